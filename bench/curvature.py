"""`gradwire bench curvature`: steps to a fixed loss with MKOR, its bases, K-FAC and others, and what a step costs.

Every method is tried at the same number of learning rates, with the same seeds.
"""

import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch

from gradwire.bench import data, machine
from gradwire.bench.curvature_overhead import CONTEXT, VARIANTS, overhead
from gradwire.bench.curvature_problems import HYBRID, METHODS, SETTINGS, SPREAD, Problem, Setting, digest
from gradwire.bench.curvature_table import COLUMNS, curvature_rows
from gradwire.bench.errors import UsageError
from gradwire.bench.grid import DIVERGED, Grid, check_alone
from gradwire.bench.runs import Record, write_json
from gradwire.bench.teams import deal

if TYPE_CHECKING:
    from rich.table import Table

SEEDS = 3
QUICK_STEPS = 10

_BLOCKS, _BATCHES = 12, (4, 16)
_KEYS = ("problem", "method", "lr", "seed")


@final
@dataclass(frozen=True)
class Task:
    """One run.

    Args:
        problem: A name in `SETTINGS`.
        method: A name in `METHODS`.
        lr: Its learning rate.
        seed: Of weights and batches.
        steps: At most.
    """

    problem: str
    method: str
    lr: float
    seed: int
    steps: int


def main(
    problems: Sequence[str] = (),
    methods: Sequence[str] = (),
    *,
    seeds: int = SEEDS,
    workers: int | None = None,
    quick: bool = False,
    output: Path | None = None,
    figure: Path | None = None,
) -> None:
    """Train every method on each problem at each rate, time steps, print tables, and write JSON if `output` is given.

    Args:
        problems: Names in `SETTINGS`; all if empty.
        methods: Names in `METHODS`; all if empty.
        seeds: Runs of each, from seed 0 on.
        workers: Processes, of one thread each; one per core by default.
        quick: A few steps, two rates and one seed.
        output: The JSON. Runs that it holds already are not repeated.
        figure: The figure; beside `output` by default.

    Raises:
        UsageError: A value is wrong, or `output` holds something else.
    """
    check_alone("bench curvature")
    for option, given, known in (("problems", problems, SETTINGS), ("methods", methods, METHODS)):
        for name in given:
            if name not in known:
                raise UsageError(f"--{option}: expected some of {', '.join(known)}, got {name!r}.")
    problems, methods = list(problems or SETTINGS), list(methods or METHODS)
    workers = workers or os.cpu_count() or 1
    kept = _kept(problems, methods, 1 if quick else seeds, workers, quick=quick)
    tasks = [
        Task(problem, method, lr, seed, kept["problems"][problem]["steps"])
        for problem in problems
        for method in methods
        for lr in kept["problems"][problem]["lrs"][method]
        for seed in kept["seeds"]
    ]
    grid = Grid("curvature bench", kept, _KEYS, {_key(task): task for task in tasks}, _title)

    def train(missing: list[Task]) -> Iterator[Record]:
        yield from deal(missing, train_once, teams=workers, title=lambda task: _title(vars(task)))
        batches, blocks = (_BATCHES[:1], 2) if quick else (_BATCHES, _BLOCKS)
        kept["overhead"] = overhead(batches, blocks=blocks)  # when nothing else runs
        if output is not None:
            write_json(output, kept)

    grid.run(train, table=tables, plot=_plot, output=output, figure=figure)


def train_once(task: Task, corpus: data.Corpus, device: torch.device) -> Record:
    """One run: when it reached either target, and its last loss."""
    setting = SETTINGS[task.problem]
    problem = setting.problem(task.seed, corpus)
    optimizer = METHODS[task.method].build(problem.model, task.lr)
    groups = getattr(optimizer, "base", optimizer).param_groups
    limit = DIVERGED * problem.validation_loss()
    loss = math.nan
    steps_to: list[int | None] = [None, None]
    switched_at = None
    diverged, step, seconds = False, 0, 0.0
    while step < task.steps and not diverged and None in steps_to:
        start = time.perf_counter()
        for _ in range(min(setting.every, task.steps - step)):
            step += 1
            for group in groups:
                group["lr"] = task.lr * min(1.0, step / max(1, setting.warmup))
            _step(problem, optimizer, step)
            if switched_at is None and getattr(optimizer, "switched", False):
                switched_at = step
        seconds += time.perf_counter() - start
        loss = problem.validation_loss()
        diverged = not loss <= limit  # NaN is not
        for i, target in enumerate(setting.targets):
            if steps_to[i] is None and loss <= target:
                steps_to[i] = step
    return {
        **{key: getattr(task, key) for key in _KEYS},
        "steps_to": steps_to,
        "steps": step,
        "validation_loss": None if diverged else round(loss, 4),
        "diverged": diverged,
        "switched_at": switched_at,
        "seconds": round(seconds, 3),
    }


def _step(problem: Problem, optimizer: Any, step: int) -> None:
    loss = problem.loss(step)
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    if hasattr(optimizer, "observe"):
        optimizer.observe(loss)
    optimizer.step()


def tables(kept: Record) -> "Table":
    """A record for a terminal."""
    from rich import box
    from rich.table import Table

    page = Table.grid()
    for name, problem in kept["problems"].items():
        table = Table(title=problem["title"], box=box.SIMPLE_HEAD, pad_edge=False)
        for place, column in enumerate(COLUMNS):
            table.add_column(column.format(*problem["targets"]), justify="right" if place else "left")
        for row in curvature_rows(kept, name):
            table.add_row(row.method, *row.cells())
        page.add_row(table)
    table = Table(title="Training step over AdamW's", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("optimizer")
    for batch in kept["overhead"]["ratios"]:
        table.add_column(f"{int(batch) * CONTEXT} tokens", justify="right")
    for variant in VARIANTS:
        table.add_row(variant, *(f"{ratios[variant]:.2f}" for ratios in kept["overhead"]["ratios"].values()))
    page.add_row(table)
    return page


def _kept(problems: Sequence[str], methods: Sequence[str], seeds: int, workers: int, *, quick: bool) -> Record:
    """The JSON form of a comparison without runs."""
    corpus = data.standard_library()
    settings = {name: replace(SETTINGS[name], steps=QUICK_STEPS) if quick else SETTINGS[name] for name in problems}
    return {
        "benchmark": "curvature",
        "machine": machine.describe() | {"threads": 1, "workers": workers},
        "options": {"quick": quick, "hybrid": {**HYBRID, "windows": list(HYBRID["windows"])}},
        "data": {name: digest(name, corpus) for name in problems},
        "problems": {name: _described(setting, methods, quick=quick) for name, setting in settings.items()},
        "methods": list(methods),
        "bases": {method: METHODS[method].base for method in methods},
        "seeds": list(range(seeds)),
        "overhead": None,
        "runs": [],
    }


def _described(setting: Setting, methods: Sequence[str], *, quick: bool) -> Record:
    spread = SPREAD[1:3] if quick else SPREAD
    middle = {method: setting.lrs[METHODS[method].family] for method in methods}
    return {
        "title": setting.title,
        "targets": list(setting.targets),
        "steps": setting.steps,
        "every": setting.every,
        "warmup": setting.warmup,
        "lrs": {method: [round(lr * factor, 6) for factor in spread] for method, lr in middle.items()},
    }


def _plot(kept: Record, path: Path) -> None:
    """Steps to both targets, the mean over seeds with the least and the most; nothing where a seed missed it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 0.8 + 0.5 * len(kept["methods"])), layout="constrained")
    axes = figure.subplots(1, len(kept["problems"]), squeeze=False)[0]
    for axis, (name, problem) in zip(axes, kept["problems"].items(), strict=True):
        rows = curvature_rows(kept, name)
        for i, (target, colour) in enumerate(zip(problem["targets"], ("#56B4E9", "#0072B2"), strict=True)):
            for place, row in enumerate(rows):
                known = [steps for steps in row.steps[i] if steps is not None]
                if len(known) == len(row.steps[i]):
                    mean = sum(known) / len(known)
                    error = [[mean - min(known)], [max(known) - mean]]
                    label = f"to {target:g}" if place == 0 else None
                    axis.barh(place + 0.4 * i, mean, 0.38, xerr=error, color=colour, label=label)
        axis.set_yticks([place + 0.2 for place in range(len(rows))], [row.method for row in rows], fontsize=8)
        axis.set(title=problem["title"], xlabel="steps")
        axis.invert_yaxis()
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False)
    figure.savefig(path, dpi=150)


def _key(task: Task) -> tuple[Any, ...]:
    return tuple(getattr(task, key) for key in _KEYS)


def _title(run: Record) -> str:
    return f"{run['problem']}: {run['method']}, lr {run['lr']:g}, seed {run['seed']}"
