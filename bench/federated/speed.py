"""`gradwire bench federated`: CPU time of a round in gradwire, in loops written by hand and in other simulators.

All do the same work, which their final weights prove, in processes of their own that take turns round by round.
"""

import importlib.metadata
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from gradwire.bench import machine
from gradwire.bench.errors import UsageError
from gradwire.bench.federated.contenders import CONTENDERS, Contender, ContenderError
from gradwire.bench.federated.ranks import compare
from gradwire.bench.federated.table import speed_rows, speed_titles
from gradwire.bench.federated.work import QUICK_WORKS, WORKS, Work, model_size
from gradwire.bench.grid import check_alone
from gradwire.bench.runs import Record, write_json

if TYPE_CHECKING:
    from rich.table import Table

LEAN, *OTHERS = CONTENDERS
PASSES = 3

TOLERANCES = {"mlp": 5e-6, "lenet": 2e-2}
"""How far a final weight may be from the lean loop's; on the CNN differences of rounding grow, as between two loops."""

_RANKED = "lenet-100"
_RESTLESS = ("Flower on Ray",)
"""Whose processes do not sleep between rounds: they take turns with the lean loop alone."""
_DISTRIBUTIONS = {"pfl": "pfl", "FedLab": "fedlab", "Flower on Ray": "flwr"}


def main(
    works: Sequence[str] = (),
    contenders: Sequence[str] = (),
    *,
    passes: int | None = None,
    ranks: bool = True,
    quick: bool = False,
    output: Path | None = None,
) -> bool:
    """Measure, print a table, and write JSON if `output` is given.

    Args:
        works: Names in `WORKS`; all if empty.
        contenders: Names in `CONTENDERS`, beside the lean loop; all if empty.
        passes: Through all rounds, in fresh processes, >= 1.
        ranks: Measure two ranks against one, too.
        quick: Tiny work, one pass.
        output: The JSON.

    Returns:
        Whether all that ran did the same work.

    Raises:
        UsageError: A value is wrong, or this is not Linux.
    """
    check_alone("bench federated")
    if platform.system() != "Linux":
        raise UsageError(f"bench federated: expected Linux, for its clocks of processes, got {platform.system()}.")
    known = QUICK_WORKS if quick else WORKS
    for option, given, names in (("works", works, known), ("simulators", contenders, CONTENDERS)):
        for name in given:
            if name not in names:
                raise UsageError(f"--{option}: expected some of {', '.join(names)}, got {name!r}.")
    chosen = [LEAN, *(name for name in OTHERS if not contenders or name in contenders)]
    passes = passes or (1 if quick else PASSES)
    versions = {name: _version(_DISTRIBUTIONS[name]) for name in chosen if name in _DISTRIBUTIONS}
    kept: Record = {
        "benchmark": "federated",
        "machine": machine.describe() | {"threads": 1},
        "options": {"quick": quick, "passes": passes},
        "versions": versions,
        "works": {},
        "skipped": {name: "not installed" for name, version in versions.items() if version is None},
        "ranks": None,
    }
    from rich.console import Console

    console = Console()
    with _Bar(console, chosen, [known[name] for name in works or known], passes) as bar:
        for name in works or known:
            work = known[name]
            measurement = Measurement(work, chosen, kept["skipped"], bar.show)
            for _ in range(passes):
                measurement.go()
            kept["works"][name] = asdict(work) | {"parameters": model_size(work), "results": measurement.results()}
            if output is not None:
                write_json(output, kept)
        if ranks and _RANKED in kept["works"]:
            bar.show("two ranks against one", 0)
            kept["ranks"] = {"work": _RANKED} | compare(_RANKED, passes, quick=quick)
    if output is not None:
        write_json(output, kept)
    console.print(table(kept))
    if kept["ranks"] is not None:
        console.print(f"{kept['ranks']['work']} on two ranks: {kept['ranks']['speedup']:.2f} times as fast as on one")
    for name, reason in kept["skipped"].items():
        console.print(f"{name}: not measured: {reason}", markup=False)
    if output is not None:
        console.print(f"written to {output}", markup=False)
    return all(one["same_work"] for work in kept["works"].values() for one in work["results"].values())


@final
@dataclass
class Measurement:
    """Rounds of one work, by contender.

    Args:
        work: What is done.
        names: Contenders; the others are compared with the first one.
        skipped: Those that could not be measured, and why; added to.
        show: Tells of progress: what goes on, and how many rounds are done since.
    """

    work: Work
    names: Sequence[str]
    skipped: dict[str, str]
    show: Callable[[str, int], None]
    _cpu: dict[str, list[float]] = field(default_factory=dict, init=False)
    _ratios: dict[str, list[float]] = field(default_factory=dict, init=False)
    _seconds: dict[str, list[float]] = field(default_factory=dict, init=False)
    _difference: dict[str, float] = field(default_factory=dict, init=False)

    def go(self) -> None:
        """One more pass through all rounds."""
        first, *others = self.names
        self._take_turns([first, *(name for name in others if name not in _RESTLESS)])
        for name in others:
            if name in _RESTLESS and name not in self.skipped:
                self._take_turns([first, name])

    def results(self) -> Record:
        """Medians over rounds and passes."""
        limit = TOLERANCES[self.work.model]
        return {
            name: {
                "cpu_ms": round(1e3 * statistics.median(self._cpu[name]), 3),
                "ratio": round(statistics.median(self._ratios[name]), 3),
                "seconds": round(statistics.median(self._seconds[name]), 4),
                "rounds": len(self._cpu[name]),
                "difference": self._difference[name],
                "same_work": self._difference[name] <= limit,
            }
            for name in self.names
            if name in self._cpu
        }

    def _take_turns(self, names: Sequence[str]) -> None:
        """All rounds, every contender going through each before the next one begins."""
        self.show(f"{self._title}: starting {', '.join(names)}", 0)
        running = {name: Contender(name, self.work) for name in names if name not in self.skipped}
        try:
            self._without_failed(running, Contender.wait)
            found: dict[str, list[tuple[float, float]]] = {name: [] for name in running}
            for number in range(self.work.rounds):
                for name, one in self._without_failed(running, Contender.round).items():
                    found[name].append(one)
                self.show(f"{self._title}, round {number + 1}", len(running))
            weights = self._without_failed(running, Contender.weights)
        finally:
            for contender in running.values():
                contender.end()
        first = self.names[0]
        for name in running:
            if name == first and first in self._cpu and len(names) == 2 and names[1] in _RESTLESS:
                continue
            cpu, seconds = zip(*found[name][1:], strict=True)
            base = [one for one, _ in found[first][1:]]
            self._cpu.setdefault(name, []).extend(cpu)
            self._seconds.setdefault(name, []).extend(seconds)
            self._ratios.setdefault(name, []).extend(one / other for one, other in zip(cpu, base, strict=True))
            off = float((weights[name] - weights[first]).abs().max())
            self._difference[name] = max(off, self._difference.get(name, 0.0))

    def _without_failed(self, running: dict[str, Contender], do: Callable[[Contender], Any]) -> dict[str, Any]:
        """What each gives; those that fail are left out from then on."""
        found = {}
        for name, contender in list(running.items()):
            try:
                found[name] = do(contender)
            except ContenderError as error:
                if name not in _DISTRIBUTIONS:
                    raise RuntimeError(f"bench federated: {name}: {error}") from None
                self.skipped[name] = str(error)
                running.pop(name).end()
        return found

    @property
    def _title(self) -> str:
        return f"{self.work.model}, {self.work.cohort} of {self.work.clients} clients"


@final
class _Bar:
    """Progress in rounds, on a terminal; elsewhere a line where something else begins."""

    def __init__(self, console: Any, names: Sequence[str], works: Sequence[Work], passes: int) -> None:
        from rich import progress

        turns = len(names) + sum(name in _RESTLESS for name in names)
        self._console, self._said = console, ""
        self._bar = progress.Progress(
            "{task.description}",
            progress.BarColumn(bar_width=20),
            progress.TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("starting", total=passes * turns * sum(work.rounds for work in works))

    def __enter__(self) -> "_Bar":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, what: str, rounds: int) -> None:
        """Say what goes on."""
        self._bar.update(self._task, description=what, advance=rounds)
        if not self._console.is_terminal and not rounds and what != self._said:
            self._console.print(what, markup=False)
            self._said = what


def table(kept: Mapping[str, Any]) -> "Table":
    """A record for a terminal."""
    from rich import box
    from rich.table import Table

    found = Table(title="CPU time of a round", box=box.SIMPLE_HEAD, pad_edge=False)
    for place, column in enumerate(speed_titles(kept)):
        found.add_column(column, justify="right" if place else "left")
    for row in speed_rows(kept):
        found.add_row(*row)
    return found


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
