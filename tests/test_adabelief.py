"""`AdaBelief`: closed forms and limits; that it equals its reference and other packages stands elsewhere."""

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from optimizing import assert_equal, clones, parameters, train
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from gradwire.optim import AdaBelief


def steps(gradients: list[float], **kwargs: Any) -> list[float]:
    """By how much a scalar falls in each step."""
    weight = nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimizer = AdaBelief([weight], **kwargs)
    positions = [0.0]
    for gradient in gradients:
        weight.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
        positions.append(weight.item())
    return [before - after for before, after in pairwise(positions)]


def test_first_step_along_the_sign_of_the_gradient() -> None:
    """g - m is beta1 g, so that the step is lr / beta1 at any scale."""
    for gradient in (1.0, -1e-3, 1e-5):
        (step,) = steps([gradient], lr=1e-2, rectify=False)
        assert step == pytest.approx(1e-2 / 0.9 * (1 if gradient > 0 else -1), rel=1e-2)


def test_steps_grow_along_a_constant_gradient() -> None:
    """Its deviation from the average vanishes; eps alone bounds the step."""
    taken = steps([1.0] * 3000, lr=1.0, rectify=False)
    assert [taken[t - 1] for t in (1, 100, 300, 1000, 3000)] == pytest.approx([1.1, 5, 9, 20, 67], rel=0.05)
    bound = ((1 - 0.999**1000) / (1e-4 * (1 - 0.999**1000) / 1e-3)) ** 0.5
    assert steps([1.0] * 1000, lr=1.0, rectify=False, eps=1e-4)[-1] == pytest.approx(bound, rel=0.05)


def test_eps_adds_up_in_the_state() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = AdaBelief([weight], betas=(0.9, 0.9), eps=1e-8)
    for _ in range(200):
        weight.grad = torch.zeros(3)
        optimizer.step()
    torch.testing.assert_close(optimizer.state[weight]["exp_avg_var"], torch.full((3,), 1e-7))
    assert torch.equal(weight, torch.ones(3))


def test_rectified_from_the_sixth_step_on() -> None:
    gradients = torch.randn(10, dtype=torch.float64).tolist()
    by_momentum, waiting = steps(gradients, lr=1e-2), steps(gradients, lr=1e-2, degenerated_to_sgd=False)
    average = 0.0
    for t in range(1, 6):
        average = 0.9 * average + 0.1 * gradients[t - 1]
        assert by_momentum[t - 1] == pytest.approx(1e-2 * average / (1 - 0.9**t), rel=1e-10)
        assert waiting[t - 1] == 0.0
    assert waiting[5:] == pytest.approx(by_momentum[5:], rel=1e-8)
    assert all(waiting[5:])


def test_rectifies_each_parameter_by_its_own_steps() -> None:
    early, late = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    optimizer = AdaBelief([early, late], lr=1e-2, foreach=True)
    for step in range(8):
        early.grad = torch.ones(3)
        late.grad = torch.ones(3) if step > 3 else None
        before = early.detach().clone(), late.detach().clone()
        optimizer.step()
        if step > 5:
            assert not torch.allclose(before[0] - early, torch.tensor(1e-2), rtol=0.5)  # r is small at first
            torch.testing.assert_close(before[1] - late, torch.full((3,), 1e-2))


def test_amsgrad_keeps_the_largest_and_uses_it_unless_rectified() -> None:
    gradients = [1.0, -1.0, 1.0, -1.0, *[0.1] * 20]
    plain, largest = (steps(gradients, lr=1e-2, rectify=False, amsgrad=x, betas=(0.9, 0.9)) for x in (False, True))
    assert largest[-1] < 0.5 * plain[-1]
    assert steps(gradients, amsgrad=True) == steps(gradients, amsgrad=False)


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
def test_fixed_decay_does_without_lr_but_pauses_where_it_is_zero(lr: float | Tensor) -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = AdaBelief([weight], lr=lr, weight_decay=0.5, fixed_decay=True)
    weight.grad = torch.zeros(3)
    optimizer.step()
    assert torch.equal(weight, torch.full((3,), 0.5))
    optimizer.param_groups[0]["lr"] = lr * 0
    optimizer.step()
    assert torch.equal(weight, torch.full((3,), 0.5))


def test_loading_a_distributed_checkpoint_does_not_decay() -> None:
    """`set_optimizer_state_dict` makes a step with lr = 0."""
    model = nn.Linear(4, 3)
    optimizer = AdaBelief(model.parameters(), weight_decay=0.1, fixed_decay=True)
    train(optimizer, list(model.parameters()), 2)
    restored = copy.deepcopy(model)
    for p in restored.parameters():
        p.grad = None
    other = AdaBelief(restored.parameters(), weight_decay=0.1, fixed_decay=True)
    set_optimizer_state_dict(restored, other, get_optimizer_state_dict(model, optimizer))
    assert_equal(list(restored.parameters()), list(model.parameters()))


def test_flags_belong_to_groups_and_are_saved() -> None:
    first, second = parameters(), parameters()
    alone = clones(second)
    optimizer = AdaBelief(first, lr=1e-2)
    optimizer.add_param_group({"params": second, "rectify": False, "amsgrad": True, "betas": (0.9, 0.99)})
    train(optimizer, second, 7)
    train(AdaBelief(alone, lr=1e-2, rectify=False, amsgrad=True, betas=(0.9, 0.99)), alone, 7)
    assert_equal(second, alone)
    other = AdaBelief([{"params": clones(first)}, {"params": clones(second)}])
    other.load_state_dict(optimizer.state_dict())
    assert [group["rectify"] for group in other.param_groups] == [True, False]
    assert {*other.state[other.param_groups[1]["params"][0]]} == {"step", "exp_avg", "exp_avg_var", "max_exp_avg_var"}


def test_bfloat16_state() -> None:
    params = parameters(torch.float32)
    others = clones(params)
    train(AdaBelief(params, lr=1e-2, state_dtype=torch.bfloat16), params, 20)
    train(AdaBelief(others, lr=1e-2), others, 20)
    assert_equal(params, others, rtol=0.0, atol=5e-3)
