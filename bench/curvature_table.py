"""The tables of `gradwire bench curvature`."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from gradwire.bench.runs import Record
from gradwire.bench.tuning import check_finished, seeds_in_words

COLUMNS = ("Optimizer", "Learning rate", "Steps to {0:g}", "Steps to {1:g}", "Over its base")


@final
@dataclass(frozen=True)
class CurvatureRow:
    """A method on a problem, at its best learning rate.

    Args:
        method: Its name.
        lr: The rate with which it is first at the last target, in the mean over seeds.
        edge: Whether that is the least or greatest rate.
        runs: Those at `lr`, one per seed.
        steps: For each target and seed, the steps that it took, or None.
        over_base: Mean steps over those of its base, for each target; None without a base, or where a seed missed it.
    """

    method: str
    lr: float
    edge: bool
    runs: Sequence[Record]
    steps: Sequence[Sequence[int | None]]
    over_base: Sequence[float | None]

    def cells(self) -> list[str]:
        """Under `COLUMNS`, without the first."""
        ratios = [ratio for ratio in self.over_base if ratio is not None]
        return [
            f"{self.lr:g}{' (edge)' if self.edge else ''}",
            *(_in_words(steps) for steps in self.steps),
            ", ".join(f"{ratio:.2f}" for ratio in ratios),
        ]


def curvature_rows(results: Mapping[str, Any], problem: str) -> list[CurvatureRow]:
    """Every method of a problem.

    Raises:
        UsageError: Runs are missing.
    """
    lrs: Mapping[str, Sequence[float]] = results["problems"][problem]["lrs"]
    seeds = results["seeds"]
    runs = {(run["method"], run["lr"], run["seed"]): run for run in results["runs"] if run["problem"] == problem}
    check_finished("curvature bench", len(runs), sum(len(some) for some in lrs.values()) * len(seeds))
    rows: dict[str, CurvatureRow] = {}
    for method, some in lrs.items():
        at = {lr: [runs[method, lr, seed] for seed in seeds] for lr in some}
        lr = min(at, key=lambda lr: _score(at[lr]))
        steps = _steps(at[lr])
        base = rows.get(results["bases"].get(method) or "")
        ratios = [None, None] if base is None else [_ratio(*pair) for pair in zip(steps, base.steps, strict=True)]
        rows[method] = CurvatureRow(method, lr, lr in (some[0], some[-1]), at[lr], steps, ratios)
    return list(rows.values())


def curvature_section(results: Mapping[str, Any]) -> str:
    """What the README shows of `gradwire bench curvature`: steps to two losses, and what a step costs; or this alone.

    Raises:
        UsageError: Runs are missing.
    """
    machine, parts = results["machine"], []
    if not results["problems"]:
        return f"{_overhead(results['overhead'])} {machine.get('gpu', machine['cpu'])}, {_made(machine)}"
    for name, problem in results["problems"].items():
        columns = [column.format(*problem["targets"]) for column in COLUMNS]
        lines = ["| " + " | ".join(columns) + " |", "|---" + "|---:" * (len(columns) - 1) + "|"]
        rows = curvature_rows(results, name)
        lines += ["| " + " | ".join([f"`{row.method}`", *row.cells()]) + " |" for row in rows]
        parts.append(
            "\n".join(lines) + "\n\n"
            f"{problem['title']}: held-out loss after at most {problem['steps']} steps, looked at every "
            f"{problem['every']}; {seeds_in_words(results['seeds'])} and, in brackets, the least and the most."
            f"{_in_front(rows)}"
        )
    several = len(next(iter(next(iter(results["problems"].values()))["lrs"].values())))
    hybrid = results["options"]["hybrid"]
    parts.append(
        f"Each method at the best of {several} learning rates, a factor of two apart, about the middle of its family; "
        "rates are constant, all else as by default, but that `MKORH` switches when the loss falls by less than "
        f"{hybrid['threshold']:.0%} in {hybrid['check_every']} steps. K-FAC is an implementation of its own, with "
        "whole factors, inverted every step, damping 0.001 and clipping. Over its base: steps over those of the "
        f"optimizer within, to either loss; below 1 curvature pays. {machine['cpu']}, one thread, {_made(machine)}"
    )
    if results.get("overhead"):
        parts.append(_overhead(results["overhead"]))
    return "\n\n".join(parts)


def _made(machine: Mapping[str, Any]) -> str:
    return f"torch {machine['torch']}, {machine['date'][:10]}. Made by `{machine['command']}`."


def _in_front(rows: Sequence[CurvatureRow]) -> str:
    """What MKOR and K-FAC do to the steps of the optimizers behind them, in a sentence; nothing if neither ran."""
    parts = []
    for name in ("MKOR", "K-FAC"):
        ratios = [ratio for row in rows if row.method.startswith(name) for ratio in row.over_base if ratio is not None]
        if ratios:
            parts.append(f"{name} takes {min(ratios):.2f} to {max(ratios):.2f} times its steps")
    return f" In front of an optimizer {', '.join(parts)}." if parts else ""


def _overhead(overhead: Mapping[str, Any]) -> str:
    """A whole training step over one with the base alone."""
    batches = list(overhead["ratios"])
    columns = ["Training step over AdamW's", *(f"{int(batch) * overhead['context']} tokens" for batch in batches)]
    lines = ["| " + " | ".join(columns) + " |", "|---" + "|---:" * len(batches) + "|"]
    for variant in overhead["ratios"][batches[0]]:
        cells = [f"{overhead['ratios'][batch][variant]:.2f}" for batch in batches]
        lines.append("| " + " | ".join([f"`{variant}`", *cells]) + " |")
    alone = " and ".join(f"{overhead['base_ms'][batch]:.0f} ms" for batch in batches)
    return (
        "\n".join(lines) + "\n\n"
        f"Medians over blocks of ten steps, {overhead['steps']} in all, in turns, of the transformer that "
        f"`gradwire train` makes ({overhead['parameters'] / 1e6:.2f} M parameters); AdamW alone takes {alone}."
    )


def _score(runs: Sequence[Record]) -> tuple[float, ...]:
    """Less is better: seeds that missed the last target, steps of the others, the same for the first one, loss."""
    score: list[float] = []
    for steps in reversed(_steps(runs)):
        known = [step for step in steps if step is not None]
        score += [len(steps) - len(known), sum(known)]
    losses = [run["validation_loss"] for run in runs]
    return (*score, float("inf") if None in losses else sum(losses))


def _steps(runs: Sequence[Record]) -> list[list[int | None]]:
    return [[run["steps_to"][target] for run in runs] for target in range(2)]


def _ratio(steps: Sequence[int | None], base: Sequence[int | None]) -> float | None:
    known = [[step for step in some if step is not None] for some in (steps, base)]
    complete = all(len(some) == len(steps) for some in known)
    return sum(known[0]) / sum(known[1]) if complete else None


def _in_words(steps: Sequence[int | None]) -> str:
    known = [step for step in steps if step is not None]
    if len(known) < len(steps):
        return f"{len(known)} of {len(steps)} seeds" if known else "not reached"
    return f"{statistics.mean(known):.0f} ({min(known)} to {max(known)})"
