"""The table of `gradwire bench network`: step time and bytes on every network, and the time to a loss."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from gradwire.bench.network.links import title
from gradwire.bench.network.meter import HEADERS
from gradwire.bench.network.methods import DDP, NONE, POWER_SGD_HOOK
from gradwire.bench.progress import size
from gradwire.bench.tuning import check_finished

if TYPE_CHECKING:
    from rich.table import Table

_TARGET_PART = 5
"""The loss that all race to is what DDP has after one part of so many of the budget: one that most methods reach."""

_COLUMNS = ("Method", "Bytes per step", "On the wire", "Of it explained", "Steps to the loss")

Point = tuple[float, float]


@final
@dataclass(frozen=True)
class NetworkRow:
    """One method of `bench network`.

    Args:
        method: Its name.
        ours: Whether it is gradwire's.
        declared: Bytes that a rank sends per step, by the sizes of its buffers.
        wire: Bytes that the busiest interface sends per step; None where no network counts frames one by one.
        explained: `declared`, headers of packets and gloo's own messages, over `wire`; None without, or without bytes.
        seconds: Of a step, by network.
        steps: To the loss; None if it was not reached.
        curve: `(step, validation loss)`.
    """

    method: str
    ours: bool
    declared: float
    wire: float | None
    explained: float | None
    seconds: Mapping[str, float]
    steps: float | None
    curve: Sequence[Point]

    def time_to_loss(self, network: str) -> float | None:
        """Seconds of training on this network until the loss is reached; None if it is not."""
        return None if self.steps is None else self.steps * self.seconds[network]


def steps_to(curve: Sequence[Point], loss: float) -> float | None:
    """Where a curve of `(step, loss)` first reaches a loss, on straight lines between its points; None if nowhere.

    Example:
        >>> steps_to([(10, 3.0), (20, 2.0), (30, 2.5)], 2.25)
        17.5
    """
    before: Point | None = None
    for step, value in curve:
        if value <= loss:
            if before is None or before[1] == value:
                return step
            return before[0] + (before[1] - loss) / (before[1] - value) * (step - before[0])
        before = step, value
    return None


def explained(cell: Mapping[str, Any], gloo_bytes: Mapping[str, float]) -> float | None:
    """Declared bytes, packets' headers and gloo's own messages, over the bytes that the interface sent."""
    if not cell["declared_bytes"]:
        return None
    messages = sum(count * gloo_bytes.get(kind, 0.0) for kind, count in cell["calls"].items())
    return float((cell["declared_bytes"] + HEADERS * cell["sent_packets"] + messages) / cell["sent_bytes"])


def target(results: Mapping[str, Any]) -> float | None:
    """The loss that DDP has after a fifth of the budget, rounded up to two digits; None without DDP."""
    run = next((run for run in results["runs"] if (run["what"], run["name"]) == ("method", DDP.name)), None)
    if run is None:
        return None
    step = results["options"]["steps"] / _TARGET_PART
    reached = [loss for at, loss in _curve(run) if at <= step] or [_curve(run)[0][1]]
    return math.ceil(round(100 * reached[-1], 6)) / 100


def network_rows(results: Mapping[str, Any]) -> list[NetworkRow]:
    """Results of `bench network`, in the order of the methods.

    Raises:
        UsageError: some methods are missing.
    """
    runs = {run["name"]: run for run in results["runs"] if run["what"] == "method"}
    check_finished("network bench", len(runs), len(results["methods"]))
    loss = target(results)
    rows = []
    for name in results["methods"]:
        run, curve = runs[name], _curve(runs[name])
        cells = run["networks"]
        counted = [cell for cell in cells.values() if cell["counts_frames"]]
        rows.append(
            NetworkRow(
                method=name,
                ours=run["ours"],
                declared=next(iter(cells.values()))["declared_bytes"],
                wire=counted[0]["sent_bytes"] if counted else None,
                explained=explained(counted[0], run["gloo_bytes"]) if counted else None,
                seconds={network: cell["seconds"] for network, cell in cells.items()},
                steps=None if loss is None or name == NONE.name else steps_to(curve, loss),
                curve=curve,
            )
        )
    return rows


def headings(results: Mapping[str, Any]) -> list[str]:
    """Of the table's columns."""
    steps = [f"Step, ms: {title(network)}" for network in results["networks"]]
    return [*_COLUMNS[:-1], *steps, _COLUMNS[-1], *(f"Seconds to it: {title(n)}" for n in _races(results))]


def cells(row: NetworkRow, rows: Sequence[NetworkRow], results: Mapping[str, Any]) -> list[str]:
    """What the table says of a method; of a step also how many times that of no communication it is."""
    none = next((other for other in rows if other.method == NONE.name), None)
    found = [
        row.method,
        size(row.declared) if row.declared else "0",
        "" if row.wire is None else size(row.wire),
        "" if row.explained is None else f"{row.explained:.1%}",
    ]
    for network, seconds in row.seconds.items():
        ratio = f" ({_times(seconds / none.seconds[network])})" if none is not None and row is not none else ""
        found.append(f"{1e3 * seconds:.0f}{ratio}")
    if row.method == NONE.name:
        return [*found, "", *("" for _ in _races(results))]
    found.append("not reached" if row.steps is None else f"{row.steps:.0f}")
    return found + ["" if (t := row.time_to_loss(n)) is None else f"{t:.0f}" for n in _races(results)]


def findings(results: Mapping[str, Any]) -> list[str]:
    """What the numbers amount to: the best of ours against no communication, DDP and torch's PowerSGD hook."""
    rows = {row.method: row for row in network_rows(results)}
    ours = [row for row in rows.values() if row.ours]
    lines = []
    for network in results["networks"] if ours else ():
        best = min(ours, key=lambda row: row.seconds[network])
        against = [
            f"{best.seconds[network] / rows[other.name].seconds[network]:.2g} times {label}"
            for other, label in ((NONE, "none"), (DDP, "DDP's"), (POWER_SGD_HOOK, "that of torch's PowerSGD"))
            if other.name in rows
        ]
        lines.append(", ".join([f"{title(network)}: the shortest step is that of `{best.method}`", *against]))
        racing = [row for row in ours if row.steps is not None]
        if racing:
            first = min(racing, key=lambda row: row.time_to_loss(network) or math.inf)
            own = first.time_to_loss(network) or math.inf
            sooner = [
                f"{time / own:.3g} times sooner than {label}"
                if time >= own
                else f"{own / time:.3g} times later than {label}"
                for other, label in ((DDP, "DDP"), (POWER_SGD_HOOK, "torch's PowerSGD"))
                if other.name in rows and (time := rows[other.name].time_to_loss(network)) is not None
            ]
            lines[-1] += f"; first to the loss is `{first.method}` after {own:.1f} s"
            lines[-1] += f", {', '.join(sooner)}" if sooner else ""
    return lines


def checks(results: Mapping[str, Any]) -> list[str]:
    """What real runs over slow links say of predicted times, and traces of overlap."""
    lines = []
    for run in results["runs"]:
        if run["what"] == "check":
            lines.append(_check_in_words(run, results))
        elif run["what"] == "trace":
            lines.append(
                f"{run['name']}, {run['hosts']} hosts at {title(run['network'])}, {run['tokens']} bytes of text per "
                f"rank: a step of {1e3 * run['backward'] / run['steps']:.0f} ms of backward and "
                f"{1e3 * run['communication'] / run['steps']:.0f} ms of communication, of which "
                f"{run['exposed_share']:.0%} run while no operation of backward does"
            )
    return lines


def network_section(results: Mapping[str, Any]) -> str:
    """What the README shows of `gradwire bench network`: the table, what it amounts to, and how it was made.

    Raises:
        UsageError: the bench has not ended.
    """
    rows, options, about = network_rows(results), results["options"], results["machine"]
    names = headings(results)
    lines = ["| " + " | ".join(names) + " |", "|---" + "|---:" * (len(names) - 1) + "|"]
    for row in rows:
        name, *others = cells(row, rows, results)
        lines.append("| " + " | ".join([f"`{name}`" if row.ours else name, *others]) + " |")
    listed = [*findings(results), *checks(results)]
    loss = target(results)
    race = (
        ""
        if loss is None
        else f"The loss is {loss:.2f} nats per byte on held-out text, which DDP has after a fifth of the "
        "budget. Seconds to it are steps to it, trained on unlimited links, by the step's time on the links named: "
        "arithmetic does not depend on them. "
    )
    absent = "; ".join(f"{name}: {reason}" for name, reason in results["not_measured"].items())
    absent = f"Not measured: {absent}. " if absent else ""
    rates = ", ".join(f"{run['lr']:g} `{run['name']}`" for run in results["runs"] if run["what"] == "method")
    return (
        "\n".join(lines) + "\n\n" + "".join(f"- {line}.\n" for line in listed) + "\n"
        f"{options['hosts']} hosts, each a network namespace with one rank of one thread, on {about['cores']} cores, "
        "so that computing is slow, too; links shaped by token buckets on both ends, no added delay. A transformer of "
        f"{results['parameters'] / 1e6:.2f} M parameters, {options['steps']} steps of "
        f"{options['batch'] * options['context']} bytes of the {results['data']['name']} on each rank. Medians of "
        f"{options['rounds']} rounds over all networks; in brackets, over no communication. Bytes of a step are those "
        "that one rank sends by the sizes of its buffers; on the wire, those that the busiest interface counts; "
        f"explained is the share of these that buffers, {HEADERS} bytes of headers per packet and gloo's own messages "
        f"make up. {race}Learning rates: {rates}. {absent}{about['cpu']}, torch {about['torch']}, "
        f"{about['date'][:10]}. Made by `{about['command']}`."
    )


def table(results: Mapping[str, Any]) -> "Table":
    """Results for a terminal: the table, and below it what the numbers amount to."""
    from rich import box
    from rich.table import Table

    rows = network_rows(results)
    rendered = Table(
        title=f"{results['options']['hosts']} hosts, ms per step; in brackets, over no communication",
        caption="\n".join([*findings(results), *checks(results)]).replace("`", ""),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        min_width=90,
    )
    rendered.add_column(_COLUMNS[0], overflow="fold", min_width=20)
    for name in ("bytes", *results["networks"], "steps to loss"):
        rendered.add_column(name, justify="right", overflow="fold")
    last = len(results["networks"]) + 5
    for row in rows:
        found = cells(row, rows, results)
        rendered.add_row(found[0], found[1], *found[4:last])
    return rendered


def _times(ratio: float) -> str:
    """Two digits, without an exponent."""
    return f"{ratio:.1f}" if ratio < 10 else f"{ratio:.0f}"


def _curve(run: Mapping[str, Any]) -> list[Point]:
    return [(point["step"], point["validation_loss"]) for point in run["curve"]]


def _races(results: Mapping[str, Any]) -> list[str]:
    """The networks of which the table says how long the way to the loss takes: those whose links are all alike."""
    if target(results) is None:
        return []
    return [text for text, links in results["networks"].items() if len({str(link) for link in links}) == 1
            and links[0]["up"] == links[0]["down"] is not None]  # fmt: skip


def _check_in_words(run: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """A real run over slow links: its curve and its seconds beside what was said of them."""
    row = next(row for row in network_rows(results) if row.method == run["name"])
    steps, seconds = run["curve"][-1]["step"], run["curve"][-1]["seconds"]
    said = steps * row.seconds[run["network"]]
    apart = max(abs(loss - other) for (_, loss), (_, other) in zip(_curve(run), row.curve, strict=True))
    return (
        f"{run['name']}, trained over {title(run['network'])} for real: {steps} steps in {seconds:.0f} s where "
        f"{said:.0f} s were said, losses {f'within {apart:.2g}' if apart else 'the same to the last digit'}"
    )
