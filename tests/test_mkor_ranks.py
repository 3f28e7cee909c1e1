"""`MKOR` and `MKORH` on real gloo processes: shards of a batch are the batch, ranks stay equal, bytes are linear."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from reference import mkor as reference
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from gradwire.comm import Communicator, attach, checkpoint
from gradwire.compression import Identity
from gradwire.optim import LAMB, MKOR, MKORH

pytestmark = pytest.mark.slow

STEPS = 12
Array = np.ndarray[Any, Any]
DEFAULTS: dict[str, Any] = {}
EXACT: dict[str, Any] = {"vector_dtype": None}


def model_of(dtype: torch.dtype, width: int = 10) -> nn.Sequential:
    torch.manual_seed(0)
    first = [nn.Conv2d(1, 4, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(36, width), nn.Tanh()]
    return nn.Sequential(*first, nn.Linear(width, width, bias=False), nn.Tanh(), nn.Linear(width, 3)).to(dtype)


def batch_of(step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 1, 8, 8, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randn(8, 3, generator=generator, dtype=torch.float64).to(dtype)


def mine(step: int, dtype: torch.dtype) -> list[Tensor]:
    return [one.chunk(dist.get_world_size())[dist.get_rank()] for one in batch_of(step, dtype)]


def make(model: nn.Module, **settings: Any) -> MKOR:
    return MKOR(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), **settings)


def result(model: nn.Module, optimizer: MKOR) -> list[Array]:
    """Weights and inverses; arrays, which outlive the process that sends them."""
    state = optimizer.state
    names = ("output_inverse", "input_inverse")
    found = [state[layer.weight][name] for layer in optimizer.layers for name in names]
    return arrays([*model.parameters(), *found])


def arrays(tensors: Iterable[Tensor]) -> list[Array]:
    return [x.detach().numpy().copy() for x in tensors]


def equal(some: Sequence[Array], others: Sequence[Array]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(some, others, strict=True))


def alone(dtype: torch.dtype, settings: dict[str, Any]) -> list[Array]:
    model = model_of(dtype)
    optimizer = make(model, **settings)
    for step in range(STEPS):
        x, target = batch_of(step, dtype)
        optimizer.zero_grad()
        F.mse_loss(model(x), target).backward()
        optimizer.step()
    return result(model, optimizer)


def _on_shards(host: str, dtype: torch.dtype, settings: dict[str, Any]) -> list[Array]:
    model = model_of(dtype)
    wrapped = DistributedDataParallel(model) if host == "ddp" else model
    optimizer = make(wrapped, **settings)
    if host == "loop":
        attach(model.named_parameters(), Communicator(Identity()), optimizer=optimizer)
    for step in range(STEPS):
        x, target = mine(step, dtype)
        optimizer.zero_grad()
        F.mse_loss(wrapped(x), target).backward()
        optimizer.step()
    return result(model, optimizer)


@pytest.mark.parametrize(
    ("size", "host", "dtype", "settings"),
    [
        (2, "ddp", torch.float64, EXACT),
        (4, "ddp", torch.float64, EXACT | {"inverse": "reference", "every": 2}),
        (2, "loop", torch.float64, EXACT),
        (4, "loop", torch.float32, EXACT),
        (4, "ddp", torch.float32, DEFAULTS),
    ],
    ids=str,
)
def test_shards_of_a_batch_are_the_batch(size: int, host: str, dtype: torch.dtype, settings: dict[str, Any]) -> None:
    outcomes = run_ranks(size, _on_shards, host, dtype, settings)
    for other in outcomes[1:]:
        assert equal(outcomes[0], other)
    if not settings:  # vectors are rounded before they are averaged, so equal ranks are all that can be asked for
        return
    tolerance = 1e-10 if dtype == torch.float64 else 2e-3
    torch.testing.assert_close(outcomes[0], alone(dtype, settings), rtol=tolerance, atol=tolerance)


def _accumulating(sync: bool) -> list[Array]:
    """Two micro-batches per step, the first within `no_sync`, or one batch of both."""
    model = DistributedDataParallel(model_of(torch.float64))
    optimizer = make(model, **EXACT)
    for step in range(4):
        x, target = mine(step, torch.float64)
        optimizer.zero_grad()
        if sync:
            F.mse_loss(model(x), target).backward()
        else:
            (first, last), (its, other) = x.chunk(2), target.chunk(2)
            with model.no_sync():
                (F.mse_loss(model(first), its) / 2).backward()
            (F.mse_loss(model(last), other) / 2).backward()
        optimizer.step()
    return result(model.module, optimizer)


def test_accumulated_batches_are_one_batch() -> None:
    (one, other), (whole, _) = (run_ranks(2, _accumulating, sync) for sync in (False, True))
    assert equal(one, other)
    torch.testing.assert_close(one, whole, rtol=1e-10, atol=1e-10)


def _bytes(width: int, vector_dtype: torch.dtype | None, every: int) -> tuple[int, int]:
    """Payload of one step that corrects the factors, and how many such steps there were in six."""
    model = model_of(torch.float32, width)
    optimizer = make(model, vector_dtype=vector_dtype, every=every)
    for step in range(6):
        x, target = mine(step, torch.float32)
        F.mse_loss(model(x), target).backward()
        optimizer.step()
    stats = optimizer.communicator.stats
    return stats.payload_bytes // stats.steps, stats.steps


@pytest.mark.parametrize(("vector_dtype", "itemsize"), [(torch.bfloat16, 2), (torch.float16, 2), (None, 4)])
def test_bytes_are_linear_in_the_width(vector_dtype: torch.dtype | None, itemsize: int) -> None:
    """Inputs, with one for a bias, and outputs of each layer; filled up to 64, and one flag."""
    sent = {}
    for width in (10, 74, 138):
        ((sent[width], steps), _) = run_ranks(2, _bytes, width, vector_dtype, 2)
        assert steps == 3
        numbers = (9 + 1 + 4) + (36 + 1 + width) + (width + width) + (width + 1 + 3)
        assert sent[width] == itemsize * (-(-numbers // 64) * 64 + 1)
    assert sent[138] - sent[74] == sent[74] - sent[10] == itemsize * 4 * 64


def _one_bad_rank() -> tuple[list[Array], list[Array], list[Array], int]:
    model = model_of(torch.float32)
    optimizer = make(model)
    found = []
    for step in range(3):
        x, target = mine(step, torch.float32)
        if step == 1 and dist.get_rank() == 1:
            x = x * float("inf")
        optimizer.zero_grad()
        F.mse_loss(model(x), target).backward()
        if step == 1:
            optimizer.base.zero_grad()  # as after a check of the averaged gradients
        else:
            for p in model.parameters():
                dist.all_reduce(p.grad)
        optimizer.step()
        found.append(result(model, optimizer)[len(list(model.parameters())) :])
    return found[0], found[1], found[2], optimizer.communicator.stats.skipped


def test_a_rank_that_is_not_finite_leaves_all_factors_alone() -> None:
    (before, during, after, skipped), other = run_ranks(2, _one_bad_rank)
    assert skipped == 1
    assert equal(before, during)
    assert all(np.isfinite(x).all() and not np.array_equal(x, y) for x, y in zip(after, before, strict=True))
    assert equal(after, other[2])


def _resumed(folder: str) -> tuple[list[Array], list[Array]]:
    """What an uninterrupted run ends with, and one that is restored half-way from a checkpoint."""
    ends = []
    for restored in (False, True):
        model = model_of(torch.float32)
        wrapped = DistributedDataParallel(model)
        optimizer = MKORH(wrapped, LAMB(model.parameters(), lr=0.02), every=2)
        if restored:
            checkpoint.load(Path(folder) / "saved", model=wrapped, optimizer=optimizer)
        for step in range(5 if restored else 0, 11):
            if step == 5 and not restored:
                checkpoint.save(Path(folder) / "saved", model=wrapped, optimizer=optimizer)
            x, target = mine(step, torch.float32)
            optimizer.zero_grad()
            loss = F.mse_loss(wrapped(x), target)
            loss.backward()
            optimizer.observe(loss)
            optimizer.step()
        ends.append(arrays([*model.parameters(), *(x for s in optimizer.state.values() for x in s.values())]))
    return ends[0], ends[1]


def test_resumes_bit_for_bit(tmp_path: Path) -> None:
    outcomes = run_ranks(2, _resumed, str(tmp_path))
    for uninterrupted, restored in outcomes:
        assert equal(uninterrupted, restored)
    assert equal(outcomes[0][1], outcomes[1][1])


LOSSES = [[2.0 / (1 + 0.3 * step) + 1 + spread for step in range(60)] for spread in (-0.9, 0.9)]
"""By themselves, one rank's loss falls faster than the threshold for longer than the other's."""
CRITERION: dict[str, Any] = {
    "windows": (2, 6),
    "check_every": 3,
    "threshold": 0.03,
    "patience": 2,
    "min_steps": 6,
}


def _switching() -> int | None:
    model = model_of(torch.float32)
    optimizer = MKORH(model, torch.optim.SGD(model.parameters(), lr=0.01), **CRITERION)
    for step, loss in enumerate(LOSSES[dist.get_rank()], 1):
        x, target = mine(step, torch.float32)
        optimizer.zero_grad()
        F.mse_loss(model(x), target).backward()
        optimizer.observe(loss)
        optimizer.step()
        if optimizer.switched:
            return step
    return None


def test_all_ranks_switch_where_their_mean_loss_says() -> None:
    means = [(a + b) / 2 for a, b in zip(*LOSSES, strict=True)]
    expected = reference.mkorh(means, **CRITERION)
    assert expected is not None
    assert {reference.mkorh(losses, **CRITERION) for losses in LOSSES} != {expected}
    assert run_ranks(2, _switching) == [expected, expected]
