"""Plots of loss over steps, over bytes sent and over seconds."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gradwire.bench.runs import Record

# Okabe and Ito's palette: told apart by readers with any colour vision; a ninth run begins again, dashed.
_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7F7F7F")
_MARKERS = "osD^vP*X"


def plot_run(metrics: Sequence[Record], title: str, path: Path) -> None:
    """One run: train and validation loss over all three axes, as PNG."""
    figure, axes = _panels(title, height=3.6)
    for axis, key in axes:
        x, y = _points(metrics, key, "train_loss")
        axis.plot(x, y, color="#9A9A9A", linewidth=1, label="train")
        x, y = _points(metrics, key, "validation_loss")
        axis.plot(x, y, color=_COLOURS[1], marker="o", markersize=4, linewidth=2, label="validation")
    axes[0][0].legend(frameon=False)
    _frame(axes, [metrics])
    figure.savefig(path, dpi=150)


def plot_comparison(runs: Mapping[str, Sequence[Record]], title: str, path: Path) -> None:
    """Validation loss of several runs in one picture, as PNG."""
    figure, axes = _panels(title, height=4.2 + 0.22 * ((len(runs) + 1) // 2))
    lines = []
    for number, (name, metrics) in enumerate(runs.items()):
        for axis, key in axes:
            x, y = _points(metrics, key, "validation_loss")
            style = "-" if number < len(_COLOURS) else "--"
            colour, marker = _COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)]
            (line,) = axis.plot(x, y, style, color=colour, marker=marker, markersize=4, linewidth=1.5, label=name)
        lines.append(line)
    _frame(axes, list(runs.values()))
    figure.legend(handles=lines, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)


def _panels(title: str, height: float) -> tuple[Figure, list[tuple[Axes, str]]]:
    figure = Figure(figsize=(13, height), layout="constrained")
    figure.suptitle(title, fontsize=11)
    over_steps, over_bytes, over_seconds = figure.subplots(1, 3, sharey=True)
    over_steps.set(xlabel="step", ylabel="loss (nats per byte)")
    over_steps.xaxis.set_major_locator(MaxNLocator(integer=True))
    over_bytes.set(xlabel="MB sent per rank")
    over_seconds.set(xlabel="seconds of training")
    return figure, [(over_steps, "step"), (over_bytes, "bytes_sent"), (over_seconds, "seconds")]


def _points(metrics: Sequence[Record], key: str, loss: str) -> tuple[list[float], list[float]]:
    known = [record for record in metrics if record[loss] is not None]
    scale = 1e-6 if key == "bytes_sent" else 1.0
    return [record[key] * scale for record in known], [record[loss] for record in known]


def _frame(axes: Sequence[tuple[Axes, str]], runs: Sequence[Sequence[Record]]) -> None:
    """Cut off the first steep fall and what diverged, so that differences at the end can be seen."""
    for axis, _ in axes:
        axis.grid(color="#E5E5E5", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
    if any(record["bytes_sent"] for metrics in runs for record in metrics):
        axes[1][0].set_xscale("log")  # one process alone sends nothing
        axes[1][0].xaxis.set_major_formatter("{x:g}")
    curves = [_points(metrics, "step", "validation_loss")[1] for metrics in runs]
    losses = [loss for curve in curves for loss in curve]
    if not losses:
        return
    low = min(losses)
    high = max((curve[min(1, len(curve) - 1)] for curve in curves if curve and curve[-1] < 2 * low), default=low)
    axes[0][0].set_ylim(low - 0.05 * low, max(high * 1.05, low * 1.2))
