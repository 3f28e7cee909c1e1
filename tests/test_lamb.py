"""`LAMB`: closed forms and limits; that it equals its reference and other packages stands elsewhere."""

import math
from typing import Any

import pytest
import torch
from optimizing import assert_equal, clones, eager, parameters, train
from torch import nn

from gradwire.optim import LAMB


@eager
def test_steps_by_lr_times_the_norm_of_each_layer(foreach: bool) -> None:
    params = parameters()
    optimizer = LAMB(params, lr=1e-2, weight_decay=0.1, foreach=foreach)
    for step in range(5):
        before = clones(params)
        train(optimizer, params, 1, seed=step, scale=10.0**-step)
        for p, old in zip(params, before, strict=True):
            torch.testing.assert_close((p - old).norm(), 1e-2 * old.norm(), rtol=1e-10, atol=0.0)


def test_does_not_depend_on_the_scale_of_gradients() -> None:
    params = parameters()
    others = clones(params)
    train(LAMB(params, lr=1e-2, eps=0.0), params, 10)
    train(LAMB(others, lr=1e-2, eps=0.0), others, 10, scale=1e5)
    assert_equal(params, others, rtol=1e-10, atol=1e-12)


@eager
@pytest.mark.parametrize("kwargs", [{"adapt": False}, {"norm_bounds": (0.0, 0.0)}], ids=["adam", "nothing"])
def test_without_trust_ratio(kwargs: dict[str, Any], foreach: bool) -> None:
    """Without it LAMB is Adam; with a bound of zero it stands still."""
    params = parameters()
    others = clones(params)
    train(LAMB(params, lr=1e-2, eps=1e-8, foreach=foreach, **kwargs), params, 20)
    if "adapt" in kwargs:
        train(torch.optim.Adam(others, lr=1e-2, eps=1e-8), others, 20)
    assert_equal(params, others, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    ("kwargs", "length"),
    [({}, 5.0), ({"norm_bounds": (0.0, 2.0)}, 2.0), ({"norm_bounds": (7.0, 9.0)}, 7.0), ({"trust_clip": True}, 2**0.5)],
    ids=["paper", "high", "low", "clip"],
)
def test_length_of_a_step(kwargs: dict[str, Any], length: float) -> None:
    """Of u, which has two entries of 1, or of the weight, within bounds."""
    weight = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    weight.grad = torch.tensor([1e-3, 5.0], dtype=torch.float64)
    before = weight.detach().clone()
    LAMB([weight], lr=0.1, eps=0.0, **kwargs).step()
    expected = torch.full_like(weight, -0.1 * length / math.sqrt(2))
    torch.testing.assert_close(weight.detach() - before, expected)


@eager
def test_a_layer_of_zeros_steps_like_adam(foreach: bool) -> None:
    weight, still = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.ones(4))
    weight.grad, still.grad = torch.ones(4), torch.zeros(4)
    LAMB([weight, still], lr=0.1, foreach=foreach).step()
    torch.testing.assert_close(weight.detach(), torch.full((4,), -0.1))
    torch.testing.assert_close(still.detach(), torch.ones(4))


def test_groups_may_leave_the_trust_ratio_out() -> None:
    weight, bias = nn.Parameter(torch.full((4,), 10.0)), nn.Parameter(torch.full((4,), 10.0))
    optimizer = LAMB([{"params": [weight]}, {"params": [bias], "adapt": False}], lr=0.1)
    weight.grad, bias.grad = torch.ones(4), torch.ones(4)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((4,), 9.0))
    torch.testing.assert_close(bias.detach(), torch.full((4,), 9.9))
