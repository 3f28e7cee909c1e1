"""Pictures of `gradwire federate`: accuracy over rounds, bytes and virtual time; and what clients hold."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

from gradwire.bench.runs import Record
from gradwire.bench.theory.drawing import COLOURS, tidy

# Ten classes need ten colours, in the order of the palette and paler.
_SHADES = (*COLOURS, "#B5CFE0", "#F2C4A0", "#A8D8C8", "#E8C3D6")
_AXES = {"round": 1, "bytes_up": 1e6, "bytes_down": 1e6, "time": 1}
_MOST_BARS = 400
_MEAN_OVER = 5


def plot_accuracy(runs: Mapping[str, Sequence[Record]], title: str, path: Path) -> None:
    """Accuracy on held-out examples over rounds, over bytes up and down, and over virtual time, as PNG.

    Thin lines are the rounds, thick ones means over five.

    Args:
        runs: Records by the name of their run.
        title: Above all panels.
        path: Where to.
    """
    legend = 0.22 * ((len(runs) + 1) // 2) if len(runs) > 1 else 0
    figure = Figure(figsize=(15, 3.8 + legend), layout="constrained")
    panels = figure.subplots(1, 4, sharey=True)
    lines = []
    for number, records in enumerate(runs.values()):
        known = _known(records)
        accuracy = [record["accuracy"] for record in known]
        style: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)]}
        style["linestyle"] = "-" if number < len(COLOURS) else "--"
        for panel, (key, unit) in zip(panels, _AXES.items(), strict=True):
            x = [record[key] / unit for record in known]
            panel.plot(x, accuracy, linewidth=0.6, alpha=0.4, **style)
            (line,) = panel.plot(x, _smooth(accuracy), linewidth=1.8, **style)
        lines.append(line)
    tidy(panels[0], xlabel="round", ylabel="accuracy on held-out examples")
    tidy(panels[1], xlabel="MB up, all clients")
    tidy(panels[2], xlabel="MB down, all clients")
    tidy(panels[3], xlabel="seconds of virtual time")
    panels[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    for panel in panels[1:3] if any(_known(records) for records in runs.values()) else ():
        panel.set_xscale("log")
        panel.xaxis.set_major_formatter("{x:g}")
    _cut_off(panels[0], list(runs.values()))
    figure.suptitle(title, fontsize=11)
    if len(runs) > 1:
        figure.legend(lines, list(runs), loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)


def plot_distribution(amounts: Tensor, kinds: Sequence[str], unit: str, title: str, path: Path) -> None:
    """What every client holds, as PNG: amounts above, shares below, clients in the order of their amounts.

    Args:
        amounts: Of each kind, `[clients, kinds]`.
        kinds: Their names.
        unit: Of the amounts.
        title: Above.
        path: Where to.
    """
    held = amounts.double().numpy()
    held = held[np.argsort(-held.sum(1), kind="stable")]
    if len(held) > _MOST_BARS:  # bars thinner than a pixel: every so many clients
        held = held[np.linspace(0, len(held) - 1, _MOST_BARS).round().astype(int)]
    figure = Figure(figsize=(11, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    totals = held.sum(1, keepdims=True)
    edges = np.arange(len(held) + 1)
    shades = [_SHADES[kind % len(_SHADES)] for kind in range(len(kinds))]
    for panel, values in ((above, held), (below, held / np.maximum(totals, 1))):
        steps = np.concatenate([values, values[-1:]])  # the last one ends at the last edge
        panel.stackplot(edges, steps.T, colors=shades, labels=kinds, step="post", linewidth=0)
        panel.spines[["top", "right"]].set_visible(False)
        panel.margins(x=0.005)
    above.set_ylabel(unit)
    below.set(ylabel="share", xlabel="clients, the largest first", ylim=(0, 1))
    below.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    handles, names = above.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=150)


def _known(records: Sequence[Record]) -> list[Record]:
    return [record for record in records if record["accuracy"] is not None]


def _smooth(values: Sequence[float]) -> list[float]:
    """Means over the last few."""
    return [float(np.mean(values[max(0, end - _MEAN_OVER) : end])) for end in range(1, len(values) + 1)]


def _cut_off(axis: Axes, runs: Sequence[Sequence[Record]]) -> None:
    """Leave out the first steep rise, so that differences at the end can be seen."""
    curves = [[record["accuracy"] for record in _known(records)] for records in runs]
    ends = [value for curve in curves for value in curve[len(curve) // 2 :]]
    if ends:
        low, high = min(ends), max(max(curve) for curve in curves if curve)
        room = max(high - low, 0.05)
        axis.set_ylim(max(0.0, low - room), min(1.005, high + 0.15 * room))
