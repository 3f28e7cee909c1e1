"""What the figures of all claims have in common."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from gradwire.bench.theory.claim import Record

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7F7F7F", "#000000")
"""Okabe and Ito's palette: told apart by readers with any colour vision."""

_POINTS = 60


def curve(values: Tensor | Sequence[float], every: int = 1) -> Record:
    """Measurements `[points]`, one per `every` steps from step 0 on, thinned out to what a figure shows."""
    last = len(values) - 1
    places = sorted({round(last * i / (_POINTS - 1)) for i in range(_POINTS)})
    return {"steps": [place * every for place in places], "values": [rounded(values[place]) for place in places]}


def rounded(value: Any) -> float:
    """To four digits."""
    return float(f"{float(value):.4g}")


def plot(axis: Any, curves: Mapping[str, Record], **axes: Any) -> None:
    """Curves by label over steps, on a logarithmic scale."""
    for colour, (label, line) in zip(COLOURS, curves.items(), strict=False):
        axis.plot(line["steps"], line["values"], color=colour, linewidth=1.5, label=label)
    tidy(axis, **({"yscale": "log", "xlabel": "step"} | axes))


def tidy(axis: Any, **axes: Any) -> None:
    """Labels, a light grid, no frame."""
    axis.set(**axes)
    axis.title.set_fontsize(10)
    axis.grid(color="#E5E5E5", linewidth=0.8)
    axis.spines[["top", "right"]].set_visible(False)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, fontsize=8)
