"""Arithmetic in float32 around tensors that are kept narrower, and three ways to round what is written back."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gradwire.compression import counter_rng
from gradwire.compression.rounding import round_to_format


def widen(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The tensors in `dtype`: the very list if they have it already."""
    if all(x.dtype == dtype for x in tensors):
        return tensors
    wide = [torch.empty_like(x, dtype=dtype) for x in tensors]
    torch._foreach_copy_(wide, tensors)
    return wide


def write_back_(
    params: list[Tensor],
    wide: list[Tensor],
    state: Mapping[str, list[Tensor]],
    wide_state: Mapping[str, list[Tensor]],
    compensations: Sequence[Tensor],
    keys: Sequence[Tensor],
    first: int,
) -> None:
    """Round results into the tensors that they were widened from.

    Args:
        params: Parameters.
        wide: Their new values; the very tensors if they are not narrower.
        state: State tensors by name.
        wide_state: Their new values, likewise.
        compensations: One per parameter to keep what rounding loses (Kahan), or none.
        keys: Random keys of the parameters, 0-d int64, to round stochastically, or none.
        first: Number of the first element within each parameter.
    """
    if wide is not params:
        _round_(params, wide, [counter_rng.at_step(key, 0) for key in keys], first)
    if compensations:
        lost = torch._foreach_sub(wide, widen(params, wide[0].dtype))
        torch._foreach_copy_(list(compensations), list(lost))
    for i, (name, tensors) in enumerate(state.items(), 1):
        if wide_state[name] is not tensors:
            of_params = tensors[0].shape == params[0].shape
            _round_(
                tensors, wide_state[name], [counter_rng.at_step(key, i) for key in keys] if of_params else [], first
            )


def _round_(narrow: list[Tensor], wide: list[Tensor], keys: list[Tensor], first: int) -> None:
    """To nearest without keys."""
    for x, rounded, key in zip(wide, narrow, keys, strict=False):
        counters = torch.arange(first, first + x.numel(), device=x.device).view(x.shape)
        uniform = (counter_rng.bits(key, counters) >> 8).to(x.dtype) * 2.0**-24
        rounded.copy_(round_to_format(x, rounded.dtype, uniform))
    if not keys:
        torch._foreach_copy_(narrow, wide)
