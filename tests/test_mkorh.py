"""`MKORH`: when it switches, and what is left then."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import mkor as reference
from torch import Tensor, nn

from gradwire.comm import checkpoint
from gradwire.optim import MKOR, MKORH

QUICK: dict[str, Any] = {"windows": (3, 10), "check_every": 5, "threshold": 0.02, "patience": 2, "min_steps": 12}


def make(**settings: Any) -> tuple[nn.Linear, MKORH]:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return model, MKORH(model, base, **{**QUICK, "vector_dtype": None, **settings})


def one_step(model: nn.Module, optimizer: Any, seed: int, loss: float | Tensor | None = None) -> None:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    model(x).square().mean().backward()
    if loss is not None:
        optimizer.observe(loss)
    optimizer.step()


def switched_after(losses: Sequence[float], **settings: Any) -> int | None:
    model, optimizer = make(**settings)
    for step, loss in enumerate(losses, 1):
        one_step(model, optimizer, step, loss)
        if optimizer.switched:
            return step
    return None


def noise(step: int) -> float:
    return math.sin(12.9898 * step) * 43758.5453 % 1 - 0.5


CURVES = {
    "falls for ever": [math.exp(-0.02 * step) for step in range(300)],
    "levels off": [1 + 3 * math.exp(-0.05 * step) for step in range(300)],
    "levels off in noise": [1 + 3 * math.exp(-0.05 * step) + 0.1 * noise(step) for step in range(300)],
    "rises": [1 + 0.01 * step for step in range(300)],
    "is negative and falls": [-1 - 0.05 * step for step in range(300)],
    "in steps": [2.0 ** -(step // 60) + 0.01 for step in range(300)],
}


@pytest.mark.parametrize("settings", [{}, {"threshold": 0.1, "patience": 4}, {"windows": (5, 40)}], ids=str)
@pytest.mark.parametrize("curve", CURVES)
def test_switches_where_the_reference_does(curve: str, settings: dict[str, Any]) -> None:
    expected = reference.mkorh(CURVES[curve], **{**QUICK, **settings})
    assert switched_after(CURVES[curve], **settings) == expected


def test_when_it_switches() -> None:
    """Rates of 2 % and 4 % in 5 steps are the bounds here."""
    assert switched_after([math.exp(-0.02 * step) for step in range(200)]) is None  # 10 % in 5 steps
    assert switched_after([1.0] * 200) == 20  # checks at 15 and 20: min_steps is 12
    assert switched_after([1.0] * 200, min_steps=100) == 105
    assert switched_after([1.0] * 200, patience=5) == 35


def test_between_the_bounds_the_count_stands() -> None:
    """A check above twice the threshold makes it start again; one a little above the threshold does not."""
    model, optimizer = make()
    one_step(model, optimizer, 0, 1.0)
    for rate, count in ((0.019, 1), (0.021, 1), (0.039, 1), (0.041, 0), (0.0, 1), (0.03, 1), (-0.5, 2)):
        optimizer._averages.copy_(torch.tensor([50.0, 1 - rate * 7 / 5, 1.0]))  # the averages are 7 steps apart
        assert not optimizer.switched
        optimizer._check_rate()
        assert optimizer._count == count
    assert optimizer.switched


def test_what_is_left_is_the_base(caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = make()
    with caplog.at_level(logging.INFO, "gradwire"):
        for step in range(20):
            assert not optimizer.switched
            one_step(model, optimizer, step, 1.0)
    assert optimizer.switched
    (message,) = caplog.messages
    assert message.startswith("MKORH: step 20: the loss falls by 0 % in 5 steps, the 2nd time below 2 %; SGD goes on")
    assert not model._forward_hooks
    assert optimizer.state[model.weight].keys() == {"momentum_buffer", "mkorh_record"}
    steps, other = optimizer.communicator.stats.steps, nn.Linear(4, 3)
    other.load_state_dict(model.state_dict())
    base = torch.optim.SGD(other.parameters(), lr=0.05, momentum=0.9)
    one_step(model, optimizer, 99, 1.0)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        base.state[q]["momentum_buffer"] = (optimizer.state[p]["momentum_buffer"] - p.grad) / 0.9
    one_step(other, base, 99)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert optimizer.communicator.stats.steps == steps


def test_until_then_it_is_mkor() -> None:
    model, optimizer = make()
    torch.manual_seed(0)
    other = nn.Linear(4, 3)
    plain = MKOR(other, torch.optim.SGD(other.parameters(), lr=0.05, momentum=0.9), vector_dtype=None)
    for step in range(19):
        one_step(model, optimizer, step, 1.0)
        one_step(other, plain, step)
    assert torch.equal(model.weight, other.weight)


def test_the_loss_of_a_closure_and_the_mean_of_micro_batches() -> None:
    model, optimizer = make()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(2, 4)).square().mean()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert torch.equal(optimizer._averages, torch.stack([torch.ones(()), first, first]).double())
    optimizer.observe(torch.tensor(1.0, requires_grad=True))
    optimizer.observe(3)
    optimizer.step()
    torch.testing.assert_close(optimizer._averages[1], (first.detach().double() + 2) / 2)


def test_losses_that_are_missing_or_not_finite_do_not_count() -> None:
    model, optimizer = make()
    for step, loss in enumerate([1.0, None, float("nan"), float("inf"), 2.0]):
        one_step(model, optimizer, step, loss)
    assert optimizer._averages.tolist() == [2.0, 1.5, 1.5]


def test_says_so_when_it_gets_no_loss(caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = make()
    for step in range(3 * QUICK["check_every"]):
        one_step(model, optimizer, step)
    (message,) = caplog.messages
    assert message.startswith("MKORH: got no loss in 5 steps, and never switches without. Call observe(loss)")


@pytest.mark.parametrize("switched", [False, True])
@pytest.mark.parametrize("how", ["state_dict", "checkpoint"])
def test_resumes_bit_for_bit(how: str, switched: bool, tmp_path: Path) -> None:
    losses = [1.0] * 40
    model, optimizer = make()
    cut = 25 if switched else 17
    for step in range(cut):
        one_step(model, optimizer, step, losses[step])
    assert optimizer.switched == switched
    other, resumed = make()
    if how == "state_dict":
        other.load_state_dict(model.state_dict())
        resumed.load_state_dict(optimizer.state_dict())
        torch.save(optimizer.state_dict(), tmp_path / "saved")
        resumed.load_state_dict(torch.load(tmp_path / "saved", weights_only=True))
    else:
        checkpoint.save(tmp_path / "saved", model=model, optimizer=optimizer)
        if switched:
            resumed.switch()
        checkpoint.load(tmp_path / "saved", model=other, optimizer=resumed)
    assert resumed.switched == switched
    for step in range(cut, 40):
        one_step(model, optimizer, step, losses[step])
        one_step(other, resumed, step, losses[step])
        assert resumed.switched == optimizer.switched
        assert torch.equal(model.weight, other.weight)
    assert torch.equal(resumed.state[other.weight]["mkorh_record"], optimizer.state[model.weight]["mkorh_record"])


def test_a_state_from_before_the_switch_brings_mkor_back() -> None:
    model, optimizer = make()
    one_step(model, optimizer, 0, 1.0)
    saved = optimizer.state_dict()
    optimizer.switch()
    optimizer.load_state_dict(saved)
    assert not optimizer.switched
    assert model._forward_hooks


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"windows": (10, 10)}, r"MKORH: expected windows \(fast, slow\) with 1 <= fast < slow, got \(10, 10\)"),
        ({"check_every": 0}, "expected an integer check_every >= 1, got check_every=0"),
        ({"patience": 0}, "expected an integer patience >= 1, got patience=0"),
        ({"threshold": -0.1}, r"expected 0 <= threshold, got threshold=-0\.1"),
        ({"min_steps": -1}, "expected 0 <= min_steps"),
        ({"decay": 0.0}, r"MKORH: expected 0 < decay <= 1, got decay=0\.0"),
    ],
)
def test_refuses_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**settings)
