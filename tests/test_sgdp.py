"""`SGDP`: closed forms and limits; that it equals its reference and other packages stands elsewhere."""

from typing import Any

import pytest
import torch
from optimizing import assert_equal, clones, eager, parameters, train
from torch import nn

from gradwire.optim import SGDP, AdamP


@eager
@pytest.mark.parametrize(
    "kwargs", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}], ids=["plain", "momentum", "nesterov"]
)
def test_without_projection_is_sgd(kwargs: dict[str, Any], foreach: bool) -> None:
    params = parameters()
    others = clones(params)
    train(SGDP(params, lr=1e-2, delta=0.0, foreach=foreach, **kwargs), params, 20)
    train(torch.optim.SGD(others, lr=1e-2, **kwargs), others, 20)
    assert_equal(params, others, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("by_rows", [True, False], ids=["rows", "matrix"])
def test_moves_along_the_tangent_and_leaves_the_momentum_whole(nesterov: bool, by_rows: bool) -> None:
    weight = nn.Parameter(torch.randn(8, 16, dtype=torch.float64))
    optimizer = SGDP([weight], lr=1e-2, momentum=0.9, nesterov=nesterov)
    momentum = torch.zeros_like(weight)
    for _ in range(5):
        before = weight.detach().clone()
        flat = before if by_rows else before.reshape(1, -1)
        gradient = torch.randn_like(flat)
        gradient -= flat * ((gradient * flat).sum(1, keepdim=True) / flat.square().sum(1, keepdim=True))
        weight.grad = gradient.reshape(8, 16)
        optimizer.step()
        momentum = 0.9 * momentum + weight.grad
        torch.testing.assert_close(optimizer.state[weight]["momentum_buffer"], momentum)
        radial = (before * (weight.detach() - before)).sum(1)
        assert radial.abs().max() < 1e-9 if by_rows else radial.sum().abs() < 1e-9


def test_decays_as_much_as_sgd_in_the_long_run() -> None:
    """There the momentum multiplies the decay by 1 / (1 - momentum); here the division does."""
    ours, theirs = nn.Parameter(torch.ones(3, dtype=torch.float64)), nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = SGDP([ours], lr=1e-4, momentum=0.9, weight_decay=0.1)
    other = torch.optim.SGD([theirs], lr=1e-4, momentum=0.9, weight_decay=0.1)
    for _ in range(2000):
        ours.grad, theirs.grad = torch.zeros_like(ours), torch.zeros_like(theirs)
        optimizer.step()
        other.step()
    torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=0.0)
    torch.testing.assert_close(ours.detach(), torch.full_like(ours, (1 - 1e-4 * 0.1 / 0.1) ** 2000))


def test_decays_scale_invariant_weights_less() -> None:
    weight, vector = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    optimizer = SGDP([weight, vector], lr=0.1, momentum=0.5, weight_decay=0.5, wd_ratio=0.1)
    weight.grad, vector.grad = torch.zeros(2, 2), torch.zeros(2)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((2, 2), 0.99))
    torch.testing.assert_close(vector.detach(), torch.full((2,), 0.9))


def test_dampens_every_step() -> None:
    weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = SGDP([weight], lr=1.0, momentum=0.5, dampening=0.5)
    for expected in (-0.5, -1.25, -2.125):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        torch.testing.assert_close(weight.detach(), torch.full_like(weight, expected))


def test_takes_over_from_sgd() -> None:
    params = parameters(torch.float32)
    sgd = torch.optim.SGD(params, momentum=0.9, nesterov=True)
    train(sgd, params, 3)
    others = clones(params)
    optimizer = SGDP(others, lr=1.0, delta=0.0)
    saved = sgd.state_dict()
    optimizer.load_state_dict(state_dict=saved)
    assert saved["state"][0].keys() == {"momentum_buffer"}
    assert optimizer.param_groups[0]["nesterov"]
    assert optimizer.param_groups[0]["delta"] == 0.0
    train(sgd, params, 3, seed=1)
    train(optimizer, others, 3, seed=1)
    assert_equal(others, params, rtol=1e-5, atol=1e-6)
    assert {state["step"].item() for state in optimizer.state.values()} == {3.0}


def test_refuses_a_state_with_other_moments() -> None:
    params = parameters()
    adamp = AdamP(params)
    train(adamp, params, 1)
    with pytest.raises(ValueError, match=r"SGDP: expected a state of \['momentum_buffer', 'step'\], got \['exp_avg'"):
        SGDP(params).load_state_dict(adamp.state_dict())
