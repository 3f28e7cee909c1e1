"""Adafactor in closed form, against other implementations, and the size of its state."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from optimizing import SHAPES, assert_equal, clones, eager, parameters, train
from torch import Tensor, nn

from gradwire.optim import Adafactor, factored

GOLDEN = Path(__file__).parent / "golden" / "adafactor.npz"
AS_PUBLISHED = (1e-30, 1e-3)


def rms(x: Tensor) -> float:
    return x.detach().double().square().mean().sqrt().item()


def step_of(p: nn.Parameter, optimizer: Any, gradient: Tensor) -> Tensor:
    """What one step takes away."""
    before = p.detach().clone()
    p.grad = gradient
    optimizer.step()
    return before - p.detach()


# Closed forms.


@eager
@pytest.mark.parametrize("shape", [(6, 5), (3, 6, 5), (7,), ()])
def test_a_rank_one_square_gives_the_sign(shape: tuple[int, ...], foreach: bool) -> None:
    p = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    gradient = torch.randn(shape, dtype=torch.float64).sign()
    if len(shape) > 1:
        gradient = gradient * torch.rand(*shape[:-1], 1).exp2() * 1e-3 * torch.rand(*shape[:-2], 1, shape[-1]).exp2()
    expected = 1e-2 * rms(p) * gradient.sign()
    step = step_of(p, Adafactor([p], foreach=foreach), gradient)
    torch.testing.assert_close(step, expected, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("d", [0.3, 1.0])
@pytest.mark.parametrize("shape", [(6, 5), (9,)])
def test_clipping_bounds_the_update(shape: tuple[int, ...], d: float) -> None:
    """Also where gradients grow tenfold, which without clipping gives a step far too long."""
    p = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    q = nn.Parameter(p.detach().clone())
    clipped, free = Adafactor([p], d=d), Adafactor([q], d=None)
    for t in range(1, 30):
        gradient = torch.randn(shape, dtype=torch.float64) * 10.0 ** (t // 10)
        alpha = min(1e-2, t**-0.5) * rms(p)
        assert rms(step_of(p, clipped, gradient)) <= alpha * d * (1 + 1e-9)
        alpha = min(1e-2, t**-0.5) * rms(q)
        step = rms(step_of(q, free, gradient))
        assert step > 1.5 * alpha or t % 10 > 0


def test_steps_follow_the_size_of_the_weight() -> None:
    for size, least in [(100.0, 0.0), (1e-2, 1e-3), (0.0, 1e-3), (0.0, 0.5)]:
        p = nn.Parameter(torch.full((3, 4), size, dtype=torch.float64))
        step = step_of(p, Adafactor([p], eps=(1e-30, least)), torch.ones(3, 4, dtype=torch.float64))
        assert rms(step) == pytest.approx(1e-2 * max(size, least), rel=1e-12)
    p = nn.Parameter(torch.full((3, 4), 100.0, dtype=torch.float64))
    assert rms(step_of(p, Adafactor([p], scale_parameter=False), torch.ones_like(p))) == pytest.approx(1e-2, rel=1e-9)


@pytest.mark.parametrize(
    ("kwargs", "t", "rho"),
    [
        ({}, 4, 1e-2),
        ({"lr": 1.0}, 4, 0.5),
        ({"lr": 1.0, "relative_step": False}, 4, 1.0),
        ({"warmup_init": True}, 4, 4e-6),
        ({"lr": 1.0, "warmup_init": True}, 40_000, 5e-3),
    ],
    ids=str,
)
def test_relative_step_sizes(kwargs: dict[str, Any], t: int, rho: float) -> None:
    p = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = Adafactor([p], **kwargs)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.state[p]["step"].fill_(t - 1)
    optimizer.state[p]["variance"].fill_(1.0)
    assert rms(step_of(p, optimizer, torch.ones_like(p))) == pytest.approx(rho, rel=1e-9)


def test_capped_window_and_offset() -> None:
    """The second moment forgets with t^-0.8, at least with 1 - beta2_cap, and from the offset on as at the start."""
    for kwargs, keep in [({}, 1 - 1000**-0.8), ({"beta2_cap": 0.9}, 0.9), ({"step_offset": 999}, 0.0)]:
        p = nn.Parameter(torch.ones(3, dtype=torch.float64))
        optimizer = Adafactor([p], **kwargs)
        step_of(p, optimizer, torch.ones_like(p))
        optimizer.state[p]["step"].fill_(999)
        step_of(p, optimizer, torch.zeros_like(p))
        torch.testing.assert_close(optimizer.state[p]["variance"], torch.full_like(p, keep), rtol=1e-9, atol=1e-20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_small_gradients_of_unequal_rows_give_equal_steps(dtype: torch.dtype) -> None:
    """Rows 100 times apart: torch's default eps makes this 100 times in bfloat16."""

    def spread(cls: Any, **kwargs: Any) -> float:
        p = nn.Parameter(torch.zeros(32, 64, dtype=dtype))
        scales = torch.logspace(0, -2, 32)[:, None]
        generator = torch.Generator().manual_seed(0)
        optimizer = cls([p], **kwargs)
        for _ in range(3):
            optimizer.zero_grad()
            p.data.zero_()
            step = step_of(p, optimizer, (torch.randn(32, 64, generator=generator) * scales * 1e-4).to(dtype))
        rows = step.float().square().mean(1).sqrt()
        return (rows.max() / rows.min()).item()

    assert spread(Adafactor) < 1.5
    assert spread(torch.optim.Adafactor, eps=AS_PUBLISHED) < 2.0
    if dtype == torch.bfloat16:
        assert spread(torch.optim.Adafactor) > 50


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e-12])
def test_float32_is_exact_at_any_gradient_scale(scale: float) -> None:
    """Products of two second moments would underflow."""
    p, q = nn.Parameter(torch.ones(8, 8)), nn.Parameter(torch.ones(8, 8, dtype=torch.float64))
    ours, exact = Adafactor([p]), Adafactor([q])
    for _ in range(10):
        gradient = torch.randn(8, 8, dtype=torch.float64) * scale
        step, expected = step_of(p, ours, gradient.float()), step_of(q, exact, gradient)
        torch.testing.assert_close(step.double(), expected, rtol=1e-3, atol=3e-7)


# Other implementations.


@eager
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e-8])
def test_equals_torch_with_the_published_eps(foreach: bool, weight_decay: float, scale: float) -> None:
    params = parameters()
    others = clones(params)
    ours = Adafactor(params, weight_decay=weight_decay, foreach=foreach)
    theirs = torch.optim.Adafactor(others, weight_decay=weight_decay, eps=AS_PUBLISHED)
    for optimizer in (ours, theirs):
        torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)
    for seed in range(50):
        train(ours, params, 1, seed=seed, scale=scale)
        train(theirs, others, 1, seed=seed, scale=scale)
    assert_equal(params, others, rtol=0.0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_takes_over_from_torch(dtype: torch.dtype) -> None:
    """Its state, spelled alike, and its groups, in which eps1 is None."""
    params = parameters(dtype)
    theirs = torch.optim.Adafactor(params, lr=0.1)
    train(theirs, params, 3)
    others = clones(params)
    ours = Adafactor(others)
    ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["lr"] == 0.1
    assert ours.param_groups[0]["eps"] == (None, 1e-3)
    for p, q in zip(params, others, strict=True):
        assert ours.state[q].keys() == theirs.state[p].keys()
        assert {x.dtype for n, x in ours.state[q].items() if n != "step"} == {torch.promote_types(dtype, torch.float32)}
    train(theirs, params, 3)
    train(ours, others, 3)
    if dtype == torch.float64:
        assert_equal(others, params, rtol=1e-6, atol=1e-9)


TRANSFORMERS: list[dict[str, Any]] = [
    {},
    {"beta1": 0.9, "weight_decay": 0.1},
    {"relative_step": False, "weight_decay": 0.1},
    {
        "relative_step": False,
        "scale_parameter": False,
        "beta1": 0.5,
        "d": 0.5,
        "beta2_decay": -0.5,
        "eps": (1e-12, 0.01),
    },
    {"warmup_init": True},
]
OPTAX: list[dict[str, Any]] = [
    {},
    {"beta1": 0.9},
    {"min_dim_size_to_factor": 4, "d": None, "beta2_decay": -0.5},
]


@eager
@pytest.mark.parametrize(
    ("key", "kwargs", "rtol"),
    [
        *((f"transformers_{n}", {"decay": "effective", **kwargs}, 1e-12) for n, kwargs in enumerate(TRANSFORMERS)),
        *((f"optax_{n}", {"factored_dims": "largest", **kwargs}, 1e-6) for n, kwargs in enumerate(OPTAX)),
    ],
    ids=str,
)
def test_equals_transformers_and_optax(key: str, kwargs: dict[str, Any], rtol: float, foreach: bool) -> None:
    """50 steps in float64, gradients of scale 1, 1e-4 and 1e-8 in turns; optax has b in float32."""
    rng = np.random.RandomState(7)
    params = [nn.Parameter(torch.tensor(rng.standard_normal(shape))) for shape in SHAPES]
    start = clones(params)
    optimizer = Adafactor(params, foreach=foreach, **kwargs)
    for step in range(50):
        for p in params:
            p.grad = torch.tensor(rng.standard_normal(p.shape) * 10.0 ** -(step % 3 * 4))
        optimizer.step()
    with np.load(GOLDEN) as golden:
        for i, (p, before) in enumerate(zip(params, start, strict=True)):
            error = (p.detach() - torch.tensor(golden[f"{key}_{i}"])).abs().max()
            assert error <= rtol * (p.detach() - before.detach()).abs().max()


# State.


@pytest.mark.parametrize(
    ("shape", "kwargs", "expected"),
    [
        ((6, 5), {}, {"row_var": (6, 1), "col_var": (1, 5)}),
        ((2, 3, 6, 5), {}, {"row_var": (2, 3, 6, 1), "col_var": (2, 3, 1, 5)}),
        ((6, 5, 2, 3), {"factored_dims": "largest"}, {"row_var": (2, 3, 6, 1), "col_var": (2, 3, 1, 5)}),
        ((3, 3, 3), {"factored_dims": "largest"}, {"row_var": (3, 3, 1), "col_var": (3, 1, 3)}),
        ((6, 5), {"min_dim_size_to_factor": 6}, {"variance": (6, 5)}),
        ((2, 3), {"beta1": 0.9}, {"row_var": (2, 1), "col_var": (1, 3), "exp_avg": (2, 3)}),
        ((7,), {}, {"variance": (7,)}),
        ((), {"beta1": 0.0}, {"variance": (), "exp_avg": ()}),
        ((0, 3), {}, {"row_var": (0, 1), "col_var": (1, 3)}),
    ],
    ids=str,
)
def test_size_of_the_state(shape: tuple[int, ...], kwargs: Any, expected: dict[str, tuple[int, ...]]) -> None:
    p = nn.Parameter(torch.randn(shape, dtype=torch.bfloat16))
    optimizer = Adafactor([p], **kwargs)
    train(optimizer, [p], 1)
    state = {name: x for name, x in optimizer.state[p].items() if name != "step"}
    assert {name: tuple(x.shape) for name, x in state.items()} == expected
    assert {x.dtype for x in state.values()} == {torch.float32}


# Sums.


@pytest.mark.parametrize(
    "shape", [(1, 1), (5, 7), (70, 3), (3, 70), (4, 5, 6), (50, 2, 3, 3), (0, 3), (3, 0), (0, 2, 2)]
)
@pytest.mark.parametrize("block", [8, 64, 1 << 19])
def test_streamed_sums(shape: tuple[int, ...], block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factored, "_SMALL", 0)
    monkeypatch.setattr(factored, "_BLOCK", block)
    x = torch.randn(shape, dtype=torch.float64)
    (rows,), (columns,) = factored.row_column_sums([x])
    torch.testing.assert_close(rows, x.square().sum(-1, keepdim=True))
    torch.testing.assert_close(columns, x.square().sum(-2, keepdim=True))


@pytest.mark.parametrize("shape", [(2, 2), (16, 3), (33, 5), (3, 70, 4)])
def test_sums_in_blocks_of_rows(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(factored._column_sums(x), x.square().sum(-2, keepdim=True))
