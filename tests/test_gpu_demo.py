"""`DeMo` on CUDA: what it does on the CPU, in every form, and no waiting for the device."""

from typing import Any

import pytest
import torch
from torch import nn

from gradwire.comm import Plan
from gradwire.optim import DeMo

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]  # compilers warn

SHAPES = [(64, 128), (48,), (16, 4, 2, 2), (65, 130)]
FORMS = ["2024", "2026", "overlapped"]
every_form = pytest.mark.parametrize("form", FORMS)


def make(params: Any, form: str, **options: Any) -> DeMo:
    return DeMo(params, **{"lr": 1e-2, "form": form, "k": 64, "plan": Plan(min_numel=0), **options})


@every_form
@pytest.mark.parametrize("fused", [False, True])
def test_equals_the_cpu(form: str, fused: bool) -> None:
    """A sign may flip where an update is zero up to rounding; nearly all entries are equal."""
    host = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    device = [nn.Parameter(p.detach().cuda()) for p in host]
    optimizers = [make(host, form), make(device, form, fused=fused)]
    for _ in range(5):
        for p, q in zip(host, device, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.cuda()
        for optimizer in optimizers:
            optimizer.step()
    for optimizer in optimizers:
        optimizer.synchronize()
    for p, q in zip(host, device, strict=True):
        off = (p.detach() - q.detach().cpu()).abs() > 1e-5
        assert off.float().mean() < 0.01


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@every_form
def test_a_steady_step_never_waits_for_the_host(form: str) -> None:
    params = [nn.Parameter(torch.randn(shape, device="cuda")) for shape in SHAPES]
    optimizer = make(params, form, fused=True)
    for p in params:
        p.grad = torch.randn_like(p)
    for _ in range(3):
        optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_form
def test_inf_leaves_no_trace(form: str) -> None:
    params = [nn.Parameter(torch.randn(shape, device="cuda")) for shape in SHAPES]
    optimizer = make(params, form)
    for step in range(3):
        before = [p.detach().clone() for p in params]
        for p in params:
            p.grad = torch.randn_like(p)
        if step == 1:
            params[0].grad[0, 0] = torch.inf
        optimizer.step()
        optimizer.synchronize()
        assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True)) == (step == 1)
    assert optimizer.communicator.stats.skipped == 1
