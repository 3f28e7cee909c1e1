"""Bytes of an interface, and what of them is not the payload: headers of packets, and those of gloo's own messages."""

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from gradwire.bench.network.namespaces import INTERFACE
from gradwire.comm.collectives import Collectives, _all_gather_flat

HEADERS = 66
"""Bytes around the payload of each packet: Ethernet 14, IPv4 20, TCP with time stamps 32."""

_PROBES = 30
_ENTRIES = 4096

CALLS: Counter[str] = Counter()
"""Collectives of this process since `count_calls`, by kind."""


def counters() -> dict[str, float]:
    """Bytes and packets that the interface has sent so far."""
    folder = Path("/sys/class/net") / INTERFACE / "statistics"
    names = {"sent_bytes": "tx_bytes", "sent_packets": "tx_packets"}
    return {name: float((folder / file).read_text()) for name, file in names.items()}


def minus(after: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    """The difference, name by name."""
    return {name: value - before[name] for name, value in after.items()}


def count_calls() -> None:
    """Count the collectives of communicators in `CALLS`, from now on."""
    original = Collectives._run

    def run(self: Collectives, collective: Any, *args: Any) -> None:
        CALLS[_kind(collective)] += 1
        original(self, collective, *args)

    Collectives._run = run  # type: ignore[method-assign]


def gloo_bytes() -> dict[str, float]:
    """Bytes that one collective of each kind sends from this rank beside its payload and the headers of packets.

    gloo puts a header before every message and announces each in both directions. How many messages a collective takes
    is measured: the interface's bytes, less the packets' headers, less the payload. Frames must be counted one by one.
    """
    size = dist.get_world_size()
    buffer = torch.zeros(_ENTRIES * size)
    small = buffer[:_ENTRIES]
    probes: dict[str, tuple[Callable[[], object], float]] = {
        "all_reduce": (lambda: dist.all_reduce(buffer), 2 * (size - 1) / size * 4 * buffer.numel()),
        "all_gather": (lambda: _all_gather_flat(torch.empty_like(buffer), small), (size - 1) * 4 * small.numel()),
        "all_to_all": (
            lambda: dist.all_to_all_single(torch.empty_like(buffer), buffer),
            (size - 1) / size * 4 * buffer.numel(),
        ),
    }
    found = {}
    for kind, (call, payload) in probes.items():
        call()  # connections are made at the first
        dist.barrier()
        before = counters()
        for _ in range(_PROBES):
            call()
        sent = minus(counters(), before)
        found[kind] = max(0.0, (sent["sent_bytes"] - HEADERS * sent["sent_packets"]) / _PROBES - payload)
    return found


def _kind(collective: Any) -> str:
    """`all_reduce`, `all_gather`, `all_to_all`, or torch's own name."""
    name = str(getattr(collective.func if isinstance(collective, functools.partial) else collective, "__name__", ""))
    return next((kind for kind in ("all_reduce", "all_gather", "all_to_all") if name.startswith(kind)), name)
