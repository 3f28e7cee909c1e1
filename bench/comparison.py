"""Train several configurations one after another, on the same seed and text, and set them side by side."""

import dataclasses
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from gradwire.bench.data import Corpus
from gradwire.bench.machine import describe
from gradwire.bench.plots import plot_comparison, plot_run
from gradwire.bench.report import COLUMNS, markdown, rows
from gradwire.bench.runs import Record, RunFolder, write_json
from gradwire.bench.train import Options, train


def compare(
    configurations: Sequence[str],
    options: Options,
    corpus: Corpus,
    path: Path,
    device: torch.device,
    *,
    command: str,
    results: Path | None,
) -> None:
    """Train each configuration in these processes; every rank calls it, rank 0 writes and prints.

    Args:
        configurations: Texts, the baseline first.
        options: All else; `configuration` is replaced.
        corpus: The text.
        path: Folder that gets one run folder per configuration, `comparison.json`, `.md` and `.png`.
        device: Where to train.
        command: How to do it again.
        results: Another place for the JSON, such as `bench/results/train.json`.
    """
    folders = [RunFolder(path / f"{n}-{slug(text)}") for n, text in enumerate(configurations, 1)]
    summaries: list[Record] = []
    for text, folder in zip(configurations, folders, strict=True):
        one = dataclasses.replace(options, configuration=text)
        summaries.append(train(one, corpus, folder, device, resume=False, keep=False))
        if dist.get_rank() == 0:
            plot_run(folder.metrics(), text, folder.path / "loss.png")
    if dist.get_rank() != 0:
        return

    curves = {text: folder.metrics() for text, folder in zip(configurations, folders, strict=True)}
    title = f"Held-out loss, {dist.get_world_size()} ranks, {options.steps} steps, seed {options.seed}"
    plot_comparison(curves, title, path / "comparison.png")
    (path / "comparison.md").write_text(markdown(summaries) + "\n")
    machine = describe(str(device))
    machine.pop("command")  # it leaves out the launcher
    content = {"kind": "train", "command": command, "machine": machine, "runs": _with_curves(summaries, curves)}
    for target in (path / "comparison.json", results):
        if target is not None:
            write_json(target, content)
    _print(summaries)
    print(f"Plots, table and metrics are in {path}")


def _with_curves(summaries: Sequence[Record], curves: dict[str, list[Record]]) -> list[dict[str, Any]]:
    """Each summary with its validation points."""
    keys = ("step", "bytes_sent", "seconds", "validation_loss")
    return [
        {
            **summary,
            "curve": [
                {key: record[key] for key in keys}
                for record in curves[summary["configuration"]]
                if record["validation_loss"] is not None
            ],
        }
        for summary in summaries
    ]


def _print(summaries: Sequence[Record]) -> None:
    table = Table()
    for place, column in enumerate(COLUMNS):
        table.add_column(column, justify="right" if place else "left", overflow="fold")
    for cells in rows(summaries):
        table.add_row(*cells)
    Console(width=None if sys.stdout.isatty() else 120).print(table, markup=False)


def slug(text: str) -> str:
    """A folder's name for a configuration."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
