"""`gradwire bench optim`: step times of every optimizer, against torch's fused AdamW and a copy of the same memory.

Each candidate takes turns with torch's fused AdamW and the copy, and what is kept are medians of ratios within rounds.
Candidates come one after another, so that only one holds state beside the reference. The copy gives the floor: the
bytes that a step must move, at the bytes per second of the copy.
"""

import gc
import json
import statistics
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gradwire.bench import machine
from gradwire.bench.errors import UsageError
from gradwire.bench.optim_rivals import SOURCE, Candidate, candidates, missing, versions
from gradwire.bench.optim_training import training_steps
from gradwire.bench.optim_workload import CASES, QUICK_CASES, Workload, moved_bytes, peak_share, step_alone
from gradwire.bench.timing import measure

if TYPE_CHECKING:
    from rich.table import Table  # `make gpu-check` measures without it

WHOLE_MODEL = "gpt2"
"""The case on which first steps and memory are measured."""

_BUDGET_S = 1.5  # of each candidate on each case
_TABLE_WIDTH = 130


@dataclass(frozen=True)
class Result:
    """One candidate on one case.

    Args:
        source: "gradwire", "torch" or another package.
        algorithm: Its name in gradwire.
        mode: "loop", "foreach", "fused" or "default".
        case: The name of the case.
        seconds: Of one step, the median.
        ratio: To a step of torch's fused AdamW in the same rounds.
        over_floor: To the time in which a copy moves the bytes that a step must move.
        us_per_tensor: Microseconds per parameter tensor of the fastest step: no ratio, so noise only adds to it.
        reference_s: Seconds of the step of torch's fused AdamW.
        copy_bytes_per_s: Read and written by the copy.
        peak_share: Peak memory of a step above weights, gradients and state, as a share of them; None if not measured.
        first_step_cold_s: Seconds of the first step in a new process where nothing is compiled yet.
        first_step_warm_s: The same where the compiler's disk cache is filled.
    """

    source: str
    algorithm: str
    mode: str
    case: str
    seconds: float
    ratio: float
    over_floor: float
    us_per_tensor: float
    reference_s: float
    copy_bytes_per_s: float
    peak_share: float | None = None
    first_step_cold_s: float | None = None
    first_step_warm_s: float | None = None


def run(
    subjects: Sequence[Candidate],
    *,
    cases: Sequence[str] = tuple(CASES),
    quick: bool = False,
    device: str = "cpu",
    memory: bool = False,
    compile_times: bool = False,
    progress: Callable[[str], None] = lambda name: None,
) -> tuple[list[Result], dict[str, str]]:
    """Measure candidates on cases.

    Args:
        subjects: What to measure.
        cases: Names in `CASES`.
        quick: Tiny cases, few rounds.
        device: Where. On CUDA memory is always measured.
        memory: Measure the memory of a step on the case `WHOLE_MODEL`.
        compile_times: Measure the first step there, of what gradwire compiles.
        progress: Called with what is measured next.

    Returns:
        Results by case in the order of `subjects`, and why a candidate is not among them, by its name.
    """
    results: dict[tuple[str, str], Result] = {}
    failed: dict[str, str] = {}
    for case in cases:
        work = Workload((QUICK_CASES if quick else CASES)[case], device)
        for number, candidate in enumerate(subjects, 1):
            progress(f"{case}: {candidate.name} ({number} of {len(subjects)})")
            try:
                results[case, candidate.name] = _measure(candidate, case, work, quick=quick)
            except Exception as error:  # of any package, in any way; it is listed
                failed[f"{candidate.name}, {case}"] = _reason(error)
            if not quick:
                gc.collect()  # some packages leave cycles
        del work
    for candidate in subjects:
        result = results.get((WHOLE_MODEL, candidate.name))
        compiled = compile_times and candidate.source == SOURCE and candidate.mode == "fused"
        if result is None or not (compiled or (memory and device == "cpu")):
            continue
        progress(f"{WHOLE_MODEL}: {candidate.name}, in a process of its own")
        try:
            found = _alone(candidate, quick=quick, device=device, compiled=compiled)
        except Exception as error:
            failed[f"{candidate.name}, in a process of its own"] = _reason(error)
        else:
            results[WHOLE_MODEL, candidate.name] = replace(result, **found)
    return list(results.values()), failed


def main(
    cases: Sequence[str] = (),
    optimizers: Sequence[str] = (),
    *,
    rivals: bool = True,
    fused: bool = True,
    quick: bool = False,
    memory: bool = False,
    compile_times: bool = False,
    training: bool = False,
    device: str = "cpu",
    threads: int | None = None,
    output: Path | None = None,
) -> bool:
    """Measure, print a table, and write JSON and a figure to `output` if given; whether all of gradwire's ran.

    Raises:
        UsageError: There is no such case, optimizer or device.
    """
    from rich.console import Console

    subjects = select(cases, optimizers, rivals=rivals, fused=fused)
    cases = [case for case in CASES if case in cases or not cases]
    if (memory or compile_times) and WHOLE_MODEL not in cases:
        raise UsageError(f"--memory and --compile-times: measured on {WHOLE_MODEL}. Add --case {WHOLE_MODEL}.")
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise UsageError(f"--device: expected cpu, or cuda where there is a GPU, got {device!r}.")
    if threads is not None:
        torch.set_num_threads(threads)
    console = Console()
    if not console.is_terminal:  # a file has no width; the table has
        console = Console(width=_TABLE_WIDTH)
    with console.status("starting") as status:

        def progress(name: str) -> None:
            status.update(f"measuring {name}")
            if not console.is_terminal:
                console.print(f"measuring {name}", markup=False)

        options: dict[str, Any] = {"quick": quick, "memory": memory, "compile_times": compile_times}
        results, failed = run(subjects, cases=cases, device=device, progress=progress, **options)
        steps = training_run(subjects, quick=quick, device=device, progress=progress) if training else []
    kept = record(results, (missing() if rivals else {}) | failed, quick=quick, device=device) | {"training": steps}
    if results:
        console.print(table(kept))
    for line in training_lines(kept):
        console.print(line, markup=False)
    for name, reason in kept["not_measured"].items():
        console.print(f"not measured: {name}: {reason}", markup=False)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(kept, indent=1) + "\n")
        console.print(f"written to {output}")
    if output is not None and results:
        from gradwire.bench.plots import plot_optimizers

        plot_optimizers(kept, output.with_suffix(".png"))
        console.print(f"drawn in {output.with_suffix('.png')}")
    return not any(name.startswith(SOURCE) for name in failed)


def select(cases: Sequence[str], optimizers: Sequence[str], *, rivals: bool, fused: bool) -> list[Candidate]:
    """The candidates of the named optimizers, of all if none is named.

    Raises:
        UsageError: There is no such case or optimizer.
    """
    for case in cases:
        if case not in CASES:
            raise UsageError(f"--case: expected one of {', '.join(CASES)}, got {case!r}.")
    subjects = candidates(fused=fused) if rivals else candidates(rivals=(), fused=fused)
    known = {subject.algorithm.lower(): subject.algorithm for subject in subjects}
    for name in optimizers:
        if name.lower() not in known:
            raise UsageError(f"--optimizer: expected one of {', '.join(known.values())}, got {name!r}.")
    chosen = {name.lower() for name in optimizers or known}
    return [subject for subject in subjects if subject.algorithm.lower() in chosen]


def training_run(
    subjects: Sequence[Candidate], *, quick: bool, device: str, progress: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Whole training steps with our fused optimizers in place of torch's fused AdamW."""
    (reference,) = [some for some in candidates(rivals=()) if (some.source, some.mode) == ("torch", "fused")]
    fused = [subject for subject in subjects if subject.source == SOURCE and subject.mode == "fused"]
    progress("whole training steps")
    return training_steps(fused, reference, quick=quick, device=device)


def training_lines(kept: Mapping[str, Any]) -> list[str]:
    """One sentence for each optimizer that was measured in whole training steps."""
    return [
        f"{step['algorithm']}: a training step of {step['tokens']} tokens takes {step['ratio']:.3f} times that with "
        f"torch's fused AdamW ({step['backward_s']:.3g} s forward and backward, {step['step_s'] * 1e3:.3g} ms step)"
        for step in kept.get("training", ())
    ]


def record(results: Sequence[Result], not_measured: dict[str, str], *, quick: bool, device: str) -> dict[str, Any]:
    """The JSON form of a measurement."""
    cases = QUICK_CASES if quick else CASES
    by_case = {name: [result for result in results if result.case == name] for name in CASES}
    return {
        "benchmark": "optim",
        "machine": machine.describe(device),
        "packages": versions(),
        "cases": {
            name: {
                "title": cases[name].title,
                "tensors": len(cases[name].shapes),
                "parameters": cases[name].numel,
                "reference_s": statistics.median(result.reference_s for result in some),
                "copy_bytes_per_s": statistics.median(result.copy_bytes_per_s for result in some),
            }
            for name, some in by_case.items()
            if some
        },
        "results": [vars(result) | {"over_ours": _over_ours(result, results)} for result in results],
        "not_measured": not_measured,
    }


def table(kept: dict[str, Any]) -> "Table":
    """A record for a terminal."""
    from rich import box
    from rich.table import Table

    from gradwire.bench.report import optim_rows

    speeds = [f"{case['copy_bytes_per_s'] / 1e9:.1f}" for case in kept["cases"].values()]
    rendered = Table(
        title="Step time as a multiple of torch's fused AdamW in the same rounds",
        caption=f"floor: as a multiple of moving the bytes that a step must move, at the {', '.join(speeds)} GB/s of a "
        "copy. ours: as a multiple of gradwire's fused one.",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for title in ("optimizer", "of", "mode"):
        rendered.add_column(title, no_wrap=True)
    columns = _columns(kept)
    for title, *_ in columns:
        rendered.add_column(title, justify="right", max_width=9)
    previous = None
    for (algorithm, source, mode), by_case in optim_rows(kept).items():
        if previous not in (None, algorithm):
            rendered.add_section()
        values = [(by_case.get(case, {}).get(key), form) for _, case, key, form in columns]
        cells = ["" if value is None else form.format(value) for value, form in values]
        rendered.add_row("" if algorithm == previous else algorithm, source, mode, *cells)
        previous = algorithm
    return rendered


def _columns(kept: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """`(title, case, key, format)` of those columns that hold anything."""
    columns = []
    for case in kept["cases"]:
        columns.append((kept["cases"][case]["title"], case, "ratio", "{:.2f}"))
        if case == "small":  # it stays in the cache
            columns.append(("µs per tensor", case, "us_per_tensor", "{:.1f}"))
        else:
            columns += [("floor", case, "over_floor", "{:.1f}"), ("ours", case, "over_ours", "{:.1f}")]
    columns += [
        ("peak memory", WHOLE_MODEL, "peak_share", "{:.1%}"),
        ("first step", WHOLE_MODEL, "first_step_cold_s", "{:.1f} s"),
        ("warm cache", WHOLE_MODEL, "first_step_warm_s", "{:.1f} s"),
    ]
    held = {(result["case"], key) for result in kept["results"] for key in result if result[key] is not None}
    return [column for column in columns if column[1:3] in held]


def _measure(candidate: Candidate, case: str, work: Workload, *, quick: bool) -> Result:
    def rounds(seconds: dict[str, float]) -> dict[str, int]:
        slowest = max(seconds.values())
        few = 2 if quick or slowest > 2 * _BUDGET_S else 3
        count = few if quick or slowest > _BUDGET_S / 3 else min(100, max(5, round(_BUDGET_S / slowest)))
        return dict.fromkeys(seconds, count)

    optimizer = candidate.build(work.parameters())
    functions: dict[str, Callable[[], object]] = {
        "copy": work.copy,
        "reference": work.reference.step,
        "candidate": optimizer.step,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated calls of old packages
        warnings.filterwarnings("error", message="fused=True")  # would run uncompiled
        spans = measure(functions, work.device, rounds, from_idle=True)
    copies, references, steps = spans["copy"], spans["reference"], spans["candidate"]
    floor = moved_bytes(candidate.algorithm, optimizer) / work.copied  # in copies
    seconds = statistics.median(steps)
    return Result(
        candidate.source,
        candidate.algorithm,
        candidate.mode,
        case,
        seconds,
        ratio=statistics.median(step / reference for step, reference in zip(steps, references, strict=True)),
        over_floor=statistics.median(step / (copy * floor) for step, copy in zip(steps, copies, strict=True)),
        us_per_tensor=min(steps) / len(work.case.shapes) * 1e6,
        reference_s=statistics.median(references),
        copy_bytes_per_s=work.copied / statistics.median(copies),
        peak_share=peak_share(optimizer, work.device) if work.device.type == "cuda" else None,
    )


def _alone(candidate: Candidate, *, quick: bool, device: str, compiled: bool) -> dict[str, Any]:
    """The fields of a result that a process of its own finds; the first steps only where a candidate is `compiled`."""

    def alone(cache: str | None = None) -> dict[str, float]:
        return step_alone(candidate, WHOLE_MODEL, quick=quick, device=device, cache=cache)

    if not compiled:
        return {"peak_share": alone()["peak_share"]}
    with tempfile.TemporaryDirectory() as cache:
        cold, warm = alone(cache), alone(cache)
    times = {"first_step_cold_s": cold["first_step_s"], "first_step_warm_s": warm["first_step_s"]}
    return times | {"peak_share": warm["peak_share"]}


def _over_ours(result: Result, results: Sequence[Result]) -> float | None:
    """How many times faster gradwire's fused optimizer of the same algorithm is; None for our own and without one."""
    if result.source == SOURCE:
        return None
    for ours in results:
        if (ours.source, ours.mode, ours.algorithm, ours.case) == (SOURCE, "fused", result.algorithm, result.case):
            return result.ratio / ours.ratio
    return None


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
