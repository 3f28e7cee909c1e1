"""`attach` on the named parameters of a plain training loop."""

import threading
from typing import Any

import pytest
import torch
import torch.distributed as dist
import toy
from cases import COMMUNICATORS
from ranks import run_ranks
from torch import Tensor, nn

from gradwire.comm import EF, Communicator, attach
from gradwire.compression import ChunkTopK, ScaledSign
from gradwire.optim import AdamP

WAIT_S = 30.0
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.2, "momentum": 0.5}),
    "AdamW": (torch.optim.AdamW, {"lr": 3e-3}),
    "AdamP": (AdamP, {"lr": 3e-3}),
}


def _sparse() -> Communicator:
    return Communicator(ChunkTopK(k=8, chunk=256), feedback=EF())


def _one_bucket_or_many() -> dict[str, list[tuple[str, str]]]:
    results = {}
    for case in COMMUNICATORS:
        results[case.name] = []
        for options in ({"overlap": False}, {"bucket_mb": 25.0}, {"bucket_mb": toy.BUCKET_MB}, {"bucket_mb": 1e-6}):
            module, communicator = toy.model(), case.make(seed=3)
            optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
            attach(module.named_parameters(), communicator, optimizer=optimizer, **options)
            for step in range(4):
                optimizer.zero_grad()
                toy.loss(module, step).backward()
                optimizer.step()
            results[case.name].append((toy.digest(module.parameters()), toy.state_digest(communicator)))
    return results


@pytest.mark.slow
def test_several_overlapping_buckets_equal_one_bit_for_bit() -> None:
    first, second = run_ranks(2, _one_bucket_or_many, timeout_s=100)
    for name, runs in first.items():
        assert toy.all_equal(runs), name
        assert runs[0][0] == second[name][0][0]


def _overlap() -> list[str]:
    """Backward waits at the first layer until the last layer's bucket is averaged: without overlap it waits in vain."""
    module, communicator = toy.model(), _sparse()
    average, averaged = communicator.average_, threading.Event()
    events: list[str] = []

    def recorded(grads: list[Tensor], names: list[str], *, last: bool = True) -> None:
        average(grads, names, last=last)
        averaged.set()

    communicator.average_ = recorded  # type: ignore[method-assign]
    handle = attach(module.named_parameters(), communicator, bucket_mb=toy.BUCKET_MB)
    module[0].register_full_backward_hook(lambda *_: events.append("in time" if averaged.wait(WAIT_S) else "too late"))
    x, y = toy.batch(0, dist.get_rank())
    nn.functional.mse_loss(module(x.clone().requires_grad_()), y).backward()
    handle.wait()
    return events


def test_buckets_are_averaged_while_backward_goes_on() -> None:
    assert run_ranks(2, _overlap) == [["in time"], ["in time"]]


def _waiting() -> list[str]:
    """By hand, by the optimizer, and in a closure, each with three micro-batches a step."""
    digests = []
    for way in ("by hand", "by the optimizer", "in a closure"):
        module = toy.model()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        options = {"optimizer": optimizer} if way == "by the optimizer" else {}
        handle = attach(module.named_parameters(), _sparse(), bucket_mb=toy.BUCKET_MB, **options)

        def backward(step: int, module: nn.Module = module, handle: Any = handle) -> None:
            module.zero_grad()
            with handle.no_sync():
                for micro in range(2):
                    toy.loss(module, 10 * step + micro).backward()
            toy.loss(module, 10 * step + 2).backward()

        for step in range(3):
            if way == "in a closure":

                def closure(step: int = step, backward: Any = backward, handle: Any = handle) -> float:
                    backward(step)
                    handle.wait()
                    return 0.0

                optimizer.step(closure)
            else:
                backward(step)
                if way == "by hand":
                    handle.wait()
                    handle.wait()  # a second time does nothing
                optimizer.step()
        digests.append(toy.digest(module.parameters()))

    module, communicator = toy.model(), _sparse()
    names = [name for name, _ in module.named_parameters()]
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        for micro in range(3):
            toy.loss(module, 10 * step + micro).backward()
        communicator.average_([p.grad for p in module.parameters()], names)
        optimizer.step()
    return [*digests, toy.digest(module.parameters())]


def test_every_way_to_wait_averages_accumulated_gradients_once() -> None:
    first, second = run_ranks(2, _waiting)
    assert first == second
    assert toy.all_equal(first)


class _Branches(nn.Module):
    """The middle layer takes part on rank 0 only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(37, 40), nn.Linear(40, 40, bias=False), nn.Linear(40, 23)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(self.middle(x) if dist.get_rank() == 0 else x)


def _without_gradient(overlap: bool) -> tuple[str, list[float]]:
    torch.manual_seed(0)
    module = _Branches()
    handle = attach(module.named_parameters(), Communicator(ScaledSign(width=40), feedback=EF()), overlap=overlap)
    toy.loss(module, 0).backward()
    own = module.middle.weight.grad
    scale = 0.0 if own is None else own.abs().mean(1).tolist()
    handle.wait()
    return toy.digest(p.grad for p in module.parameters()), [scale, module.middle.weight.grad.abs().mean(1).tolist()]


@pytest.mark.parametrize("overlap", [False, True])
def test_a_parameter_without_gradient_on_one_rank_takes_part_with_zero(overlap: bool) -> None:
    (first, (scale, mean)), (second, (absent, _)) = run_ranks(2, _without_gradient, overlap)
    assert first == second
    assert absent == 0.0
    torch.testing.assert_close(torch.tensor(mean), torch.tensor(scale) / 2)


def _misuse() -> str:
    module = toy.model()
    handle = attach(module.named_parameters(), _sparse(), bucket_mb=toy.BUCKET_MB)
    toy.loss(module, 0).backward()
    with pytest.raises(RuntimeError, match=r"expected one backward pass per step.*no_sync"):
        toy.loss(module, 1).backward()
    handle.wait()
    module.zero_grad()
    handle.detach()
    toy.loss(module, 2).backward()
    handle.wait()
    alone = [p.grad.clone() for p in module.parameters()]
    reference = toy.model()
    toy.loss(reference, 2).backward()
    assert toy.digest(alone) == toy.digest(p.grad for p in reference.parameters())
    return toy.digest(alone)


def test_a_second_backward_is_refused_and_detach_ends_averaging() -> None:
    first, second = run_ranks(2, _misuse)
    assert first != second  # each rank has its own batch


def _optimizers() -> dict[str, tuple[str, float, float]]:
    results = {}
    for name, (cls, options) in OPTIMIZERS.items():
        module = toy.model()
        optimizer = cls(module.parameters(), **options)
        attach(module.named_parameters(), _sparse(), optimizer=optimizer, bucket_mb=toy.BUCKET_MB)
        before = toy.evaluate(module)
        for step in range(60):
            optimizer.zero_grad()
            toy.loss(module, step).backward()
            optimizer.step()
        results[name] = toy.digest(module.parameters()), before, toy.evaluate(module)
    return results


def test_every_optimizer_learns_and_keeps_ranks_equal() -> None:
    first, second = run_ranks(2, _optimizers)
    assert first == second
    for name, (_, before, after) in first.items():
        assert after < 0.7 * before, name


def _scaled() -> tuple[str, float, int]:
    """Overflow on one rank at one step: `wait` before `scaler.step`, as GradScaler looks at gradients first."""
    module, communicator = toy.model(), _sparse()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)
    handle = attach(module.named_parameters(), communicator, scaler=scaler, bucket_mb=toy.BUCKET_MB)
    for step in range(4):
        optimizer.zero_grad()
        kept = toy.digest(module.parameters()), toy.state_digest(communicator)
        loss = toy.loss(module, step)
        scaler.scale(loss * float("inf") if step == 2 and dist.get_rank() == 1 else loss).backward()
        handle.wait()
        scaler.step(optimizer)
        scaler.update()
        same = (toy.digest(module.parameters()), toy.state_digest(communicator)) == kept
        assert same == (step == 2)
    return toy.digest(module.parameters()), scaler.get_scale(), communicator.stats.skipped


def test_the_scaler_skips_on_all_ranks() -> None:
    first, second = run_ranks(2, _scaled)
    assert first == second
    assert first[1:] == (2.0**9, 1)


def _scaled_without_wait() -> None:
    module = toy.model()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    attach(module.named_parameters(), _sparse(), optimizer=optimizer, scaler=scaler)
    scaler.scale(toy.loss(module, 0)).backward()
    with pytest.raises(RuntimeError, match=r"call wait\(\) before scaler\.step\(\)"):
        scaler.step(optimizer)


def test_a_scaler_that_looks_before_the_mean_is_there_is_an_error() -> None:
    run_ranks(2, _scaled_without_wait)


def _plain() -> tuple[torch.nn.Linear, torch.optim.Optimizer, Communicator]:
    module = torch.nn.Linear(64, 64)
    return module, torch.optim.SGD(module.parameters(), lr=0.1), Communicator(ChunkTopK(), feedback=EF())


def test_detach_takes_the_guard_along() -> None:
    """A bad last step must not go on dropping the gradients of an optimizer that is on its own again."""
    module, optimizer, communicator = _plain()
    handle = attach(module.named_parameters(), communicator, optimizer=optimizer)
    (module(torch.ones(1, 64)).sum() * torch.inf).backward()
    before = module.weight.detach().clone()
    optimizer.step()
    assert torch.equal(module.weight, before)  # skipped
    handle.detach()
    optimizer.zero_grad()
    module(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    assert not torch.equal(module.weight, before)


def test_a_communicator_has_one_host_at_a_time() -> None:
    module, _, communicator = _plain()
    handle = attach(module.named_parameters(), communicator)
    with pytest.raises(ValueError, match="expected a communicator that is attached to nothing else"):
        attach(torch.nn.Linear(64, 64).named_parameters(), communicator)
    handle.detach()
    attach(module.named_parameters(), communicator)
