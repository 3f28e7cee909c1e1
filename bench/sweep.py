"""`gradwire bench sweep`: every optimizer trained at each learning rate of one grid, its best run beside the others'.

A run is that of `gradwire train`, alone in a process with one thread.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gradwire.bench import data, machine, specs
from gradwire.bench.errors import UsageError
from gradwire.bench.grid import Grid, check_alone, check_lrs, train_to_the_end
from gradwire.bench.model import ByteTransformer, num_parameters
from gradwire.bench.report import sweep_rows
from gradwire.bench.runs import Record
from gradwire.bench.teams import deal
from gradwire.bench.train import Options, Trainer

if TYPE_CHECKING:
    from rich.table import Table

LRS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
"""The grid: wide enough to hold the best rate of Adam's relatives and of SGD's."""

OPTIONS = Options(
    configuration=specs.DENSE,
    optimizer="AdamW",
    layers=2,
    width=64,
    heads=2,
    context=64,
    batch=16,
    steps=500,
    seed=0,
    lr=LRS[0],
    warmup=0.1,
    dtype="float32",
    host="loop",
    bucket_mb=25.0,
    eval_every=50,
    checkpoint_every=0,
    data=[],
)
"""A run, but for its optimizer, lr and seed."""

QUICK_LRS = (0.003, 0.03)
QUICK_OPTIONS = replace(OPTIONS, layers=1, width=16, heads=1, context=16, batch=2, steps=4, eval_every=2)

_ARGUMENTS = {"SGDP": "SGDP(momentum=0.9)"}  # as SGD is used; else the defaults
_PROBE = 0.123
_KEYS = ("optimizer", "lr", "seed")


def default_optimizers() -> list[str]:
    """AdamW of torch, and every optimizer of gradwire that leaves the exchange of gradients to others."""
    known = specs.catalogue()["optimizer"].items()
    ours = [_ARGUMENTS.get(name, name) for name, cls in known if cls.__module__.startswith("gradwire.")]
    return list(dict.fromkeys(["AdamW", *(text for text in ours if not specs.exchanges_itself(text))]))


def main(
    optimizers: Sequence[str] = (),
    lrs: Sequence[float] = (),
    *,
    steps: int | None = None,
    seeds: int = 1,
    workers: int | None = None,
    quick: bool = False,
    output: Path | None = None,
    figure: Path | None = None,
) -> None:
    """Train each optimizer at each rate, print a table, and write JSON and a figure if `output` is given.

    Args:
        optimizers: Texts as for `gradwire train --optimizer`, the baseline first; `default_optimizers()` if empty.
        lrs: Peak learning rates, > 0; `LRS` if empty.
        steps: Of each run, >= 1.
        seeds: Runs of each pair, from seed 0 on; means over them are compared.
        workers: Processes, of one thread each; one per core by default.
        quick: A tiny model, few steps and rates.
        output: The JSON. Runs that it holds already are not repeated.
        figure: The figure; beside `output` by default.

    Raises:
        UsageError: A value is wrong, or `output` holds something else.
    """
    check_alone("bench sweep")
    base = QUICK_OPTIONS if quick else OPTIONS
    if steps is not None:
        base = replace(base, steps=steps, eval_every=max(1, steps // 10))
    optimizers = list(dict.fromkeys(optimizers or default_optimizers()))
    lrs = sorted(set(lrs or (QUICK_LRS if quick else LRS)))
    _check(optimizers, lrs, base)
    tasks = [
        replace(base, optimizer=optimizer, lr=lr, seed=seed)
        for optimizer in optimizers
        for lr in lrs
        for seed in range(seeds)
    ]
    workers = workers or os.cpu_count() or 1
    kept = _kept(base, optimizers, lrs, seeds, workers)

    def plot(kept: Record, path: Path) -> None:
        from gradwire.bench.plots import plot_sweep

        plot_sweep(kept, path)

    grid = Grid("sweep", kept, _KEYS, {_key(task): task for task in tasks}, _title)
    grid.run(lambda missing: _trained(missing, workers), table=table, plot=plot, output=output, figure=figure)


def train_once(options: Options, corpus: data.Corpus, device: torch.device) -> Record:
    """One run: its losses at every evaluation, and whether it diverged."""
    return dict(zip(_KEYS, _key(options), strict=True)) | train_to_the_end(Trainer(options, corpus, device))


def table(kept: Record) -> "Table":
    """A record for a terminal."""
    from rich import box
    from rich.table import Table

    rows = sweep_rows(kept)
    rendered = Table(
        title=f"Validation loss after {kept['options']['steps']} steps, at the best of {len(kept['lrs'])} rates",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for place, title in enumerate(
        ("optimizer", "best lr", "at the edge", "validation loss", f"over {rows[0].optimizer}", "diverged")
    ):
        rendered.add_column(title, justify="right" if place else "left")
    for row in rows:
        lost = sum(loss is None for loss in row.losses.values())
        rendered.add_row(
            row.optimizer,
            *("none", "", "") if row.lr is None else (f"{row.lr:g}", "yes" if row.edge else "no", f"{row.loss:.3f}"),
            "" if row is rows[0] or row.difference is None else f"{row.difference:+.3f}",
            f"{lost} of {len(row.losses)}",
        )
    return rendered


def _check(optimizers: Sequence[str], lrs: Sequence[float], base: Options) -> None:
    """Try everything out, so that every mistake shows before anything is trained."""
    check_lrs(lrs)
    for text in optimizers:
        check_takes_lr("--optimizers", text, replace(base, optimizer=text))


def check_takes_lr(option: str, text: str, options: Options) -> None:
    """Raise UsageError unless the optimizer of these options can be made and leaves its learning rate open.

    Args:
        option: Where the user has written it.
        text: What the user has written there.
        options: A run with it.
    """
    model = ByteTransformer(options.layers, options.width, options.heads)
    configuration = specs.parse(options.configuration, options.optimizer)
    made = configuration.optimizer(model.named_parameters(), options.optimizer, lr=_PROBE)
    if any(group["lr"] != _PROBE for group in made.param_groups):
        raise UsageError(f"{option}: expected no lr, which is what differs between runs, got {text!r}.")


def _kept(base: Options, optimizers: Sequence[str], lrs: Sequence[float], seeds: int, workers: int) -> Record:
    """The JSON form of a sweep without runs."""
    corpus = data.standard_library()
    facts = machine.describe("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "benchmark": "sweep",
        "machine": facts | {"threads": 1, "workers": workers},
        "options": {name: value for name, value in asdict(base).items() if name not in _KEYS},
        "parameters": num_parameters(ByteTransformer(base.layers, base.width, base.heads)),
        "data": {"name": corpus.name, "digest": corpus.digest},
        "optimizers": list(optimizers),
        "lrs": list(lrs),
        "seeds": list(range(seeds)),
        "runs": [],
    }


def _trained(tasks: Sequence[Options], workers: int) -> Iterator[Record]:
    """Deal runs to processes; yields each as it ends."""
    return deal(tasks, train_once, teams=workers, title=lambda task: _title(asdict(task)))


def _key(options: Options) -> tuple[Any, ...]:
    return tuple(getattr(options, key) for key in _KEYS)


def _title(run: Record) -> str:
    return f"{run['optimizer']}, lr {run['lr']:g}" + (f", seed {run['seed']}" if run["seed"] else "")
