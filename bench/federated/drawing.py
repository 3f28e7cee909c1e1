"""The figure of `gradwire bench federated --accuracy`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from gradwire.bench.federated.accuracy_table import accuracy_rows, accuracy_section

_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7F7F7F")
_LEAST = 60.0


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Accuracy over rounds and over bytes that clients have sent, for every Dirichlet distribution, as PNG."""
    rows, options = accuracy_rows(results), results["options"]
    figure = Figure(figsize=(13, 4.1 * len(results["alphas"]) + 0.18 * len(rows)), layout="constrained")
    grid = figure.subplots(len(results["alphas"]), 2, sharey=True, squeeze=False)
    lines = []
    for number, (alpha, (over_rounds, over_bytes)) in enumerate(zip(results["alphas"], grid, strict=True)):
        for place, row in enumerate(rows):
            best, style = row.best[number], ("-", "--", ":")[place // len(_COLOURS)]
            rounds = results["rounds_of_curve"]
            sent = [round * options["cohort"] * row.bytes_up / 1e6 for round in rounds]
            look: dict[str, Any] = {"color": _COLOURS[place % len(_COLOURS)], "linestyle": style, "linewidth": 1.4}
            lines += over_rounds.plot(rounds, best.curve, label=row.method, **look)[: number == 0]
            over_bytes.plot(sent, best.curve, **look)
        over_rounds.set(xlabel="round", ylabel="accuracy (%)", title=f"Dirichlet({alpha:g})", ylim=(_LEAST, 100))
        over_bytes.set(xlabel="MB that clients have sent", xscale="log", title=f"Dirichlet({alpha:g})")
        over_bytes.xaxis.set_major_formatter("{x:g}")
        for axis in (over_rounds, over_bytes):
            axis.grid(color="#E5E5E5", linewidth=0.8)
            axis.spines[["top", "right"]].set_visible(False)
    figure.legend(handles=lines, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path, dpi=120, metadata={"Description": accuracy_section(results)})
