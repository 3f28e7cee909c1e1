"""`in_backward`: the backward pass is the step, and no gradient outlives it."""

import copy
from typing import Any

import pytest
import torch
from cases import OptimizerCase
from optimizing import assert_equal, every_class, make
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from gradwire.optim import AdamP, in_backward


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))


def _loss(model: nn.Module, step: int) -> Tensor:
    return model(torch.randn(5, 4, generator=torch.Generator().manual_seed(step))).square().mean()


def _train_as_usual(model: nn.Module, optimizer: Any, steps: range, scheduler: Any = None) -> None:
    for step in steps:
        _loss(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()


@every_class
def test_equals_a_step_after_the_backward_pass(case: OptimizerCase) -> None:
    model = _model()
    other = copy.deepcopy(model)
    optimizer = in_backward(model, lambda params: make(case, params))
    usual = make(case, other.named_parameters())
    schedules = [torch.optim.lr_scheduler.StepLR(o, 2, 0.5) for o in (optimizer, usual)]
    for step in range(5):
        _loss(model, step).backward()
        schedules[0].step()
        assert all(p.grad is None for p in model.parameters())
    _train_as_usual(other, usual, range(5), schedules[1])
    assert_equal(list(model.parameters()), list(other.parameters()))


@pytest.mark.filterwarnings("error")
def test_schedulers_do_not_miss_the_step() -> None:
    model = _model()
    optimizer = in_backward(model, lambda params: AdamP(params))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    _loss(model, 0).backward()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 5e-4


def test_state_dict_takes_over_and_goes_on() -> None:
    model = _model()
    optimizer = in_backward(model, lambda params: AdamP(params, lr=0.1))
    for step in range(3):
        _loss(model, step).backward()
    restored = copy.deepcopy(model)
    for p in restored.parameters():
        p._post_accumulate_grad_hooks = None
    other = in_backward(restored, lambda params: AdamP(params, lr=1.0))
    other.load_state_dict(optimizer.state_dict())
    other.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"] = 0.05
    for step in range(3, 5):
        _loss(model, step).backward()
        _loss(restored, step).backward()
    assert_equal(list(restored.parameters()), list(model.parameters()))


def test_any_optimizer_and_frozen_parameters() -> None:
    model = _model()
    model[0].requires_grad_(False)
    other = copy.deepcopy(model)
    in_backward(model, lambda params: torch.optim.AdamW(params, lr=0.1))
    usual = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], lr=0.1)
    for step in range(3):
        _loss(model, step).backward()
    _train_as_usual(other, usual, range(3))
    assert_equal(list(model.parameters()), list(other.parameters()))


def test_gradients_never_exist_together() -> None:
    model = _model()
    alive: list[int] = []
    optimizer = in_backward(model, lambda params: AdamP(params))
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(q.grad is not None for q in model.parameters()))
        )
    _loss(model, 0).backward()
    assert alive == [0] * 6
    for handle in optimizer.in_backward_hooks:
        handle.remove()
    _loss(model, 0).backward()
    assert alive[-1] == 6


def _refuse_ddp() -> None:
    with pytest.raises(TypeError, match=r"in_backward: expected .* got a DistributedDataParallel"):
        in_backward(DistributedDataParallel(_model()), lambda params: AdamP(params))


def _fsdp() -> None:
    model, other = _model(), _model()
    for m in (model, other):
        for layer in m:
            if isinstance(layer, nn.Linear):
                fully_shard(layer)
        fully_shard(m)
    in_backward(model, lambda params: AdamP(params, lr=0.1))
    for step in range(3):
        _loss(model, step).backward()
        assert all(p.grad is None for p in model.parameters())
    _train_as_usual(other, AdamP(other.parameters(), lr=0.1), range(3))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.full_tensor(), q.full_tensor(), rtol=1e-5, atol=1e-6)


def test_ddp_is_refused() -> None:
    run_ranks(1, _refuse_ddp)


@pytest.mark.slow
def test_works_on_sharded_parameters() -> None:
    run_ranks(2, _fsdp)
