"""Checks of optimizers' hyper-parameters with one wording: who, expected, got."""

import math
from collections.abc import Mapping
from typing import Any

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


def check_eps_in_state(who: str, group: Mapping[str, Any]) -> None:
    """Raise ValueError if the group's `eps` is too small to be told from zero in its `state_dtype`."""
    dtype, eps = group["state_dtype"], group["eps"]
    least = 0.0 if dtype is None else torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    if 0.0 < eps < least:
        raise ValueError(f"{who}: expected eps >= {least:.1e} with state_dtype={dtype}, got eps={eps!r}.")
