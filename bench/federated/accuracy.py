"""`gradwire bench federated --accuracy`: federated algorithms on digits, with clients alike and with different ones.

Every method is tried at the same learning rates, with the same clients, cohorts and first weights.
"""

import functools
import os
import statistics
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch

from gradwire.bench import data, machine
from gradwire.bench.errors import UsageError
from gradwire.bench.federated import methods
from gradwire.bench.federated.accuracy_table import accuracy_rows, columns
from gradwire.bench.federated.methods import ALPHAS, METHODS
from gradwire.bench.federated.work import cross_entropy
from gradwire.bench.grid import Grid, check_alone
from gradwire.bench.runs import Record
from gradwire.bench.teams import deal
from gradwire.federated import LocalTraining, Simulation

if TYPE_CHECKING:
    from rich.table import Table

LRS = (0.03, 0.1, 0.3)
ROUNDS, QUICK_ROUNDS = 200, 4
LAST = 20
"""Rounds at the end whose mean accuracy counts."""
SEEDS = 3

_EVERY = 10
_KEYS = ("method", "alpha", "lr", "seed")


@final
@dataclass(frozen=True)
class Task:
    """One run.

    Args:
        method: A name in `METHODS`.
        alpha: Of the Dirichlet distribution.
        lr: Of clients.
        seed: Of what is held out, clients, first weights, cohorts and batches.
        rounds: In all.
    """

    method: str
    alpha: float
    lr: float
    seed: int
    rounds: int


def main(
    names: Sequence[str] = (),
    *,
    seeds: int = SEEDS,
    workers: int | None = None,
    quick: bool = False,
    output: Path | None = None,
    figure: Path | None = None,
) -> None:
    """Train every method at each rate, print the table, and write JSON and a figure if `output` is given.

    Args:
        names: Of `METHODS`; all if empty.
        seeds: Runs of each, from seed 0 on.
        workers: Processes, of one thread each; one per core by default.
        quick: A few rounds, two rates and one seed.
        output: The JSON. Runs that it holds already are not repeated.
        figure: The figure; beside `output` by default.

    Raises:
        UsageError: A value is wrong, or `output` holds something else.
    """
    check_alone("bench federated --accuracy")
    for name in names:
        if name not in METHODS:
            raise UsageError(f"--methods: expected some of {', '.join(METHODS)}, got {name!r}.")
    workers = workers or os.cpu_count() or 1
    kept = _kept(list(names or METHODS), 1 if quick else seeds, workers, quick=quick)
    tasks = [
        Task(method, alpha, lr, seed, kept["options"]["rounds"])
        for method in kept["methods"]
        for alpha in kept["alphas"]
        for lr in kept["lrs"]
        for seed in kept["seeds"]
    ]
    grid = Grid("federated accuracy bench", kept, _KEYS, {_key(task): task for task in tasks}, _title, _outcome)

    def train(missing: list[Task]) -> Iterator[Record]:
        return deal(missing, train_once, teams=workers, title=lambda task: _title(vars(task)))

    grid.run(train, table=table, plot=_plot, output=output, figure=figure)


def train_once(task: Task, corpus: data.Corpus, device: torch.device) -> Record:
    """One run: accuracy at its end and on the way, and what has travelled."""
    method, start = METHODS[task.method], time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # one of the methods has an alpha that is too large
        simulation = Simulation(
            methods.model(task.seed),
            methods.clients(task.alpha, task.seed),
            method.algorithm,
            LocalTraining(lr=task.lr, steps=methods.STEPS, batch_size=methods.BATCH_SIZE),
            loss=cross_entropy,
            cohort_size=methods.COHORT,
            uplink=method.uplink,
            server_optimizer=method.server_optimizer,
            evaluate=functools.partial(methods.accuracy, seed=task.seed),
            seed=task.seed,
        )
    found = [record.metrics["accuracy"] for record in simulation.run(task.rounds)]
    last = found[-LAST:]
    return {
        **{key: getattr(task, key) for key in _KEYS},
        "accuracy": round(statistics.mean(last), 2),
        "deviation": round(statistics.pstdev(last), 2),
        "bytes_up": simulation.bytes_up,
        "bytes_down": simulation.bytes_down,
        "seconds": round(time.perf_counter() - start, 2),
        "curve": [round(found[round_ - 1], 2) for round_ in rounds_of_curve(task.rounds)],
    }


def rounds_of_curve(rounds: int) -> list[int]:
    """After which a run's curve has its points."""
    return sorted({1, *range(min(_EVERY, rounds), rounds + 1, _EVERY)})


def table(kept: Record) -> "Table":
    """A record for a terminal."""
    from rich import box
    from rich.table import Table

    found = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for place, column in enumerate(columns(kept)):
        found.add_column(column, justify="right" if place else "left")
    for row in accuracy_rows(kept):
        found.add_row(row.method, *row.cells())
    return found


def _plot(kept: Record, path: Path) -> None:
    from gradwire.bench.federated.drawing import draw

    draw(kept, path)


def _kept(names: Sequence[str], seeds: int, workers: int, *, quick: bool) -> Record:
    """The JSON form of a comparison without runs."""
    rounds = QUICK_ROUNDS if quick else ROUNDS
    return {
        "benchmark": "federated-accuracy",
        "machine": machine.describe() | {"threads": 1, "workers": workers},
        "options": {
            "quick": quick,
            "rounds": rounds,
            "last": LAST,
            "clients": methods.CLIENTS,
            "min_size": methods.MIN_SIZE,
            "cohort": methods.COHORT,
            "steps": methods.STEPS,
            "batch_size": methods.BATCH_SIZE,
        },
        "data": {"digits": methods.digest(), "held_out": methods.HELD_OUT},
        "parameters": methods.NUMEL,
        "methods": list(names),
        "references": {name: list(METHODS[name].reference) for name in names},
        "alphas": list(ALPHAS),
        "lrs": list(LRS[1:] if quick else LRS),
        "seeds": list(range(seeds)),
        "rounds_of_curve": rounds_of_curve(rounds),
        "runs": [],
    }


def _key(task: Task) -> tuple[Any, ...]:
    return tuple(getattr(task, key) for key in _KEYS)


def _title(run: Record) -> str:
    return f"{run['method']}, Dirichlet({run['alpha']:g}), lr {run['lr']:g}, seed {run['seed']}"


def _outcome(run: Record) -> str:
    return f"{run['accuracy']:.1f} %"
