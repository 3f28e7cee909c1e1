"""Parameters and states in 16 bits: rounding to nearest, stochastically, or with compensation."""

from typing import Any

import pytest
import torch
from cases import OptimizerCase
from optimizing import assert_equal, clones, eager, every_class, make, parameters, tensors, train
from torch import nn

low_precision = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
KEEPERS: list[dict[str, Any]] = [{"stochastic_rounding": True}, {"kahan_sum": True}]


@every_class
@pytest.mark.parametrize("keeper", KEEPERS, ids=str)
@low_precision
def test_small_updates_are_not_lost(case: OptimizerCase, keeper: dict[str, Any], dtype: torch.dtype) -> None:
    """Steps of less than half a unit in the last place: rounding to nearest loses all of them."""
    lr = 2e-5 if dtype == torch.float16 else 1e-4
    start = torch.full((128, 128), 1.5)
    exact, lost, kept = (nn.Parameter(start.clone().to(d)) for d in (torch.float64, dtype, dtype))
    optimizers = [make(case, [exact], lr=lr), make(case, [lost], lr=lr), make(case, [kept], lr=lr, **keeper)]
    for _ in range(40):
        gradient = (torch.rand(128, 128) + 0.5).to(dtype)
        for p, optimizer in zip((exact, lost, kept), optimizers, strict=True):
            p.grad = gradient.to(p.dtype)
            optimizer.step()
    moved = 1.5 - exact.mean().item()
    assert moved > 1e-4
    mean = kept.double()
    if "kahan_sum" in keeper:
        mean = mean + optimizers[2].state[kept]["compensation"].double()
        torch.testing.assert_close(mean, exact.detach(), rtol=0.0, atol=0.05 * moved)
    assert 1.5 - mean.mean().item() == pytest.approx(moved, rel=0.05)
    biased = 1.5 - lost.double().mean().item()
    assert abs(biased - moved) > 0.5 * moved, "the test shows nothing"


@every_class
@eager
@low_precision
def test_stochastic_rounding_is_reproducible_and_changes_with_step_and_parameter(
    case: OptimizerCase, foreach: bool, dtype: torch.dtype
) -> None:
    first, second = (nn.Parameter(torch.ones(40, 50, dtype=dtype)) for _ in range(2))
    one_by_one = clones([first, second])
    for params, batched in ((([first, second]), foreach), (one_by_one, False)):
        lr = 1e-4 if dtype == torch.float16 else 1e-3
        optimizer = make(case, params, lr=lr, stochastic_rounding=True, foreach=batched)
        steps = []
        for _ in range(3):
            for p in params:
                p.grad = torch.full_like(p, 0.1)
            optimizer.step()
            steps.append([p.detach().clone() for p in params])
    assert_equal(one_by_one, [first, second])
    assert not torch.equal(steps[0][0] != 1, steps[0][1] != 1)
    assert len(first.unique()) > 1


@every_class
def test_stochastic_rounding_follows_the_name(case: OptimizerCase) -> None:
    """Not the order of parameters, nor their groups."""
    a, b = (nn.Parameter(torch.ones(30, 30, dtype=torch.bfloat16)) for _ in range(2))
    c, d = clones([a, b])
    one = make(case, [("a", a), ("b", b)], lr=1e-3, stochastic_rounding=True)
    other = make(case, [{"params": [("b", d)]}, {"params": [("a", c)]}], lr=1e-3, stochastic_rounding=True)
    for optimizer, params in ((one, (a, b)), (other, (c, d))):
        for p in params:
            p.grad = torch.full_like(p, 0.1)
        optimizer.step()
    assert_equal([c, d], [a, b])


@every_class
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_state_dtype(case: OptimizerCase, dtype: torch.dtype) -> None:
    params = parameters(dtype)
    wide = clones(params)
    optimizer, other = make(case, params, state_dtype=torch.bfloat16), make(case, wide)
    train(optimizer, params, 5)
    train(other, wide, 5)
    for p, q in zip(params, wide, strict=True):
        for name, x in optimizer.state[p].items():
            shaped = x.shape == p.shape and name != "step" and p.ndim > 0
            assert x.dtype == (torch.bfloat16 if shaped else x.dtype)
            assert other.state[q][name].dtype == torch.float32
    assert_equal([p.float() for p in params], [p.float() for p in wide], rtol=0.2, atol=3e-2)
    assert not all(torch.equal(p, q) for p, q in zip(params, wide, strict=True))


@every_class
@pytest.mark.parametrize("keeper", KEEPERS, ids=str)
def test_float32_needs_neither(case: OptimizerCase, keeper: dict[str, Any]) -> None:
    params = parameters(torch.float32)
    plain = clones(params)
    optimizer, other = make(case, params, **keeper), make(case, plain)
    train(optimizer, params)
    train(other, plain)
    assert_equal(tensors(optimizer, params), tensors(other, plain))


@every_class
@pytest.mark.parametrize("options", [*KEEPERS, {"state_dtype": torch.bfloat16}], ids=str)
def test_resumes_to_the_bit(case: OptimizerCase, options: dict[str, Any]) -> None:
    params = parameters(torch.bfloat16)
    optimizer = make(case, params, **options)
    train(optimizer, params, 3)
    restored = clones(params)
    other = make(case, restored, **options)
    other.load_state_dict(optimizer.state_dict())
    train(optimizer, params, 3, seed=1)
    train(other, restored, 3, seed=1)
    assert_equal(tensors(other, restored), tensors(optimizer, params))


@every_class
def test_loading_changes_neither_storage_nor_needs_the_same_one(case: OptimizerCase) -> None:
    params = parameters(torch.bfloat16)
    optimizer = make(case, params, kahan_sum=True)
    train(optimizer, params, 2)
    others = clones(params)
    other = make(case, others, state_dtype=torch.bfloat16)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["state_dtype"] == torch.bfloat16
    assert not other.param_groups[0]["kahan_sum"]
    assert all("compensation" not in state for state in other.state.values())
    train(other, others, 1)
    optimizer.load_state_dict(other.state_dict())
    assert all("compensation" in state for state in optimizer.state.values())
    train(optimizer, params, 1)
