"""What `gradwire federate` says: a line while it runs, and a table at the end."""

import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from gradwire.bench.progress import size
from gradwire.bench.runs import Record

COLUMNS = ("Method", "Accuracy", "Best", "Loss", "Rounds to {}", "Up", "Down", "Virtual time", "Seconds")
"""Accuracy is the mean over the last tenth of the rounds; bytes are those of all clients and rounds."""

_SHARE_OF_BEST = 0.95


def describe(record: dict[str, Any], rounds: int) -> str:
    """One line of text for a record."""
    text = f"round {record['round']}/{rounds}  loss {_number(record['train_loss'], '.3f')}"
    if record["accuracy"] is not None:
        text += f"  accuracy {record['accuracy']:.1%}"
    text += f"  up {size(record['bytes_up'])}  down {size(record['bytes_down'])}"
    return f"{text}  time {duration(record['time'])}{_trouble(record)}"


def summary(records: Sequence[Record], **more: Any) -> Record:
    """Figures of a whole run.

    Args:
        records: One per round, at least one.
        more: Further entries, put in front.
    """
    last, known = records[-1], [record for record in records if record["accuracy"] is not None]
    tail = known[-max(1, len(known) // 10) :]
    return {
        **more,
        "rounds": last["round"],
        "accuracy": sum(record["accuracy"] for record in tail) / len(tail) if tail else None,
        "best_accuracy": max((record["accuracy"] for record in known), default=None),
        "loss": known[-1]["loss"] if known else None,
        "bytes_up": last["bytes_up"],
        "bytes_down": last["bytes_down"],
        "time": last["time"],
        "seconds": last["seconds"],
        "lost": sum(record["lost"] for record in records),
        "late": sum(record["late"] for record in records),
        "not_finite": sum(record["not_finite"] for record in records),
        "failed": sum(len(record["failures"]) for record in records),
        "curve": [[record["round"], record["accuracy"]] for record in known],
    }


def headers(summaries: Sequence[Record]) -> list[str]:
    """The columns' names, with the accuracy that rounds are counted to."""
    goal = _goal(summaries)
    return [column.format("-" if goal is None else f"{goal:.0%}") for column in COLUMNS]


def rows(summaries: Sequence[Record]) -> list[tuple[str, ...]]:
    """Cells, one row per run."""
    goal = _goal(summaries)
    table: list[tuple[str, ...]] = []
    for run in summaries:
        reached = [] if goal is None else [number for number, accuracy in run["curve"] if accuracy >= goal]
        table.append(
            (
                run["method"],
                _number(run["accuracy"], ".1%"),
                _number(run["best_accuracy"], ".1%"),
                _number(run["loss"], ".3f"),
                str(reached[0]) if reached else "-",
                size(run["bytes_up"]),
                size(run["bytes_down"]),
                duration(run["time"]),
                f"{run['seconds']:.1f}",
            )
        )
    return table


def markdown(summaries: Sequence[Record]) -> str:
    """The same table in Markdown."""
    lines = ["| " + " | ".join(headers(summaries)) + " |", "|---" + "|---:" * (len(COLUMNS) - 1) + "|"]
    for name, *cells in rows(summaries):
        lines.append("| " + " | ".join([f"`{name}`", *cells]) + " |")
    return "\n".join(lines)


def show(summaries: Sequence[Record]) -> None:
    """Print the table."""
    table = Table()
    for place, column in enumerate(headers(summaries)):
        table.add_column(column, justify="right" if place else "left", overflow="fold")
    for cells in rows(summaries):
        table.add_row(*cells)
    Console(width=None if sys.stdout.isatty() else 120).print(table, markup=False)


def duration(seconds: float) -> str:
    """Virtual time in a unit that can be read: `3.2 min`."""
    for unit, length in (("s", 60.0), ("min", 60.0), ("h", 24.0)):
        if seconds < 10 * length:
            return f"{seconds:.3g} {unit}"
        seconds /= length
    return f"{seconds:.3g} d"


def _goal(summaries: Sequence[Record]) -> float | None:
    """An accuracy that the best run reached well before its end, in whole percent."""
    best = max((run["accuracy"] for run in summaries if run["accuracy"] is not None), default=None)
    return None if best is None else int(100 * _SHARE_OF_BEST * best) / 100


def _number(value: float | None, form: str) -> str:
    """A number that may not be one."""
    return "-" if value is None else format(value, form)


def _trouble(record: Record) -> str:
    """What did not go well in a round, if anything."""
    counts = {"lost": record["lost"], "late": record["late"], "not finite": record["not_finite"]}
    counts["failed"] = len(record["failures"])
    return "".join(f"  {count} {name}" for name, count in counts.items() if count)
