"""Communicators on CUDA under NCCL with one rank: equal to the CPU, and no step waits for the host."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import toy
from cases import COMMUNICATORS, CommunicatorCase
from torch import Tensor

from gradwire.comm import EF, Averager, Communicator, Hierarchical, TwoPhase, attach, checkpoint
from gradwire.compression import BlockQuantize, ChunkTopK, Identity

pytestmark = pytest.mark.gpu

CASES = [
    *(case for case in COMMUNICATORS if case.inside == 1),
    CommunicatorCase(
        "hierarchical",
        lambda **options: Communicator(
            ChunkTopK(k=8, chunk=256),
            feedback=EF(),
            exchange=Hierarchical(1, TwoPhase(second=BlockQuantize(bits=8, block=256))),
            **options,
        ),
    ),
]
SHAPES = {"conv": (5, 7, 29, 3), "bias": (61,), "square": (300, 257), "column": (1031, 1), "half": (64, 100)}
HALF = {"half": torch.bfloat16}
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.fixture(scope="module", autouse=True)
def _nccl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = dist.FileStore(str(tmp_path_factory.mktemp("nccl") / "store"), 1)
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def forbid_sync() -> Iterator[Callable[[], None]]:
    """Call it, and from then on whatever makes the host wait for the device raises."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


def _grads(step: int, device: str) -> list[Tensor]:
    numbers = torch.Generator().manual_seed(step)
    return [
        torch.randn(shape, generator=numbers).to(HALF.get(name, torch.float32)).to(device)
        for name, shape in SHAPES.items()
    ]


@each_case
def test_cuda_equals_cpu(case: CommunicatorCase) -> None:
    """To rounding; a sum in another order may move a few entries by a whole quantisation step."""
    ours, theirs = case.make(seed=3), case.make(seed=3)
    share, tolerance = (0.0, 1e-3) if "powersgd" in case.name else (2e-3, 1e-5)
    if "dct" in case.name:  # a coefficient that is rounded to the next value moves its whole tile a little
        share, tolerance = 0.02, 2e-2
    for step in range(4):
        on_cuda, on_cpu = _grads(step, "cuda"), _grads(step, "cpu")
        ours.average_(on_cuda, list(SHAPES))
        theirs.average_(on_cpu, list(SHAPES))
        for name, grad, expected in zip(SHAPES, on_cuda, on_cpu, strict=True):
            off = (grad.cpu().double() - expected.double()).abs() > tolerance * expected.abs().max().double()
            assert off.double().mean() <= share, (step, name)
    assert ours.stats.payload_bytes == theirs.stats.payload_bytes
    assert math.isclose(ours.stats.residual_norm, theirs.stats.residual_norm, rel_tol=1e-3, abs_tol=1e-6)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@each_case
def test_a_steady_step_never_waits_for_the_host(case: CommunicatorCase, forbid_sync: Callable[[], None]) -> None:
    communicator = case.make(seed=3)
    steps = [_grads(step, "cuda") for step in range(5)]
    for grads in steps[:3]:
        communicator.average_(grads, list(SHAPES))
    torch.cuda.synchronize()
    forbid_sync()
    for grads in steps[3:]:
        communicator.average_(grads, list(SHAPES))


def _train(communicator: Averager, host: str, *, fused: bool = True, bad_at: int | None = None) -> list[Tensor]:
    """Parameters after each step."""
    module = toy.model().cuda()
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3, fused=fused)
    wrapped = toy.ddp(module) if host == "ddp" else module
    if host == "ddp":
        attach(wrapped, communicator, optimizer=optimizer)
    else:
        attach(module.named_parameters(), communicator, optimizer=optimizer, bucket_mb=toy.BUCKET_MB)
    history = []
    for step in range(5):
        optimizer.zero_grad()
        x, y = (tensor.cuda() for tensor in toy.batch(step, 0))
        factor = float("inf") if step == bad_at else 1.0
        (torch.nn.functional.mse_loss(wrapped(x), y) * factor).backward()
        optimizer.step()
        history.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    return history


@each_case
def test_ddp_and_loop_on_cuda(case: CommunicatorCase) -> None:
    """Streams and overlap change nothing: both hosts give what the same steps give anywhere."""
    on_ddp, in_loop = (_train(case.make(seed=3), host)[-1] for host in ("ddp", "loop"))
    assert on_ddp.isfinite().all()
    torch.testing.assert_close(on_ddp, in_loop, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("host", ["ddp", "loop"])
def test_a_bad_step_is_skipped(host: str, fused: bool) -> None:
    """A fused optimizer decides by itself (`found_inf`), any other one through its hook."""
    communicator = Communicator(ChunkTopK(k=8, chunk=256), feedback=EF())
    history = _train(communicator, host, fused=fused, bad_at=3)
    assert torch.equal(history[3], history[2])
    assert not torch.equal(history[4], history[3])
    assert history[4].isfinite().all()
    assert communicator.stats.skipped == 1


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_a_whole_ddp_step_never_waits_for_the_host(forbid_sync: Callable[[], None]) -> None:
    module = toy.model().cuda()
    host, optimizer = toy.ddp(module), torch.optim.AdamW(module.parameters(), lr=3e-3, fused=True)
    attach(host, Communicator(ChunkTopK(k=8, chunk=256), feedback=EF()), optimizer=optimizer)
    x, y = (tensor.cuda() for tensor in toy.batch(0, 0))
    for step in range(5):
        if step == 3:
            torch.cuda.synchronize()
            forbid_sync()
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(host(x), y).backward()
        optimizer.step()


@pytest.mark.slow
def test_fused_equals_eager() -> None:
    fused, eager = (Communicator(ChunkTopK(k=8, chunk=256), feedback=EF(), fused=fused) for fused in (True, False))
    for step in range(3):
        ours, theirs = _grads(step, "cuda"), _grads(step, "cuda")
        fused.average_(ours, list(SHAPES))
        eager.average_(theirs, list(SHAPES))
        for grad, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-6)


def test_a_checkpoint_goes_on_where_it_was(tmp_path: Path) -> None:
    def make() -> tuple[torch.nn.Module, torch.optim.Optimizer, Communicator]:
        module = toy.model().cuda()
        communicator = Communicator(ChunkTopK(k=8, chunk=256), feedback=EF())
        optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
        attach(module.named_parameters(), communicator, optimizer=optimizer)
        return module, optimizer, communicator

    def step(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        module(torch.ones(4, 37, device="cuda")).square().sum().backward()
        optimizer.step()

    first, optimizer, communicator = make()
    step(first, optimizer)
    checkpoint.save(tmp_path / "one", model=first, optimizer=optimizer, communicator=communicator)
    step(first, optimizer)

    second, optimizer, communicator = make()
    checkpoint.load(tmp_path / "one", model=second, optimizer=optimizer, communicator=communicator)
    step(second, optimizer)
    for ours, theirs in zip(second.parameters(), first.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_lossless_is_exact_on_cuda() -> None:
    communicator = Communicator(Identity(), feedback=EF())
    grads = _grads(0, "cuda")
    communicator.average_(grads, list(SHAPES))
    for grad, expected in zip(grads, _grads(0, "cuda"), strict=True):
        assert torch.equal(grad, expected)
