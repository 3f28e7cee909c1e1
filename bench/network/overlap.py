"""Whether communication hides behind backward: steps recorded by torch's profiler, and how much of it stands alone."""

import contextlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile, record_function

from gradwire.comm.collectives import Collectives

COMMUNICATION = "gradwire::collective"
"""The span of a blocking collective in a trace."""

_BACKWARD = "autograd::engine::evaluate_function"
_MILLION = 1e6

Span = tuple[float, float]


@final
@dataclass(frozen=True)
class Overlap:
    """What a trace says of communication.

    Args:
        communication: Seconds in which some collective runs.
        backward: Seconds in which some operation of backward runs.
        exposed: Seconds in which the first is so and the second is not.
    """

    communication: float
    backward: float
    exposed: float

    @property
    def exposed_share(self) -> float:
        """Exposed seconds over those of communication; 0 without any."""
        return self.exposed / self.communication if self.communication else 0.0


@contextlib.contextmanager
def record(path: Path | None) -> Iterator[None]:
    """Record all threads of this process, collectives of communicators as `COMMUNICATION`, and write a Chrome trace.

    Args:
        path: The trace; nothing is recorded without.
    """
    if path is None:
        yield
        return
    original = Collectives._run

    def run(self: Collectives, collective: Any, *args: Any) -> None:
        with record_function(COMMUNICATION):
            original(self, collective, *args)

    Collectives._run = run  # type: ignore[method-assign]
    try:
        everywhere = _ExperimentalConfig(profile_all_threads=True)
        with profile(activities=[ProfilerActivity.CPU], experimental_config=everywhere) as profiler:
            yield
        path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))
    finally:
        Collectives._run = original  # type: ignore[method-assign]


def read(path: Path) -> Overlap:
    """What a Chrome trace of `record` says."""
    events = json.loads(path.read_text())["traceEvents"]
    return overlap(communication=_spans(events, COMMUNICATION), backward=_spans(events, _BACKWARD))


def overlap(*, communication: Iterable[Span], backward: Iterable[Span]) -> Overlap:
    """From spans `(start, end)` in seconds, which may overlap each other.

    Example:
        >>> overlap(communication=[(0.0, 2.0), (5.0, 6.0)], backward=[(1.0, 3.0), (2.0, 4.0)])
        Overlap(communication=3.0, backward=3.0, exposed=2.0)
    """
    sent, computed = _union(communication), _union(backward)
    hidden = sum(max(0.0, min(end, until) - max(start, since)) for start, end in sent for since, until in computed)
    total = _length(sent)
    return Overlap(total, _length(computed), total - hidden)


def _spans(events: Iterable[dict[str, Any]], name: str) -> list[Span]:
    return [
        (event["ts"] / _MILLION, (event["ts"] + event["dur"]) / _MILLION)
        for event in events
        if event.get("ph") == "X" and str(event.get("name", "")).startswith(name)
    ]


def _union(spans: Iterable[Span]) -> list[Span]:
    """The same time as spans apart from each other, in order."""
    apart: list[Span] = []
    for start, end in sorted(spans):
        if apart and start <= apart[-1][1]:
            apart[-1] = apart[-1][0], max(end, apart[-1][1])
        else:
            apart.append((start, end))
    return apart


def _length(spans: Iterable[Span]) -> float:
    return sum(end - start for start, end in spans)
