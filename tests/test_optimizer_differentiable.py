"""`differentiable=True`: gradients flow through steps, and equal finite differences."""

from typing import Any

import pytest
import torch
from cases import OptimizerCase
from optimizing import every_case, every_class, make
from torch import Tensor, nn

SHAPES = [(3, 4), (4,), (2, 3, 2), ()]


@every_case
def test_gradients_equal_finite_differences(case: OptimizerCase) -> None:
    """Of two steps' weights and state with respect to weights, gradients and learning rate."""
    torch.manual_seed(3)

    def steps(lr: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        params = [x.clone() for x in tensors[: len(SHAPES)]]
        optimizer = make(case, params, lr=lr, differentiable=True)
        for step in range(2):
            for i, p in enumerate(params):
                p.grad = tensors[len(SHAPES) * (step + 1) + i]
            optimizer.step()
        return (*params, *(x for p in params for n, x in optimizer.state[p].items() if n != "step"))

    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in SHAPES * 3]
    lr = torch.tensor(0.01, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(steps, (lr, *inputs), eps=1e-7, atol=1e-4, rtol=1e-3)


@every_class
@pytest.mark.parametrize("options", [{}, {"maximize": True}, {"kahan_sum": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_equals_the_loop(case: OptimizerCase, options: dict[str, Any], dtype: torch.dtype) -> None:
    leaves = [torch.randn(shape, dtype=dtype) for shape in SHAPES]
    params = [x.clone().requires_grad_().clone() for x in leaves]
    others = [nn.Parameter(x.clone()) for x in leaves]
    optimizer = make(case, params, differentiable=True, **options)
    other = make(case, others, **options)
    for _ in range(3):
        for p, q in zip(params, others, strict=True):
            q.grad = torch.randn_like(q)
            p.grad = q.grad.clone()
        optimizer.step()
        other.step()
    for p, q in zip(params, others, strict=True):
        assert p.grad_fn is not None
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-12 if dtype == torch.float64 else 0.0, atol=1e-13)
        for name, x in optimizer.state[p].items():
            torch.testing.assert_close(x.detach(), other.state[q][name], rtol=1e-5, atol=1e-6)


@every_class
def test_a_hypergradient_of_the_learning_rate(case: OptimizerCase) -> None:
    """The loss after a step, differentiated by the learning rate that the step took."""
    lr = torch.tensor(1e-3, dtype=torch.float64, requires_grad=True)
    w = torch.tensor([3.0, -2.0], dtype=torch.float64, requires_grad=True)
    weight = w.clone()
    optimizer = make(case, [weight], lr=lr, differentiable=True)
    weight.grad = 2 * w  # of the squared length
    optimizer.step()
    weight.square().sum().backward()
    assert lr.grad is not None
    assert lr.grad < 0, "a larger step would have been better"


@pytest.mark.parametrize("other", ["foreach", "fused", "capturable"])
@every_class
def test_excludes(case: OptimizerCase, other: str) -> None:
    with pytest.raises(ValueError, match=f"expected differentiable or {other}, got both"):
        make(case, [nn.Parameter(torch.ones(2))], **{"differentiable": True, other: True})
