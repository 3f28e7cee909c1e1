"""Optimizers on CUDA: equal to the loop on CPU, and no step waits for the device."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cases import OPTIMIZERS, OptimizerCase
from torch import nn

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(400)]

every_class = pytest.mark.parametrize(
    "case", list({case.cls: case for case in reversed(OPTIMIZERS)}.values()), ids=lambda case: case.cls.__name__
)
MODES: list[dict[str, Any]] = [{}, {"foreach": False}, {"fused": True}]
every_mode = pytest.mark.parametrize("mode", MODES, ids=["default", "loop", "fused"])
SHAPES = [(60, 50), (40, 30, 3, 3), (2000,), (300, 400), (), (0, 3)]


@contextmanager
def no_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def on_both(case: OptimizerCase, dtype: torch.dtype, **mode: Any) -> tuple[list[Any], Any, list[Any], Any]:
    """Parameters and optimizer on CUDA, then equal ones in a loop on CPU."""
    host = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]
    device = [nn.Parameter(p.detach().cuda()) for p in host]
    options = {"lr": 1e-2, **case.kwargs}
    return device, case.cls(device, **options, **mode), host, case.cls(host, **options, foreach=False)


def give_gradients(device: list[Any], host: list[Any]) -> None:
    for p, q in zip(device, host, strict=True):
        q.grad = torch.randn_like(q)
        p.grad = q.grad.cuda()


@every_class
@every_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_cpu_without_synchronisation(case: OptimizerCase, mode: dict[str, Any], dtype: torch.dtype) -> None:
    device, optimizer, host, reference = on_both(case, dtype, **mode)
    for step in range(5):
        give_gradients(device, host)
        reference.step()
        if step < 1:
            optimizer.step()  # creates state and compiles
        else:
            optimizer.param_groups[0]["lr"] = reference.param_groups[0]["lr"]
            with no_synchronisation():
                optimizer.step()
        reference.param_groups[0]["lr"] *= 0.9
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-3}
    for p, q in zip(device, host, strict=True):
        torch.testing.assert_close(p.detach().cpu(), q.detach(), **tolerance)
        assert {x.device.type for x in optimizer.state[p].values()} == {"cuda"}


@every_mode
@pytest.mark.parametrize("lr_device", ["cpu", "cuda"])
def test_lr_as_tensor(mode: dict[str, Any], lr_device: str) -> None:
    device, optimizer, host, reference = on_both(OPTIMIZERS[0], torch.float32, **mode)
    optimizer.param_groups[0]["lr"] = torch.tensor(1e-2, device=lr_device)
    for step in range(3):
        give_gradients(device, host)
        reference.step()
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for p, q in zip(device, host, strict=True):
        torch.testing.assert_close(p.detach().cpu(), q.detach(), rtol=1e-4, atol=1e-5)


@every_class
@every_mode
def test_grad_scaler_skips_on_the_device(case: OptimizerCase, mode: dict[str, Any]) -> None:
    device, optimizer, host, reference = on_both(case, torch.float32, **mode)
    scaler = torch.amp.GradScaler("cuda", init_scale=256.0)
    scaler.scale(torch.ones((), device="cuda"))
    for step in range(4):
        give_gradients(device, host)
        for p in device:
            p.grad *= scaler.get_scale()
        if step == 0 or step == 2:  # the very first step, too: its bias correction would divide by zero
            device[0].grad[0, 0] = torch.inf
            before = copy.deepcopy([p.detach() for p in device])
        scaler.step(optimizer)
        scaler.update()
        if step in (0, 2):
            for p, old in zip(device, before, strict=True):
                assert torch.equal(p, old)
        else:
            reference.step()
    for p, q in zip(device, host, strict=True):
        torch.testing.assert_close(p.detach().cpu(), q.detach(), rtol=1e-4, atol=1e-5)
        assert optimizer.state[p]["step"].item() == 2.0


@every_mode
def test_found_inf_of_a_communicator_is_not_waited_for(mode: dict[str, Any]) -> None:
    device, optimizer, host, _ = on_both(OPTIMIZERS[0], torch.float32, **mode)
    optimizer.found_inf = torch.zeros((), device="cuda")
    give_gradients(device, host)
    optimizer.step()
    before = copy.deepcopy([p.detach() for p in device])
    optimizer.found_inf.fill_(1.0)
    with no_synchronisation():
        optimizer.step()
    for p, old in zip(device, before, strict=True):
        assert torch.equal(p, old)
    assert {optimizer.state[p]["step"].item() for p in device} == {1.0}


@every_class
@every_mode
def test_can_be_captured_in_a_cuda_graph(case: OptimizerCase, mode: dict[str, Any]) -> None:
    """Replays go on counting steps and see a learning rate that changes in its tensor."""
    device, optimizer, host, reference = on_both(case, torch.float32, capturable=True, **mode)
    lr = torch.tensor(1e-2, device="cuda")
    optimizer.param_groups[0]["lr"] = lr
    give_gradients(device, host)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for step in range(4):
        if step == 2:
            lr.fill_(1e-3)
        graph.replay()
    for step in range(7):
        reference.param_groups[0]["lr"] = 1e-2 if step < 5 else 1e-3
        reference.step()
    for p, q in zip(device, host, strict=True):
        torch.testing.assert_close(p.detach().cpu(), q.detach(), rtol=1e-4, atol=1e-5)
        assert optimizer.state[p]["step"].item() == 7.0


@every_class
@every_mode
@pytest.mark.parametrize("keeper", [{"stochastic_rounding": True}, {"kahan_sum": True}], ids=str)
def test_sixteen_bits_keep_small_steps(case: OptimizerCase, mode: dict[str, Any], keeper: dict[str, Any]) -> None:
    exact = nn.Parameter(torch.full((64, 64), 1.5, dtype=torch.float64))
    kept = nn.Parameter(exact.detach().bfloat16().cuda())
    options = {**case.kwargs, "lr": 1e-4}
    one, other = case.cls([exact], **options), case.cls([kept], **options, **keeper, **mode)
    for _ in range(40):
        exact.grad = (torch.rand(64, 64) + 0.5).bfloat16().double()
        kept.grad = exact.grad.bfloat16().cuda()
        one.step()
        other.step()
    moved = kept.detach().double().cpu()
    if "kahan_sum" in keeper:
        moved += other.state[kept]["compensation"].double().cpu()
    assert (1.5 - moved.mean()).item() == pytest.approx((1.5 - exact.mean()).item(), rel=0.05)
