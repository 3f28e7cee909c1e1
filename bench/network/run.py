"""`gradwire bench network`: step time, bytes and loss of every method on hosts of this machine, over shaped links.

Every method is one torchrun job over all hosts. It first spends the token budget on unlimited links, which gives loss
over steps; then its step is timed on every network in turn, several rounds of them. Time to a loss on a network is
steps to that loss by the step's time there: arithmetic does not depend on the links. One real run over slow links
checks that.
"""

import contextlib
import functools
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, final

from gradwire.bench import data, machine
from gradwire.bench.errors import UsageError
from gradwire.bench.grid import Grid, check_alone
from gradwire.bench.model import ByteTransformer, num_parameters
from gradwire.bench.network import overlap
from gradwire.bench.network.job import settings
from gradwire.bench.network.links import Network, parse
from gradwire.bench.network.methods import CATALOGUE, NONE, NOT_MEASURED, QUICK, Method, find
from gradwire.bench.network.namespaces import Hosts, hosts, why_not
from gradwire.bench.network.table import table
from gradwire.bench.network.team import team
from gradwire.bench.network.trainee import Shape
from gradwire.bench.runs import Record

NETWORKS = ("unlimited", "1gbit", "100mbit", "10mbit", "10mbit/100mbit", "10mbit,100mbit")
QUICK_NETWORKS = ("100mbit", "10mbit")
CHECKED = "PowerSGD(matrix_rank=1)", "10mbit"
"""What is also trained over slow links, and over which."""

TRACED = tuple(Method(f"dense, {host}", "gradwire", "dense", host, bucket_mb=0.25) for host in ("loop", "ddp"))
"""What is traced: all-reduce of whole gradients through both adapters, in small buckets."""

_TRACED_NETWORK, _TRACED_HOSTS, _TRACED_STEPS = "1gbit", 2, 20
_TRACED_SHAPE = Shape(batch=32)

_WINDOW_SECONDS = 2.5
_MOST_ROUNDS, _LEAST_ROUNDS = 12, 3  # of a window, for methods that exchange in every step
_WARM_UP_STEPS = 4
_SECONDS_OF_SILENCE = 600.0

What = Literal["method", "check", "trace"]


@final
@dataclass(frozen=True)
class Task:
    """One job.

    Args:
        what: A method on all networks, a check of one on its network, or a trace.
        method: How gradients are brought together.
        networks: Where.
        hosts: Namespaces, >= 2.
        shape: Model and training.
        rounds: How often each network is measured.
        trace: Where a trace stays; nowhere if None.
    """

    what: What
    method: Method
    networks: tuple[Network, ...]
    hosts: int
    shape: Shape
    rounds: int
    trace: Path | None = None

    @property
    def key(self) -> tuple[str, str]:
        """By what the run is known."""
        return self.what, self.method.name


def main(
    methods: Sequence[str] = (),
    networks: Sequence[str] = (),
    *,
    host_count: int = 4,
    rounds: int | None = None,
    steps: int | None = None,
    quick: bool = False,
    output: Path | None = None,
    figure: Path | None = None,
    trace: Path | None = None,
) -> None:
    """Run every method, print a table, and write JSON and a figure if `output` is given.

    Args:
        methods: Names of the catalogue or configurations as for `gradwire train`; all of the catalogue if empty.
        networks: As `gradwire.bench.network.links` reads them; `NETWORKS` if empty.
        host_count: Namespaces, from 2 to 4.
        rounds: How often each network is measured; medians over them count. 3, or 1 with `quick`.
        steps: Of the token budget; 300, or 30 with `quick`.
        quick: Two hosts, few methods, networks and steps.
        output: The JSON. Runs that it holds already are not repeated.
        figure: The figure; beside `output` by default.
        trace: A folder for Chrome traces of some steps of rank 0.

    Raises:
        UsageError: A value is wrong, namespaces cannot be made, or `output` holds something else.
    """
    check_alone("bench network")
    if (why := why_not()) is not None:
        raise UsageError(f"bench network: {why}")
    host_count = min(host_count, 2) if quick else host_count
    rounds = rounds or (1 if quick else 3)
    base = Shape(steps=30, eval_every=15) if quick else Shape()
    if steps is not None:
        base = replace(base, steps=steps, eval_every=max(1, min(base.eval_every, steps // 4)))
    chosen = [find(name) for name in dict.fromkeys(methods or (QUICK if quick else CATALOGUE))]
    links = [parse(text, host_count) for text in dict.fromkeys(networks or (QUICK_NETWORKS if quick else NETWORKS))]
    jobs = _tasks(chosen, links, host_count, base, rounds, trace, quick=quick)
    kept = _kept(chosen, links, host_count, base, rounds)
    grid = Grid("network", kept, ("what", "name"), {job.key: job for job in jobs}, _title, outcome=_outcome)

    def plot(kept: Record, path: Path) -> None:
        from gradwire.bench.network.drawing import draw

        draw(kept, path)

    grid.run(_run, table=table, plot=plot, output=output, figure=figure)


def _tasks(
    methods: Sequence[Method],
    networks: Sequence[Network],
    host_count: int,
    shape: Shape,
    rounds: int,
    trace: Path | None,
    *,
    quick: bool,
) -> list[Task]:
    """Methods; the check if both its method and its network are measured; traces in full runs, and where asked for."""
    made = [Task("method", method, tuple(networks), host_count, shape, rounds) for method in methods]
    slow = [network for network in networks if network.text == CHECKED[1]]
    checked = [method for method in methods if method.name == CHECKED[0]]
    if slow and checked and not quick:
        made.append(Task("check", checked[0], (slow[0],), host_count, shape, rounds))
    if trace is not None or not quick:
        there = (parse(_TRACED_NETWORK, _TRACED_HOSTS),)
        made += [Task("trace", method, there, _TRACED_HOSTS, _TRACED_SHAPE, rounds, trace) for method in TRACED]
    return made


def _kept(methods: Sequence[Method], networks: Sequence[Network], host_count: int, shape: Shape, rounds: int) -> Record:
    corpus = data.standard_library()
    return {
        "benchmark": "network",
        "machine": machine.describe() | {"threads": 1},
        "options": asdict(shape) | {"hosts": host_count, "rounds": rounds},
        "parameters": num_parameters(ByteTransformer(shape.layers, shape.width, shape.heads)),
        "data": {"name": corpus.name, "digest": corpus.digest},
        "methods": [method.name for method in methods],
        "networks": {network.text: [asdict(link) for link in network.links] for network in networks},
        "not_measured": NOT_MEASURED,
        "runs": [],
    }


def _run(tasks: Sequence[Task]) -> Iterator[Record]:
    """One job after the other, each on new namespaces; yields each record as it ends."""
    for task in tasks:
        start = time.perf_counter()
        with hosts(task.hosts) as made, team(made, settings(task.method, task.shape)) as ranks:
            ask = functools.partial(ranks.ask, timeout=_SECONDS_OF_SILENCE)
            record = {"method": _measured, "check": _checked, "trace": _traced}[task.what](task, made, ask)
        what, name = task.key
        yield {"what": what, "name": name} | record | {"seconds": round(time.perf_counter() - start, 1)}


def _measured(task: Task, made: Hosts, ask: Any) -> Record:
    """Train on unlimited links, then time the step on every network, round after round."""
    curve = ask({"do": "train", "steps": task.shape.steps})[0]["curve"]
    windows: dict[str, list[Record]] = {network.text: [] for network in task.networks}
    for _ in range(task.rounds):
        for network in task.networks:
            made.shape(network)
            windows[network.text].append(_window(task.method, ask))
    made.shape(parse(f"{200_000}kbit", task.hosts))  # frames are counted one by one, and nobody waits
    gloo = ask({"do": "probe"})
    return {
        "ours": task.method.ours,
        "lr": task.method.lr,
        "every": task.method.every,
        "curve": curve,
        "gloo_bytes": {kind: statistics.mean(rank[kind] for rank in gloo) for kind in gloo[0]},
        "networks": {
            network.text: {"counts_frames": network.counts_frames} | summary(windows[network.text])
            for network in task.networks
        },
    }


def _window(method: Method, ask: Any) -> Record:
    """Some steps of all ranks: the mean over ranks of each rank's median, and the bytes of the busiest."""
    warm = ask({"do": "measure", "steps": method.every * (_WARM_UP_STEPS // 2 if method.every == 1 else 1)})
    count = rounds_of_window(statistics.mean(rank["seconds"] for rank in warm), method.every)
    ranks: list[Record] = ask({"do": "measure", "steps": method.every * count})
    busiest = max(ranks, key=lambda rank: float(rank["sent_bytes"]))
    return busiest | {
        "seconds": statistics.mean(rank["seconds"] for rank in ranks),
        "processor_seconds": statistics.mean(rank["processor_seconds"] for rank in ranks),
    }


def rounds_of_window(step_seconds: float, every: int) -> int:
    """How many rounds of `every` steps are measured together: what fits into the window, within limits."""
    least = _LEAST_ROUNDS if every == 1 else 1
    return max(least, min(_MOST_ROUNDS, int(_WINDOW_SECONDS / (step_seconds * every))))


def summary(windows: Sequence[Record]) -> Record:
    """Medians over rounds, and the seconds of each."""
    names = ("seconds", "processor_seconds", "declared_bytes", "sent_bytes", "sent_packets")
    return {
        **{name: statistics.median(window[name] for window in windows) for name in names},
        "calls": windows[0]["calls"],
        "rounds": [window["seconds"] for window in windows],
    }


def _checked(task: Task, made: Hosts, ask: Any) -> Record:
    """Train over slow links for real."""
    (network,) = task.networks
    made.shape(network)
    return {"network": network.text, "curve": ask({"do": "train", "steps": task.shape.steps})[0]["curve"]}


def _traced(task: Task, made: Hosts, ask: Any) -> Record:
    """Record some steps of rank 0, and see how much of the communication stands alone."""
    (network,) = task.networks
    made.shape(network)
    ask({"do": "measure", "steps": _WARM_UP_STEPS})
    with contextlib.ExitStack() as stack:
        folder = task.trace or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        path = folder.resolve() / f"{task.method.host}.json"
        ask({"do": "trace", "steps": _TRACED_STEPS, "path": str(path)})
        found = overlap.read(path)
    return {
        "network": network.text,
        "hosts": task.hosts,
        "tokens": task.shape.batch * task.shape.context,
        "steps": _TRACED_STEPS,
        **asdict(found),
        "exposed_share": found.exposed_share,
    }


def _title(run: Record) -> str:
    return str(run["name"]) if run["what"] == "method" else f"{run['what']} of {run['name']}"


def _outcome(run: Record) -> str:
    """A finished run in a few words."""
    if run["what"] == "trace":
        return f"{run['exposed_share']:.0%} of {1e3 * run['communication'] / run['steps']:.0f} ms exposed"
    if run["what"] == "check":
        return f"{run['curve'][-1]['seconds']:.1f} s over {run['network']}"
    steps = ", ".join(f"{1e3 * cell['seconds']:.0f} ms {text}" for text, cell in run["networks"].items())
    loss = "" if run["name"] == NONE.name else f"loss {run['curve'][-1]['validation_loss']:.3f}, "
    return loss + steps
