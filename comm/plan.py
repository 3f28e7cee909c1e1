"""`Plan`: which tensors are compressed and which are sent dense, and why."""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import final

import torch


@final
@dataclass(frozen=True)
class Plan:
    """Decide by name, shape and size what is compressed; everything else is averaged dense.

    Norms, biases and tiny tensors are a negligible share of the bytes and the most sensitive to errors, so by default
    vectors and tensors under 1024 entries are dense.

    Args:
        min_ndim: Tensors of fewer dimensions are dense, >= 0.
        min_numel: Tensors of fewer entries are dense, >= 0.
        dense: Patterns (`fnmatch`, case-sensitive) of names that are dense, whatever their shape.
        compress: Patterns of names that are compressed, whatever their shape; they win over all of the above.

    Example:
        >>> plan = Plan(dense=("*.embedding.*",))
        >>> plan.why_dense("layer.bias", torch.Size([4096]))
        'ndim 1 < 2'
        >>> plan.why_dense("layer.weight", torch.Size([64, 64])) is None
        True
    """

    min_ndim: int = 2
    min_numel: int = 1024
    dense: tuple[str, ...] = ()
    compress: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, value in (("min_ndim", self.min_ndim), ("min_numel", self.min_numel)):
            if value < 0:
                raise ValueError(f"Plan: expected {name} >= 0, got {name}={value}.")
        given: tuple[tuple[str, object], ...] = (("dense", self.dense), ("compress", self.compress))
        for name, patterns in given:
            if isinstance(patterns, str):
                raise ValueError(f"Plan: expected a tuple of patterns for {name}, got the string {patterns!r}.")

    def why_dense(self, name: str, shape: torch.Size) -> str | None:
        """The reason why this tensor is sent dense, or None if it is compressed."""
        if any(fnmatchcase(name, pattern) for pattern in self.compress):
            return None
        for pattern in self.dense:
            if fnmatchcase(name, pattern):
                return f"name matches {pattern!r}"
        if len(shape) < self.min_ndim:
            return f"ndim {len(shape)} < {self.min_ndim}"
        if shape.numel() < self.min_numel:
            return f"numel {shape.numel()} < {self.min_numel}"
        return None
