"""`RunFolder`: what a training run leaves on disk."""

import json
import math
import os
import re
from pathlib import Path
from typing import Any, final

Record = dict[str, Any]


@final
class RunFolder:
    """A folder with `options.json`, `metrics.jsonl`, `summary.json`, plots and `checkpoints/step-N`.

    Only rank 0 writes to it, checkpoints apart; all ranks may read.

    Args:
        path: The folder; created when first written to.
        counter: What its records and checkpoints are counted by.
    """

    def __init__(self, path: Path, counter: str = "step") -> None:
        self.path, self.counter = path, counter

    def start(self, options: Record) -> None:
        """Begin a new run here: keep its options, drop an earlier run's metrics."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / "options.json", options)
        (self.path / "metrics.jsonl").write_text("")

    def continue_from(self, step: int) -> Record | None:
        """Cut the metrics back to a checkpoint's step; returns their last record, None if there is none."""
        kept = [record for record in self.metrics() if record[self.counter] <= step]
        lines = (json.dumps(record) + "\n" for record in kept)
        (self.path / "metrics.jsonl").write_text("".join(lines))
        return kept[-1] if kept else None

    def append(self, record: Record) -> None:
        """Add one line to the metrics."""
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(_finite(record), allow_nan=False) + "\n")

    def options(self) -> Record:
        """The options of the run, as saved."""
        saved: Record = json.loads((self.path / "options.json").read_text())
        return saved

    def metrics(self) -> list[Record]:
        """All records so far; what a process that died in the middle of a line has left is none."""
        text = (self.path / "metrics.jsonl").read_text()
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def checkpoint(self, step: int) -> Path:
        """Where the checkpoint of a step stands."""
        return self.path / "checkpoints" / f"{self.counter}-{step:07d}"

    def newest_checkpoint(self) -> int | None:
        """The last step with a finished checkpoint."""
        names = (re.fullmatch(rf"{self.counter}-(\d+)", path.name) for path in (self.path / "checkpoints").glob("*-*"))
        return max((int(name[1]) for name in names if name), default=None)


def write_json(path: Path, content: Any) -> None:
    """Write strict JSON (a NaN becomes null), whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(_finite(content), indent=2, allow_nan=False) + "\n")
    os.replace(partial, path)


def _finite(content: Any) -> Any:
    """The same with None for every number that JSON cannot hold."""
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
