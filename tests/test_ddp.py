"""`attach` on DistributedDataParallel: every way in which DDP hands over gradients."""

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import toy
from cases import COMMUNICATORS
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradwire.comm import EF, Averager, Communicator, PowerSGD, TwoPhase, attach
from gradwire.compression import ChunkTopK, Identity, ScaledSign

WAIT_S = 30.0


def _sparse(**options: Any) -> Communicator:
    return Communicator(ChunkTopK(k=8, chunk=256), feedback=EF(), **options)


def _train_ddp(module: nn.Module, communicator: Averager | None, steps: int, **options: Any) -> DistributedDataParallel:
    host = toy.ddp(module, **options)
    if communicator is not None:
        attach(host, communicator)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    for step in range(steps):
        optimizer.zero_grad()
        toy.loss(host, step).backward()
        optimizer.step()
    return host


def _train_directly(module: nn.Module, communicator: Averager, steps: int) -> None:
    """One bucket, one call, no host: what every host must equal bit for bit at two ranks."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    names, parameters = zip(*((n, p) for n, p in module.named_parameters() if p.requires_grad), strict=True)
    for step in range(steps):
        optimizer.zero_grad()
        toy.loss(module, step).backward()
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        communicator.average_([p.grad for p in parameters], names)
        optimizer.step()


# Lossless.


def _lossless() -> list[str]:
    makers: list[Callable[[], Averager | None]] = [
        lambda: None,
        lambda: Communicator(Identity()),
        lambda: Communicator(Identity(), feedback=EF(), exchange=TwoPhase()),
    ]
    digests = []
    for make in makers:
        module = toy.model()
        _train_ddp(module, make(), steps=20)
        digests.append(toy.digest(module.parameters()))
    return digests


def test_lossless_equals_plain_ddp_exactly() -> None:
    first, second = run_ranks(2, _lossless)
    assert first == second
    plain, dense, two_phase = first
    assert dense == plain
    assert two_phase == plain


# Buckets.


def _all_on_several_buckets() -> dict[str, tuple[str, str, str, str, int, int]]:
    results = {}
    for case in COMMUNICATORS:
        ours, theirs, reference = case.make(seed=3), case.make(seed=3), toy.model()
        host = toy.ddp(toy.model())
        calls: list[tuple[str, ...]] = []
        _record_calls(ours, calls)
        attach(host, ours)
        optimizer = torch.optim.SGD(host.parameters(), lr=0.1, momentum=0.9)
        for step in range(5):
            optimizer.zero_grad()
            toy.loss(host, step).backward()
            optimizer.step()
        _train_directly(reference, theirs, steps=5)
        results[case.name] = (
            toy.digest(host.parameters()),
            toy.digest(reference.parameters()),
            toy.state_digest(ours),
            toy.state_digest(theirs),
            len(calls),
            len(set(calls)),
        )
    return results


def _record_calls(communicator: Averager, calls: list[tuple[str, ...]]) -> None:
    average = communicator.average_

    def recorded(grads: list[Tensor], names: list[str], *, last: bool = True) -> None:
        calls.append(tuple(names))
        average(grads, names, last=last)

    communicator.average_ = recorded  # type: ignore[method-assign]


@pytest.mark.slow
def test_several_and_rebuilt_buckets_equal_one_bucket_bit_for_bit() -> None:
    """State too: it survives the rebuilding of buckets after the first step."""
    first, second = run_ranks(2, _all_on_several_buckets, timeout_s=100)
    for name, (parameters, expected, state, expected_state, calls, layouts) in first.items():
        assert (name, parameters, state) == (name, expected, expected_state)
        assert parameters == second[name][0]
        assert calls > 5
        assert layouts > calls / 5, "DDP should have rebuilt its buckets after the first step"


def _low_rank_on_many_buckets() -> str:
    module = toy.model()
    _train_ddp(module, PowerSGD(2), steps=12, bucket_cap_mb=1e-4)
    return toy.digest(module.parameters())


def test_powersgd_on_a_bucket_per_tensor_does_not_hang() -> None:
    assert toy.all_equal(run_ranks(4, _low_rank_on_many_buckets))


# Models and options of DDP.


class _Partial(nn.Module):
    """A middle layer that takes part on some ranks only, and a last one that takes part nowhere."""

    def __init__(self, used_on: tuple[int, ...]) -> None:
        super().__init__()
        self.first, self.middle, self.last = toy.model(), nn.Linear(23, 23, bias=False), nn.Linear(60, 60)
        self._used_on = used_on
        for layer in (self.middle, self.last):
            nn.init.constant_(layer.weight, 0.01)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return x + self.middle(x) if dist.get_rank() in self._used_on else x


class _Tied(nn.Module):
    """One matrix used twice under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = toy.model()
        self.up, self.down = nn.Linear(23, 50, bias=False), nn.Linear(50, 23, bias=False)
        nn.init.constant_(self.up.weight, 0.01)
        self.down.weight = self.up.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return x + (x @ self.up.weight.T) @ self.down.weight


def _frozen() -> nn.Module:
    module = toy.model()
    module[3].weight.requires_grad_(False)
    return module


_VARIANTS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "views": (toy.model, {"gradient_as_bucket_view": True}),
    "one bucket": (toy.model, {"bucket_cap_mb": 25}),
    "static graph": (toy.model, {"static_graph": True}),
    "static graph, unused": (lambda: _Partial((0, 1)), {"static_graph": True}),
    "unused everywhere": (lambda: _Partial((0, 1)), {"find_unused_parameters": True}),
    "unused on one rank": (lambda: _Partial((0,)), {"find_unused_parameters": True}),
    "frozen": (_frozen, {}),
    "tied": (_Tied, {}),
    "bfloat16": (lambda: toy.model(dtype=torch.bfloat16), {}),
    "float64": (lambda: toy.model(dtype=torch.float64), {}),
}


def _variants() -> dict[str, tuple[str, str, str, str]]:
    results = {}
    for name, (make, options) in _VARIANTS.items():
        module, reference, ours, theirs = make(), make(), _sparse(), _sparse()
        _train_ddp(module, ours, 6, **options)
        _train_directly(reference, theirs, 6)
        state = ours.state_rows()
        assert not any("3.weight" in key for key in state) or name != "frozen"
        assert not any("down.weight" in key for key in state)
        assert all(rows.dtype in (torch.float32, torch.float64) for rows in state.values())
        results[name] = (
            toy.digest(module.parameters()),
            toy.digest(reference.parameters()),
            toy.state_digest(ours),
            toy.state_digest(theirs),
        )
    return results


def test_every_kind_of_model_and_option_equals_the_direct_call() -> None:
    first, second = run_ranks(2, _variants)
    for name, (parameters, expected, state, expected_state) in first.items():
        assert (name, parameters, state) == (name, expected, expected_state)
        assert parameters == second[name][0]


# Gradient accumulation.


def _accumulate() -> tuple[str, str, int]:
    module, reference = toy.model(), toy.model()
    host, ours, theirs = toy.ddp(module), _sparse(), _sparse()
    calls: list[tuple[str, ...]] = []
    _record_calls(ours, calls)
    attach(host, ours)
    names = [name for name, _ in reference.named_parameters()]
    rank = dist.get_rank()
    for step in range(4):
        for parameters in (module, reference):
            parameters.zero_grad()
        for micro in range(3):
            with host.no_sync() if micro < 2 else contextlib.nullcontext():
                (toy.loss(host, 10 * step + micro, rank) / 3).backward()
            (toy.loss(reference, 10 * step + micro, rank) / 3).backward()
        theirs.average_([p.grad for p in reference.parameters()], names)
        for parameters in (module, reference):
            torch.optim.SGD(parameters.parameters(), lr=0.1).step()
    assert ours.stats.steps == theirs.stats.steps == 4
    return toy.digest(module.parameters()), toy.digest(reference.parameters()), len(calls)


def test_accumulated_micro_batches_are_one_step() -> None:
    for ours, expected, calls in run_ranks(2, _accumulate):
        assert ours == expected
        assert calls <= 4 * 8  # nothing is averaged inside no_sync: 3 times as many otherwise


# Overlap.


def _overlap() -> list[str]:
    """Backward waits at the first layer until the last layer's bucket is averaged: without overlap it waits in vain."""
    module = toy.model()
    host, communicator = toy.ddp(module), _sparse()
    average, averaged = communicator.average_, threading.Event()
    events: list[str] = []

    def recorded(grads: list[Tensor], names: list[str], *, last: bool = True) -> None:
        average(grads, names, last=last)
        events.append(f"averaged {names[0]}")
        averaged.set()

    def first_layer(*_: Any) -> None:
        events.append("in time" if averaged.wait(WAIT_S) else "too late")

    communicator.average_ = recorded  # type: ignore[method-assign]
    attach(host, communicator)
    module[0].register_full_backward_hook(first_layer)
    for step in range(2):  # with DDP's first buckets, and with its rebuilt ones
        averaged.clear()
        x, y = toy.batch(step, dist.get_rank())
        nn.functional.mse_loss(host(x.clone().requires_grad_()), y).backward()
        events.append("backward ended")
    return events


def test_buckets_are_averaged_while_backward_goes_on() -> None:
    for events in run_ranks(2, _overlap):
        assert events.count("in time") == 2
        assert "too late" not in events
        assert events[-1] == "backward ended"


# Mixed precision.


def _loss_scales() -> list[str]:
    """A power of two changes no bit of an unscaled gradient, so neither may it change residuals or parameters."""
    digests = []
    for scale in (1.0, 2.0**8):
        module = toy.model()
        host, communicator = toy.ddp(module), Communicator(ScaledSign(width=256), feedback=EF())
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_factor=2.0, growth_interval=2)
        attach(host, communicator, scaler=scaler)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        for step in range(7):
            optimizer.zero_grad()
            scaler.scale(toy.loss(host, step)).backward()
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == scale * 8
        digests += [toy.digest(module.parameters()), toy.state_digest(communicator)]
    return digests


def test_residuals_are_kept_unscaled_when_the_loss_scale_changes() -> None:
    for digests in run_ranks(2, _loss_scales):
        assert digests[:2] == digests[2:]


def _overflow(dtype: torch.dtype) -> tuple[str, int, bool]:
    module = toy.model()
    host, communicator = toy.ddp(module), _sparse()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)
    attach(host, communicator, scaler=scaler)
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    before = toy.evaluate(module)
    for step in range(30):
        optimizer.zero_grad()
        kept = toy.digest(module.parameters()), toy.state_digest(communicator), scaler.get_scale()
        with torch.autocast("cpu", dtype=dtype):
            loss = toy.loss(host, step)
        if step == 5 and dist.get_rank() == 1:
            loss = loss * 1e38
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        now = toy.digest(module.parameters()), toy.state_digest(communicator), scaler.get_scale()
        if step == 5:
            assert now == (kept[0], kept[1], kept[2] / 2)
        else:
            assert (now[0] != kept[0], now[1] != kept[1], now[2]) == (True, True, kept[2])
    return toy.digest(module.parameters()), communicator.stats.skipped, toy.evaluate(module) < 0.8 * before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_overflow_on_one_rank_is_skipped_on_all(dtype: torch.dtype) -> None:
    first, second = run_ranks(2, _overflow, dtype)
    assert first == second
    assert first[1:] == (1, True)


# Compiled autograd and torch.compile.


def _call_per_parameter(compiled: bool) -> tuple[str, str, int]:
    torch._dynamo.config.optimize_ddp = "python_reducer"  # one call of the hook per parameter, with a tuple
    module, reference, ours, theirs = nn.Linear(37, 40), nn.Linear(37, 40), _sparse(), _sparse()
    reference.load_state_dict(module.state_dict())
    host = toy.ddp(module)
    attach(host, ours)
    compiler = torch.compile(backend="eager")
    names = [name for name, _ in reference.named_parameters()]
    for step in range(3):
        x, _ = toy.batch(step, dist.get_rank())
        with torch._dynamo.compiled_autograd._enable(compiler) if compiled else contextlib.nullcontext():
            host(x).square().mean().backward()
        reference(x).square().mean().backward()
        theirs.average_([p.grad for p in reference.parameters()], names)
        for layer in (module, reference):
            optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
            optimizer.step()
            optimizer.zero_grad()
    return toy.digest(module.parameters()), toy.digest(reference.parameters()), ours.stats.steps


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_one_call_per_parameter_with_the_python_reducer(compiled: bool) -> None:
    """With compiled autograd, and when the same hooks are called by the ordinary engine."""
    first, second = run_ranks(2, _call_per_parameter, compiled, timeout_s=90)
    assert first == second
    ours, expected, steps = first
    assert (ours, steps) == (expected, 3)


def _call_per_parameter_with_one_unused() -> None:
    torch._dynamo.config.optimize_ddp = "python_reducer"
    host = toy.ddp(_Partial((0, 1)))
    attach(host, _sparse())
    toy.loss(host, 0).backward()
    with pytest.raises(RuntimeError, match=r"every gradient once per step, got none for 'last\.weight'"):
        toy.loss(host, 1).backward()


def test_the_python_reducer_cannot_leave_a_parameter_out() -> None:
    run_ranks(2, _call_per_parameter_with_one_unused)


# Misuse.


def _attach_twice() -> None:
    host = toy.ddp(toy.model())
    attach(host, _sparse())
    with pytest.raises(RuntimeError, match="register_comm_hook"):
        attach(host, _sparse())


def test_a_second_communicator_is_refused() -> None:
    run_ranks(2, _attach_twice)
