"""Makes `adamp.npz`, `sgdp.npz`, `adabelief.npz`, `laprop.npz`, `diffgrad.npz`, `lamb.npz`: other packages' optimizers.

Each holds the weights after 50 steps in float64 of every run below, which tests/test_optimizer_oracles.py compares
with ours. From PyPI, without dependencies, which would replace torch, and with JAX apart:

    pip install --no-deps --target oracles adamp==0.3.0 adabelief-pytorch==0.2.1 tabulate colorama timm==1.0.31 \
        torch-optimizer==0.3.0 pytorch-ranger==0.1.1 pytorch-optimizer==4.1.0 packaging
    pip install --target jax jax==0.10.2 optax==0.2.8

and what is on GitHub alone, each a single file to be put into `oracles`:

    Z-T-WANG/LaProp-Optimizer@ff5efc0              laprop.py
    shivram1987/diffGrad@93fb7fc                   diffGrad_v2.py
    lessw2020/Best-Deep-Learning-Optimizers@5db143c  diffgrad/diffgrad.py

    PYTHONPATH=oracles:jax JAX_ENABLE_X64=1 python -P tests/golden/make_golden.py
"""

import importlib
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

SHAPES = [(6, 5), (5,), (4, 3, 3, 3), (2, 6, 7), ()]
LR = 1e-2
STEPS = 50


@dataclass(frozen=True)
class Run:
    """50 steps of another package's optimizer.

    Args:
        oracle: Its module and class.
        kwargs: Its hyper-parameters.
        ours: Those with which our optimizer takes the same steps; None if they are spelled alike.
        deviates: How it differs from its paper; the empty string if it does not.
        scales: Of the gradients, in turns.
        scheduled: Whether lr falls by 3 % in every step.
        reuses_gradients: Whether gradients stay in the same memory, as with `zero_grad(set_to_none=False)`.
        decays_last: Share of the weight that it takes off after each step and we take off before it.
    """

    oracle: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    ours: dict[str, Any] | None = None
    deviates: str = ""
    scales: tuple[float, ...] = (1.0, 1e-4, 1e-8)
    scheduled: bool = False
    reuses_gradients: bool = False
    decays_last: float = 0.0


_TINY = (1e-8,)
_TIMM_LAMB = {"max_grad_norm": None, "always_adapt": True}
_FLOOR = "1e-15 under the root is a floor of 3e-8 below the denominator"

RUNS: dict[str, list[Run]] = {
    "AdamP": [
        Run("adamp:AdamP"),
        Run("adamp:AdamP", {"weight_decay": 0.1, "delta": 1.0, "nesterov": True}),
        Run("adamp:AdamP", {"betas": (0.5, 0.9), "eps": 1e-4, "weight_decay": 0.1, "delta": 2.0, "wd_ratio": 0.5}),
        Run("timm.optim:AdamP", {"weight_decay": 0.1, "delta": 2.0}),
        Run("adamp:AdamP", scales=_TINY),
        Run(
            "pytorch_optimizer:AdamP",
            {"weight_decay": 0.1, "delta": 1.0},
            deviates="eps is divided by the root of the bias correction",
        ),
    ],
    "SGDP": [
        Run("adamp:SGDP", {"momentum": 0.9, "weight_decay": 0.1, "delta": 2.0, "nesterov": True}),
        Run("timm.optim:SGDP", {"momentum": 0.9, "weight_decay": 0.1, "delta": 2.0}),
        Run("timm.optim:SGDP", {"momentum": 0.5, "dampening": 0.3, "eps": 1e-4, "delta": 1.0, "wd_ratio": 0.5}),
        Run("timm.optim:SGDP"),
        Run(
            "adamp:SGDP",
            {"momentum": 0.9, "delta": 2.0},
            deviates="without Nesterov's momentum the projection is taken of the momentum buffer itself",
        ),
    ],
    "AdaBelief": [
        Run("adabelief_pytorch:AdaBelief", scheduled=True),
        Run("adabelief_pytorch:AdaBelief", {"weight_decay": 0.1, "betas": (0.8, 0.99), "amsgrad": True}),
        Run("adabelief_pytorch:AdaBelief", {"weight_decay": 0.01, "fixed_decay": True, "degenerated_to_sgd": False}),
        Run("adabelief_pytorch:AdaBelief", scales=_TINY),
        Run("adabelief_pytorch:AdaBelief", {"rectify": False, "weight_decouple": False, "weight_decay": 0.1}),
        Run("timm.optim:AdaBelief", {"rectify": False, "amsgrad": True, "eps": 1e-8}, scheduled=True),
        Run(
            "timm.optim:AdaBelief",
            {"weight_decay": 0.1, "decoupled_decay": False},
            {"weight_decay": 0.1, "weight_decouple": False},
        ),
        Run("optax:adabelief", {"eps": 1e-8, "eps_root": 1e-8}, {"eps": 1e-8, "rectify": False}),
        Run("optax:adabelief", {}, {"rectify": False}),
        Run(
            "torch_optimizer:AdaBelief",
            {"eps": 1e-8, "rectify": True, "weight_decouple": True},
            deviates="rectifies from rho > 4 on, corrects the bias twice, and not at all before",
        ),
    ],
    "LaProp": [
        Run("laprop:LaProp"),
        Run("laprop:LaProp", {"betas": (0.5, 0.99), "eps": 1e-4, "amsgrad": True}, scheduled=True),
        Run("laprop:LaProp", {"centered": True}, scheduled=True),
        Run("laprop:LaProp", {"centered": True, "amsgrad": True, "betas": (0.9, 0.99)}),
        Run(
            "laprop:LaProp",
            {"weight_decay": 0.01},
            {"weight_decay": 0.01, "fixed_decay": True},
            scheduled=True,
            decays_last=0.01,
        ),
        Run("laprop:LaProp", scales=_TINY),
        Run("pytorch_optimizer:LaProp", deviates=_FLOOR, scales=_TINY),
    ],
    "DiffGrad": [
        Run("diffGrad_v2:diffgrad", {"weight_decay": 0.1}, scheduled=True),
        Run("torch_optimizer:DiffGrad", {"betas": (0.5, 0.9), "eps": 1e-4}),
        Run("diffgrad:DiffGrad", {"version": 1, "weight_decay": 0.1}),
        Run("diffgrad:DiffGrad", {"version": 2}),
        Run("diffgrad:DiffGrad", {"weight_decay": 0.1}, {"weight_decay": 0.1, "original": True}, reuses_gradients=True),
        Run(
            "diffgrad:DiffGrad",
            reuses_gradients=True,
            deviates="keeps a reference to the gradient, which the next one overwrites, so that nothing ever changes",
        ),
        Run("torch_optimizer:DiffGrad", scales=_TINY),
        Run("pytorch_optimizer:DiffGrad", deviates=_FLOOR, scales=_TINY),
    ],
    "LAMB": [
        Run("timm.optim:Lamb", _TIMM_LAMB | {"weight_decay": 0.1}, {"weight_decay": 0.1}, scheduled=True),
        Run(
            "timm.optim:Lamb",
            _TIMM_LAMB | {"weight_decay": 0.5, "trust_clip": True, "betas": (0.5, 0.99), "eps": 1e-4},
            {"weight_decay": 0.5, "trust_clip": True, "betas": (0.5, 0.99), "eps": 1e-4},
        ),
        Run("timm.optim:Lamb", {"max_grad_norm": None, "weight_decay": 0.0}, {"adapt": False}),
        Run(
            "torch_optimizer:Lamb",
            {"weight_decay": 0.1, "clamp_value": 3.0},
            {"weight_decay": 0.1, "bias_correction": False, "norm_bounds": (0.0, 3.0)},
        ),
        Run(
            "pytorch_optimizer:Lamb",
            {"weight_decay": 0.1, "weight_decouple": False},
            {"weight_decay": 0.1, "bias_correction": False, "norm_bounds": (0.0, 10.0)},
            deviates="adds eps to the norm of the step, too",
        ),
        Run("optax:lamb", {"weight_decay": 0.1}, {"weight_decay": 0.1}),
        Run("optax:lamb", {"weight_decay": 0.1}, {"weight_decay": 0.1}, scales=_TINY),
    ],
}


def problem(run: Run) -> tuple[list[Any], list[list[Any]], list[float]]:
    """First weights, the gradients of every step, the lr of every step."""
    rng = np.random.RandomState(7)
    weights = [np.asarray(rng.standard_normal(shape)) for shape in SHAPES]
    scales = [run.scales[step % len(run.scales)] for step in range(STEPS)]
    gradients = [[np.asarray(rng.standard_normal(shape) * scale) for shape in SHAPES] for scale in scales]
    return weights, gradients, [LR * 0.97**step if run.scheduled else LR for step in range(STEPS)]


def follow(run: Run, make: Callable[[list[nn.Parameter]], Any], start: float = 1.0) -> list[Any]:
    """The weights after all steps, if at first they are those of the problem times `start`."""
    weights, gradients, lrs = problem(run)
    params = [nn.Parameter(torch.tensor(w * start)) for w in weights]
    optimizer = make(params)
    for step, lr in zip(gradients, lrs, strict=True):
        for p, g in zip(params, step, strict=True):
            if run.reuses_gradients and p.grad is not None:
                p.grad.copy_(torch.tensor(g))
            else:
                p.grad = torch.tensor(g)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
    return [p.detach().numpy() for p in params]


class _Optax:
    """An optimizer of optax with the interface of one of torch."""

    def __init__(self, name: str, params: list[nn.Parameter], lr: float, **kwargs: Any) -> None:
        jax, self.optax = importlib.import_module("jax"), importlib.import_module("optax")
        assert jax.config.jax_enable_x64, "set JAX_ENABLE_X64=1"
        self.as_array = jax.numpy.asarray
        self.params, self.param_groups = params, [{"lr": lr}]
        self.optimizer = getattr(self.optax, name)(lr, **kwargs)
        self.state = self.optimizer.init(self._weights())

    def _weights(self) -> list[Any]:
        return [self.as_array(p.detach().numpy()) for p in self.params]

    def step(self) -> None:
        assert self.param_groups[0]["lr"] == LR, "optax takes schedules another way"
        grads = [self.as_array(p.grad.numpy()) for p in self.params]
        updates, self.state = self.optimizer.update(grads, self.state, self._weights())
        for p, u in zip(self.params, updates, strict=True):
            p.data += torch.tensor(np.asarray(u))


def _oracle(run: Run, params: list[nn.Parameter]) -> Any:
    module, name = run.oracle.split(":")
    if module == "optax":
        return _Optax(name, params, LR, **run.kwargs)
    quiet = {"print_change_log": False} if module == "adabelief_pytorch" else {}
    return getattr(importlib.import_module(module), name)(params, lr=LR, **run.kwargs, **quiet)


def main() -> None:
    timm: Any = types.ModuleType("timm")  # the real one needs torchvision, which timm.optim does not
    timm.__path__ = [str(Path(folder) / "timm") for folder in sys.path]
    models: Any = types.ModuleType("timm.models")
    models.group_parameters = None
    sys.modules |= {"timm": timm, "timm.models": models}
    for algorithm, runs in RUNS.items():
        kept = {
            f"{number}_{i}": w
            for number, run in enumerate(runs)
            for i, w in enumerate(follow(run, lambda params, run=run: _oracle(run, params)))
        }
        np.savez_compressed(Path(__file__).with_name(f"{algorithm.lower()}.npz"), **kept)


if __name__ == "__main__":
    main()
