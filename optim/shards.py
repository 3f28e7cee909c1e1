"""`Shards`: sums and maxima over a whole tensor, of which each process may hold a part."""

from collections.abc import Callable, Iterator

import torch
import torch.distributed._functional_collectives as collectives
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

_all_reduce: Callable[..., Tensor] = collectives.all_reduce  # these can be compiled, unlike those of `comm`
_wait: Callable[..., Tensor] = collectives.wait_tensor


class Shards:
    """How the tensors of one update are shared among processes.

    Args:
        groups: For each dimension of the update's tensors, the names of the process groups that share it; empty if this
            process holds all.
    """

    def __init__(self, groups: tuple[tuple[str, ...], ...] = ()) -> None:
        self._groups = groups

    def sum(self, parts: list[Tensor], dim: int) -> list[Tensor]:
        """Sum over the processes that share a dimension; one collective for all parts, none if nobody does.

        Args:
            parts: What this process has summed over `dim`: small tensors, whose shapes the processes agree on.
            dim: A dimension of the update's tensors, as `Optimizer.dims` gives them.

        Returns:
            Tensors of these shapes, equal on all these processes.
        """
        return self._reduce(parts, dim, "sum")

    def max(self, parts: list[Tensor], dim: int) -> list[Tensor]:
        """The largest over the processes that share a dimension, else as `sum`."""
        return self._reduce(parts, dim, "max")

    def _reduce(self, parts: list[Tensor], dim: int, operation: str) -> list[Tensor]:
        groups = self._groups[dim] if self._groups else ()
        if not groups or not parts:
            return parts
        total = torch.cat([part.reshape(-1) for part in parts])
        for group in groups:
            total = _wait(_all_reduce(total, operation, group))
        pieces = torch.split(total, [part.numel() for part in parts])
        return [piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True)]


def groups_by_dim(param: Tensor, dims: tuple[tuple[int, ...], ...]) -> tuple[tuple[str, ...], ...]:
    """For each group of dimensions of a `DTensor`, the process groups that share one of them; empty if none does.

    Raises:
        ValueError: The parameter is neither sharded nor replicated.
    """
    groups: list[list[str]] = [[] for _ in dims]
    for mesh_dim, sharded in _sharded(param):
        (dim,) = (i for i, group in enumerate(dims) if sharded in group)
        groups[dim].append(param.device_mesh.get_group(mesh_dim).group_name)  # type: ignore[attr-defined]
    return tuple(map(tuple, groups)) if any(groups) else ()


def coordinates(param: Tensor) -> list[int]:
    """Which of the shards of a `DTensor` this process holds; replicas have equal ones."""
    return [param.device_mesh.get_local_rank(mesh_dim) for mesh_dim, _ in _sharded(param)]  # type: ignore[attr-defined]


def _sharded(param: Tensor) -> Iterator[tuple[int, int]]:
    """Dimensions of the mesh over which a `DTensor` is sharded, each with the tensor's dimension."""
    if isinstance(param, DTensor):
        for mesh_dim, placement in enumerate(param.placements):
            if placement.is_partial():
                raise ValueError(f"expected a sharded or replicated parameter, got placements {param.placements}.")
            if not isinstance(placement, Replicate) and param.device_mesh.size(mesh_dim) > 1:
                yield mesh_dim, placement.dim  # type: ignore[attr-defined]
