"""Checks of the library's optimizers as clients of DeepSpeed; `tests/test_deepspeed.py` runs them."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from cases import OPTIMIZERS
from deepspeed_training import Training, assert_agreed, assert_equal, check, error_of, lossless
from torch import Tensor, nn

from gradwire import comm, optim


def _classes() -> list[Any]:
    return list({case.cls: case for case in reversed(OPTIMIZERS)}.values())


def _grouped(make: Callable[[Any], Any]) -> Callable[[nn.Module], Any]:
    def build(model: nn.Module) -> Any:
        named = list(model.named_parameters())
        decayed = {"params": [(name, p) for name, p in named if p.ndim > 1], "weight_decay": 0.1}
        return make([decayed, {"params": [(name, p) for name, p in named if p.ndim < 2], "weight_decay": 0.0}])

    return build


def _client(stage: int, make: Callable[[Any], Any], *, bf16: bool = False) -> Training:
    return Training(stage, optimizer=_grouped(make), bf16=bf16, gradient_clipping=0.0)


def _plain(make: Callable[[Any], Any], steps: int) -> Tensor:
    """The same model and data in a loop of one's own, with gradients averaged by gradwire."""
    like = Training(0)
    model = copy.deepcopy(like.model)
    optimizer = _grouped(make)(model)
    comm.attach(model.named_parameters(), lossless(), optimizer=optimizer)
    for _ in range(steps):
        inputs = torch.randn(8, 24, generator=like.batches)
        nn.functional.cross_entropy(model(inputs), (inputs @ like.labels).argmax(1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def _maker(case: Any) -> Callable[[Any], Any]:
    return lambda params: case.cls(params, **{"lr": 1e-3, **case.kwargs})


@check
def every_optimizer_runs_at_stage_0() -> None:
    for case in _classes():
        training = _client(0, _maker(case))
        training.run(4)
        assert_equal(training.flat(), _plain(_maker(case), 4), 1e-6)
        masters = _client(0, _maker(case), bf16=True)
        masters.run(4)
        assert masters.flat().isfinite().all()


@check
def elementwise_optimizers_run_on_partitions() -> None:
    elementwise = [case for case in _classes() if case.cls.elementwise]
    assert {case.cls.__name__ for case in elementwise} == {"AdaBelief", "DiffGrad", "LaProp"}
    for case in elementwise:
        expected = _plain(_maker(case), 4)
        for stage in (1, 2, 3):
            training = _client(stage, _maker(case))
            training.run(4)
            assert_equal(training.flat(), expected, 1e-6)


@check
def elementwise_optimizers_run_offloaded() -> None:
    offload = {"offload_optimizer": {"device": "cpu"}}
    make = _grouped(lambda params: optim.AdaBelief(params, lr=1e-3))
    training = Training(2, optimizer=make, zero=offload, zero_force_ds_cpu_optimizer=False, gradient_clipping=0.0)
    training.run(4)
    assert_equal(training.flat(), _plain(lambda params: optim.AdaBelief(params, lr=1e-3), 4), 1e-6)
    assert "Leave offload_optimizer" in error_of(lambda: comm.attach(training.engine, lossless()))


@check
def other_optimizers_refuse_partitions() -> None:
    for case in [case for case in _classes() if not case.cls.elementwise]:
        for stage in (1, 3):
            training = _client(stage, _maker(case))
            before = training.flat()
            name = case.cls.__name__
            assert f"{name}: expected parameters of the shapes" in error_of(lambda t=training: t.run(1), RuntimeError)
            assert_equal(training.flat(), before)
            if stage < 3:
                message = error_of(lambda t=training: comm.attach(t.engine, lossless()))
                assert f"got {name} at stage {stage}. Use stage 0" in message


def _exchanging() -> Iterator[tuple[str, Callable[[Any], Any]]]:
    yield "DeMo", lambda params: optim.DeMo(params, lr=1e-3, k=8, chunk=16)
    yield "OneBitAdam", lambda params: optim.OneBitAdam(params, lr=1e-3, warmup_steps=2)
    yield "OneBitLAMB", lambda params: optim.OneBitLAMB(params, lr=1e-3, warmup_steps=2)
    yield "ZeroOneAdam", lambda params: optim.ZeroOneAdam(params, lr=1e-3, warmup_steps=2, max_interval=1)
    yield "DiLoCo", lambda params: optim.DiLoCo(torch.optim.AdamW(params, lr=1e-3), every=2)


def _alone(make: Callable[[Any], Any], steps: int) -> Tensor:
    like = Training(0)
    model = copy.deepcopy(like.model)
    optimizer = _grouped(make)(model)
    for _ in range(steps):
        inputs = torch.randn(8, 24, generator=like.batches)
        nn.functional.cross_entropy(model(inputs), (inputs @ like.labels).argmax(1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@check
def optimizers_that_exchange_run_at_stage_0() -> None:
    for name, make in _exchanging():
        training = _client(0, make)
        assert f"got {name}, which exchanges by itself" in error_of(
            lambda t=training: comm.attach(t.engine, lossless())
        )
        comm.keep_local(training.engine)
        training.run(4)
        assert_equal(training.flat(), _alone(make, 4), 1e-6)
        assert_agreed(training.flat())


@check
def optimizers_that_exchange_refuse_partitions() -> None:
    for name, make in _exchanging():
        for stage in (1, 3):
            training = _client(stage, make)
            assert "keep_local: expected ZeRO stage 0" in error_of(lambda t=training: comm.keep_local(t.engine))
            assert f"{name}: expected" in error_of(lambda t=training: t.run(1), RuntimeError)
            training.engine.destroy()


def _mkor(model: nn.Module) -> Any:
    return optim.MKOR(model, base=torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9))


@check
def mkor_runs_where_parameters_are_whole() -> None:
    training = Training(0, optimizer=_mkor, gradient_clipping=0.0)
    base = Training(0, optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9))
    training.run(4)
    base.run(4)
    assert_agreed(training.flat())
    assert (training.flat() - base.flat()).abs().max() > 1e-3
    for stage, bf16 in ((0, True), (1, False), (2, False), (3, False)):
        message = error_of(lambda s=stage, b=bf16: Training(s, optimizer=_mkor, bf16=b).run(1), RuntimeError)
        assert "MKOR: expected the parameters that it was given" in message
