"""What `gradwire federate` does: simulate one method or several, keep every round, and draw them."""

import contextlib
import dataclasses
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from gradwire.bench import federate_data, federate_table
from gradwire.bench.comparison import slug
from gradwire.bench.errors import UsageError
from gradwire.bench.federate_data import Task
from gradwire.bench.federate_options import Options
from gradwire.bench.federate_plots import plot_accuracy, plot_distribution
from gradwire.bench.federate_simulation import AnySimulation, make
from gradwire.bench.machine import describe
from gradwire.bench.progress import Progress
from gradwire.bench.runs import Record, RunFolder, write_json
from gradwire.federated import Engine, RoundRecord, SerialEngine, TorchrunEngine, partition
from gradwire.federated.partition import Partition


@contextlib.contextmanager
def engine(name: str | None) -> Iterator[Engine]:
    """Where clients run, with one thread per process unless OMP_NUM_THREADS says otherwise.

    Args:
        name: "serial" or "torchrun"; by default whatever started this process.

    Raises:
        UsageError: torchrun is asked for and did not start this process, or the other way round.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if name == "serial" and launched:
        raise UsageError(
            "--engine: expected torchrun under torchrun, got serial, which would do the same on each rank."
        )
    if name == "torchrun" and "WORLD_SIZE" not in os.environ:
        raise UsageError(
            "--engine: expected serial without torchrun, got torchrun. Start it with: torchrun --standalone "
            "--nproc-per-node 2 --no-python gradwire federate"
        )
    threads = torch.get_num_threads()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    try:
        if name == "torchrun" or launched:
            with TorchrunEngine(threads=None) as ranks:
                yield ranks
        else:
            yield SerialEngine()
    finally:
        torch.set_num_threads(threads)


def run(options: Options, task: Task, output: Path | None, where: Engine, *, resume: bool) -> None:
    """Simulate one method, and show how it went.

    Raises:
        UsageError: the folder holds an earlier run, or parts do not fit one another.
    """
    folder = _folder(output, where)
    if not resume and folder.newest_checkpoint() is not None:
        raise UsageError(f"--output: expected a new folder, got {str(output)!r} with a run. Use --resume to go on.")
    summary = simulate(options, task, folder, where, resume=resume, keep=True)
    if where.rank == 0:
        plot_accuracy({options.method: folder.metrics()}, _title(options, task), folder.path / "accuracy.png")
        (folder.path / "table.md").write_text(federate_table.markdown([summary]) + "\n")
        federate_table.show([summary])
        print(f"Plots, table and metrics are in {folder.path}")


def compare(
    options: Options, task: Task, methods: Sequence[str], output: Path | None, where: Engine, *, command: str
) -> None:
    """Simulate several methods on the same clients, cohorts and batches, and set them side by side.

    Raises:
        UsageError: a method does not fit the others' options.
    """
    for text in methods:
        make(dataclasses.replace(options, method=text), task, _parts(options, task), SerialEngine())
    path = _folder(output, where).path
    folders = [RunFolder(path / f"{number}-{slug(text)}", "round") for number, text in enumerate(methods, 1)]
    summaries = []
    for text, folder in zip(methods, folders, strict=True):
        one = dataclasses.replace(options, method=text)
        summaries.append(simulate(one, task, folder, where, resume=False, keep=False))
    if where.rank != 0:
        return
    runs = {text: folder.metrics() for text, folder in zip(methods, folders, strict=True)}
    plot_accuracy(runs, _title(options, task), path / "accuracy.png")
    _plot_clients(options, task, _parts(options, task), path)
    (path / "comparison.md").write_text(federate_table.markdown(summaries) + "\n")
    machine = describe("cpu")
    machine.pop("command")  # it leaves out the launcher
    content = {"kind": "federate", "command": command, "machine": machine, "runs": summaries}
    write_json(path / "comparison.json", content)
    federate_table.show(summaries)
    print(f"Plots, table and metrics are in {path}")


def simulate(options: Options, task: Task, folder: RunFolder, where: Engine, *, resume: bool, keep: bool) -> Record:
    """Go through the rounds; every process calls it, the first one writes.

    Args:
        options: Of the run.
        task: What is trained on.
        folder: Gets options, partition and metrics.
        where: Clients run.
        resume: Go on from the folder's newest checkpoint.
        keep: Whether checkpoints are written, and the picture of what clients hold.

    Returns:
        The run's figures.
    """
    speaks = where.rank == 0
    parts = _parts(options, task, folder.path / "partition.json" if resume else None)
    simulation = make(options, task, parts, where, folder.path / "clients")
    elapsed = 0.0
    if resume:
        newest = folder.newest_checkpoint()
        assert newest is not None
        _load(simulation, folder.checkpoint(newest))
        if speaks:
            last = folder.continue_from(newest)
            elapsed = last["seconds"] if last else 0.0
            write_json(folder.path / "options.json", dataclasses.asdict(options))
    elif speaks:
        folder.start(dataclasses.asdict(options))
        made_by = f"{options.partition}, seed {options.seed}"
        partition.save(folder.path / "partition.json", parts, num_examples=task.num_examples, made_by=made_by)
        if keep:
            _plot_clients(options, task, parts, folder.path)
    begin = time.perf_counter() - elapsed
    left = options.rounds - simulation.rounds
    with Progress(
        options.method, options.rounds, enabled=speaks, counter="round", describe=federate_table.describe
    ) as progress:
        for found in simulation.run(left):
            if speaks:
                record = _record(found, time.perf_counter() - begin)
                folder.append(record)
                progress.show(record)
            if keep and (found.round % options.checkpoint_every == 0 or found.round == options.rounds):
                _save(simulation, folder, found.round, where)
    if not speaks:
        return {}
    summary = federate_table.summary(
        folder.metrics(), method=options.method, options=dataclasses.asdict(options), parameters=simulation.model.numel
    )
    write_json(folder.path / "summary.json", summary)
    return summary


def _parts(options: Options, task: Task, file: Path | None = None) -> Partition:
    """Which examples are whose; of a resumed run as its file says."""
    text = options.partition if file is None else str(file)
    return federate_data.split(text, task, options.clients, options.seed)


def _record(found: RoundRecord, seconds: float) -> Record:
    """What is kept of a round; the metrics are those of the held-out examples."""
    metrics: dict[str, Any] = {"loss": None, "accuracy": None, **found.metrics}
    return {
        "round": found.round,
        "train_loss": found.loss,
        **metrics,
        "bytes_up": found.bytes_up,
        "bytes_down": found.bytes_down,
        "time": found.time,
        "participants": found.participants,
        "lost": found.lost,
        "late": found.late,
        "not_finite": found.not_finite,
        "staleness": found.staleness,
        "failures": {str(client): said for client, said in found.failures.items()},
        "seconds": seconds,
    }


def _save(simulation: AnySimulation, folder: RunFolder, number: int, where: Engine) -> None:
    """A checkpoint in place of the one before."""
    before = folder.newest_checkpoint()
    simulation.save(folder.checkpoint(number))
    if where.rank == 0 and before not in (None, number):
        shutil.rmtree(folder.checkpoint(before))


def _load(simulation: AnySimulation, path: Path) -> None:
    try:
        simulation.load(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"--resume: {error}") from None


def _plot_clients(options: Options, task: Task, parts: Partition, path: Path) -> None:
    title = f"{len(parts)} clients of {task.name}, {options.partition}"
    plot_distribution(task.distribution(parts), task.kinds, task.unit, title, path / "clients.png")


def _folder(output: Path | None, where: Engine) -> RunFolder:
    """One folder for all processes; without a name, the first one's clock gives it one."""
    mine = str(output or Path("runs") / time.strftime("%Y%m%d-%H%M%S"))
    return RunFolder(Path(where.gather_text(mine)[0]), "round")


def _title(options: Options, task: Task) -> str:
    work = f"{options.local_steps} local steps" if options.local_steps else f"{options.epochs} local epochs"
    return (
        f"{task.name}: {options.clients} clients, {options.partition}, {options.cohort} per round, {work}, "
        f"seed {options.seed}"
    )
