"""The claims by name: what they show, and how they are drawn."""

import hashlib
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradwire.bench.theory.claim import Claim, Line

NAMES = ("counterexample", "weights", "econtrol", "momentum", "saddle", "walk", "unbiased")
"""Modules of this package, each with a `CLAIM`."""

COLUMNS = ("Claim", "Theory", "Measured", "Holds")

_PACKAGE = __name__.rpartition(".")[0]


def load(name: str) -> Claim:
    """The claim of this name."""
    found: Claim = importlib.import_module(f"{_PACKAGE}.{name}").CLAIM
    return found


def lines(results: Mapping[str, Any], name: str) -> list[Line]:
    """What a kept claim shows."""
    return load(name).lines(results["claims"][name]["numbers"])


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Draw the claim of which a PNG has the name; the file says of which numbers."""
    from matplotlib.figure import Figure

    claim = load(path.stem)
    figure = Figure(layout="constrained")
    claim.draw(figure, results["claims"][claim.name]["numbers"])
    figure.suptitle(claim.title, fontsize=11, wrap=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Description": digest(results, path)})


def digest(results: Mapping[str, Any], path: Path) -> str:
    """A hash of the numbers that a PNG of this name shows."""
    numbers = json.dumps(results["claims"][path.stem]["numbers"], sort_keys=True)
    return hashlib.blake2b(numbers.encode(), digest_size=8).hexdigest()


def theory_section(results: Mapping[str, Any]) -> str:
    """What the README shows of `gradwire bench theory`: every line of every claim, with its figure."""
    about, rows = results["machine"], ["| " + " | ".join(COLUMNS) + " |", "|---|---|---|---|"]
    for name in results["claims"]:
        for place, line in enumerate(lines(results, name)):
            what = f"[{name}](docs/theory/{name}.png): {line.what}" if place == 0 else line.what
            cells = (what, line.expected, line.measured, verdict(line))
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return (
        "\n".join(rows) + "\n\n"
        f"{about['cpu']}, {about['workers']} processes of one thread, torch {about['torch']}, {about['date'][:10]}. "
        f"Made by `{about['command']}`."
    )


def verdict(line: Line) -> str:
    """Whether a line holds, in a word."""
    return "yes" if line.holds else "no"
