"""`Progress`: one live line on a terminal, a plain line every few seconds elsewhere."""

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, final

from rich import progress as rich_progress

_SECONDS_BETWEEN_LINES = 5.0


@final
class Progress:
    """Shows how far a run is: by default step, loss, tokens per second, bytes per step and compression rate.

    Args:
        title: What is trained.
        steps: Steps in all.
        enabled: Whether this rank speaks.
        counter: Entry of a record that counts steps.
        describe: One line of text for a record and the number of steps.
    """

    def __init__(
        self,
        title: str,
        steps: int,
        *,
        enabled: bool,
        counter: str = "step",
        describe: Callable[[dict[str, Any], int], str] | None = None,
    ) -> None:
        self._title, self._steps, self._enabled = title, steps, enabled
        self._counter, self._describe = counter, describe or describe_step
        self._next_line = 0.0
        self._live: rich_progress.Progress | None = None
        if enabled and sys.stdout.isatty():
            self._live = rich_progress.Progress(
                rich_progress.TextColumn("{task.description}", markup=False),
                rich_progress.BarColumn(bar_width=20),
                rich_progress.TextColumn("{task.fields[line]}", markup=False),
            )
            self._task = self._live.add_task(title, total=steps, line="")

    def __enter__(self) -> "Progress":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, record: dict[str, Any]) -> None:
        """Show a record of the metrics."""
        if not self._enabled:
            return
        line, done = self._describe(record, self._steps), record[self._counter]
        if self._live is not None:
            self._live.update(self._task, completed=done, line=line)
        elif time.monotonic() >= self._next_line or done == self._steps:
            print(f"{self._title}: {line}", flush=True)
            self._next_line = time.monotonic() + _SECONDS_BETWEEN_LINES


def describe_step(record: dict[str, Any], steps: int) -> str:
    """One line of text for a record."""
    text = f"step {record['step']}/{steps}  loss {record['train_loss']:.3f}"
    if record["validation_loss"] is not None:
        text += f"  validation {record['validation_loss']:.3f}"
    return (
        f"{text}  {record['tokens_per_second']:,.0f} tokens/s  {size(record['bytes_per_step'])}/step  "
        f"rate {record['compression_rate']:.1f}"
    )


def size(count: float) -> str:
    """Bytes in a unit that can be read: `3.35 MB`."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
