"""`measure`: the seconds of functions that take turns."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


def measure(
    functions: Mapping[str, Callable[[], object]],
    device: torch.device,
    rounds: Callable[[dict[str, float]], dict[str, int]],
    *,
    from_idle: bool = False,
) -> dict[str, list[float]]:
    """Seconds of each function in every round, all taking turns after a first call that compiles and warms up.

    Round i of one function stands beside round i of the others, so that their ratio is untouched by what else the
    machine does meanwhile.

    Args:
        functions: What to measure.
        device: Whose clock counts.
        rounds: From the seconds of every function's second call to the rounds that each gets, >= 1.
        from_idle: Let an accelerator finish before each call, so that the time to issue the work counts, too.
    """
    second_calls = {}
    for name, function in functions.items():
        function()
        start = _mark(device, idle=from_idle)
        function()
        second_calls[name] = _elapsed(start, _mark(device))
    counts = rounds(second_calls)
    spans: dict[str, list[tuple[Any, Any]]] = {name: [] for name in functions}
    for turn in range(max(counts.values())):
        for name, function in functions.items():
            if turn < counts[name]:
                start = _mark(device, idle=from_idle)
                function()
                spans[name].append((start, _mark(device)))
    return {name: [_elapsed(*span) for span in spans[name]] for name in functions}


def _mark(device: torch.device, *, idle: bool = False) -> Any:
    """Now, on the clock of the device."""
    if device.type == "cpu":
        return time.perf_counter()
    if idle:
        torch.cuda.synchronize(device)
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _elapsed(start: Any, end: Any) -> float:
    """Seconds between two marks."""
    if isinstance(start, float):
        return float(end - start)
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3
