"""`DiLoCo` and `LocalSGD` on CUDA: what they do on the CPU, and no waiting for the device within a round."""

import pytest
import torch
from torch import nn

from gradwire.comm import EF, Communicator, LocalSGD
from gradwire.compression import BlockQuantize, Chain, ChunkTopK
from gradwire.optim import DiLoCo

pytestmark = pytest.mark.gpu

SHAPES = [(64, 128), (48,), ()]


def _loop(params: list[nn.Parameter], method: str, every: int) -> torch.optim.Optimizer:
    inner = torch.optim.AdamW(params, lr=0.01, fused=True)
    if method == "local_sgd":
        LocalSGD(inner, every=every)
        return inner
    if method == "diloco":
        return DiLoCo(inner, every=every)
    chain = Chain(ChunkTopK(k=64, chunk=512), BlockQuantize(bits=2))
    outer = torch.optim.SGD(params, lr=1.0)
    return DiLoCo(inner, outer, every=every, communicator=Communicator(chain, feedback=EF(decay=0.95)))


@pytest.mark.parametrize("method", ["diloco", "local_sgd", "sparseloco"])
def test_equals_the_cpu(method: str) -> None:
    host = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    device = [nn.Parameter(p.detach().cuda()) for p in host]
    loops = [_loop(params, method, 3) for params in (host, device)]
    for _ in range(10):
        for p, q in zip(host, device, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.cuda()
        for loop in loops:
            loop.step()
    for p, q in zip(host, device, strict=True):
        off = (p.detach() - q.detach().cpu()).abs() > 1e-5
        assert off.float().mean() < 0.01  # a tie may be broken otherwise


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("method", ["diloco", "local_sgd"])
def test_steps_within_a_round_never_wait_for_the_host(method: str) -> None:
    params = [nn.Parameter(torch.randn(shape, device="cuda")) for shape in SHAPES]
    loop = _loop(params, method, 100)
    for p in params:
        p.grad = torch.randn_like(p)
    for _ in range(3):
        loop.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            loop.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
