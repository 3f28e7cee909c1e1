"""Checks of optimizers' hyper-parameters with one wording: who, expected, got."""

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


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


def check_whole(who: str, params: Iterable[Tensor], shapes: Collection[torch.Size]) -> None:
    """Raise RuntimeError if a host has put other tensors than whole ones in the place of an optimizer's parameters.

    Args:
        who: The optimizer.
        params: Its parameters now: those that it was given, or copies in another dtype, say.
        shapes: The shapes of those that it was given.
    """
    other = next((p for p in params if p.shape not in shapes), None)
    if other is not None:
        raise RuntimeError(
            f"{who}: expected parameters of the shapes that it was given, got one of {tuple(other.shape)}, such as the "
            "flat partitions of DeepSpeed's ZeRO stages 1 to 3. Use stage 0, shard with FSDP2, or take an optimizer "
            "that treats each element alone: AdaBelief, DiffGrad or LaProp."
        )


def check_given(who: str, groups: Iterable[Mapping[str, Any]], given: Collection[Tensor]) -> None:
    """Raise RuntimeError if a host has put other tensors in the place of the parameters that an optimizer was given."""
    params = [p for group in groups for p in group["params"]]
    if params and not any(p in given for p in params):
        raise RuntimeError(
            f"{who}: expected the parameters that it was given, got others, one of {tuple(params[0].shape)}, such "
            "as DeepSpeed puts in their place in 16 bits and at ZeRO stages 1 to 3. Use stage 0 in float32, or FSDP2."
        )
