"""What `gradwire plan` prints: a table, the formula with its numbers, the answers, and three lines to paste."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from gradwire.bench.plan_code import lines
from gradwire.bench.plan_measure import PLAIN
from gradwire.bench.plan_units import show_rate, show_seconds
from gradwire.bench.progress import size

if TYPE_CHECKING:
    from rich.table import Table

    from gradwire.bench.plan import Plan
    from gradwire.bench.plan_case import Case

_HIDDEN = 0.01  # of the step: less does not count as exposed
_WIDTH = 118


def show(case: "Case", plan: "Plan") -> None:
    """Print everything."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)

    def say(text: str = "") -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    say(f"{case.model}; {case.tokens:,} tokens per step on each of {case.world_size} ranks; {_link_in_words(case)}")
    if case.pairs:
        console.print(_pairs(case))
    console.print(table(case, plan))
    for sentence in formula(case, plan):
        say(sentence)
    say()
    for sentence in answers(case, plan):
        say(sentence)
    say()
    for line in lines(plan.best):
        say(line)


def table(case: "Case", plan: "Plan") -> "Table":
    """Predictions by method, the shortest step first."""
    from rich import box
    from rich.table import Table

    rendered = Table(title="Predicted step", box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("method", "step", "times", "exposed", "network", "work", "sent", "calls"):
        first = title == "method"
        rendered.add_column(title, justify="left" if first else "right", no_wrap=not first, overflow="fold")
    plain = plan.predictions[PLAIN].step
    for method, found in sorted(plan.predictions.items(), key=lambda item: item[1].step):
        times = [show_seconds(value) for value in (found.exposed, found.network, found.codec)]
        cells = [show_seconds(found.step), f"{plain / found.step:.2f}", *times, size(found.sent), str(found.calls)]
        rendered.add_row(method, *cells)
    return rendered


def formula(case: "Case", plan: "Plan") -> Iterator[str]:
    """How a step comes about, with the numbers of the baseline and of the best method."""
    yield "step = compute + exposed;  exposed = what bucket by bucket of (work + network) outlasts backward"
    yield "network = calls x overhead + hops x latency + stretch x bytes on the busiest link / bandwidth"
    longer = [f"{name} {value:.2f}" for name, value in vars(case.network.stretch).items() if value != 1]
    if longer:
        yield f"stretch, of a collective over a message of as many bytes: {', '.join(longer)}"
    link = case.network.across
    for method in dict.fromkeys((PLAIN, plan.best)):
        found = plan.predictions[method]
        fixed = found.calls * link.overhead
        on_the_way = max(0.0, found.network - fixed)
        yield (
            f"{method}: {show_seconds(found.step)} = {show_seconds(case.compute.step)} + "
            f"{show_seconds(found.exposed)};  network {show_seconds(found.network)} = "
            f"{found.calls} x {show_seconds(link.overhead)} + "
            f"{show_seconds(on_the_way)} for {size(found.sent)} at {size(link.bandwidth)}/s and "
            f"{show_seconds(link.latency)};  work {show_seconds(found.codec)};  "
            f"backward {show_seconds(case.compute.backward)}"
        )


def answers(case: "Case", plan: "Plan") -> Iterator[str]:
    """Is communication exposed; what is best, by how much; where does it stop paying."""
    plain, best = plan.predictions[PLAIN], plan.predictions[plan.best]
    if plain.exposed <= _HIDDEN * case.compute.step:
        yield f"Communication is hidden: plain averaging leaves {plain.exposed / plain.step:.1%} of the step exposed."
    else:
        yield f"Communication is exposed: it is {plain.exposed / plain.step:.0%} of the step under plain averaging."
    if plan.best == PLAIN:
        yield "Nothing here makes the step shorter: stay with DistributedDataParallel as it is."
    else:
        shorter = f"{plan.gain:.2f} times shorter, {best.exposed / best.step:.0%} of it exposed"
        yield f"The shortest step is that of {plan.best}: {shorter}."
        yield "A shorter step is not a shorter way to a loss: try it with `gradwire train --compare` first."
    rate, tokens = plan.bandwidth, plan.tokens
    if rate is None:
        yield "Compression pays at no bandwidth."
    elif math.isinf(rate):
        yield "Compression pays at every bandwidth that was looked at."
    else:
        yield f"Compression pays up to {show_rate(rate)}, all else as it is."
    if tokens is None:
        yield "Compression pays at no number of tokens per step."
    elif math.isinf(tokens):
        yield "Compression pays at every number of tokens per step that was looked at."
    else:
        yield f"Compression pays up to {tokens:,.0f} tokens per step and rank, all else as it is."


def _link_in_words(case: "Case") -> str:
    across, inside = case.network.across, case.network.inside
    said = f"{show_rate(across.bandwidth)} of payload and {show_seconds(across.latency)} one way"
    if inside is None:
        return f"{said} between ranks"
    return (
        f"{said} between machines of {case.network.ranks_per_machine} ranks, {show_rate(inside.bandwidth)} and "
        f"{show_seconds(inside.latency)} inside"
    )


def _pairs(case: "Case") -> "Table":
    from rich import box
    from rich.table import Table

    rendered = Table(title="Measured links", box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("ranks", "where", "latency", "bandwidth"):
        rendered.add_column(title, justify="left" if title in ("ranks", "where") else "right")
    ranks = case.network.ranks_per_machine
    for (a, b), link in (case.pairs or {}).items():
        where = "inside" if case.network.inside is not None and a // ranks == b // ranks else "across"
        where = where if case.network.inside is not None else ""
        rendered.add_row(f"{a} - {b}", where, show_seconds(link.latency), show_rate(link.bandwidth))
    return rendered
