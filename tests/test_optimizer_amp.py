"""Loss scales and steps that are skipped."""

import pytest
import torch
from cases import OptimizerCase
from optimizing import assert_equal, clones, eager, every_class, make, parameters, train

from gradwire.optim import base


@every_class
@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler(case: OptimizerCase, unscale: bool) -> None:
    params = parameters(torch.float32)
    plain = clones(params)
    optimizer, other = make(case, params), make(case, plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(4):
        for p, q in zip(params, plain, strict=True):
            q.grad = torch.randn_like(p)
            p.grad = q.grad * scaler.scale(torch.tensor(1.0))
        if step == 2:
            before = [p.detach().clone() for p in params]
            params[0].grad[0] = torch.inf
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if step == 2:
            assert_equal(params, before)
        else:
            other.step()
    assert_equal(params, plain)
    assert scaler.get_scale() == 512.0
    assert {optimizer.state[p]["step"].item() for p in params} == {3.0}


@every_class
@eager
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_skipped_on_the_device_changes_nothing(
    case: OptimizerCase, foreach: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "_on_host", lambda x: False)
    params = parameters(dtype)
    others = clones(params)
    optimizer, other = make(case, params, foreach=foreach), make(case, others, foreach=foreach)
    for step in range(5):
        optimizer.found_inf = torch.tensor(float(step in (0, 3)))
        before = [x.detach().clone() for p in params for x in (p, *optimizer.state[p].values())]
        for p, q in zip(params, others, strict=True):
            q.grad = torch.randn_like(q)
            p.grad = torch.full_like(p, torch.nan) if optimizer.found_inf else q.grad.clone()
        optimizer.step()
        if not optimizer.found_inf:
            other.step()
        elif step:
            assert_equal([x for p in params for x in (p, *optimizer.state[p].values())], before)
    assert_equal(params, others)


@every_class
def test_found_inf_on_the_host_skips_the_step(case: OptimizerCase) -> None:
    params = parameters(torch.float32)
    before = clones(params)
    optimizer = make(case, params)
    optimizer.found_inf = torch.tensor(1.0)
    train(optimizer, params, 1)
    assert_equal(params, before)
    optimizer.found_inf = torch.tensor(0.0)
    train(optimizer, params, 1)
    assert not torch.equal(params[0], before[0])
