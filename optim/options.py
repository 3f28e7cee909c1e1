"""`Options`: how an optimizer runs, apart from its algorithm."""

from collections.abc import Mapping
from typing import Any, TypedDict

import torch


class Options(TypedDict, total=False):
    """Keyword arguments of every optimizer here.

    Args:
        foreach: Update all parameters by batched kernels, or one after the other. None: all on an accelerator and where
            shards have to be summed over; else as many as a CPU's cache holds, which is faster there.
        fused: Compile the update into one kernel. Falls back, with a warning, where there is no compiler.
        maximize: Ascend instead of descend.
        capturable: Accepted as torch's optimizers do. A step may always be captured in a CUDA graph once it has been
            taken outside of one, since step counts live on the device; what a graph is to see changing, such as lr,
            must be a tensor there.
        differentiable: Let autograd differentiate through the step. One parameter at a time, no compiler.
        stochastic_rounding: Round what is stored in less than float32, up or down with the exact value as expectation,
            so that small updates are not lost. Random numbers depend on the parameter's name (or number) and the step
            alone: equal runs are equal to the bit, and so are replicas.
        kahan_sum: Keep what rounding a parameter loses, in a buffer of its dtype, and add it in the next step.
        state_dtype: Dtype of state tensors of the parameter's shape. None: float32, float64 for float64 parameters.
    """

    foreach: bool | None
    fused: bool | None
    maximize: bool
    capturable: bool
    differentiable: bool
    stochastic_rounding: bool
    kahan_sum: bool
    state_dtype: torch.dtype | None


DEFAULTS = Options(
    foreach=None,
    fused=None,
    maximize=False,
    capturable=False,
    differentiable=False,
    stochastic_rounding=False,
    kahan_sum=False,
    state_dtype=None,
)

STORAGE = ("state_dtype", "kahan_sum")
"""What decides how a state is kept; loading one does not change it."""

_EXCLUSIVE = (
    ("foreach", "fused"),
    ("differentiable", "foreach"),
    ("differentiable", "fused"),
    ("differentiable", "capturable"),
    ("stochastic_rounding", "kahan_sum"),
)


def check_options(who: str, group: Mapping[str, Any]) -> None:
    """Raise ValueError if options of a group contradict each other."""
    for first, second in _EXCLUSIVE:
        if group[first] and group[second]:
            raise ValueError(f"{who}: expected {first} or {second}, got both. Leave one of them out.")
    dtype = group["state_dtype"]
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"{who}: expected a floating-point state_dtype, got state_dtype={dtype!r}.")
