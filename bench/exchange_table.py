"""The table of `gradwire bench exchange`: each method at its best learning rate, its loss and its bytes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from gradwire.bench.progress import size
from gradwire.bench.tuning import check_finished, seeds_in_words, tune

EXCHANGE_COLUMNS = (
    "Ranks",
    "Method",
    "Best learning rate",
    "Validation loss",
    "Difference",
    "Bytes per step",
    "Times fewer",
)


@final
@dataclass(frozen=True)
class ExchangeRow:
    """One method of `bench exchange` at one world size.

    Args:
        method: Configuration as text.
        world_size: Ranks.
        losses: Final validation loss by learning rate, the mean over seeds; None where a seed diverged.
        lr: The rate with the least loss; None if there is none.
        loss: That loss.
        difference: From that of the first method at this world size, as a share of it.
        edge: Whether `lr` is the grid's least or greatest.
        bytes_per_step: What one rank sends.
        fewer: Bytes of the first method at this world size over these.
        curve: `(bytes sent by one rank, validation loss)` at `lr`, the loss as the mean over seeds.
    """

    method: str
    world_size: int
    losses: Mapping[float, float | None]
    lr: float | None
    loss: float | None
    difference: float | None
    edge: bool
    bytes_per_step: float
    fewer: float
    curve: Sequence[tuple[float, float]]

    def cells(self) -> list[str]:
        """What the table says under all of `EXCHANGE_COLUMNS` but the first two; no difference from itself."""
        if self.lr is None:
            found = ["every one diverged", "", ""]
        else:
            difference = "" if self.difference is None else f"{self.difference:+.1%}"
            found = [f"{self.lr:g}{' (edge)' if self.edge else ''}", f"{self.loss:.3f}", difference]
        return [*found, size(self.bytes_per_step), f"{self.fewer:.3g}"]


def exchange_rows(results: Mapping[str, Any]) -> list[ExchangeRow]:
    """Results of `bench exchange` by world size and method, in their order.

    Raises:
        UsageError: The comparison has not ended.
    """
    methods, world_sizes, lrs, seeds = (results[key] for key in ("methods", "world_sizes", "lrs", "seeds"))
    runs = {(run["configuration"], run["world_size"], run["lr"], run["seed"]): run for run in results["runs"]}
    check_finished("comparison", len(runs), len(methods) * len(world_sizes) * len(lrs) * len(seeds))
    rows: list[ExchangeRow] = []
    for world_size in world_sizes:
        first: ExchangeRow | None = None
        for method in methods:
            some = {(lr, seed): runs[method, world_size, lr, seed] for lr in lrs for seed in seeds}
            best = tune(some, lrs, seeds)
            last = (best.runs or list(some.values()))[0]["curve"][-1]
            sent = last["bytes_sent"] / last["step"]
            difference = best.loss / first.loss - 1 if first and first.loss and best.loss else None
            fewer = first.bytes_per_step / sent if first and sent else 1.0
            curve = best.curve("bytes_sent")
            row = ExchangeRow(
                method, world_size, best.losses, best.lr, best.loss, difference, best.edge, sent, fewer, curve
            )
            first = first or row
            rows.append(row)
    return rows


def exchange_section(results: Mapping[str, Any]) -> str:
    """What the README shows of `gradwire bench exchange`: the table, and what the sweep was.

    Raises:
        UsageError: The comparison has not ended.
    """
    options, machine = results["options"], results["machine"]
    lines = ["| " + " | ".join(EXCHANGE_COLUMNS) + " |", "|---:|---" + "|---:" * (len(EXCHANGE_COLUMNS) - 2) + "|"]
    rows = exchange_rows(results)
    lines += [f"| {row.world_size} | `{row.method}` | {' | '.join(row.cells())} |" for row in rows]
    edge = " A rate at the edge of the grid may not be the best." if any(row.edge for row in rows) else ""
    return (
        "\n".join(lines) + "\n\n"
        f"Nats per byte on held-out text of the {results['data']['name']}; a transformer of "
        f"{results['parameters'] / 1e6:.2f} M parameters, {options['steps']} steps of "
        f"{options['global_batch'] * options['context']} bytes of text shared among the ranks, "
        f"{seeds_in_words(results['seeds'])}. Differences are from `{results['methods'][0]}` on as many ranks. The "
        f"same sweep for each: peak learning rates {', '.join(f'{lr:g}' for lr in results['lrs'])}, reached after a "
        f"warm-up of {options['warmup']:.0%} of the steps and brought down to zero by a cosine; all else is default. "
        f"The rate with the least final loss counts.{edge} Bytes are those that one of n ranks sends: 2(n-1)/n of what "
        f"is all-reduced, n-1 times what all ranks gather. {machine['cpu']}, torch {machine['torch']}, "
        f"{machine['date'][:10]}. Made by `{machine['command']}`."
    )
