"""`gradwire bench theory`: what theory says of error feedback, shown on small problems, one process per claim."""

import contextlib
import json
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gradwire.bench import machine
from gradwire.bench.errors import UsageError
from gradwire.bench.grid import check_alone
from gradwire.bench.runs import write_json
from gradwire.bench.theory.catalogue import COLUMNS, NAMES, draw, lines, load, verdict
from gradwire.bench.theory.claim import Record
from gradwire.bench.theory.problems import classes

if TYPE_CHECKING:
    from rich.table import Table

_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_CONSOLE_WIDTH = 120


def main(
    claims: Sequence[str] = (),
    *,
    quick: bool = False,
    workers: int | None = None,
    output: Path = Path("runs/theory/theory.json"),
    figures: Path | None = None,
) -> bool:
    """Run claims, draw them, write their numbers, print a table.

    Args:
        claims: Of `NAMES`; all if empty.
        quick: Small forms of a few seconds, with wider margins.
        workers: Processes, of one thread each; one per core by default.
        output: The JSON. Claims that it holds and that are not run now stay.
        figures: The folder of the figures; that of `output` by default.

    Returns:
        Whether everything holds.

    Raises:
        UsageError: A name is unknown, `output` holds something else, or scikit-learn is missing.
    """
    from rich.console import Console

    check_alone("bench theory")
    for name in claims:
        if name not in NAMES:
            raise UsageError(f"--claims: expected some of {', '.join(NAMES)}, got {name!r}.")
    chosen = [name for name in NAMES if name in (claims or NAMES)]
    if any(load(name).data for name in chosen):
        classes("digits")  # at once, and not after minutes
    workers = workers or os.cpu_count() or 1
    kept: Record = {
        "benchmark": "theory",
        "machine": machine.describe() | {"threads": 1, "workers": workers},
        "options": {"quick": quick},
        "claims": {},
    }
    if output.exists():
        kept["claims"] = _others(output, kept, chosen)
    console = Console()
    if not console.is_terminal:  # a file has no width; the table has
        console = Console(width=_CONSOLE_WIDTH)
    figures = figures or output.parent
    start = time.perf_counter()
    for done, (name, record) in enumerate(_run(chosen, workers, quick=quick), start=1):
        kept["claims"][name] = record
        kept["claims"] = {other: kept["claims"][other] for other in NAMES if other in kept["claims"]}
        write_json(output, kept)
        kept = json.loads(output.read_text())  # what figures are drawn from, now and later
        draw(kept, figures / f"{name}.png")
        outcome = "holds" if all(line.holds for line in lines(kept, name)) else "does not hold"
        console.print(f"[{done}/{len(chosen)}] {name}: {outcome}, {record['seconds']:.0f} s", markup=False)
    console.print(_table(kept, chosen))
    console.print(
        f"{time.perf_counter() - start:.0f} s; written to {output} and drawn in {figures}", markup=False, soft_wrap=True
    )
    return all(line.holds for name in chosen for line in lines(kept, name))


def _run(names: Sequence[str], workers: int, *, quick: bool) -> Iterator[tuple[str, Record]]:
    """Records of these claims as they end, each made in a process that does nothing else."""
    context = multiprocessing.get_context("spawn")
    with _one_thread(), ProcessPoolExecutor(min(workers, len(names)), mp_context=context) as pool:
        running: dict[Future[Record], str] = {pool.submit(make, name, quick): name for name in names}
        try:
            for future in as_completed(running):
                yield running[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def make(name: str, quick: bool) -> Record:
    """Run one claim in this process, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    start = time.perf_counter()
    try:
        numbers = load(name).run(quick)
    finally:
        torch.set_num_threads(threads)
    return {"seconds": round(time.perf_counter() - start, 1), "numbers": numbers}


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Processes started meanwhile have linear algebra on one thread."""
    before = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _others(output: Path, kept: Record, chosen: Sequence[str]) -> Record:
    """The claims that stay in a file of an earlier command."""
    try:
        earlier = json.loads(output.read_text())
        before, now = (_facts(content) for content in (earlier, kept))
        others = {name: record for name, record in earlier["claims"].items() if name not in chosen}
    except (ValueError, TypeError, KeyError):
        raise UsageError(f"--output: expected a new file or that of bench theory, got {str(output)!r}.") from None
    for name, value in now.items():
        if others and before[name] != value:
            raise UsageError(
                f"--output: expected a new file or one with {name}={value!r}, got {str(output)!r} with "
                f"{name}={before[name]!r}. Name another, or remove it."
            )
    return others


def _facts(kept: Record) -> Record:
    """What claims of one file have in common."""
    return {"benchmark": kept["benchmark"], "quick": kept["options"]["quick"], "torch": kept["machine"]["torch"]}


def _table(kept: Record, names: Sequence[str]) -> "Table":
    """For a terminal."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in COLUMNS:
        table.add_column(column, overflow="fold")
    for name in names:
        table.add_section()
        for place, line in enumerate(lines(kept, name)):
            what = f"{name}: {line.what}" if place == 0 else line.what
            cells = (what, line.expected, line.measured, verdict(line))
            table.add_row(*map(Text, cells), style=None if line.holds else "bold red")
    return table
