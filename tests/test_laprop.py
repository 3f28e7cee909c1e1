"""`LaProp`: closed forms and limits; that it equals its reference and other packages stands elsewhere."""

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from optimizing import assert_equal, clones, parameters, train
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from gradwire.optim import LaProp


def positions(
    gradients: list[float], lrs: list[float], dtype: torch.dtype = torch.float64, **kwargs: Any
) -> list[float]:
    """Of a scalar that starts at zero, after each step."""
    weight = nn.Parameter(torch.zeros((), dtype=dtype))
    optimizer = LaProp([weight], **kwargs)
    after = []
    for gradient, lr in zip(gradients, lrs, strict=True):
        optimizer.param_groups[0]["lr"] = lr
        weight.grad = torch.tensor(gradient, dtype=dtype)
        optimizer.step()
        after.append(weight.item())
    return after


def test_averages_gradients_with_the_lr_that_they_came_with() -> None:
    """With beta2 = 0 a normalised gradient is its sign."""
    first, second = positions([3.0, -5.0], [1.0, 0.1], betas=(0.5, 0.0))
    assert first == pytest.approx(-1.0)
    assert second - first == pytest.approx(-0.1 * (0.5 * 1.0 - 0.1) / (0.5 * 1.0 + 0.1))


def test_paper_momentum_forgets_them() -> None:
    first, second = positions([3.0, -5.0], [1.0, 0.1], betas=(0.5, 0.0), paper_momentum=True)
    assert first == pytest.approx(-1.0)
    assert second - first == pytest.approx(-0.1 * (0.5 * 1.0 - 1.0) / (0.5 * 1.0 + 1.0))


def test_both_momenta_agree_while_lr_is_constant() -> None:
    params = parameters()
    others = clones(params)
    train(LaProp(params, lr=1e-2), params, 30)
    train(LaProp(others, lr=1e-2, paper_momentum=True), others, 30)
    assert_equal(params, others, rtol=1e-12, atol=1e-14)


def test_steps_without_lr_leave_weights_alone_and_do_not_count() -> None:
    gradients = [1.0, -2.0, 3.0, 0.5]
    warm, cold = (
        positions(g, lr, betas=(0.9, 0.0)) for g, lr in ((gradients, [0.0, 0.1, 0.1, 0.1]), (gradients[1:], [0.1] * 3))
    )
    assert warm[0] == 0.0
    assert warm[1:] == pytest.approx(cold)
    paused = positions(gradients, [0.1, 0.0, 0.0, 0.1])
    assert paused[0] == paused[1] == paused[2] != paused[3]


def test_no_pair_of_betas_lets_it_diverge() -> None:
    """A large gradient before small ones: Adam divides what it remembers of the one by the size of the others."""
    gradients, lrs = [*[1e-4] * 50, 1.0, *[1e-4] * 50], [1e-2] * 101
    after = [0.0, *positions(gradients, lrs, betas=(0.99, 0.5))]
    taken = [abs(a - b) for a, b in pairwise(after)]
    assert max(taken) < 1.5e-2

    weight = nn.Parameter(torch.zeros((), dtype=torch.float64))
    adam = torch.optim.Adam([weight], lr=1e-2, betas=(0.99, 0.5))
    for gradient in gradients:
        weight.grad = torch.tensor(gradient, dtype=torch.float64)
        adam.step()
    assert weight.abs() > 10 * abs(after[-1])


@pytest.mark.parametrize("centered", [False, True])
def test_the_scale_of_gradients_does_not_matter(centered: bool) -> None:
    gradients = torch.randn(30, dtype=torch.float64).tolist()
    large, small = (positions([g * s for g in gradients], [1e-2] * 30, centered=centered) for s in (1.0, 1e-9))
    assert small == pytest.approx(large, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_centered_stands_constant_gradients(dtype: torch.dtype) -> None:
    """Nothing is left of v but rounding errors of either sign; a millionth bounds the step at 1000 lr."""
    after = [0.0, *positions([1.0] * 500, [1e-2] * 500, dtype, betas=(0.9, 0.9), centered=True)]
    taken = [a - b for a, b in pairwise(after)]
    assert 0 < min(taken) <= max(taken) <= 10.01


def test_centered_counts_from_its_own_step_on() -> None:
    """Also amsgrad's maximum: an early outlier is forgotten."""
    lrs, early = [1e-2] * 40, [100.0, *[1.0, -1.0] * 19, 1.0]
    kwargs: dict[str, Any] = {"betas": (0.9, 0.5), "amsgrad": True}
    plain, centered = positions(early, lrs, **kwargs), positions(early, lrs, centered=True, **kwargs)
    assert plain[:1] == centered[:1]
    assert abs(centered[-1] - centered[-2]) > 5 * abs(plain[-1] - plain[-2])
    at_once = positions(early, lrs, centered=True, steps_before_using_centered=0, **kwargs)
    assert abs(at_once[-1] - at_once[-2]) < 0.2 * abs(centered[-1] - centered[-2])


def test_decay_with_lr_and_without() -> None:
    for kwargs, left in (({}, 0.95), ({"fixed_decay": True}, 0.5)):
        weight = nn.Parameter(torch.ones(3))
        optimizer = LaProp([weight], lr=0.1, weight_decay=0.5, **kwargs)
        weight.grad = torch.zeros(3)
        optimizer.step()
        torch.testing.assert_close(weight.detach(), torch.full((3,), left))


def test_loading_a_distributed_checkpoint_does_not_decay() -> None:
    """`set_optimizer_state_dict` makes a step with lr = 0."""
    model = nn.Linear(4, 3)
    optimizer = LaProp(model.parameters(), weight_decay=0.1, fixed_decay=True)
    train(optimizer, list(model.parameters()), 2)
    restored = copy.deepcopy(model)
    for p in restored.parameters():
        p.grad = None
    other = LaProp(restored.parameters(), weight_decay=0.1, fixed_decay=True)
    set_optimizer_state_dict(restored, other, get_optimizer_state_dict(model, optimizer))
    assert_equal(list(restored.parameters()), list(model.parameters()))
    assert other.state[restored.weight]["exp_avg_lr"] == optimizer.state[model.weight]["exp_avg_lr"]


def test_state_is_spelled_as_in_torch() -> None:
    params = parameters()
    optimizer = LaProp(params, amsgrad=True, centered=True)
    train(optimizer, params, 1)
    ours = optimizer.state_dict()["state"][0].keys()
    adam, rmsprop = torch.optim.Adam(params, amsgrad=True), torch.optim.RMSprop(params, centered=True)
    train(adam, params, 1)
    train(rmsprop, params, 1)
    assert ours == {*adam.state[params[0]], *rmsprop.state[params[0]], "exp_avg_lr"} - {"square_avg"}
