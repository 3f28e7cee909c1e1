"""Every optimizer against its reference, and AdamP against what projection means."""

from typing import Any

import numpy as np
import pytest
import torch
from cases import OptimizerCase
from optimizing import assert_equal, clones, eager, every_case, every_class, make, parameters, train
from torch import Tensor, nn

from gradwire.optim import AdamP, base, kernels


def tangent_gradient(p: Tensor, gradient: Tensor, step: int) -> Tensor:
    """Orthogonal to the weight by rows, as a whole, or not at all, in turns."""
    if p.ndim < 2 or step % 3 == 2:
        return gradient
    w, g = (x.reshape(len(p) if step % 3 == 0 else 1, -1) for x in (p.detach(), gradient))
    return (g - w * ((w * g).sum(1, keepdim=True) / (w * w).sum(1, keepdim=True))).reshape(p.shape)


@every_case
@eager
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e-8])
def test_equals_the_reference(case: OptimizerCase, foreach: bool, scale: float) -> None:
    params = parameters()
    before = [p.detach().numpy().copy() for p in params]
    optimizer = make(case, params, foreach=foreach)
    grads: list[list[Any]] = [[] for _ in params]
    lrs = [1e-2 * 0.97**step for step in range(50)]
    for step, lr in enumerate(lrs):
        for i, p in enumerate(params):
            p.grad = None if i == 2 and step < 7 else tangent_gradient(p, torch.randn_like(p) * scale, step)
            grads[i].append(None if p.grad is None else p.grad.numpy().copy())
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
    for p, start, gradients in zip(params, before, grads, strict=True):
        expected = case.reference(start, gradients, lrs, **case.kwargs)
        rounding = 1e-14 * np.abs(start).max()  # of weights that hardly move
        assert np.abs(p.detach().numpy() - expected).max() <= 1e-12 * np.abs(expected - start).max() + rounding


@eager
def test_adamp_without_projection_is_adamw(foreach: bool) -> None:
    params = parameters()
    others = clones(params)
    train(AdamP(params, lr=1e-2, weight_decay=0.1, delta=0.0, foreach=foreach), params, 20)
    train(torch.optim.AdamW(others, lr=1e-2, weight_decay=0.1), others, 20)
    assert_equal(params, others, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dims", [1, 0], ids=["rows", "matrix"])
def test_adamp_moves_scale_invariant_weights_along_the_tangent(dims: int) -> None:
    weight = nn.Parameter(torch.randn(8, 16, dtype=torch.float64))
    optimizer = AdamP([weight], lr=1e-2)
    for step in range(5):
        before = weight.detach().clone()
        weight.grad = tangent_gradient(weight, torch.randn_like(weight), 1 - dims)
        optimizer.step()
        radial = (before * (weight.detach() - before)).flatten(1)
        assert radial.sum(1).abs().max() < 1e-9 if dims else radial.sum().abs() < 1e-9
        assert radial.abs().sum() > 1e-3, step


def test_adamp_decays_scale_invariant_weights_less() -> None:
    weight, vector = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    optimizer = AdamP([weight, vector], lr=0.1, weight_decay=0.5, wd_ratio=0.1)
    weight.grad, vector.grad = torch.zeros(2, 2), torch.zeros(2)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((2, 2), 0.995))
    torch.testing.assert_close(vector.detach(), torch.full((2,), 0.95))


@every_case
def test_foreach_equals_loop(case: OptimizerCase, monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters(torch.float32)
    in_one, in_chunks, in_cache, in_pieces = (clones(params) for _ in range(4))
    train(make(case, params, foreach=False), params)
    train(make(case, in_one, foreach=True), in_one)
    train(make(case, in_cache), in_cache)
    monkeypatch.setattr(base, "CHUNK", 40)
    train(make(case, in_chunks, foreach=True), in_chunks)
    monkeypatch.setattr(kernels, "PIECE", 7)
    train(make(case, in_pieces, foreach=False), in_pieces)
    for others in (in_one, in_chunks, in_cache):
        assert_equal(others, params)
    assert_equal(in_pieces, params, rtol=1e-6, atol=1e-7)  # a sigmoid's last bit depends on its place in a vector


@every_case
@eager
def test_numbers_may_stay_on_the_device(case: OptimizerCase, foreach: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an accelerator: one 0-d tensor per parameter where the host would read floats."""

    def unread(value: Any, start: int, stop: int) -> Any:
        return list(value[start:stop].unbind()) if isinstance(value, Tensor) and value.ndim else value

    params = parameters(torch.float32)
    others = clones(params)
    train(make(case, params), params)
    monkeypatch.setattr(kernels, "_numbers", unread)
    train(make(case, others, foreach=foreach), others)
    assert_equal(others, params, rtol=1e-6, atol=1e-6)


@every_class
def test_descends_rosenbrock(case: OptimizerCase) -> None:
    xy = nn.Parameter(torch.tensor([-1.5, 1.5]))
    optimizer = make(case, [xy], lr=case.rosenbrock_lr)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (1 - xy[0]) ** 2 + 100 * (xy[1] - xy[0] ** 2) ** 2
        loss.backward()
        return loss

    first = closure().item()
    for _ in range(300):
        optimizer.step(closure)
    assert closure().item() < 0.2 * first
