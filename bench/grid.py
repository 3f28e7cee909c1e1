"""Runs over a grid of settings: kept in one JSON as they end, never repeated, and shown when all are there."""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, final

from torch import Tensor

from gradwire.bench.errors import UsageError
from gradwire.bench.runs import Record, write_json
from gradwire.bench.train import Trainer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

DIVERGED = 2.0
"""A run ends early when its loss is not finite or this many times the first step's."""

_CONSOLE_WIDTH = 100

Task = TypeVar("Task")


@final
class Grid(Generic[Task]):
    """What a command trains, and how far it has come.

    Args:
        noun: What the user calls it.
        kept: Its JSON form without runs.
        keys: Entries of a run by which it is known.
        tasks: What there is to train, by these entries.
        title: A run or its entries in words.
        outcome: What came of a run, in words.
    """

    def __init__(
        self,
        noun: str,
        kept: Record,
        keys: Sequence[str],
        tasks: Mapping[tuple[Any, ...], Task],
        title: Callable[[Record], str],
        outcome: Callable[[Record], str] | None = None,
    ) -> None:
        self.noun, self.kept, self.keys, self.tasks, self.title = noun, kept, keys, tasks, title
        self.outcome = outcome or _loss

    def run(
        self,
        train: Callable[[list[Task]], Iterator[Record]],
        *,
        table: Callable[[Record], "Table"],
        plot: Callable[[Record, Path], None] | None = None,
        output: Path | None,
        figure: Path | None = None,
    ) -> None:
        """Train what `output` does not hold yet, print the table, and write JSON and figure if `output` is given.

        Args:
            train: Yields a record for each of these tasks, in any order.
            table: Makes the terminal's table.
            plot: Draws the figure, if there is one.
            output: The JSON.
            figure: The figure; beside `output` by default.

        Raises:
            UsageError: `output` holds something else.
        """
        from rich.console import Console

        if output is not None and output.exists():
            self.kept["runs"] = self._finished(output)
        console = Console()
        if not console.is_terminal:  # a file has no width; the table has
            console = Console(width=_CONSOLE_WIDTH)
        done, total = self.kept["runs"], len(self.tasks)
        if done:
            console.print(f"{len(done)} of {total} runs are taken from {output}: remove it to repeat them")
        try:
            self._train_missing(train, output, console)
        except KeyboardInterrupt:
            if output is not None:
                done = self.kept["runs"]
                console.print(f"{len(done)} of {total} runs are in {output}: the same command goes on there")
            raise
        console.print(table(self.kept))
        if output is not None and plot is None:
            console.print(f"written to {output}", markup=False)
        elif output is not None and plot is not None:
            figure = figure or output.with_suffix(".png")
            figure.parent.mkdir(parents=True, exist_ok=True)
            plot(self.kept, figure)
            console.print(f"written to {output} and drawn in {figure}", markup=False)

    def _key(self, run: Record) -> tuple[Any, ...]:
        return tuple(run[key] for key in self.keys)

    def _finished(self, output: Path) -> list[Record]:
        """The runs that an earlier, perhaps interrupted, command has left in its file."""
        try:
            earlier = json.loads(output.read_text())
            before, now = _facts(earlier), _facts(self.kept)
            runs: list[Record] = earlier["runs"]
        except (ValueError, TypeError, KeyError):
            raise UsageError(f"--output: expected a new file or that of a {self.noun}, got {str(output)!r}.") from None
        for name, value in now.items():
            if before.get(name) != value:
                raise UsageError(
                    f"--output: expected a new file or one with {name}={value!r}, got {str(output)!r} with "
                    f"{name}={before.get(name)!r}. Name another, or remove it."
                )
        for run in runs:
            if self._key(run) not in self.tasks:
                raise UsageError(
                    f"--output: {str(output)!r} holds {self.title(run)}, which is not part of this {self.noun}. Name "
                    "another, or remove it."
                )
        return runs

    def _train_missing(
        self, train: Callable[[list[Task]], Iterator[Record]], output: Path | None, console: "Console"
    ) -> None:
        """Add the runs that are missing, in the order of the tasks, and write each down as it ends."""
        from rich import progress

        runs = {self._key(run): run for run in self.kept["runs"]}
        missing = [task for key, task in self.tasks.items() if key not in runs]
        columns = ("{task.description}", progress.BarColumn(bar_width=20), progress.MofNCompleteColumn())
        bar = progress.Progress(
            *columns, progress.TimeRemainingColumn(), console=console, disable=not console.is_terminal, transient=True
        )
        with bar:
            shown = bar.add_task("training", total=len(self.tasks), completed=len(runs))
            for run in train(missing):
                runs[self._key(run)] = run
                self.kept["runs"] = [runs[key] for key in self.tasks if key in runs]
                if output is not None:
                    write_json(output, self.kept)
                line = f"{self.title(run)}: {self.outcome(run)}"
                bar.update(shown, completed=len(runs), description=line)
                if not console.is_terminal:
                    console.print(f"[{len(runs)}/{len(self.tasks)}] {line}, {run['seconds']:.0f} s", markup=False)


def _loss(run: Record) -> str:
    return "diverged" if run["diverged"] else f"validation loss {run['validation_loss']:.3f}"


def check_alone(command: str) -> None:
    """Raise UsageError under torchrun: the command starts its own processes."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(f"{command}: expected one process, without torchrun; it starts its own.")


def check_lrs(lrs: Sequence[float]) -> None:
    """Raise UsageError unless these can be peak learning rates."""
    for lr in lrs:
        if not 0 < lr < math.inf:
            raise UsageError(f"--lrs: expected learning rates > 0, got {lr}.")


def train_to_the_end(trainer: Trainer, measure: Callable[[], Record] = dict) -> Record:
    """One run: its losses at every evaluation, and whether it diverged. Every rank calls it and gets the same losses.

    Args:
        trainer: Fresh.
        measure: What else to note at every evaluation.
    """
    options = trainer.options
    start = time.perf_counter()
    curve: list[Record] = []
    losses: list[Tensor] = []
    limit = math.inf
    diverged = False
    for step in range(1, options.steps + 1):
        losses.append(trainer.step(step - 1))
        if step % options.eval_every and step < options.steps:
            continue
        if step < options.steps:
            trainer.wait()
        else:
            trainer.settle()
        if not curve:
            limit = DIVERGED * trainer.mean_over_ranks(losses[:1])
        found = {"train_loss": trainer.mean_over_ranks(losses), "validation_loss": trainer.evaluate()}
        losses.clear()
        curve.append({"step": step} | {name: round(loss, 5) for name, loss in found.items()} | measure())
        diverged = not all(loss <= limit for loss in found.values())  # NaN is not
        if diverged:
            break
    return {
        "validation_loss": None if diverged else curve[-1]["validation_loss"],
        "diverged": diverged,
        "skipped_steps": trainer.communicator.stats.skipped,
        "seconds": round(time.perf_counter() - start, 2),
        "curve": curve,
    }


def _facts(kept: Record) -> Record:
    """What must not differ between runs of one file."""
    return {
        "benchmark": kept["benchmark"],
        **kept["options"],
        **kept["data"],
        "torch": kept["machine"]["torch"],
    }
