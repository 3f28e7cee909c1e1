"""`Flat`: a parameter, its gradient and its state, arranged as an update sees them."""

import math
from collections.abc import Mapping
from typing import Any, TypeAlias, final

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from gradwire.compression import counter_rng
from gradwire.optim.shards import coordinates, groups_by_dim

_kinds: dict[tuple[Any, ...], int] = {}

Dims: TypeAlias = tuple[tuple[int, ...], ...]
"""Dimensions of a tensor in groups, each of which becomes one dimension."""


def real(x: Tensor) -> Tensor:
    """A complex tensor as a real one with a last dimension of 2, any other as it is."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def local(x: Tensor) -> Tensor:
    """What this process holds of a `DTensor`, sharing memory; any other tensor as it is."""
    return x.to_local() if isinstance(x, DTensor) else x


@final
class Flat:
    """A parameter and its state, contiguous in the dimensions that the update sees, for as long as they stay in place.

    Args:
        param: The parameter; of a `DTensor`, this process's shard.
        state: Its state, `step` included.
        dims: Which of its dimensions become which one. Within each, the parameter's memory order is kept, so that the
            result is a view wherever one exists.
        name: Its name, or its number in the optimizer.
        whole: Whether the update sums over dimensions, so that it matters what other processes hold.

    Attributes:
        param: The parameter in these dimensions.
        grad: Its gradient, from `take` to `finish`.
        state: State tensors without `step`; those of the parameter's shape in its dimensions, others as they are.
        counted_in: What the step count is a view of, once it is counted together with others.
        sizes: `[len(dims)]` float64, the whole parameter's size in each dimension.
        numel: Elements of the whole parameter.
        empty: Whether this process holds none of them.
        key: 0-d int64, a random key of its own, different for different shards.
        groups: For each dimension, the names of the process groups that share it; empty if none matters.
        kind: Number of what parameters must share to be updated together: device, dtypes, state, dimensions, groups.
    """

    grad: Tensor
    counted_in: Tensor | None = None

    def __init__(self, param: Tensor, state: dict[str, Tensor], dims: Dims, name: int | str, *, whole: bool) -> None:
        shard, shape = real(local(param)), real_shape(param)
        self._order = [d for group in dims for d in sorted(group, key=shard.stride, reverse=True)]
        self._shape = [math.prod(shard.shape[d] for d in group) for group in dims]
        self._in_order = self._order == sorted(self._order)
        self.owner, self.source = param, state
        self._placements = param.placements if isinstance(param, DTensor) else None
        self._copies: list[tuple[Tensor, Tensor]] = []
        self.param = self._arrange(shard)
        self.state = {
            name: self._arrange(real(local(x))) if self._alike(x) else local(x)
            for name, x in state.items()
            if name != "step"
        }
        sizes = [math.prod(shape[d] for d in group) for group in dims]
        self.sizes = torch.tensor(sizes, dtype=torch.float64, device=shard.device)
        self.numel = math.prod(sizes)
        self.empty = self.param.numel() == 0
        key = counter_rng.fold("parameter", name, *coordinates(param))
        self.key = torch.tensor(key, dtype=torch.int64, device=shard.device)
        self.groups = groups_by_dim(param, dims) if whole else ()
        dtypes = tuple((name, x.dtype) for name, x in self.state.items())
        self._memory = self._where()
        kind = (shard.device, shard.dtype, dtypes, len(dims), self.groups)
        self.kind = _kinds.setdefault(kind, len(_kinds))

    @property
    def step(self) -> Tensor:
        """0-d, its step count."""
        return self.source["step"]

    def count_in(self, steps: Tensor, i: int) -> None:
        """Move the step count to where it is updated together with others."""
        self.source["step"], self.counted_in = steps[i], steps
        self._memory = self._where()

    def fits(self, state: Mapping[str, Tensor]) -> bool:
        """Whether parameter and state are still where they were."""
        return state is self.source and not self._copies and self._where() == self._memory

    def take(self, grad: Tensor) -> None:
        """Arrange the gradient likewise."""
        if self._placements is not None and isinstance(grad, DTensor):
            if grad.placements != self._placements:
                grad = grad.redistribute(placements=self._placements)
            grad = local(grad)
        if grad.is_complex():
            grad = real(grad)
        as_it_is = self._in_order and grad.is_contiguous() and grad.shape == self.param.shape
        if not as_it_is or grad._is_view() or grad.requires_grad:
            grad = self._arrange(grad, written=False)
        self.grad = grad

    def finish(self) -> None:
        """Forget the gradient, and copy results to where no view exists."""
        del self.grad
        for original, copy in self._copies:
            original.copy_(copy)

    def _alike(self, x: Tensor) -> bool:
        """Whether a state tensor has the parameter's shape, sharded as it is."""
        owner = self.owner
        same = x.shape == owner.shape and x.is_complex() == owner.is_complex()
        return same and getattr(x, "placements", None) == self._placements

    def _arrange(self, x: Tensor, *, written: bool = True) -> Tensor:
        """`.data`: to Dynamo it is no view then, which would be guarded by the shape that it came from."""
        if self._in_order and x.is_contiguous():
            return x.view(self._shape).data
        ordered = x.permute(self._order)
        contiguous = ordered.contiguous()
        if written and contiguous is not ordered:
            self._copies.append((ordered, contiguous))
        return contiguous.view(self._shape).data

    def _where(self) -> list[Any]:
        """Where everything lies in memory."""
        if self._placements is None:
            return [self.owner.stride(), self.owner.data_ptr(), *[x.data_ptr() for x in self.source.values()]]
        return [self.owner.stride(), *[local(x).data_ptr() for x in (self.owner, *self.source.values())]]


def real_shape(param: Tensor) -> torch.Size:
    """The shape of `real(param)`."""
    return torch.Size((*param.shape, 2)) if param.is_complex() else param.shape
