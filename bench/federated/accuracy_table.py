"""The table of `gradwire bench federated --accuracy`."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from gradwire.bench.progress import size
from gradwire.bench.runs import Record
from gradwire.bench.tuning import check_finished, seeds_in_words


@final
@dataclass(frozen=True)
class Best:
    """A method with clients of one Dirichlet distribution, at its best learning rate.

    Args:
        lr: The rate with the greatest accuracy, in the mean over seeds.
        edge: Whether it is the least or greatest rate.
        runs: Those at `lr`, one per seed.
        reference: What the implementation in NumPy has found, in percent.
    """

    lr: float
    edge: bool
    runs: Sequence[Record]
    reference: float | None

    @property
    def accuracy(self) -> float:
        """Mean over seeds, in percent."""
        return float(statistics.mean(run["accuracy"] for run in self.runs))

    @property
    def spread(self) -> float:
        """Standard deviation over seeds."""
        return statistics.stdev(run["accuracy"] for run in self.runs) if len(self.runs) > 1 else 0.0

    @property
    def deviation(self) -> float:
        """Mean over seeds of the standard deviation over the last rounds."""
        return float(statistics.mean(run["deviation"] for run in self.runs))

    @property
    def curve(self) -> list[float]:
        """Mean over seeds on the way."""
        return [statistics.mean(some) for some in zip(*(run["curve"] for run in self.runs), strict=True)]

    def cells(self) -> list[str]:
        """Accuracy, what the reference has, and the rate."""
        reference = "" if self.reference is None else f"{self.reference:.1f}"
        return [f"{self.accuracy:.1f} ± {self.spread:.1f}", reference, f"{self.lr:g}"]


@final
@dataclass(frozen=True)
class AccuracyRow:
    """A method.

    Args:
        method: Its name.
        best: By Dirichlet distribution.
        bytes_up: That a client sends in a round.
    """

    method: str
    best: Sequence[Best]
    bytes_up: float

    def cells(self) -> list[str]:
        """Under `columns`, without the first."""
        return [*(cell for best in self.best for cell in best.cells()), size(self.bytes_up)]


def columns(results: Mapping[str, Any]) -> list[str]:
    """Titles of the table."""
    each = [title for alpha in results["alphas"] for title in (f"Dirichlet({alpha:g})", "NumPy", "Rate")]
    return ["Method", *each, "Up"]


def accuracy_rows(results: Mapping[str, Any]) -> list[AccuracyRow]:
    """Every method.

    Raises:
        UsageError: Runs are missing.
    """
    names, alphas, lrs, seeds = (results[key] for key in ("methods", "alphas", "lrs", "seeds"))
    runs = {(run["method"], run["alpha"], run["lr"], run["seed"]): run for run in results["runs"]}
    check_finished("federated accuracy bench", len(runs), len(names) * len(alphas) * len(lrs) * len(seeds))
    rows = []
    options = results["options"]
    for name in names:
        best = []
        for alpha, reference in zip(alphas, results["references"][name], strict=True):
            at = {lr: [runs[name, alpha, lr, seed] for seed in seeds] for lr in lrs}
            found = [Best(lr, lr in (lrs[0], lrs[-1]), some, reference) for lr, some in at.items()]
            best.append(max(found, key=lambda one: one.accuracy))
        sent = statistics.mean(run["bytes_up"] for one in best for run in one.runs)
        rows.append(AccuracyRow(name, best, sent / (options["rounds"] * options["cohort"])))
    return rows


def accuracy_section(results: Mapping[str, Any]) -> str:
    """What the README shows of `gradwire bench federated --accuracy`.

    Raises:
        UsageError: Runs are missing.
    """
    titles, options, machine = columns(results), results["options"], results["machine"]
    lines = ["| " + " | ".join(titles) + " |", "|---" + "|---:" * (len(titles) - 1) + "|"]
    found = accuracy_rows(results)
    lines += ["| " + " | ".join([f"`{row.method}`", *row.cells()]) + " |" for row in found]
    off = [
        (abs(best.accuracy - best.reference), row.method)
        for row in found
        for best in row.best
        if best.reference is not None
    ]
    most, where = max(off)
    last = f"rounds {options['rounds'] - options['last'] + 1} to {options['rounds']}"
    return (
        "\n".join(lines) + "\n\n"
        f"Accuracy in percent on {results['data']['held_out']} held-out digits, the mean over {last} and "
        f"{seeds_in_words(results['seeds'])}, ± the standard deviation over seeds; a seed chooses what is held out, "
        f"the clients, first weights and cohorts. {options['clients']} clients, to which each class is dealt by a "
        f"Dirichlet distribution, at least {options['min_size']} examples each, {options['cohort']} per round, "
        f"{options['steps']} steps of SGD on {options['batch_size']} examples, an MLP of {results['parameters']:,} "
        f"parameters. Rate: of the clients, the best of {', '.join(f'{lr:g}' for lr in results['lrs'])}. NumPy: an "
        "implementation of its own, on partitions of its own. `QSGD` without a bucket scales the whole vector by one "
        "norm; with one level, `alpha=0.1` is beyond what is stable, and partitions decide. Farthest from NumPy: "
        f"{most:.1f} points, `{where}`. Up: bytes that a client sends in a round. torch {machine['torch']}, "
        f"{machine['date'][:10]}. Made by `{machine['command']}`."
    )
