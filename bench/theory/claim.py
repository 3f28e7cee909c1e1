"""`Claim`: one statement of theory, the experiment that shows it, and its picture."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Record = dict[str, Any]


@final
@dataclass(frozen=True)
class Line:
    """One thing that a claim says, and what was measured.

    Args:
        what: In words, without numbers that were measured.
        expected: What theory says, as text.
        measured: What came out, as text.
        holds: Whether the two agree within the margin that the experiment states.
    """

    what: str
    expected: str
    measured: str
    holds: bool


@final
@dataclass(frozen=True)
class Claim:
    """An experiment on theory.

    Args:
        name: Of its module, its figure and its entry in the results.
        title: One sentence.
        run: Takes `quick` and returns numbers and curves in JSON's types.
        draw: Draws a record of `run`.
        lines: What a record of `run` shows.
        data: Whether `run` needs scikit-learn's data sets.
    """

    name: str
    title: str
    run: Callable[[bool], Record]
    draw: Callable[["Figure", Record], None]
    lines: Callable[[Record], list[Line]]
    data: bool = False
