"""The figure of `gradwire bench network`: loss over seconds on every network."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from gradwire.bench.network.links import title
from gradwire.bench.network.methods import NONE
from gradwire.bench.network.table import network_rows, network_section, target

_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7F7F7F")
_COLUMNS = 3


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Validation loss over the seconds of training, one panel per network, as PNG.

    The file's description is `network_section(results)`, so that it is known which results the picture shows.
    """
    rows = [row for row in network_rows(results) if row.method != NONE.name]
    networks = list(results["networks"])
    columns = min(_COLUMNS, len(networks))
    lines = -(-len(networks) // columns)
    height = 0.6 + 3.6 * lines + 0.2 * -(-len(rows) // 2)
    figure = Figure(figsize=(1 + 4.2 * columns, height), layout="constrained")
    panels = figure.subplots(lines, columns, sharey=True, squeeze=False).flatten()
    loss = target(results)
    handles: list[Any] = []
    for axis, network in zip(panels, networks, strict=False):
        handles = []
        for number, row in enumerate(rows):
            seconds = [step * row.seconds[network] for step, _ in row.curve]
            style = "-" if number < len(_COLOURS) else "--"
            values = [value for _, value in row.curve]
            colour = _COLOURS[number % len(_COLOURS)]
            handles += axis.plot(seconds, values, style, color=colour, linewidth=1.5, label=row.method)
        if loss is not None:
            axis.axhline(loss, color=_COLOURS[-1], linewidth=0.8, linestyle=":")
        axis.set(xscale="log", xlabel="seconds of training")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_title(title(network), fontsize=10)
        axis.grid(color="#E5E5E5", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in panels[len(networks) :]:
        axis.set_visible(False)
    panels[0].set_ylabel("validation loss (nats per byte)")
    ends = [row.curve[-1][1] for row in rows]
    starts = [row.curve[min(1, len(row.curve) - 1)][1] for row in rows]
    if ends:
        panels[0].set_ylim(0.97 * min(ends), 1.02 * max(starts))
    figure.suptitle(
        f"{results['options']['hosts']} hosts, a transformer of {results['parameters'] / 1e6:.2f} M parameters",
        fontsize=11,
    )
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Description": network_section(results)})
