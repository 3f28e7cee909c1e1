"""`DiffGrad`: closed forms and limits; that it equals its reference and other packages stands elsewhere."""

import math
from typing import Any

import pytest
import torch
from optimizing import assert_equal, clones, parameters, train
from torch import Tensor, nn

from gradwire.optim import DiffGrad


def frictions(gradients: list[Tensor], **kwargs: Any) -> list[Tensor]:
    """What our steps are as multiples of Adam's."""
    ours, theirs = (nn.Parameter(torch.zeros_like(gradients[0])) for _ in range(2))
    optimizer = DiffGrad([ours], lr=1.0, eps=0.0, **kwargs)
    adam = torch.optim.Adam([theirs], lr=1.0, eps=0.0)
    found = []
    for gradient in gradients:
        before = ours.detach().clone(), theirs.detach().clone()
        for p, o in ((ours, optimizer), (theirs, adam)):
            p.grad = gradient.clone()
            o.step()
        found.append((ours.detach() - before[0]) / (theirs.detach() - before[1]))
    return found


def constant(value: float) -> list[Tensor]:
    return [torch.full((3,), value, dtype=torch.float64)] * 4


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(
    ("version", "first"), [(0, sigmoid(2.0)), (1, sigmoid(-2.0)), (2, 9 * sigmoid(1.0) - 4)], ids=str
)
@pytest.mark.parametrize("original", [False, True])
def test_friction_of_a_constant_gradient(version: int, first: float, original: bool) -> None:
    found = frictions(constant(2.0), version=version, original=original)
    for friction, expected in zip(found, [first, 0.5, 0.5, 0.5], strict=True):
        torch.testing.assert_close(friction, torch.full_like(friction, expected), rtol=1e-9, atol=0.0)


@pytest.mark.parametrize(("version", "low", "high"), [(0, 0.5, 1.0), (1, 0.0, 1.0), (2, 0.5, 5.0)])
def test_range_of_the_friction(version: int, low: float, high: float) -> None:
    gradients = [torch.randn(100, dtype=torch.float64) * 10 for _ in range(5)]
    found = torch.stack(frictions(gradients, version=version))
    assert found.min() >= low - 1e-9
    assert found.max() <= high + 1e-9
    assert found.max() > high - 0.01
    assert found.min() < low + 0.5


@pytest.mark.parametrize(("scale", "mean"), [(1.0, 0.725), (0.1, 0.528), (0.01, 0.503)])
def test_small_gradients_leave_adam_with_half_the_lr(scale: float, mean: float) -> None:
    gradients = [torch.randn(20000, dtype=torch.float64) * scale for _ in range(3)]
    assert frictions(gradients)[-1].mean().item() == pytest.approx(mean, abs=3e-3)


def test_original_is_what_a_kept_buffer_made_of_it_and_keeps_no_gradient() -> None:
    gradients = [torch.randn(5, dtype=torch.float64) for _ in range(4)]
    for friction in frictions(gradients, original=True)[1:]:
        torch.testing.assert_close(friction, torch.full_like(friction, 0.5), rtol=1e-9, atol=0.0)
    weight = nn.Parameter(torch.ones(3))
    optimizer = DiffGrad([weight], original=True)
    train(optimizer, [weight], 1)
    assert optimizer.state[weight].keys() == {"step", "exp_avg", "exp_avg_sq"}


def test_gradients_may_stay_in_one_buffer() -> None:
    params = parameters()
    others = clones(params)
    optimizer, other = DiffGrad(params, lr=1e-2), DiffGrad(others, lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad(set_to_none=False)
        for p, q in zip(params, others, strict=True):
            q.grad = torch.randn_like(p)
            p.grad = q.grad.clone() if p.grad is None else p.grad.add_(q.grad)
        optimizer.step()
        other.step()
    assert_equal(params, others)


def test_decay_is_part_of_the_gradient_that_is_kept_but_not_of_the_callers() -> None:
    weight = nn.Parameter(torch.full((3,), 2.0))
    optimizer = DiffGrad([weight], weight_decay=0.1)
    weight.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(weight.grad, torch.ones(3))
    torch.testing.assert_close(optimizer.state[weight]["previous_grad"], torch.full((3,), 1.2))
