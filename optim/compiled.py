"""Run an update compiled: `torch.compile` on packs of parameters, one kernel for all sizes and all numbers."""

import functools
import types
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast, final

import torch
from torch import Tensor

from gradwire.compression.base import compute_dtype
from gradwire.optim.kernels import Around, Scalars, Update, apply, step_eager
from gradwire.optim.layout import Flat

_SMALL = 1 << 15
"""Parameters below this size have kernels of their own: Inductor fixes the number of threads at the first size it sees,
and the call costs more than the work, so that more of them share one."""

_PACKS = {True: 8, False: 2}
"""Parameters that one compiled call takes, small ones of one shape or large ones of any: with more, calls cost less and
compiling them more."""

_TRACED: dict[bool, tuple[tuple[int, ...], ...]] = {
    True: ((4096,), (64, 96), (5, 64, 96), (5, 7, 24, 36), (5, 7, 11, 8, 9)),
    False: ((1 << 18,), (512, 768), (5, 256, 384), (5, 7, 128, 192), (5, 7, 11, 32, 48)),
}
"""Sizes that a kernel is traced with, small or large, by dimensions: all different, so that none is taken for another.
Tensors of more dimensions are not compiled."""

_LONG_SUM = 4096
"""Inductor adds more terms than this in an order of less rounding: its choice for the sizes traced, no condition."""

Spares: TypeAlias = Callable[[int, Sequence[int]], list[Flat]]
"""`(n, sizes)`: n parameters like those at hand, but of these sizes (or larger, if need be), that nobody reads."""


@final
class Pack:
    """Parameters that one compiled call takes.

    Args:
        flats: The parameters.
        start: Number of the first one in the list that they come from.
        small: Whether they are small, and then of one shape.
    """

    def __init__(self, flats: Sequence[Flat], start: int, small: bool) -> None:
        self.flats, self.start, self.small = flats, start, small
        self.params = [flat.param for flat in flats]
        self.state = {name: [flat.state[name] for flat in flats] for name in flats[0].state}
        self.groups, self.kind, self.shape = flats[0].groups, flats[0].kind, flats[0].param.shape
        self.generic = all(map(_generic, flats))
        self._met: dict[int, bool] = {}

    @property
    def stop(self) -> int:
        """One more than the number of the last one."""
        return self.start + len(self.flats)

    @property
    def grads(self) -> list[Tensor]:
        """Gradients of this step."""
        return [flat.grad for flat in self.flats]

    def meets(self, graph: "_Graph") -> bool:
        """Whether the sizes satisfy a graph's conditions; looked at once."""
        if id(graph) not in self._met:
            sizes = {symbol: self.params[i].shape[dim] for symbol, (i, dim) in graph.symbols.items()}
            self._met[id(graph)] = all(condition.subs(sizes) == True for condition in graph.conditions)  # noqa: E712
        return self._met[id(graph)]


def pack(flats: Sequence[Flat], spares: Spares) -> tuple[list[Flat], list[Pack]]:
    """Order parameters of one kind by packs, completed by spares; what no kernel takes comes last."""
    by_pack: dict[tuple[bool, Any], list[Flat]] = defaultdict(list)
    rest: list[Flat] = []
    for flat in flats:
        if flat.groups:
            by_pack[False, None].append(flat)  # the same on all processes, whatever they hold of each parameter
        elif not _generic(flat):
            rest.append(flat)
        elif flat.numel < _SMALL:
            by_pack[True, tuple(flat.param.shape)].append(flat)
        else:
            by_pack[False, None].append(flat)
    ordered: list[Flat] = []
    packs: list[Pack] = []
    for (small, shape), some in by_pack.items():
        size = _PACKS[small]
        some += spares(-len(some) % size, shape if small else [2] * some[0].param.ndim)
        first = len(ordered)
        packs += [Pack(some[i : i + size], first + i, small) for i in range(0, len(some), size)]
        ordered += some
    return ordered + rest, packs


def _generic(flat: Flat) -> bool:
    """Whether a kernel can take it: Dynamo compiles sizes 0 and 1 apart."""
    return flat.param.ndim <= len(_TRACED[True]) and all(size > 1 for size in flat.param.shape)


def step_compiled(
    update_: Update, flats: Sequence[Flat], packs: Sequence[Pack], scalars: Scalars, around: Around, spares: Spares
) -> int:
    """Run the update compiled, pack by pack; returns how many are done: not all of them where compilation fails."""
    if update_ in _uncompilable or not packs:
        return 0
    static = tuple((name, value) for name, value in scalars.items() if isinstance(value, bool))
    numbers = {name: value for name, value in scalars.items() if not isinstance(value, bool)}
    names = tuple((name, isinstance(value, Tensor) and value.ndim == 1) for name, value in numbers.items())
    sizes = [len(part.flats) for part in packs]
    packed = packs[-1].stop
    tables = _table(list(numbers.values()), packed, sizes, flats[0])
    keys = [None] * len(packs) if around.keys is None else _split(around.keys[:packed], sizes)
    variant = (flats[0].grad.dtype, around.scale is None, around.skip is None, around.keys is None)
    for part, table, key in zip(packs, tables, keys, strict=True):
        if part.groups and not part.generic:
            # A shard that is empty or a single row; other processes may run the compiled form of the same sums.
            step_eager(update_, flats[: part.stop], scalars, around, at_once=1 << 62, first=part.start)
            continue
        serial = part.small and len(part.shape) > 1
        kernel = _kernel(
            update_, names, static, around.maximize, part.groups, serial, (part.kind, part.small, *variant)
        )
        try:
            if kernel.traced:
                kernel(part, table, key, around)
            elif part.groups:
                kernel.trace(part, table, key, around)  # sums over processes cannot be tried
            else:
                # What is traced first decides for which sizes the code is good.
                kernel.trace(Pack(_samples(part, spares), 0, part.small), table, key, around)
                kernel(part, table, key, around)
        except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
            _uncompilable.add(update_)
            warnings.warn(
                "fused=True: torch.compile failed, so updates run uncompiled. Install a C++ compiler (for CPU) or "
                f"Triton (for CUDA). The reason was: {' '.join(str(error).split())[:300]}",
                stacklevel=7,  # the caller of step()
            )
            return part.start
    return packed


def _samples(part: Pack, spares: Spares) -> list[Flat]:
    """What to trace with: one shape if the pack has one, else as many as parameters."""
    n, sizes = len(part.flats), _TRACED[part.small][len(part.shape) - 1]
    if part.small:
        return spares(n, sizes)
    return [flat for i in range(n) for flat in spares(1, [size + 13 * i for size in sizes])]


def _table(numbers: list[Any], n: int, sizes: list[int], like: Flat) -> Sequence[Tensor]:
    """`[parameters, numbers]` for each pack: tensors are data to the compiler, so new values need no new kernel."""
    dtype = compute_dtype(like.param.dtype)
    zeros = torch.zeros(n, dtype=torch.float64, device=like.param.device)
    columns = [zeros + (number[:n] if isinstance(number, Tensor) and number.ndim else number) for number in numbers]
    return _split(torch.stack(columns, dim=1).to(dtype), sizes)


def _split(x: Tensor, sizes: list[int]) -> Sequence[Tensor]:
    """Pieces along the first dimension; not views, whose offsets would be symbolic to Dynamo."""
    pieces: Sequence[Tensor] = torch.ops.aten.split_with_sizes_copy(x, sizes)
    return pieces


_uncompilable: set[Update] = set()
"""Updates whose compilation failed; they are not tried again."""

_OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {
    "realize_reads_threshold": 1 << 10,
    "realize_opcount_threshold": 1 << 10,
    "realize_acc_reads_threshold": 1 << 10,
    "size_asserts": False,
    "alignment_asserts": False,
    "emulate_precision_casts": True,
}
"""Let Inductor recompute a full-size intermediate wherever it is used again: memory traffic decides the speed, and a
fresh temporary costs page faults besides. AdamP is three times faster so. Checks of sizes cost as much as a small
update, and `Flat` vouches for them. Without the last option what rounding loses is compiled to zero."""


@dataclass(frozen=True)
class _Graph:
    """What the compiler made of an update.

    Args:
        call: The compiled function.
        inputs: Where its arguments come from: `(number of a tensor, None)`, or `(number of a parameter, dimension)`.
        symbols: Where the symbols in conditions come from.
        conditions: What the sizes have to satisfy.
    """

    call: Callable[..., Any]
    inputs: list[tuple[int, int | None]]
    symbols: Mapping[Any, tuple[int, int]]
    conditions: Sequence[Any]


@final
class _Kernel:
    """The compiled update of one pack, for one setting of all that is static; sizes and numbers are dynamic.

    Args:
        update_: The update.
        names: Names of the table's columns, each with whether its numbers differ between parameters.
        static: Scalars that are compiled in.
        maximize: Whether to ascend.
        groups: Process groups of sharded dimensions.
        serial: Whether to use one thread: for small matrices, whose many loops take less than waking threads for each.
    """

    def __init__(
        self,
        update_: Update,
        names: tuple[tuple[str, bool], ...],
        static: tuple[tuple[str, bool], ...],
        maximize: bool,
        groups: tuple[tuple[str, ...], ...],
        serial: bool,
    ) -> None:
        def kernel(
            params: list[Tensor],
            grads: list[Tensor],
            state: dict[str, list[Tensor]],
            table: Tensor,
            keys: Tensor | None,
            scale: Tensor | None,
            skip: Tensor | None,
        ) -> Any:
            scalars: Scalars = dict(static)
            for i, (name, per_parameter) in enumerate(names):
                scalars[name] = [table[j, i] for j in range(len(params))] if per_parameter else table[0, i]
            own_keys = [] if keys is None else [keys[j] for j in range(len(params))]
            return apply(update_, params, grads, state, scalars, Around(maximize, scale, skip), own_keys, groups)

        # Dynamo stops compiling at the 8th variant of one code object, not of one function, and carries over what it
        # learned of sizes from one of equal name and line: give each its own.
        name = f"{update_.__qualname__.replace('.', '_')}{_kernel.cache_info().misses}"
        code = kernel.__code__.replace(co_name=name)
        own = types.FunctionType(code, kernel.__globals__, code.co_name, None, kernel.__closure__)
        self._compiled = torch.compile(own, dynamic=True, fullgraph=True, backend=self._compile)
        self._serial = serial
        self._graphs: list[tuple[Callable[..., Any], list[Any]]] = []
        self._graph: _Graph | None = None
        self.traced = False

    def trace(self, part: Pack, table: Tensor, keys: Tensor | None, around: Around) -> None:
        """The first call, from which sizes that are equal in it have to be so in others."""
        for constant in (table, keys):
            if constant is not None:
                torch._dynamo.mark_static(constant)
        self(part, table, keys, around)
        self.traced = True
        if not part.groups and len(self._graphs) == 1:
            self._skip_guards(part, table, keys, around)
        self._graphs.clear()

    def __call__(self, part: Pack, table: Tensor, keys: Tensor | None, around: Around) -> None:
        if self._graph is None or not part.meets(self._graph):
            self._compiled(part.params, part.grads, part.state, table, keys, around.scale, around.skip)
            return
        tensors, params = _tensors(part, table, keys, around), part.params
        self._graph.call(*[tensors[i] if dim is None else params[i].shape[dim] for i, dim in self._graph.inputs])

    def _compile(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        from torch._inductor.compile_fx import compile_fx  # takes seconds

        options = {**_OPTIONS, "cpp.threads": 1} if self._serial else _OPTIONS
        compiled: Any = compile_fx(graph, inputs, config_patches=options)
        if not self.traced:
            self._graphs.append((compiled, list(inputs)))
        return cast(Callable[..., Any], compiled)

    def _skip_guards(self, part: Pack, table: Tensor, keys: Tensor | None, around: Around) -> None:
        """Call the graph itself from now on: Dynamo's checks at every call cost as much as the work.

        The graph's inputs are the arguments and sizes of parameters, in an order which the first call shows.
        """
        call, values = self._graphs[0]
        places = {id(x): i for i, x in enumerate(_tensors(part, table, keys, around))}
        sizes: dict[int, tuple[int, int]] = {}
        for i, param in enumerate(part.params):
            for dim, size in enumerate(param.shape):
                if sizes.setdefault(size, (i, dim))[1] != dim:
                    return
        inputs: list[tuple[int, int | None]] = []
        symbols: dict[Any, tuple[int, int]] = {}
        conditions: list[Any] = []
        for value in values:
            if isinstance(value, Tensor) and id(value) in places:
                inputs.append((places[id(value)], None))
            elif isinstance(value, torch.SymInt) and value.node.hint in sizes:
                inputs.append(sizes[value.node.hint])
                symbols[value.node.expr] = sizes[value.node.hint]
                conditions = [guard.expr for guard in value.node.shape_env.guards]
            else:
                return
        conditions = [condition for condition in conditions if _LONG_SUM not in condition.args]
        self._graph = _Graph(call, inputs, symbols, conditions)


def _tensors(part: Pack, table: Tensor, keys: Tensor | None, around: Around) -> list[Any]:
    return [
        *part.params,
        *part.grads,
        *(x for xs in part.state.values() for x in xs),
        table,
        keys,
        around.scale,
        around.skip,
    ]


@functools.cache
def _kernel(
    update_: Update,
    names: tuple[tuple[str, bool], ...],
    static: tuple[tuple[str, bool], ...],
    maximize: bool,
    groups: tuple[tuple[str, ...], ...],
    serial: bool,
    variant: tuple[Any, ...],
) -> _Kernel:
    """One kernel for each setting."""
    return _Kernel(update_, names, static, maximize, groups, serial)
