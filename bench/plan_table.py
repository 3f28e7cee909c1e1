"""The README's tables of what `gradwire plan` measures and predicts."""

from collections.abc import Mapping
from typing import Any

from gradwire.bench.plan_lab import plan_lab_section


def plan_section(results: Mapping[str, Any]) -> str:
    """Predictions beside what the lab measured; of a machine without the lab, what methods add to a training step."""
    return work_section(results) if results.get("benchmark") == "plan work" else plan_lab_section(results)


def work_section(results: Mapping[str, Any]) -> str:
    """What each method's own work adds to a training step, as `make gpu-check` measures it."""
    about, step = results["machine"], results["step"]
    lines = ["| Method | Training step over that without it | Added, ms |", "|---|---:|---:|"]
    lines += [
        f"| `{method}` | {1 + seconds / step:.3f} | {1e3 * seconds:.2f} |"
        for method, seconds in results["work"].items()
    ]
    return (
        "\n".join(lines) + "\n\n"
        f"Work beside the network in a training step of {results['tokens']:,} tokens of a {results['model']}, as one "
        f"of {results['world_size']} ranks whose collectives send nothing; without, a step takes {1e3 * step:.3g} ms. "
        f"{about.get('gpu', about['cpu'])}, torch {about['torch']}, {about['date'][:10]}. Made by `{about['command']}`."
    )
