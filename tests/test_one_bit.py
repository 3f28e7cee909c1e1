"""1-bit optimizers in one process: against their references, and what a user of `torch.optim` expects."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from cases import ONE_BIT, OptimizerCase
from optimizing import assert_equal, clones
from reference.one_bit import zero_one_policies
from torch import Tensor, nn

from gradwire.comm import CheckpointError, Plan
from gradwire.compression import ScaledSign
from gradwire.optim import LAMB, OneBitAdam, OneBitLAMB, ZeroOneAdam, in_backward

# Inductor's own
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

ALL = Plan(min_ndim=0, min_numel=0)
SHAPES = [(16, 32), (48,), (7, 5, 3), (), (48, 16)]
FIRST = list({case.cls: case for case in reversed(ONE_BIT)}.values())  # one case of each class

every_case = pytest.mark.parametrize("case", ONE_BIT, ids=lambda case: f"{case.cls.__name__}-{case.kwargs}")
every_class = pytest.mark.parametrize("case", FIRST, ids=lambda case: case.cls.__name__)


def parameters(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in SHAPES]


def make(case: OptimizerCase, params: Any, **options: Any) -> Any:
    return case.cls(params, **{"lr": 1e-2, **case.kwargs, **options})


def gradients(params: list[nn.Parameter], step: int) -> list[Tensor]:
    """Of a direction that all steps share, and noise."""
    made = []
    for i, p in enumerate(params):
        same = torch.randn(p.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i), dtype=torch.float64)
        made.append((same + noise).to(p.dtype))
    return made


def train(optimizer: Any, params: list[nn.Parameter], first: int, last: int, scale: float = 1.0) -> None:
    for step in range(first, last):
        for p, grad in zip(params, gradients(params, step), strict=True):
            p.grad = scale * grad
        optimizer.step()


@pytest.mark.parametrize("mode", [{}, {"foreach": False}, {"foreach": True}, {"maximize": True}], ids=str)
@every_case
def test_equals_the_reference(case: OptimizerCase, mode: dict[str, bool]) -> None:
    params = parameters()
    before = [p.detach().numpy().copy() for p in params]
    optimizer = make(case, params, **mode)
    lrs = [1e-2 * 0.97**step for step in range(20)]
    seen: list[list[Any]] = [[] for _ in params]
    for step, lr in enumerate(lrs):
        for p, grad, grads in zip(params, gradients(params, step), seen, strict=True):
            p.grad = -grad if mode.get("maximize") else grad
            grads.append(grad.numpy()[None])
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
    for p, start, grads in zip(params, before, seen, strict=True):
        expected = case.reference(start, grads, lrs, **case.kwargs)
        np.testing.assert_allclose(p.detach().numpy(), expected, rtol=1e-9, atol=1e-11)


@every_class
def test_compiled_is_eager(case: OptimizerCase) -> None:
    params = parameters()
    others = clones(params)
    train(make(case, params), params, 0, 12)
    train(make(case, others, fused=True), others, 0, 12)
    assert_equal(params, others, rtol=1e-6, atol=1e-7)  # scales are float32


def test_the_warm_up_is_adamw_and_lamb() -> None:
    params = parameters()
    others, third, fourth = clones(params), clones(params), clones(params)
    train(OneBitAdam(params, lr=1e-2, weight_decay=0.1, warmup_steps=10), params, 0, 10)
    train(torch.optim.AdamW(others, lr=1e-2, weight_decay=0.1), others, 0, 10)
    assert_equal(params, others, rtol=1e-12, atol=1e-13)
    wide = {"ratio_bounds": (0.0, math.inf)}
    train(OneBitLAMB(third, lr=1e-2, weight_decay=0.1, warmup_steps=10, **wide), third, 0, 10)
    train(LAMB(fourth, lr=1e-2, weight_decay=0.1), fourth, 0, 10)
    assert_equal(third, fourth, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("cls", "kwargs", "message"),
    [(case.cls, kwargs, message) for case in ONE_BIT for kwargs, message in case.errors],
)
def test_refuses(cls: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        cls([nn.Parameter(torch.ones(2))], **kwargs)


@every_class
def test_refuses_what_belongs_to_all_groups_in_one(case: OptimizerCase) -> None:
    with pytest.raises(ValueError, match=r"expected 'warmup_steps' for all groups together, got it in one"):
        make(case, [{"params": [nn.Parameter(torch.ones(2))], "warmup_steps": 5}])
    with pytest.raises(ValueError, match="expected real parameters"):
        make(case, [nn.Parameter(torch.ones(2, dtype=torch.complex64))])
    with pytest.raises(TypeError, match="got unexpected keyword arguments"):
        make(case, [nn.Parameter(torch.ones(2))], nesterov=True)


@every_class
def test_sparse_gradients_and_single_parameters_are_refused(case: OptimizerCase) -> None:
    embedding = nn.Embedding(8, 4, sparse=True)
    optimizer = make(case, embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=rf"{case.cls.__name__}: expected dense gradients"):
        optimizer.step()
    model = nn.Linear(3, 2)
    in_backward(model, lambda params: make(case, params))
    with pytest.raises(RuntimeError, match=r"expected step\(\), got a step of single parameters"):
        model(torch.ones(1, 3)).sum().backward()


@every_class
def test_a_missing_gradient_is_zero_and_a_closure_comes_first(case: OptimizerCase) -> None:
    params = parameters()
    others = clones(params)
    optimizer, other = make(case, params), make(case, others)
    for step in range(9):
        for i, (p, q, grad) in enumerate(zip(params, others, gradients(params, step), strict=True)):
            missing = i == 1 and step in (2, 7)
            q.grad = torch.zeros_like(q) if missing else grad
            p.grad = None if missing else grad.clone()
        assert optimizer.step(lambda: 3.0) == 3.0
        other.step()
    assert_equal(params, others)


@every_class
def test_groups_have_their_own_hyper_parameters(case: OptimizerCase) -> None:
    params = parameters()
    others = clones(params)
    own = {"lr": 1e-3, "weight_decay": 0.1, "betas": (0.8, 0.99)}
    both = make(case, [{"params": params[:2], **own}, {"params": params[2:]}])
    apart = [make(case, others[:2], **own), make(case, others[2:])]
    for step in range(10):
        grads = gradients(params, step)
        for p, q, grad in zip(params, others, grads, strict=True):
            p.grad, q.grad = grad, grad.clone()
        for optimizer in (both, *apart):
            optimizer.step()
    assert_equal(params, others, rtol=1e-12, atol=1e-14)


@every_class
def test_entries_without_a_variance_do_not_move(case: OptimizerCase) -> None:
    """One bit would send them away from zero in every step."""
    weight = nn.Parameter(torch.ones(8, 64))
    optimizer = make(case, [weight], compressor=ScaledSign(width=512))
    for step in range(30):
        weight.grad = torch.randn(8, 64, generator=torch.Generator().manual_seed(step))
        weight.grad[3] = 0
        optimizer.step()
    assert torch.equal(weight[3], torch.ones(64))
    assert (weight - 1).abs().max() < 1.0  # over the first 30 steps of at most a few lr


@every_class
def test_late_parameters_are_refused(case: OptimizerCase) -> None:
    params = parameters()
    params[0].requires_grad_(False)
    optimizer = make(case, [(f"p{i}", p) for i, p in enumerate(params)])
    before = params[0].detach().clone()
    train(optimizer, params[1:], 0, 8)
    assert torch.equal(params[0], before)
    params[0].requires_grad_(True)
    with pytest.raises(RuntimeError, match="to require a gradient during the warm-up, got p0 at step 8"):
        optimizer.step()


@every_class
def test_nothing_to_exchange_is_nothing_to_do(case: OptimizerCase) -> None:
    frozen = nn.Parameter(torch.ones(16, 16), requires_grad=False)
    optimizer = make(case, [frozen])
    assert optimizer.step(lambda: 2.0) == 2.0
    assert torch.equal(frozen, torch.ones(16, 16))


@every_class
@pytest.mark.parametrize("at", [2, 9], ids=["in the warm-up", "after it"])
def test_inf_leaves_no_trace(case: OptimizerCase, at: int) -> None:
    params = parameters()
    optimizer = make(case, params)
    train(optimizer, params, 0, at)
    rows = {key: value.clone() for key, value in optimizer.communicator.state_rows().items()}
    before = [x.detach().clone() for p in params for x in (p, *optimizer.state[p].values())]
    train(optimizer, params, at, at + 1, scale=math.inf)
    assert_equal([x for p in params for x in (p, *optimizer.state[p].values())], before)
    assert all(torch.equal(value, rows[key]) for key, value in optimizer.communicator.state_rows().items())
    assert optimizer.communicator.stats.skipped == 1
    train(optimizer, params, at + 1, at + 2)
    assert not torch.equal(params[0], before[0])


@every_class
def test_a_grad_scaler_changes_nothing(case: OptimizerCase) -> None:
    params = parameters(torch.float32)
    others = clones(params)
    optimizer, other = make(case, params), make(case, others)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(10):
        for p, q, grad in zip(params, others, gradients(params, step), strict=True):
            p.grad, q.grad = scaler.scale(grad), grad.clone()
        scaler.step(optimizer)
        scaler.update()
        other.step()
    assert_equal(params, others)


@every_class
@pytest.mark.parametrize("at", [3, 9], ids=["in the warm-up", "after it"])
def test_resume_is_exact(case: OptimizerCase, at: int) -> None:
    params = parameters()
    optimizer = make(case, params)
    train(optimizer, params, 0, at)
    saved = copy.deepcopy(optimizer.state_dict())
    others = clones(params)
    other = make(case, others)
    other.load_state_dict(saved)
    train(optimizer, params, at, at + 6)
    train(other, others, at, at + 6)
    assert_equal(params, others)


@every_class
def test_a_state_without_residuals_is_refused(case: OptimizerCase) -> None:
    params = parameters()
    optimizer = make(case, params)
    train(optimizer, params, 0, 8)
    saved = optimizer.state_dict()
    del saved["communicator"]
    other = make(case, params)
    other.load_state_dict(saved)
    with pytest.raises(CheckpointError, match="expected the residuals of every rank with the loaded state, got none"):
        train(other, params, 8, 9)


@every_class
def test_narrow_parameters_and_states(case: OptimizerCase) -> None:
    params = parameters(torch.bfloat16)
    optimizer = make(case, params, stochastic_rounding=True, state_dtype=torch.bfloat16)
    before = clones(params)
    train(optimizer, params, 0, 10)
    assert all(p.isfinite().all() and not torch.equal(p, q) for p, q in zip(params, before, strict=True))
    assert optimizer.state[params[0]]["exp_avg"].dtype == torch.bfloat16


@pytest.mark.parametrize(("warmup_steps", "kappa", "double_every", "max_interval"), [(40, 3, 7, 4), (1, 1, 2, 64)])
def test_policies(warmup_steps: int, kappa: int, double_every: int, max_interval: int) -> None:
    policy = {"warmup_steps": warmup_steps, "kappa": kappa, "double_every": double_every, "max_interval": max_interval}
    optimizer = ZeroOneAdam([nn.Parameter(torch.ones(2))], **policy)
    dense, exchanged = zero_one_policies(200, **policy)
    expected = ["dense" if t in dense else "one bit" if t in exchanged else "local" for t in range(200)]
    assert [optimizer.kind(t) for t in range(200)] == expected


def test_a_plan_that_compresses_the_variance_is_refused() -> None:
    optimizer = ZeroOneAdam([("w", nn.Parameter(torch.ones(4, 4)))], plan=Plan(compress=("*w",)))
    with pytest.raises(ValueError, match=r"match parameters alone, got \('\*w',\), which also match 'gradient of w'"):
        optimizer.step()


def test_a_step_size_of_zero_is_no_harm() -> None:
    params = parameters()
    optimizer = ZeroOneAdam(params, lr=0.0, warmup_steps=2, kappa=1, double_every=2, plan=ALL)
    before = clones(params)
    train(optimizer, params, 0, 9)
    assert_equal(params, before)
    optimizer.param_groups[0]["lr"] = 1e-2
    train(optimizer, params, 9, 14)
    assert all(p.isfinite().all() and not torch.equal(p, q) for p, q in zip(params, before, strict=True))


@every_class
def test_minimises(case: OptimizerCase) -> None:
    """A quadratic whose curvatures span two orders, with noise; 4 steps in 5 are compressed."""
    target = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    curvature = torch.logspace(-1, 1, 64)
    weight = nn.Parameter(torch.zeros(32, 64))
    often = {"kappa": 50} if case.cls is ZeroOneAdam else {}  # a variance that is seldom updated is too large here
    optimizer = case.cls([weight], lr=0.05, warmup_steps=100, plan=ALL, betas=(0.9, 0.99), **often)
    noise = torch.Generator().manual_seed(2)
    for step in range(500):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 500)
        weight.grad = curvature * (weight.detach() - target) + 0.1 * torch.randn(32, 64, generator=noise)
        optimizer.step()
    loss = (curvature * (weight.detach() - target) ** 2).mean()
    assert loss < 0.01 * (curvature * target**2).mean()
