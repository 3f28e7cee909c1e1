"""1-bit optimizers on CUDA: what they do on the CPU, and no waiting for the device."""

from typing import Any

import pytest
import torch
from cases import ONE_BIT, OptimizerCase
from torch import nn

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]  # compilers warn

SHAPES = [(64, 128), (48,), (16, 4, 2, 2), (65, 130)]
every_class = pytest.mark.parametrize(
    "case", list({case.cls: case for case in reversed(ONE_BIT)}.values()), ids=lambda case: case.cls.__name__
)


def make(case: OptimizerCase, params: Any, **options: Any) -> Any:
    return case.cls(params, **{"lr": 1e-2, **case.kwargs, **options})


@every_class
@pytest.mark.parametrize("fused", [False, True])
def test_equals_the_cpu(case: OptimizerCase, fused: bool) -> None:
    """In float64 hardly a sign depends on the order of a sum."""
    host = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in SHAPES]
    device = [nn.Parameter(p.detach().cuda()) for p in host]
    optimizers = [make(case, host), make(case, device, fused=fused)]
    for _ in range(12):  # the last one is an exchange
        for p, q in zip(host, device, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.cuda()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(host, device, strict=True):
        off = (p.detach() - q.detach().cpu()).abs() > 1e-5
        assert off.float().mean() < 0.01


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@every_class
def test_a_steady_step_never_waits_for_the_host(case: OptimizerCase) -> None:
    params = [nn.Parameter(torch.randn(shape, device="cuda")) for shape in SHAPES]
    optimizer = make(case, params, fused=True)
    for p in params:
        p.grad = torch.randn_like(p)
    for _ in range(12):
        optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):  # local steps and an exchange, of 0/1 Adam
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
