"""A method at its best learning rate, chosen from the runs of a grid."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from gradwire.bench.errors import UsageError
from gradwire.bench.runs import Record


@final
@dataclass(frozen=True)
class Tuned:
    """One method over a grid of learning rates.

    Args:
        losses: Final validation loss by rate, the mean over seeds; None where a seed diverged.
        lr: The rate with the least loss; None if there is none.
        loss: That loss.
        edge: Whether `lr` is the grid's least or greatest.
        runs: Those at `lr`, one per seed.
    """

    losses: Mapping[float, float | None]
    lr: float | None
    loss: float | None
    edge: bool
    runs: Sequence[Record]

    def curve(self, key: str) -> list[tuple[Any, float]]:
        """`(key, validation loss)` at every evaluation of `runs`, the loss as the mean over seeds."""
        points = zip(*(run["curve"] for run in self.runs), strict=True)
        return [(point[0][key], statistics.mean(one["validation_loss"] for one in point)) for point in points]


def tune(runs: Mapping[tuple[float, int], Record], lrs: Sequence[float], seeds: Sequence[int]) -> Tuned:
    """Choose the rate with the least final validation loss.

    Args:
        runs: By learning rate and seed.
        lrs: The grid, in rising order.
        seeds: Of each rate.
    """
    at = {lr: [runs[lr, seed] for seed in seeds] for lr in lrs}
    losses = {lr: _mean(run["validation_loss"] for run in some) for lr, some in at.items()}
    known = {lr: loss for lr, loss in losses.items() if loss is not None}
    best = min(known, key=known.__getitem__, default=None)
    if best is None:
        return Tuned(losses, None, None, False, ())
    return Tuned(losses, best, known[best], best in (lrs[0], lrs[-1]), at[best])


def check_finished(what: str, done: int, total: int) -> None:
    """Raise UsageError unless all runs of a grid are done."""
    if done < total:
        raise UsageError(f"report: expected a finished {what}, got {done} of {total} runs. Start it again.")


def seeds_in_words(seeds: Sequence[int]) -> str:
    """Which seeds a loss is of."""
    return "seed 0" if len(seeds) == 1 else f"the mean over seeds 0 to {seeds[-1]}"


def _mean(losses: Iterable[float | None]) -> float | None:
    found = list(losses)
    known = [loss for loss in found if loss is not None]
    return statistics.mean(known) if len(known) == len(found) else None
