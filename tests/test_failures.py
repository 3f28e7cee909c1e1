"""What must not happen: one bad step that poisons all later ones, ranks that drift apart, and jobs that hang."""

import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import final

import pytest
import torch
import torch.distributed as dist
import toy
from cases import COMMUNICATORS
from ranks import collect, run_ranks, start_ranks
from torch import Tensor, nn

from gradwire.comm import (
    EF,
    EF21,
    AllGather,
    Averager,
    Communicator,
    ConfigurationError,
    Exchange,
    Hierarchical,
    Plan,
    PowerSGD,
    TwoPhase,
    attach,
)
from gradwire.compression import BlockQuantize, ChunkTopK, Compressor, Identity, Part, ScaledSign, TopK

# The groups' own timeout is far longer than the tests wait: an end that only a timeout brings is a hang.
GROUP_TIMEOUT_S, WAIT_S = 600.0, 45.0


def _step(host: nn.Module, optimizer: torch.optim.Optimizer, step: int, factor: float = 1.0) -> None:
    optimizer.zero_grad()
    (toy.loss(host, step) * factor).backward()
    optimizer.step()


def _steps(host: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        _step(host, optimizer, step)


# Non-finite gradients.


def _bad_step_everywhere() -> dict[str, str]:
    """Every communicator under DDP: one bad entry on rank 1, in the first or in the last bucket."""
    results = {}
    for case, (layer, value) in zip(COMMUNICATORS, itertools.cycle([(0, "inf"), (5, "nan")]), strict=False):
        module, communicator = toy.model(), case.make(seed=3)
        host = toy.ddp(module)
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
        attach(host, communicator, optimizer=optimizer)
        _steps(host, optimizer, 3)
        kept = toy.digest(module.parameters()), toy.state_digest(communicator)
        before = optimizer.state[module[0].weight]["step"].item()
        poison = module[layer].weight.register_hook(lambda g, value=value: _poison(g, value))
        _step(host, optimizer, 3)
        poison.remove()
        assert (toy.digest(module.parameters()), toy.state_digest(communicator)) == kept, case.name
        assert communicator.found_inf is not None
        assert communicator.found_inf.item() == 1.0, case.name
        assert optimizer.state[module[0].weight]["step"].item() == before, case.name
        _step(host, optimizer, 4)
        assert communicator.found_inf.item() == 0.0, case.name
        assert (communicator.stats.steps, communicator.stats.skipped) == (5, 1), case.name
        assert all(p.isfinite().all() for p in module.parameters()), case.name
        results[case.name] = toy.digest(module.parameters())
        assert results[case.name] != kept[0], case.name
    return results


def _poison(grad: Tensor, value: str) -> Tensor:
    if dist.get_rank() == 1:
        grad = grad.clone()
        grad[3, 5] = float(value)
    return grad


@pytest.mark.slow
def test_a_bad_gradient_on_one_rank_leaves_no_trace_on_any() -> None:
    first, second = run_ranks(2, _bad_step_everywhere, timeout_s=100)
    assert set(first) == {case.name for case in COMMUNICATORS}
    assert first == second


def _four_ranks_in_two_nodes() -> str:
    module = toy.model()
    exchange = Hierarchical(2, TwoPhase(second=BlockQuantize(bits=8, block=256)))
    communicator = Communicator(ChunkTopK(k=8, chunk=256), feedback=EF(), exchange=exchange)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    attach(module.named_parameters(), communicator, optimizer=optimizer, bucket_mb=toy.BUCKET_MB)
    for step in range(4):
        kept = toy.digest(module.parameters()), toy.state_digest(communicator)
        if step == 2:
            poison = module[3].weight.register_hook(lambda g: _poison(g, "nan"))
        _step(module, optimizer, step)
        if step == 2:
            poison.remove()
        assert ((toy.digest(module.parameters()), toy.state_digest(communicator)) == kept) == (step == 2)
    return toy.digest(module.parameters())


def test_a_bad_gradient_in_one_node_is_known_in_all() -> None:
    assert toy.all_equal(run_ranks(4, _four_ranks_in_two_nodes))


def _recovery() -> list[tuple[str, float, float, float]]:
    makers: list[Callable[[], Averager]] = [
        lambda: Communicator(Identity()),
        lambda: Communicator(ChunkTopK(k=16, chunk=256), feedback=EF()),
        lambda: Communicator(ChunkTopK(k=16, chunk=256), feedback=EF21()),
        lambda: Communicator(ScaledSign(width=256), feedback=EF(), exchange=TwoPhase()),
        lambda: PowerSGD(2),
    ]
    results = []
    for make in makers:
        module, communicator = toy.model(), make()
        host = toy.ddp(module)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.5)
        attach(host, communicator, optimizer=optimizer)
        start = toy.evaluate(module)
        for step in range(60):
            if step == 20:
                middle = toy.evaluate(module)
            bad = step == 20 and dist.get_rank() == 0
            _step(host, optimizer, step, float("inf") if bad else 1.0)
            if step == 20:
                assert toy.evaluate(module) == middle
        results.append((toy.digest(module.parameters()), start, middle, toy.evaluate(module)))
    return results


def test_the_loss_goes_on_falling_after_a_bad_step() -> None:
    first, second = run_ranks(2, _recovery)
    assert first == second
    for _, start, middle, end in first:
        assert end < middle < start


def _unguarded() -> list[bool]:
    module = toy.model()
    host = toy.ddp(module, bucket_cap_mb=25)
    attach(host, Communicator(ScaledSign(width=256), feedback=EF()))
    (toy.loss(host, 0) * (float("inf") if dist.get_rank() == 1 else 1.0)).backward()
    return [bool(p.grad.isnan().all()) for p in module.parameters()]


def test_without_a_guard_all_ranks_see_nan() -> None:
    assert run_ranks(2, _unguarded) == [[True] * 8] * 2


# A rank that dies.


def _train_until_killed(where: str) -> None:
    module = toy.model()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    communicator = Communicator(_Failing(Identity(), step=3, kill=True), feedback=EF(), exchange=AllGather())
    host = toy.ddp(module) if where == "ddp" else module
    if where == "ddp":
        attach(host, communicator, optimizer=optimizer)
    else:
        attach(module.named_parameters(), communicator, optimizer=optimizer, bucket_mb=toy.BUCKET_MB)
    _steps(host, optimizer, 50)


@pytest.mark.parametrize("where", ["ddp", "loop"])
def test_when_one_rank_is_killed_the_others_end_with_an_error(where: str) -> None:
    outcomes = collect(start_ranks(3, _train_until_killed, where, timeout_s=GROUP_TIMEOUT_S), WAIT_S)
    assert outcomes[1] == ("died", -signal.SIGKILL)
    assert [outcomes[0][0], outcomes[2][0]] == ["error", "error"]
    assert "RuntimeError" in outcomes[0][1]


# A rank that raises.


@final
@dataclass(frozen=True)
class _Failing(Compressor):
    """Breaks down on rank 1 at one step, in the second of its calls if there are several a step."""

    inner: Compressor
    step: int
    kill: bool = False
    calls: Iterator[int] = field(default_factory=itertools.count, repr=False, compare=False)

    def row_width(self, shape: torch.Size) -> int:
        return self.inner.row_width(shape)

    def layout(self, width: int, dtype: torch.dtype) -> tuple[Part, ...]:
        return self.inner.layout(width, dtype)

    def compress_rows(self, x: Tensor, dtype: torch.dtype, keys: Tensor | None = None) -> tuple[Tensor, ...]:
        if next(self.calls) >= self.step and dist.get_rank() == 1:
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise ArithmeticError("the tide came in")
        return self.inner.compress_rows(x, dtype, keys)

    def decompress_rows(self, parts: tuple[Tensor, ...], width: int, keys: Tensor | None = None) -> Tensor:
        return self.inner.decompress_rows(parts, width, keys)

    def contraction(self, numel: int) -> float | None:
        return 1.0


_EXCHANGES: dict[str, Callable[[], Exchange]] = {
    "gather": AllGather,
    "two-phase": TwoPhase,
    "hierarchical": lambda: Hierarchical(2, AllGather()),
}


def _end_of_training(where: str, exchange: str) -> tuple[str, str]:
    """The error that ended training. The process lives on, so nobody is woken by a dead peer."""
    module = toy.model()
    failing = _Failing(Identity(width=256), step=7)
    communicator = Communicator(failing, feedback=EF(), exchange=_EXCHANGES[exchange]())
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    host = toy.ddp(module) if where == "ddp" else module
    if where == "ddp":
        attach(host, communicator, optimizer=optimizer)
    else:
        attach(module.named_parameters(), communicator, optimizer=optimizer, bucket_mb=toy.BUCKET_MB)
    with pytest.raises(Exception, match="the tide came in") as error:
        _steps(host, optimizer, 50)
    with pytest.raises(RuntimeError, match="an earlier step failed; restart from a checkpoint"):
        communicator.average_([torch.ones(64, 64)], ["w"])
    return type(error.value).__name__, str(error.value)


@pytest.mark.parametrize("exchange", list(_EXCHANGES))
@pytest.mark.parametrize("where", ["ddp", "loop"])
def test_an_error_on_one_rank_ends_all_with_its_message(where: str, exchange: str) -> None:
    size = 4 if exchange == "hierarchical" else 3
    outcomes = collect(start_ranks(size, _end_of_training, where, exchange, timeout_s=GROUP_TIMEOUT_S), WAIT_S)
    assert [state for state, _ in outcomes] == ["ok"] * size, outcomes
    for rank, (_, (kind, text)) in enumerate(outcomes):
        assert kind in ("RuntimeError", "ArithmeticError")
        assert "Unable to cast" not in text  # what DDP makes of an exception that it cannot read
        if rank != 1:
            assert "another rank failed: rank 1: ArithmeticError: the tide came in" in text


# Ranks that were started differently.

_DIFFERENCES: dict[str, tuple[Callable[[], Averager], Callable[[], Averager], str]] = {
    "compressor": (
        lambda: Communicator(TopK(ratio=0.05), feedback=EF()),
        lambda: Communicator(TopK(ratio=0.1), feedback=EF()),
        r"differ in compressor: rank 0 has TopK\(ratio=0\.05\), rank 1 has TopK\(ratio=0\.1\)",
    ),
    "feedback": (
        lambda: Communicator(ScaledSign(), feedback=EF()),
        lambda: Communicator(ScaledSign(), feedback=EF21()),
        r"differ in feedback: rank 0 has EF\(decay=1\.0\), rank 1 has EF21\(dense_start=False\)",
    ),
    "plan": (
        lambda: Communicator(Identity(), plan=Plan(min_numel=10)),
        lambda: Communicator(Identity()),
        r"differ in plan: rank 0 has Plan\(.*min_numel=10",
    ),
    "seed": (
        lambda: Communicator(Identity(), seed=1),
        lambda: Communicator(Identity(), seed=2),
        "differ in seed: rank 0 has 1, rank 1 has 2",
    ),
    "exchange": (
        lambda: Communicator(Identity(), exchange=Hierarchical(2, AllGather())),
        lambda: Communicator(Identity(), exchange=AllGather()),
        r"differ in exchange: rank 0 has Hierarchical\(inside=2, across=AllGather\(\)\), rank 1 has AllGather\(\)",
    ),
    "communicator": (
        lambda: PowerSGD(2),
        lambda: Communicator(Identity()),
        r"differ in communicator: rank 0 has PowerSGD, rank 1 has Communicator",
    ),
}


def _start_differently() -> float:
    start = time.monotonic()
    rank = dist.get_rank()
    for ours, theirs, message in _DIFFERENCES.values():
        for named_loop in (True, False):
            module, communicator = toy.model(), (theirs if rank == 1 else ours)()
            with pytest.raises(ConfigurationError, match=message):
                attach(module.named_parameters() if named_loop else toy.ddp(module), communicator)
    return time.monotonic() - start


def test_different_configurations_raise_on_every_rank_and_name_the_difference() -> None:
    outcomes = collect(start_ranks(2, _start_differently, timeout_s=GROUP_TIMEOUT_S), WAIT_S)
    assert [state for state, _ in outcomes] == ["ok", "ok"], outcomes


def _start_with_other_layouts() -> None:
    rank = dist.get_rank()
    wide = nn.Linear(37, 61 + rank)
    with pytest.raises(
        ConfigurationError, match=r"tensor 0: rank 0 has 'weight \(61, 37\).*rank 1 has 'weight \(62, 37"
    ):
        attach(wide.named_parameters(), Communicator(Identity()))
    deep = [nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))][rank]
    with pytest.raises(ConfigurationError, match=r"differ in tensor 0: rank 0 has 'weight .*rank 1 has '0\.weight"):
        attach(deep.named_parameters(), Communicator(Identity()))
    frozen = nn.Linear(8, 8, bias=rank == 0)
    with pytest.raises(ConfigurationError, match=r"differ in tensor 1: rank 0 has 'bias .*rank 1 has 'nothing'"):
        attach(frozen.named_parameters(), Communicator(Identity()))
    precise = nn.Linear(8, 8, dtype=torch.float64 if rank == 1 else torch.float32)
    with pytest.raises(ConfigurationError, match=r"tensor 0: .*torch\.float32.*torch\.float64"):
        attach(precise.named_parameters(), Communicator(Identity()))


def test_different_layouts_raise_on_every_rank_and_name_the_difference() -> None:
    outcomes = collect(start_ranks(2, _start_with_other_layouts, timeout_s=GROUP_TIMEOUT_S), WAIT_S)
    assert [state for state, _ in outcomes] == ["ok", "ok"], outcomes
