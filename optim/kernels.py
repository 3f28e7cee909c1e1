"""Three ways to call one update on lists of tensors: in a loop, on many tensors at once, or compiled.

Everything that surrounds an algorithm's mathematics stands here once (`_apply`), so that it is compiled with it:
widening to float32, unscaling, sign, the selection where a step is skipped, and the one rounding at the end.
"""

import functools
import math
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from gradwire.compression.base import compute_dtype
from gradwire.optim.shards import Shards

Scalars: TypeAlias = dict[str, Any]
"""Numbers of one step by name: bool (static), float or 0-d tensor (one for all), or `[n]` (one per parameter)."""

Dims: TypeAlias = tuple[tuple[int, ...], ...]
"""Dimensions of a tensor in groups, each of which becomes one dimension."""

Update: TypeAlias = Callable[
    [list[Tensor], list[Tensor], dict[str, list[Tensor]], Scalars, Shards], list[Tensor] | None
]
"""`(params, grads, state, scalars, shards)`, in place on lists of tensors."""

_CHUNK = 1 << 25
"""Most elements that one foreach call takes at once: it bounds each temporary at 128 MiB and still fills a GPU."""

_SMALL = 1 << 15
"""Tensors below this size have kernels of their own: Inductor fixes the number of threads at the first size it sees."""


@dataclass(frozen=True)
class Flat:
    """A parameter, its gradient and state, contiguous in the dimensions that the update sees.

    Args:
        param: In the parameter's memory order within each dimension, so that it is a view wherever one exists.
        grad: The same elements of the gradient.
        state: The same elements of every state tensor of the parameter's shape; others as they are.
        copies: `(view of the original, what stands for it here)` wherever no flat view exists.
    """

    param: Tensor
    grad: Tensor
    state: dict[str, Tensor]
    copies: list[tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, param: Tensor, state: dict[str, Tensor], dims: Dims) -> "Flat":
        """Arrange all of a parameter in `dims`."""
        assert param.grad is not None
        copies: list[tuple[Tensor, Tensor]] = []
        real_param = real(param)
        order = [d for group in dims for d in sorted(group, key=real_param.stride, reverse=True)]
        shape = [math.prod(real_param.shape[d] for d in group) for group in dims]

        def flat(x: Tensor, *, written: bool = True) -> Tensor:
            ordered = real(x).permute(order)
            contiguous = ordered.contiguous()
            if written and contiguous is not ordered:
                copies.append((ordered, contiguous))
            return contiguous.view(shape).data  # no view to Dynamo, which would guard on the shape it came from

        own = {name: value for name, value in state.items() if name != "step"}
        return cls(
            flat(param),
            flat(param.grad, written=False),
            {name: flat(value) if value.shape == param.shape else value for name, value in own.items()},
            copies,
        )

    def write_back(self) -> None:
        """Copy results to where no flat view exists."""
        for original, copy in self.copies:
            original.copy_(copy)


def step_eager(
    update_: Update,
    flats: list[Flat],
    scalars: Scalars,
    *,
    foreach: bool,
    maximize: bool,
    scale: Tensor | None,
    skip: Tensor | None,
    first: int = 0,
) -> None:
    """Run the update from parameter `first` on, one at a time, or as many as `_CHUNK` allows if `foreach`."""
    for start, stop in _ranges([flat.param.numel() for flat in flats], first, _CHUNK if foreach else 0):
        part = flats[start:stop]
        _apply(
            update_,
            [flat.param for flat in part],
            [flat.grad for flat in part],
            {name: [flat.state[name] for flat in part] for name in part[0].state},
            {name: _numbers(value, start, stop) for name, value in scalars.items()},
            maximize=maximize,
            scale=scale,
            skip=skip,
        )


def _ranges(sizes: list[int], start: int, limit: int) -> Iterator[tuple[int, int]]:
    """Cut from `start` on into ranges of one entry at least, and of more where they have at most `limit` elements."""
    elements = 0
    for stop in range(start, len(sizes)):
        if elements and elements + sizes[stop] > limit:
            yield start, stop
            start, elements = stop, 0
        elements += sizes[stop]
    if elements:
        yield start, len(sizes)


def _numbers(value: Any, start: int, stop: int) -> Any:
    """One number per parameter as a list: floats where the host may read them, else 0-d tensors."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    return value[start:stop].tolist() if value.device.type == "cpu" else list(value[start:stop].unbind())


def _apply(
    update_: Update,
    params: list[Tensor],
    grads: list[Tensor],
    state: dict[str, list[Tensor]],
    scalars: Scalars,
    *,
    maximize: bool,
    scale: Tensor | None,
    skip: Tensor | None,
) -> Any:
    """The update and what surrounds it; returns what the update returns."""
    dtype = compute_dtype(params[0].dtype)
    wide, grads = _cast(params, dtype), _cast(grads, dtype)
    if scale is not None:
        grads = list(torch._foreach_div(grads, scale))
    if maximize:
        grads = list(torch._foreach_neg(grads))
    changed = [*wide, *(x for xs in state.values() for x in xs)]
    before = [x.clone() for x in changed] if skip is not None else []
    result = update_(wide, grads, state, scalars, Shards())
    if skip is not None:
        for x, old in zip(changed, before, strict=True):
            x.copy_(torch.where(skip, old, x))
    if wide is not params:
        torch._foreach_copy_(params, wide)
    return result


def _cast(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The tensors in `dtype`: the very list if they have it already."""
    if tensors[0].dtype == dtype:
        return tensors
    cast = [torch.empty_like(x, dtype=dtype) for x in tensors]
    torch._foreach_copy_(cast, tensors)
    return cast


def real(x: Tensor) -> Tensor:
    """A complex tensor as a real one with a last dimension of 2, any other as it is."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def step_compiled(
    update_: Update, flats: list[Flat], scalars: Scalars, *, maximize: bool, scale: Tensor | None, skip: Tensor | None
) -> int:
    """Run the update compiled, one parameter at a time; returns how many are done: not all where compilation fails."""
    if update_ in _uncompilable:
        return 0
    static = tuple((name, value) for name, value in scalars.items() if isinstance(value, bool))
    numbers = {name: value for name, value in scalars.items() if not isinstance(value, bool)}
    names = tuple((name, isinstance(value, Tensor) and value.ndim == 1) for name, value in numbers.items())
    dtype = compute_dtype(flats[0].param.dtype)
    rows = _table(list(numbers.values()), len(flats), dtype, flats[0].param.device)
    for done, (flat, row) in enumerate(zip(flats, rows, strict=True)):
        dtypes = (flat.param.dtype, flat.grad.dtype, *(x.dtype for x in flat.state.values()))
        sizes = (*(size == 1 for size in flat.param.shape), flat.param.numel() < _SMALL)
        variant = (flat.param.device, sizes, dtypes, scale is None, skip is None)
        kernel = _kernel(update_, names, static, maximize, variant)
        try:
            kernel(flat.param, flat.grad, flat.state, row, scale, skip)
        except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
            _uncompilable.add(update_)
            warnings.warn(
                "fused=True: torch.compile failed, so updates run uncompiled. Install a C++ compiler (for CPU) or "
                f"Triton (for CUDA). The reason was: {' '.join(str(error).split())[:300]}",
                stacklevel=6,  # the caller of step()
            )
            return done
    return len(flats)


def _table(numbers: list[Any], n: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """One row of numbers per parameter: in tensors they are data to the compiler, so new values need no new kernel."""
    zeros = torch.zeros(n, dtype=torch.float64, device=device)
    table = torch.stack([zeros + number for number in numbers], dim=1).to(dtype)
    sizes = [len(numbers)] * n
    return list(torch.ops.aten.split_with_sizes_copy(table.view(-1), sizes))  # not views: offsets would be symbolic


_uncompilable: set[Update] = set()
"""Updates whose compilation failed; they are not tried again."""

_OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {
    "realize_reads_threshold": 1 << 10,
    "realize_opcount_threshold": 1 << 10,
    "realize_acc_reads_threshold": 1 << 10,
}
"""Let Inductor recompute a full-size intermediate wherever it is used again: memory traffic decides the speed, and a
fresh temporary costs page faults besides. AdamP is three times faster so."""


@functools.cache
def _kernel(
    update_: Update,
    names: tuple[tuple[str, bool], ...],
    static: tuple[tuple[str, bool], ...],
    maximize: bool,
    variant: tuple[Any, ...],
) -> Callable[..., None]:
    """The compiled update of one parameter, for one setting of all that is static; sizes and numbers are dynamic."""

    def kernel(
        param: Tensor, grad: Tensor, state: dict[str, Tensor], row: Tensor, scale: Tensor | None, skip: Tensor | None
    ) -> Any:
        scalars: Scalars = dict(static)
        for i, (name, per_parameter) in enumerate(names):
            scalars[name] = [row[i]] if per_parameter else row[i]
        states = {name: [value] for name, value in state.items()}
        return _apply(update_, [param], [grad], states, scalars, maximize=maximize, scale=scale, skip=skip)

    # Dynamo stops compiling at the 8th variant of one code object, not of one function: give each its own.
    code = kernel.__code__.replace(co_name=f"{update_.__qualname__.replace('.', '_')}_kernel")
    own = types.FunctionType(code, kernel.__globals__, code.co_name, None, kernel.__closure__)
    return torch.compile(own, dynamic=True, fullgraph=True, options=_OPTIONS)
