"""Tables of kept results, and the README's copies of them."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gradwire.bench.errors import UsageError
from gradwire.bench.progress import size

COLUMNS = ("Configuration", "Validation loss", "Difference", "Bytes per step", "Compression", "Seconds")


def rows(runs: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Cells of a comparison's table, one row per run, under `COLUMNS`."""
    first = runs[0]["validation_loss"]
    table: list[tuple[str, ...]] = []
    for run in runs:
        loss = run["validation_loss"]
        difference = "" if run is runs[0] or loss is None or first is None else f"{loss - first:+.3f}"
        table.append(
            (
                run["configuration"],
                "not finite" if loss is None else f"{loss:.3f}",
                difference,
                size(run["bytes_per_step"]),
                f"{run['compression_rate']:.1f}",
                f"{run['seconds']:.0f}",
            )
        )
    return table


def markdown(runs: Sequence[Mapping[str, Any]]) -> str:
    """The same table in Markdown."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" + "|---:" * (len(COLUMNS) - 1) + "|"]
    for name, *cells in rows(runs):
        lines.append("| " + " | ".join([f"`{name}`", *cells]) + " |")
    return "\n".join(lines)


def train_section(results: Mapping[str, Any]) -> str:
    """What the README shows of `gradwire train --compare`: the table and how it was made."""
    first, machine = results["runs"][0], results["machine"]
    options = first["options"]
    tokens = options["batch"] * options["context"]
    return (
        f"{markdown(results['runs'])}\n\n"
        f"Nats per byte on held-out text of the {first['data']['name']}; a transformer of "
        f"{first['parameters'] / 1e6:.2f} M parameters, {options['steps']} steps of {tokens} "
        f"bytes on each of {first['world_size']} ranks, seed {options['seed']}. {machine['cpu']}, "
        f"torch {machine['torch']}, {machine['date'][:10]}. Bytes are those that one rank sends; over loopback, "
        f"seconds show what compression costs, not what it saves on a slow link. Made by `{results['command']}`."
    )


_SECTIONS: dict[str, Callable[[Mapping[str, Any]], str]] = {"train": train_section}


def fill(text: str, results: Path) -> str:
    """The README's text with what stands between its `<!-- results:NAME -->` markers made anew.

    Raises:
        UsageError: there is no marker, or no such result.
    """
    pattern = re.compile(r"(<!-- results:(\w+) -->\n).*?(<!-- /results:\2 -->)", re.DOTALL)
    if not pattern.search(text):
        raise UsageError("report: expected markers such as <!-- results:train --> … <!-- /results:train -->, got none.")

    def section(match: re.Match[str]) -> str:
        name, path = match[2], results / f"{match[2]}.json"
        if name not in _SECTIONS:
            raise UsageError(f"report: unknown results {name!r}. There is {', '.join(_SECTIONS)}.")
        if not path.is_file():
            raise UsageError(f"report: expected results in {path}, found no such file.")
        return f"{match[1]}{_SECTIONS[name](json.loads(path.read_text()))}\n{match[3]}"

    return pattern.sub(section, text)
