"""`gradwire bench exchange`: validation loss over bytes sent, every method at the best rate of one grid.

A method is a configuration: a communicator and an optimizer, or an optimizer that exchanges gradients by itself. Each
run is that of `gradwire train`, on real processes of one thread each that speak through gloo on this machine. The text
of a step is shared among the ranks, so that a world of any size trains on the same number of bytes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch

from gradwire.bench import data, machine, sweep
from gradwire.bench.errors import UsageError
from gradwire.bench.exchange_table import exchange_rows
from gradwire.bench.grid import Grid, check_alone, check_lrs, train_to_the_end
from gradwire.bench.model import ByteTransformer, num_parameters
from gradwire.bench.runs import Record
from gradwire.bench.teams import deal
from gradwire.bench.train import Options, Trainer

if TYPE_CHECKING:
    from rich.table import Table

METHODS = (
    "dense + AdamW",
    "PowerSGD(matrix_rank=1) + AdamW",
    "ChunkTopK(k=32) + EF21 + AdamW",
    "DeMo(k=32)",
    "DeMo(k=48, values='sign')",
)
"""The baseline first. The last one's k is the greatest that sends 80 times fewer bytes than that on 4 ranks."""

WORLD_SIZES = (2, 4)
LRS = (0.001, 0.002, 0.004, 0.006, 0.008, 0.016)
QUICK_LRS = (0.003, 0.03)
QUICK_WORLD_SIZES = (2,)

OPTIONS = sweep.OPTIONS
"""A run in one process; more share its batch."""

QUICK_OPTIONS = replace(sweep.QUICK_OPTIONS, batch=4)

_KEYS = ("configuration", "world_size", "lr", "seed")
_OF_A_RUN = ("configuration", "optimizer", "lr", "seed", "batch")


@final
@dataclass(frozen=True)
class Task:
    """One run.

    Args:
        world_size: Ranks, >= 2.
        options: Of each rank.
    """

    world_size: int
    options: Options

    @property
    def entries(self) -> Record:
        """By what the run is known."""
        of_options = {key: getattr(self.options, key) for key in _KEYS if key != "world_size"}
        return {key: self.world_size if key == "world_size" else of_options[key] for key in _KEYS}


def main(
    methods: Sequence[str] = (),
    lrs: Sequence[float] = (),
    *,
    world_sizes: Sequence[int] = (),
    steps: int | None = None,
    seeds: int = 1,
    quick: bool = False,
    output: Path | None = None,
    figure: Path | None = None,
) -> None:
    """Train each method at each rate and world size, print a table, and write JSON and a figure if `output` is given.

    Args:
        methods: Configurations as for `gradwire train --compare`, the baseline first; `METHODS` if empty.
        lrs: Peak learning rates, > 0; `LRS` if empty.
        world_sizes: Numbers of ranks, >= 2; `WORLD_SIZES` if empty.
        steps: Of each run, >= 1.
        seeds: Runs of each setting, from seed 0 on; means over them are compared.
        quick: A tiny model, few steps and rates.
        output: The JSON. Runs that it holds already are not repeated.
        figure: The figure; beside `output` by default.

    Raises:
        UsageError: A value is wrong, or `output` holds something else.
    """
    check_alone("bench exchange")
    base = QUICK_OPTIONS if quick else OPTIONS
    if steps is not None:
        base = replace(base, steps=steps, eval_every=max(1, steps // 10))
    methods = list(dict.fromkeys(methods or METHODS))
    lrs = sorted(set(lrs or (QUICK_LRS if quick else LRS)))
    world_sizes = sorted(set(world_sizes or (QUICK_WORLD_SIZES if quick else WORLD_SIZES)))
    _check(methods, lrs, world_sizes, base)
    tasks = [
        Task(world_size, replace(base, configuration=method, lr=lr, seed=seed, batch=base.batch // world_size))
        for world_size in world_sizes
        for method in methods
        for lr in lrs
        for seed in range(seeds)
    ]
    kept = {
        "benchmark": "exchange",
        "machine": machine.describe() | {"threads": 1},
        **_what_is_trained(base),
        "methods": methods,
        "world_sizes": world_sizes,
        "lrs": lrs,
        "seeds": list(range(seeds)),
        "runs": [],
    }

    def plot(kept: Record, path: Path) -> None:
        from gradwire.bench.plots import plot_exchange

        plot_exchange(kept, path)

    grid = Grid("comparison", kept, _KEYS, {tuple(task.entries.values()): task for task in tasks}, _title)
    grid.run(_trained, table=table, plot=plot, output=output, figure=figure)


def train_once(task: Task, corpus: data.Corpus, device: torch.device) -> Record:
    """One run, on every rank: losses and bytes sent at every evaluation, and whether it diverged."""
    trainer = Trainer(task.options, corpus, device)
    record = train_to_the_end(trainer, lambda: {"bytes_sent": trainer.communicator.stats.bytes_sent})
    return task.entries | {"ranks_equal": trainer.ranks_equal()} | record


def table(kept: Record) -> "Table":
    """A record for a terminal."""
    from rich import box
    from rich.table import Table

    rendered = Table(
        title=f"Validation loss after {kept['options']['steps']} steps, at the best of {len(kept['lrs'])} rates, and "
        "bytes of one rank per step",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for title in ("ranks", "method", "best lr", "loss", "difference", "bytes", "fewer"):
        method = title == "method"
        rendered.add_column(title, justify="left" if method else "right", no_wrap=not method, overflow="fold")
    for row in exchange_rows(kept):
        rendered.add_row(str(row.world_size), row.method, *row.cells())
    return rendered


def _check(methods: Sequence[str], lrs: Sequence[float], world_sizes: Sequence[int], base: Options) -> None:
    """Try everything out, so that every mistake shows before anything is trained."""
    check_lrs(lrs)
    for world_size in world_sizes:
        if world_size < 2 or base.batch % world_size:
            raise UsageError(
                f"--world-sizes: expected numbers from 2 on that divide the {base.batch} sequences of a step, "
                f"got {world_size}."
            )
    for text in methods:
        sweep.check_takes_lr("--methods", text, replace(base, configuration=text))


def _what_is_trained(base: Options) -> Record:
    """Options of all runs, model and text, for the JSON."""
    corpus = data.standard_library()
    options = {name: value for name, value in asdict(base).items() if name not in _OF_A_RUN}
    return {
        "options": options | {"global_batch": base.batch},
        "parameters": num_parameters(ByteTransformer(base.layers, base.width, base.heads)),
        "data": {"name": corpus.name, "digest": corpus.digest},
    }


def _trained(tasks: Sequence[Task]) -> Iterator[Record]:
    """Train on one world after the other, none beside another; yields each run as it ends."""
    for world_size, some in groupby(tasks, key=lambda task: task.world_size):
        yield from deal(list(some), train_once, teams=1, ranks=world_size, title=lambda task: _title(task.entries))


def _title(run: dict[str, Any]) -> str:
    seed = f", seed {run['seed']}" if run["seed"] else ""
    return f"{run['world_size']} ranks, {run['configuration']}, lr {run['lr']:g}{seed}"
