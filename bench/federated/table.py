"""The table of `gradwire bench federated`."""

from collections.abc import Mapping
from typing import Any

_MODELS = {"mlp": "MLP", "lenet": "LeNet-5"}


def speed_titles(results: Mapping[str, Any]) -> list[str]:
    """Titles of the table."""
    works = results["works"].values()
    return [
        "Simulator",
        *(f"{_MODELS[work['model']]}, {work['cohort']} of {work['clients']} clients" for work in works),
    ]


def speed_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """Every simulator: milliseconds, and how many times as much as the lean loop."""
    works = list(results["works"].values())
    names = dict.fromkeys(name for work in works for name in work["results"])
    rows = []
    for name in names:
        version = results["versions"].get(name)
        cells = [_cell(work["results"].get(name)) for work in works]
        rows.append([name if version is None else f"{name} ({version})", *cells])
    return rows


def _cell(result: Mapping[str, Any] | None) -> str:
    if result is None:
        return ""
    if not result["same_work"]:
        return "other weights"
    cpu, ratio = result["cpu_ms"], result["ratio"]
    return f"{cpu:,.{0 if cpu >= 100 else 1}f} ms, {ratio:.{1 if ratio >= 10 else 2}f}"


def speed_section(results: Mapping[str, Any]) -> str:
    """What the README shows of `gradwire bench federated`."""
    titles, machine, works = speed_titles(results), results["machine"], list(results["works"].values())
    lines = ["| " + " | ".join(titles) + " |", "|---" + "|---:" * (len(titles) - 1) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in speed_rows(results)]
    first = works[0]
    most = max(
        (one["difference"] for work in works if work["model"] == "mlp" for one in work["results"].values()), default=0.0
    )
    skipped = "; ".join(f"{name}: {reason}" for name, reason in results["skipped"].items())
    sizes = " and ".join(dict.fromkeys(f"{work['parameters']:,}" for work in works))
    text = (
        "\n".join(lines) + "\n\n"
        "CPU time of a round (user and system, of all processes) and how many times that of the lean loop, which keeps "
        "one model, slices tensors and updates all parameters at once: medians over rounds, without the first one, of "
        f"{results['options']['passes']} passes in which simulators take turns. The same work for each: federated "
        f"averaging on {first['examples']:,} synthetic images, Dirichlet({first['alpha']:g}) over clients in each of "
        f"ten classes, one epoch of SGD in batches of {first['batch_size']}, {sizes} parameters, no evaluation; final "
        f"weights of the MLP are those of the lean loop within {most:.0e}. {_ranks(results)}{machine['cpu']}, one "
        f"thread per process, torch {machine['torch']}, {machine['date'][:10]}."
    )
    return f"{text}{f' Not measured: {skipped}.' if skipped else ''} Made by `{machine['command']}`."


def _ranks(results: Mapping[str, Any]) -> str:
    """How much faster two ranks are."""
    ranks = results["ranks"]
    if ranks is None:
        return ""
    work = results["works"][ranks["work"]]
    one, two = ranks["seconds"]["1"], ranks["seconds"]["2"]
    return (
        f"Under `torchrun` a round of {_MODELS[work['model']]} takes {1e3 * one:.0f} ms on one rank and "
        f"{1e3 * two:.0f} ms on two, {ranks['speedup']:.2f} times as fast. "
    )
