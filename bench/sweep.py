"""`gradwire bench sweep`: every optimizer trained at each learning rate of one grid, its best run beside the others'.

A run is that of `gradwire train`, alone in a process with one thread. So its result depends neither on the order of the
runs nor on how many of them go on at once.
"""

import contextlib
import json
import math
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradwire.bench import data, machine, specs
from gradwire.bench.errors import UsageError
from gradwire.bench.launch import process_group
from gradwire.bench.model import ByteTransformer, num_parameters
from gradwire.bench.report import sweep_rows
from gradwire.bench.runs import Record, write_json
from gradwire.bench.train import Options, Trainer

if TYPE_CHECKING:
    from rich.console import Console
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

DIVERGED = 2.0
"""A run ends early when its loss is not finite or this many times the first step's."""

_ARGUMENTS = {"SGDP": "SGDP(momentum=0.9)"}  # as SGD is used; else the defaults
_KEYS = ("optimizer", "lr", "seed")
_CONSOLE_WIDTH = 100


def default_optimizers() -> list[str]:
    """AdamW of torch, and every optimizer of gradwire."""
    known = specs.catalogue()["optimizer"].items()
    ours = [_ARGUMENTS.get(name, name) for name, cls in known if cls.__module__.startswith("gradwire.")]
    return list(dict.fromkeys(["AdamW", *ours]))


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
    from rich.console import Console

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("bench sweep: expected one process, without torchrun; it starts --workers of its own.")
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
    if output is not None and output.exists():
        kept["runs"] = _finished(output, kept, tasks)
    console = Console()
    if not console.is_terminal:  # a file has no width; the table has
        console = Console(width=_CONSOLE_WIDTH)
    if kept["runs"]:
        console.print(f"{len(kept['runs'])} of {len(tasks)} runs are taken from {output}: remove it to repeat them")
    try:
        _train_missing(kept, tasks, workers, output, console)
    except KeyboardInterrupt:
        if output is not None:
            console.print(f"{len(kept['runs'])} of {len(tasks)} runs are in {output}: the same command goes on there")
        raise
    console.print(table(kept))
    if output is not None:
        from gradwire.bench.plots import plot_sweep

        figure = figure or output.with_suffix(".png")
        figure.parent.mkdir(parents=True, exist_ok=True)
        plot_sweep(kept, figure)
        console.print(f"written to {output} and drawn in {figure}", markup=False)


def train_once(options: Options, corpus: data.Corpus, device: torch.device) -> Record:
    """One run: its losses at every evaluation, and whether it diverged."""
    trainer = Trainer(options, corpus, device)
    start = time.perf_counter()
    curve: list[Record] = []
    losses: list[Tensor] = []
    limit = math.inf
    diverged = False
    for step in range(1, options.steps + 1):
        losses.append(trainer.step(step - 1))
        if step % options.eval_every and step < options.steps:
            continue
        if not curve:
            limit = DIVERGED * float(losses[0])
        found = {"train_loss": trainer.mean_over_ranks(losses), "validation_loss": trainer.evaluate()}
        losses.clear()
        curve.append({"step": step} | {name: round(loss, 5) for name, loss in found.items()})
        diverged = not all(loss <= limit for loss in found.values())  # NaN is not
        if diverged:
            break
    return {
        **{key: getattr(options, key) for key in _KEYS},
        "validation_loss": None if diverged else curve[-1]["validation_loss"],
        "diverged": diverged,
        "skipped_steps": trainer.communicator.stats.skipped,
        "seconds": round(time.perf_counter() - start, 2),
        "curve": curve,
    }


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
    for lr in lrs:
        if not 0 < lr < math.inf:
            raise UsageError(f"--lrs: expected learning rates > 0, got {lr}.")
    model = ByteTransformer(base.layers, base.width, base.heads)
    probe = 0.123
    for text in optimizers:
        made = specs.parse(base.configuration, text).optimizer(model.named_parameters(), text, lr=probe)
        if any(group["lr"] != probe for group in made.param_groups):
            raise UsageError(f"--optimizers: expected no lr, which is what differs between runs, got {text!r}.")


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


def _finished(output: Path, kept: Record, tasks: Sequence[Options]) -> list[Record]:
    """The runs that an earlier, perhaps interrupted, sweep has left in its file.

    Raises:
        UsageError: They are none of this sweep's.
    """
    try:
        earlier = json.loads(output.read_text())
        facts = [{**found["options"], **found["data"], "torch": found["machine"]["torch"]} for found in (earlier, kept)]
        runs: list[Record] = earlier["runs"]
    except (ValueError, TypeError, KeyError):
        raise UsageError(f"--output: expected a new file or that of a sweep, got {str(output)!r}.") from None
    for name, value in facts[1].items():
        if facts[0].get(name) != value:
            raise UsageError(
                f"--output: expected a new file or one with {name}={value!r}, got {str(output)!r} with "
                f"{name}={facts[0].get(name)!r}. Name another, or remove it."
            )
    asked = {_key(asdict(task)) for task in tasks}
    for run in runs:
        if _key(run) not in asked:
            raise UsageError(
                f"--output: {str(output)!r} holds {_title(run)}, which is not part of this sweep. Name another, or "
                "remove it."
            )
    return runs


def _train_missing(
    kept: Record, tasks: Sequence[Options], workers: int, output: Path | None, console: "Console"
) -> None:
    """Add the runs that are not in `kept`, in the order of `tasks`, and write each down as it ends."""
    from rich import progress

    runs = {_key(run): run for run in kept["runs"]}
    missing = [task for task in tasks if _key(asdict(task)) not in runs]
    columns = ("{task.description}", progress.BarColumn(bar_width=20), progress.MofNCompleteColumn())
    bar = progress.Progress(
        *columns, progress.TimeRemainingColumn(), console=console, disable=not console.is_terminal, transient=True
    )
    with bar:
        shown = bar.add_task("training", total=len(tasks), completed=len(runs))
        for run in _trained(missing, workers):
            runs[_key(run)] = run
            kept["runs"] = [runs[key] for key in (_key(asdict(task)) for task in tasks) if key in runs]
            if output is not None:
                write_json(output, kept)
            loss = "diverged" if run["diverged"] else f"validation loss {run['validation_loss']:.3f}"
            line = f"{_title(run)}: {loss}"
            bar.update(shown, completed=len(runs), description=line)
            if not console.is_terminal:
                console.print(f"[{len(runs)}/{len(tasks)}] {line}, {run['seconds']:.0f} s", markup=False)


def _trained(tasks: Sequence[Options], workers: int) -> Iterator[Record]:
    """Deal runs to processes; yields each as it ends."""
    context = multiprocessing.get_context("spawn")
    waiting = deque(tasks)
    running: dict[Connection, Options] = {}
    processes = []

    def deal(pipe: Connection) -> None:
        if waiting:
            running[pipe] = waiting.popleft()
            pipe.send(running[pipe])

    try:
        for _ in range(min(workers, len(tasks))):
            ours, theirs = context.Pipe()
            processes.append(context.Process(target=_work, args=(theirs,), daemon=True))
            processes[-1].start()
            theirs.close()
            deal(ours)
        while running:
            for pipe in wait(list(running)):
                assert isinstance(pipe, Connection)
                task = running.pop(pipe)
                try:
                    run: Record = pipe.recv()
                except EOFError:
                    raise RuntimeError(f"bench sweep: the process of {_title(asdict(task))} has ended.") from None
                deal(pipe)
                yield run
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _work(pipe: Connection) -> None:
    """Train what comes through the pipe until its other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it, too, and decides
    torch.set_num_threads(1)
    corpus = data.standard_library()
    with process_group() as device, contextlib.suppress(EOFError):
        while True:
            pipe.send(train_once(pipe.recv(), corpus, device))


def _key(run: Record) -> tuple[Any, ...]:
    return tuple(run[key] for key in _KEYS)


def _title(run: Record) -> str:
    return f"{run['optimizer']}, lr {run['lr']:g}" + (f", seed {run['seed']}" if run["seed"] else "")
