"""Plots of loss over steps, over bytes sent and over seconds; of the optimizers' step times, and of their losses."""

import contextlib
import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from PIL import Image  # comes with matplotlib

from gradwire.bench import plan_lab
from gradwire.bench.errors import UsageError
from gradwire.bench.exchange_table import exchange_rows, exchange_section
from gradwire.bench.federated.drawing import draw as draw_accuracy
from gradwire.bench.network import drawing
from gradwire.bench.report import FIGURES, SECTIONS, optim_rows, optim_section, sweep_rows, sweep_section
from gradwire.bench.runs import Record
from gradwire.bench.theory import catalogue

# Okabe and Ito's palette: told apart by readers with any colour vision; a ninth run begins again, dashed.
_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7F7F7F")
_MARKERS = "osD^vP*X"
_KINDS = {
    "gradwire, fused": _COLOURS[1],
    "gradwire, eager": _COLOURS[5],
    "torch": _COLOURS[7],
    "other packages": _COLOURS[6],
}


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


def plot_optimizers(results: Mapping[str, Any], path: Path) -> None:
    """Step times of `gradwire bench optim` over that of torch's fused AdamW, one panel per case, as PNG.

    Its description is `optim_section(results)`, if all cases were measured.
    """
    found, cases, machine = optim_rows(results), results["cases"], results["machine"]
    algorithms = list(dict.fromkeys(algorithm for algorithm, _, _ in found))
    places = [number + 0.8 * algorithms.index(algorithm) for number, (algorithm, _, _) in enumerate(found)]
    figure = Figure(figsize=(3.4 + 3.4 * len(cases), 2.1 + 0.21 * places[-1]), layout="constrained")
    axes = figure.subplots(1, len(cases), sharey=True, squeeze=False)[0]
    for axis, (name, case) in zip(axes, cases.items(), strict=True):
        limits = [1.0]
        for place, ((_, source, mode), by_case) in zip(places, found.items(), strict=True):
            if name not in by_case:
                continue
            ratio = by_case[name]["ratio"]
            floor = ratio / by_case[name]["over_floor"]
            axis.barh(place, ratio, color=_KINDS[_kind(source, mode)], height=0.8)
            axis.text(ratio, place, f" {ratio:.3g}", va="center", fontsize=7)
            axis.plot([floor, floor], [place - 0.5, place + 0.5], color=_COLOURS[0], linewidth=1.5)
            limits += [ratio, floor]
        axis.axvline(1, color=_COLOURS[7], linewidth=0.8, linestyle="--")
        axis.set(xscale="log", xlim=(min(limits) / 1.5, max(limits) * 2))
        axis.set(title=case["title"], xlabel=f"times {1e3 * case['reference_s']:.3g} ms")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.spines[["top", "right"]].set_visible(False)
    labels = [
        ", ".join([f"{algorithm}  {source}", mode][: 1 + (mode != "default")]) for algorithm, source, mode in found
    ]
    axes[0].set_yticks(places, labels, fontsize=8)
    axes[0].set_ylim(places[-1] + 1, -1)
    about = f"{machine.get('gpu', machine['cpu'])}, threads: {machine['threads']}, torch {machine['torch']}"
    figure.suptitle(f"Step time over that of torch's fused AdamW\n{about}", fontsize=11)
    handles: list[Artist] = [Patch(color=colour, label=kind) for kind, colour in _KINDS.items()]
    handles.append(Line2D([], [], color=_COLOURS[0], linewidth=1.5, label="floor: a copy of the bytes it must move"))
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    described: dict[str, str] = {}
    with contextlib.suppress(UsageError):
        described["Description"] = optim_section(results)
    figure.savefig(path, dpi=150, metadata=described)


def plot_sweep(results: Mapping[str, Any], path: Path) -> None:
    """Losses of `gradwire bench sweep`: over learning rates, and over steps at the best rate, as PNG.

    The file's description is `sweep_section(results)`, so that it is known which results the picture shows.
    """
    rows, options = sweep_rows(results), results["options"]
    figure = Figure(figsize=(11, 4.4 + 0.22 * ((len(rows) + 2) // 3)), layout="constrained")
    over_lrs, over_steps = figure.subplots(1, 2)
    lines = []
    for number, row in enumerate(rows):
        colour, marker = _COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)]
        style: dict[str, Any] = {"color": colour, "linestyle": "-" if number < len(_COLOURS) else "--"}
        style["linewidth"] = 1.5 if number else 3  # the baseline is seen below a line that covers it
        ends = [(lr, float("nan") if loss is None else loss) for lr, loss in row.losses.items()]
        best = "every rate diverged" if row.lr is None else f"{row.loss:.3f} at {row.lr:g}"
        (line,) = over_lrs.plot(*_columns(ends), marker=marker, markersize=4, label=f"{row.optimizer}: {best}", **style)
        over_steps.plot(*_columns(row.curve), marker=marker, markersize=4, **style)
        if row.lr is not None:
            over_lrs.plot(row.lr, row.loss, marker=marker, markersize=9, color=colour)
        lines.append(line)
    over_lrs.set(xscale="log", xlabel="peak learning rate", ylabel="final validation loss (nats per byte)")
    over_lrs.set_xticks(results["lrs"], [f"{lr:g}" for lr in results["lrs"]])
    over_lrs.minorticks_off()
    over_steps.xaxis.set_major_locator(MaxNLocator(integer=True))
    over_steps.set(xlabel="step", ylabel="validation loss (nats per byte)")
    over_lrs.set_title("Each learning rate; the best is marked", fontsize=10)
    over_steps.set_title("Each optimizer's best run", fontsize=10)
    finals = [loss for row in rows for loss in row.losses.values() if loss is not None]
    if finals:
        low = min(finals)
        highs = [row.curve[min(1, len(row.curve) - 1)][1] for row in rows if row.curve]
        over_lrs.set_ylim(0.97 * low, 1.02 * min(max(finals), 1.7 * low))
        over_steps.set_ylim(0.97 * low, 1.02 * max(highs))
    for axis in (over_lrs, over_steps):
        axis.grid(color="#E5E5E5", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"A transformer of {results['parameters'] / 1e6:.2f} M parameters, {options['steps']} steps of "
        f"{options['batch'] * options['context']} bytes of the {results['data']['name']}",
        fontsize=11,
    )
    figure.legend(handles=lines, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=150, metadata={"Description": sweep_section(results)})


def plot_exchange(results: Mapping[str, Any], path: Path) -> None:
    """Losses of `gradwire bench exchange` over bytes sent, each method at its best rate, one panel per world size.

    A PNG whose description is `exchange_section(results)`, so that it is known which results the picture shows.
    """
    rows, options, world_sizes = exchange_rows(results), results["options"], results["world_sizes"]
    figure = Figure(figsize=(1 + 5 * len(world_sizes), 4.4 + 0.11 * len(results["methods"])), layout="constrained")
    panels = figure.subplots(1, len(world_sizes), sharey=True, squeeze=False)[0]
    lines = {}
    for axis, world_size in zip(panels, world_sizes, strict=True):
        for row in (row for row in rows if row.world_size == world_size):
            number = results["methods"].index(row.method)
            style: dict[str, Any] = {"color": _COLOURS[number % len(_COLOURS)], "linewidth": 1.5}
            style["linestyle"] = "-" if number < len(_COLOURS) else "--"
            style |= {"marker": _MARKERS[number % len(_MARKERS)], "markersize": 4}
            x, y = _columns(row.curve)
            (lines[row.method],) = axis.plot([sent / 1e6 for sent in x], y, label=row.method, **style)
            if row.curve:
                axis.annotate(f" {y[-1]:.3f}", (x[-1] / 1e6, y[-1]), fontsize=8, va="top", color=style["color"])
        axis.set(xscale="log", xlabel="MB sent per rank")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_title(f"{world_size} ranks", fontsize=10)
        axis.grid(color="#E5E5E5", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("validation loss (nats per byte)")
    known = [row.curve for row in rows if row.curve]
    if known:
        low, high = min(curve[-1][1] for curve in known), max(curve[min(1, len(curve) - 1)][1] for curve in known)
        panels[0].set_ylim(0.95 * low, 1.02 * high)
    figure.suptitle(
        f"A transformer of {results['parameters'] / 1e6:.2f} M parameters, {options['steps']} steps of "
        f"{options['global_batch'] * options['context']} bytes of the {results['data']['name']}, best learning rates",
        fontsize=11,
    )
    figure.legend(handles=list(lines.values()), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=150, metadata={"Description": exchange_section(results)})


_DRAWN: Mapping[str, Callable[[Mapping[str, Any], Path], None]] = {
    "optim": plot_optimizers,
    "sweep": plot_sweep,
    "exchange": plot_exchange,
    "theory": catalogue.draw,
    "network": drawing.draw,
    "plan": plan_lab.draw,
    "federated-accuracy": draw_accuracy,
}


def stale(text: str, results: Path, root: Path) -> dict[Path, Callable[[], None]]:
    """The pictures that a README shows and that are missing or drawn from other results, with what draws each anew.

    Args:
        text: The README's.
        results: The folder of kept results.
        root: The README's folder.
    """
    found: dict[Path, Callable[[], None]] = {}
    for place, name in FIGURES.items():
        if place in text:
            figure, content = root / place, json.loads((results / f"{name}.json").read_text())
            shown = catalogue.digest(content, figure) if name == "theory" else SECTIONS[name](content)
            if _description(figure) != shown:
                found[figure] = functools.partial(_DRAWN[name], content, figure)
    return found


def _description(path: Path) -> str | None:
    """What a PNG says of itself."""
    if not path.is_file():
        return None
    with Image.open(path) as image:
        return image.info.get("Description")


def _columns(points: Iterable[tuple[float, float]]) -> tuple[list[float], list[float]]:
    x_and_y = list(points)
    return [x for x, _ in x_and_y], [y for _, y in x_and_y]


def _kind(source: str, mode: str) -> str:
    """Which of `_KINDS` a bar is."""
    if source == "gradwire":
        return "gradwire, fused" if mode == "fused" else "gradwire, eager"
    return source if source == "torch" else "other packages"


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
