"""Call an update on lists of tensors, with all that surrounds an algorithm's mathematics.

Widening to float32, unscaling, sign, the selection where a step is skipped, and the rounding at the end stand here
once (`apply`), and are compiled with the update in `gradwire.optim.compiled`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from gradwire.compression.base import compute_dtype
from gradwire.optim.layout import Flat
from gradwire.optim.precision import widen, write_back_
from gradwire.optim.shards import Shards

Scalars: TypeAlias = dict[str, Any]
"""Numbers of one step by name: bool (static), float or 0-d tensor (one for all), or `[n]` (one per parameter)."""

Update: TypeAlias = Callable[
    [list[Tensor], list[Tensor], dict[str, list[Tensor]], Scalars, Shards], list[Tensor] | None
]
"""`(params, grads, state, scalars, shards)`, in place on lists of tensors."""

CHUNK = 1 << 25
"""Most elements that `foreach` takes at once: it bounds each temporary at 128 MiB and still fills a GPU."""

PIECE = 1 << 17
"""Elements whose temporaries stay in a CPU's cache."""


@dataclass(frozen=True)
class Around:
    """What surrounds the update of some parameters.

    Args:
        maximize: Whether to ascend.
        scale: 0-d, what gradients are divided by first, or None.
        skip: 0-d bool, whether to change nothing, or None for False.
        keys: `[n]` int64, a random key per parameter, to round stochastically, or None.
        elementwise: Whether the update treats each element alone.
    """

    maximize: bool
    scale: Tensor | None = None
    skip: Tensor | None = None
    keys: Tensor | None = None
    elementwise: bool = False


def step_eager(
    update_: Update, flats: Sequence[Flat], scalars: Scalars, around: Around, *, at_once: int, first: int = 0
) -> None:
    """Run the update from parameter `first` on.

    Args:
        update_: The update.
        flats: Parameters of one kind.
        scalars: Numbers of this step.
        around: What surrounds the update.
        at_once: Elements that one call may take, by batched kernels; a parameter that has more is taken alone.
        first: Where to begin.
    """
    for start, stop in _ranges([flat.numel for flat in flats], first, at_once):
        part = flats[start:stop]
        params, grads = [flat.param for flat in part], [flat.grad for flat in part]
        state = {name: [flat.state[name] for flat in part] for name in part[0].state}
        numbers = {name: _numbers(value, start, stop) for name, value in scalars.items()}
        keys = [] if around.keys is None else list(around.keys[start:stop].unbind())
        groups = part[0].groups
        if len(part) == 1 and around.elementwise:
            for piece in _pieces(params[0].numel()):
                last = piece.stop == params[0].numel()
                own = {name: [_piece(xs[0], params[0], piece, last=last)] for name, xs in state.items()}
                apply(update_, [params[0][piece]], [grads[0][piece]], own, numbers, around, keys, groups, piece.start)
        else:
            apply(update_, params, grads, state, numbers, around, keys, groups)


def _pieces(numel: int) -> list[slice]:
    return [slice(start, min(start + PIECE, numel)) for start in range(0, numel, PIECE)]


def _piece(x: Tensor, param: Tensor, piece: slice, *, last: bool) -> Tensor:
    """A piece of a state tensor; what belongs to the whole parameter changes once, with the last piece."""
    if x.shape == param.shape:
        return x[piece]
    return x if last else x.clone()


def _ranges(sizes: list[int], start: int, limit: int) -> Iterator[tuple[int, int]]:
    """Cut from `start` on into ranges of one entry at least, and of more where they have at most `limit` elements."""
    first, elements = start, 0
    for stop in range(start, len(sizes)):
        if stop > first and elements + sizes[stop] > limit:
            yield first, stop
            first, elements = stop, 0
        elements += sizes[stop]
    if first < len(sizes):
        yield first, len(sizes)


def _numbers(value: Any, start: int, stop: int) -> Any:
    """One number per parameter as a list: floats where the host may read them, else 0-d tensors."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    return value[start:stop].tolist() if value.device.type == "cpu" else list(value[start:stop].unbind())


def apply(
    update_: Update,
    params: list[Tensor],
    grads: list[Tensor],
    state: dict[str, list[Tensor]],
    scalars: Scalars,
    around: Around,
    keys: Sequence[Tensor] = (),
    groups: tuple[tuple[str, ...], ...] = (),
    first: int = 0,
) -> Any:
    """The update and what surrounds it; returns what the update returns."""
    dtype = compute_dtype(params[0].dtype)
    state = dict(state)
    compensations = state.pop("compensation", [])
    wide = widen(params, dtype)
    if compensations:
        wide = list(torch._foreach_add(wide, widen(compensations, dtype)))
    wide_state = {name: widen(xs, dtype) for name, xs in state.items()}
    grads = widen(grads, dtype)
    if around.scale is not None:
        grads = list(torch._foreach_div(grads, around.scale))
    if around.maximize:
        grads = list(torch._foreach_neg(grads))
    changed = [*wide, *(x for xs in wide_state.values() for x in xs)]
    before = [x.clone() for x in changed] if around.skip is not None else []
    result = update_(wide, grads, wide_state, scalars, Shards(groups))
    if around.skip is not None:
        for x, old in zip(changed, before, strict=True):
            x.copy_(torch.where(around.skip, old, x))
    write_back_(params, wide, state, wide_state, compensations, keys, first)
    return result
