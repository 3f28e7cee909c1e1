"""Tables of kept results, and the README's copies of them."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradwire.bench.compression_table import compression_section
from gradwire.bench.curvature_table import curvature_section
from gradwire.bench.errors import UsageError
from gradwire.bench.exchange_table import exchange_section
from gradwire.bench.federated.accuracy_table import accuracy_section
from gradwire.bench.federated.table import speed_section
from gradwire.bench.network.table import network_section
from gradwire.bench.plan_table import plan_section
from gradwire.bench.products_table import legality_page
from gradwire.bench.progress import size
from gradwire.bench.theory.catalogue import NAMES, theory_section
from gradwire.bench.tuning import check_finished, seeds_in_words, tune

COLUMNS = ("Configuration", "Validation loss", "Difference", "Bytes per step", "Compression", "Seconds")
OPTIM_COLUMNS = (
    "`fused=True`",
    "4096x4096",
    "GPT-2 small",
    "Over the floor",
    "µs per tensor of 4096",
    "First step",
    "Peak memory",
    "Eager",
    "Other packages",
)
SWEEP_COLUMNS = ("Optimizer", "Best learning rate", "Validation loss", "Difference")
FIGURES = {
    "docs/optimizer-speed.png": "optim",
    "docs/optimizers.png": "sweep",
    "docs/loss-over-bytes.png": "exchange",
    "docs/network.png": "network",
    "docs/plan.png": "plan",
    "docs/federated.png": "federated-accuracy",
    **{f"docs/theory/{name}.png": "theory" for name in NAMES},
}
"""Pictures that the README may show, and the results that they are drawn from."""
PAGES = ("docs/legality.md",)
"""Pages that are made whole."""


def rows(runs: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Cells of a comparison's table, one row per run, under `COLUMNS`."""
    first = runs[0]["validation_loss"]
    table: list[tuple[str, ...]] = []
    for run in runs:
        loss = run["validation_loss"]
        difference = "" if run is runs[0] or loss is None or first is None else f"{loss - first:+.3f}"
        table.append(
            (
                run["configuration"],
                "not finite" if loss is None else f"{loss:.3f}",
                difference,
                size(run["bytes_per_step"]),
                f"{run['compression_rate']:.1f}",
                f"{run['seconds']:.0f}",
            )
        )
    return table


def markdown(runs: Sequence[Mapping[str, Any]]) -> str:
    """The same table in Markdown."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" + "|---:" * (len(COLUMNS) - 1) + "|"]
    for name, *cells in rows(runs):
        lines.append("| " + " | ".join([f"`{name}`", *cells]) + " |")
    return "\n".join(lines)


def train_section(results: Mapping[str, Any]) -> str:
    """What the README shows of `gradwire train --compare`: the table and how it was made."""
    first, machine = results["runs"][0], results["machine"]
    options = first["options"]
    tokens = options["batch"] * options["context"]
    if results.get("simulated"):
        who = f"each of {first['world_size']} workers, simulated in one process"
        what = "Bytes are those of a worker's payloads; nothing is sent, so seconds are those of computing"
    else:
        who = f"each of {first['world_size']} ranks"
        what = (
            "Bytes are those that one rank sends; over loopback, seconds show what compression costs, not what it "
            "saves on a slow link"
        )
    return (
        f"{markdown(results['runs'])}\n\n"
        f"Nats per byte on held-out text of the {first['data']['name']}; a transformer of "
        f"{first['parameters'] / 1e6:.2f} M parameters, {options['steps']} steps of {tokens} "
        f"bytes on {who}, seed {options['seed']}. {machine.get('gpu', machine['cpu'])}, "
        f"torch {machine['torch']}, {machine['date'][:10]}. {what}. Made by `{results['command']}`."
    )


def optim_rows(results: Mapping[str, Any]) -> dict[tuple[str, str, str], dict[str, Any]]:
    """Results of `bench optim` by `(algorithm, source, mode)` and case: those of one algorithm together, in order."""
    algorithms = list(dict.fromkeys(result["algorithm"] for result in results["results"]))
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for result in sorted(results["results"], key=lambda result: algorithms.index(result["algorithm"])):
        found.setdefault((result["algorithm"], result["source"], result["mode"]), {})[result["case"]] = result
    return found


def optim_section(results: Mapping[str, Any]) -> str:
    """What the README shows of `gradwire bench optim`: one row per algorithm, and how it was made.

    Raises:
        UsageError: A case was not measured.
    """
    found, machine, cases = optim_rows(results), results["machine"], results["cases"]
    if cases.keys() != {"matrix", "gpt2", "small"}:
        raise UsageError(f"report: expected results of bench optim on all cases, got {', '.join(cases)}.")
    lines = ["| " + " | ".join(OPTIM_COLUMNS) + " |", "|---" + "|---:" * (len(OPTIM_COLUMNS) - 2) + "|---|"]
    for algorithm in dict.fromkeys(algorithm for algorithm, _, _ in found):
        variants = {(source, mode): by_case for (name, source, mode), by_case in found.items() if name == algorithm}
        owners = [own for own in ("gradwire", "torch") if (own, "fused") in variants]
        lines += ["| " + " | ".join(_optim_cells(algorithm, own, variants)) + " |" for own in owners]
    absent = "; ".join(f"{name}: {reason}" for name, reason in results["not_measured"].items())
    where = f"{machine.get('gpu', machine['cpu'])}, threads: {machine['threads']}, torch {machine['torch']}"
    return (
        "\n".join(lines) + "\n\n"
        "Step time over that of torch's fused AdamW in the same rounds: less is faster. Columns without a case are of "
        f"GPT-2 small, {cases['gpt2']['parameters'] / 1e6:.0f} M parameters in {cases['gpt2']['tensors']} tensors. "
        "Floor: the bytes that a step must move, at the speed of a copy "
        f"({cases['gpt2']['copy_bytes_per_s'] / 1e9:.0f} GB/s). First step: with an empty and with a filled compiler "
        "cache. Peak memory: above weights, gradients and state, as a share of them. Eager: the faster of the default "
        f"and `foreach`. {_training_sentence(results)}{where}, {machine['date'][:10]}."
        f"{f' Not measured: {absent}.' if absent else ''} "
        f"Made by `{machine['command']}`."
    )


def _training_sentence(results: Mapping[str, Any]) -> str:
    """What optimizers add to whole training steps, if that was measured."""
    by_tokens: dict[int, list[Mapping[str, Any]]] = {}
    for step in results.get("training", ()):
        by_tokens.setdefault(step["tokens"], []).append(step)
    parts = [
        f"of {tokens:,} tokens " + ", ".join(f"`{step['algorithm']}` {step['ratio']:.3f}" for step in steps)
        for tokens, steps in by_tokens.items()
    ]
    if not parts:
        return ""
    size = next(iter(by_tokens.values()))[0]["parameters"] / 1e6
    return (
        f"Whole training steps of the {size:.2f} M-parameter transformer, over those with fused AdamW: "
        f"{'; '.join(parts)}. "
    )


def _optim_cells(algorithm: str, own: str, variants: Mapping[tuple[str, str], Mapping[str, Any]]) -> list[str]:
    """Cells under `OPTIM_COLUMNS`: the fused form, the best eager one, and other packages, on GPT-2 small."""

    def cell(case: str, name: str, form: str) -> str:
        value = variants[own, "fused"].get(case, {}).get(name)
        return "" if value is None else format(value, form)

    ratios = {key: by_case["gpt2"]["ratio"] for key, by_case in variants.items() if "gpt2" in by_case}
    eager = [f"{ratio:.1f}" for (source, mode), ratio in ratios.items() if source == own and mode != "fused"]
    others = [f"{source} {ratio:.1f}" for (source, _), ratio in ratios.items() if source != own]
    first_steps = [cell("gpt2", f"first_step_{kind}_s", ".1f") for kind in ("cold", "warm")]
    return [
        f"`{algorithm}`" if own == "gradwire" else f"`{algorithm}` of {own}",
        cell("matrix", "ratio", ".2f"),
        cell("gpt2", "ratio", ".2f"),
        cell("gpt2", "over_floor", ".1f"),
        cell("small", "us_per_tensor", ".1f"),
        f"{', '.join(first_steps)} s" if all(first_steps) else "",
        cell("gpt2", "peak_share", ".1%"),
        min(eager, key=float, default=""),
        ", ".join(others),
    ]


@dataclass(frozen=True)
class SweepRow:
    """One optimizer of `bench sweep`.

    Args:
        optimizer: As text.
        losses: Final validation loss by learning rate, the mean over seeds; None where a seed diverged.
        lr: The rate with the least loss; None if there is none.
        loss: That loss.
        difference: From that of the first optimizer.
        edge: Whether `lr` is the grid's least or greatest.
        curve: `(step, validation loss)` at `lr`, the mean over seeds.
    """

    optimizer: str
    losses: Mapping[float, float | None]
    lr: float | None
    loss: float | None
    difference: float | None
    edge: bool
    curve: Sequence[tuple[int, float]]


def sweep_rows(results: Mapping[str, Any]) -> list[SweepRow]:
    """Results of `bench sweep` by optimizer, in its order.

    Raises:
        UsageError: The sweep has not ended.
    """
    lrs, seeds = results["lrs"], results["seeds"]
    runs = {(run["optimizer"], run["lr"], run["seed"]): run for run in results["runs"]}
    check_finished("sweep", len(runs), len(results["optimizers"]) * len(lrs) * len(seeds))
    rows: list[SweepRow] = []
    for optimizer in results["optimizers"]:
        best = tune({(lr, seed): runs[optimizer, lr, seed] for lr in lrs for seed in seeds}, lrs, seeds)
        base = rows[0].loss if rows else best.loss
        difference = None if base is None or best.loss is None else best.loss - base
        rows.append(SweepRow(optimizer, best.losses, best.lr, best.loss, difference, best.edge, best.curve("step")))
    return rows


def sweep_section(results: Mapping[str, Any]) -> str:
    """What the README shows of `gradwire bench sweep`: each optimizer at its best rate, and what the sweep was.

    Raises:
        UsageError: The sweep has not ended.
    """
    found, options, machine = sweep_rows(results), results["options"], results["machine"]
    lines = ["| " + " | ".join(SWEEP_COLUMNS) + " |", "|---" + "|---:" * (len(SWEEP_COLUMNS) - 1) + "|"]
    for row in found:
        if row.lr is None:
            cells = ["every one diverged", "", ""]
        else:
            difference = "" if row is found[0] or row.difference is None else f"{row.difference:+.3f}"
            cells = [f"{row.lr:g}{' (edge of the grid)' if row.edge else ''}", f"{row.loss:.3f}", difference]
        lines.append("| " + " | ".join([f"`{row.optimizer}`", *cells]) + " |")
    tokens = options["batch"] * options["context"]
    return (
        "\n".join(lines) + "\n\n"
        f"Nats per byte on held-out text of the {results['data']['name']}; a transformer of "
        f"{results['parameters'] / 1e6:.2f} M parameters, {options['steps']} steps of {tokens} bytes, "
        f"{seeds_in_words(results['seeds'])}. The same sweep for each: peak "
        f"learning rates {', '.join(f'{lr:g}' for lr in results['lrs'])}, reached after a warm-up of "
        f"{options['warmup']:.0%} of the steps and brought down to zero by a cosine; all else as by default; the rate "
        f"with the least final loss counts. torch {machine['torch']}, {machine['date'][:10]}. Made by "
        f"`{machine['command']}`."
    )


SECTIONS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "train": train_section,
    "optim": optim_section,
    "sweep": sweep_section,
    "exchange": exchange_section,
    "compression": compression_section,
    "curvature": curvature_section,
    "theory": theory_section,
    "network": network_section,
    "plan": plan_section,
    "federated": speed_section,
    "federated-accuracy": accuracy_section,
}
"""What the README shows of each result."""


def fill(text: str, results: Path) -> str:
    """The README's text with what stands between its `<!-- results:NAME -->` markers made anew.

    That of `NAME.json`, and after it that of `NAME-cuda.json` if there is one.

    Raises:
        UsageError: there is no marker, or no such result.
    """
    pattern = re.compile(r"(<!-- results:([\w-]+) -->\n).*?(<!-- /results:\2 -->)", re.DOTALL)
    if not pattern.search(text):
        raise UsageError("report: expected markers such as <!-- results:train --> … <!-- /results:train -->, got none.")

    def section(match: re.Match[str]) -> str:
        name, path = match[2], results / f"{match[2]}.json"
        if name not in SECTIONS:
            raise UsageError(f"report: unknown results {name!r}. There is {', '.join(SECTIONS)}.")
        if not path.is_file():
            raise UsageError(f"report: expected results in {path}, found no such file.")
        text = SECTIONS[name](json.loads(path.read_text()))
        on_gpu = path.with_name(f"{name}-cuda.json")  # what `make gpu-check` has measured
        if on_gpu.is_file():
            text += f"\n\nOn a GPU:\n\n{SECTIONS[name](json.loads(on_gpu.read_text()))}"
        return f"{match[1]}{text}\n{match[3]}"

    return pattern.sub(section, text)


def stale_pages(text: str, results: Path, root: Path) -> dict[Path, str]:
    """The pages, there already or linked in a README, that are missing or not of these results: what they should say.

    Args:
        text: The README's.
        results: The folder of kept results.
        root: The README's folder.
    """
    found: dict[Path, str] = {}
    for place in PAGES:
        page, kept = root / place, results / "products.json"
        if page.is_file() or place in text:
            content = legality_page(json.loads(kept.read_text()) if kept.is_file() else None)
            if not page.is_file() or page.read_text() != content:
                found[page] = content
    return found
