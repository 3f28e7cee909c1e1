"""The one list of cases: every public class stands here and passes its family's conformance suite.

Adding an algorithm is one file, one export line, one line here and one reference in `tests/reference/`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from gradwire import compression as C


@dataclass(frozen=True)
class CompressorCase:
    """A compressor, its float64 NumPy reference, and what its constructor must refuse.

    Args:
        compressor: The instance under test.
        reference: `(x [rows, width] float64, **facts) -> float64 [rows, width]`, written from the paper.
        rtol: Relative tolerance against the reference, for float32 input.
        errors: `(keyword arguments, regex)` pairs for which the class raises ValueError.
    """

    compressor: C.Compressor
    reference: Callable[..., Any]
    rtol: float = 1e-6
    errors: tuple[tuple[dict[str, Any], str], ...] = ()


@dataclass(frozen=True)
class OptimizerCase:
    """An optimizer class, keyword arguments, its float64 NumPy reference, and what its constructor must refuse."""

    cls: type
    kwargs: dict[str, Any]
    reference: Callable[..., Any]
    errors: tuple[tuple[dict[str, Any], str], ...] = field(default=())


COMPRESSORS: list[CompressorCase] = []

OPTIMIZERS: list[OptimizerCase] = []
