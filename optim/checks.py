"""Checks of optimizers' hyper-parameters with one wording: who, expected, got."""

import math

import torch


def check_lr(who: str, lr: object) -> None:
    """Raise ValueError unless `lr` is a finite number >= 0, or a 0-d tensor of one."""
    if isinstance(lr, torch.Tensor):
        if lr.ndim != 0:
            raise ValueError(f"{who}: expected a number or a 0-d tensor lr, got shape {tuple(lr.shape)}.")
        lr = lr.item()
    check_range(who, "lr", lr)


def check_betas(who: str, betas: object) -> None:
    """Raise ValueError unless `betas` is a pair of numbers in [0, 1)."""
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise ValueError(f"{who}: expected a pair betas, got betas={betas!r}.")
    for i, beta in enumerate(betas):
        check_range(who, f"betas[{i}]", beta, below=1.0)


def check_range(who: str, name: str, value: object, *, below: float = math.inf) -> None:
    """Raise ValueError unless `value` is a finite number with 0 <= value < below."""
    if not isinstance(value, float | int) or isinstance(value, bool) or not 0.0 <= value < below:
        expected = f"0 <= {name}" if below == math.inf else f"0 <= {name} < {below:g}"
        raise ValueError(f"{who}: expected {expected}, got {name}={value!r}.")
