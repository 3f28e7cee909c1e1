"""What a plan needs to know of this machine and its links: compute, compression, latency and bandwidth."""

import ast
import functools
import multiprocessing
import os
import socket
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from gradwire.bench import specs
from gradwire.bench.plan_models import Model
from gradwire.comm.averager import Averager
from gradwire.comm.planner import Call, Compute, Link, Network, Stretch
from gradwire.comm.planner_rehearsal import Kind

_STEPS = 7
_LONG = 0.05  # seconds of a message from which on its size no longer matters
_LARGEST = 1 << 26
_LONG_COLLECTIVE = 0.25  # seconds on the wire
_LEAST_STRETCH = 0.1  # what looks ten times faster than the links is noise
_ALL_PAIRS = 16  # ranks up to which every pair is measured


def compute(model: Model, device: torch.device, together: Callable[[], object] = lambda: None) -> Compute:
    """Seconds of a training step with AdamW, and of its backward pass: medians.

    Args:
        model: With parts to measure.
        device: Where.
        together: Waits for all others that measure on this machine.
    """
    step = backward = 0.0
    for make, weight in model.parts:
        module, loss_of = make()
        optimizer = torch.optim.AdamW(module.parameters(), fused=True)
        spans = []
        for _ in range(_STEPS):
            together()
            start = now(device)
            loss = loss_of()
            between = now(device)
            loss.backward()  # type: ignore[no-untyped-call]
            behind = now(device)
            optimizer.step()
            spans.append((now(device) - start, behind - between))
            optimizer.zero_grad()
        step += weight * statistics.median(whole for whole, _ in spans[2:])
        backward += weight * statistics.median(part for _, part in spans[2:])
    return Compute(max(step, backward, 1e-9), max(backward, 1e-9))


PLAIN = "DistributedDataParallel"
"""What a method is called that hands gradients to the process group as they are."""


def averager(method: str) -> Averager | None:
    """The communicator of a configuration, that of its optimizer if it has one of its own; None for `PLAIN`.

    Raises:
        UsageError: The text is wrong.
    """
    if method == PLAIN:
        return None
    configuration = specs.parse(method)
    own = None
    if "optimizer" in configuration.terms:
        probe = [("probe", torch.nn.Parameter(torch.zeros(1)))]
        own = specs.own_communicator(configuration.optimizer(probe, lr=1.0))
    return own if own is not None else configuration.communicator(seed=0)


def exchanges_itself(method: str) -> bool:
    """Whether a configuration names an optimizer that exchanges gradients by itself."""
    terms = specs.parse(method).terms
    return "optimizer" in terms and specs.exchanges_itself(ast.unparse(terms["optimizer"]))


def is_late(method: str) -> bool:
    """Whether a configuration names an optimizer that exchanges beside the next step."""
    if method == PLAIN or "optimizer" not in (configuration := specs.parse(method)).terms:
        return False
    probe = [("probe", torch.nn.Parameter(torch.zeros(1)))]
    return getattr(configuration.optimizer(probe, lr=1.0), "form", None) == "overlapped"


def ranks_per_machine(names: Sequence[str]) -> int:
    """How many consecutive ranks every machine has; 1 where machines differ in it."""
    count = names.count(names[0])
    even = all(name == names[rank // count * count] for rank, name in enumerate(names))
    distinct = len(names) == count * len(set(names))
    return count if even and distinct else 1


def neighbours(names: Sequence[str]) -> Callable[[], object]:
    """What waits for the other ranks of this rank's machine; every rank must call it with the names of all machines."""
    own: Callable[[], object] = dist.barrier
    for name in dict.fromkeys(names):
        ranks = [rank for rank, other in enumerate(names) if other == name]
        group = dist.new_group(ranks, backend="gloo")
        if dist.get_rank() in ranks:
            own = functools.partial(dist.barrier, group)
    return own


def now(device: torch.device) -> float:
    """Seconds, after all work on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def side_by_side(work: Callable[..., Any], arguments: tuple[Any, ...], processes: int, threads: int) -> list[Any]:
    """What `work(*arguments, together)` returns in as many new processes, which do it at the same time.

    Args:
        work: A function of a module.
        arguments: What can be pickled.
        processes: >= 1.
        threads: Of torch in each.
    """
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(processes)
    started = []
    try:
        for _ in range(processes):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(work, arguments, barrier, threads, theirs), daemon=True)
            process.start()
            theirs.close()
            started.append((process, ours))
        try:
            return [pipe.recv() for _, pipe in started]
        except EOFError:
            raise RuntimeError("plan: a process that measured has ended; its error stands above.") from None
    finally:
        for process, _ in started:
            process.terminate()
            process.join()


def _work(work: Callable[..., Any], arguments: tuple[Any, ...], barrier: Any, threads: int, pipe: Any) -> None:
    torch.set_num_threads(threads)
    pipe.send(work(*arguments, barrier.wait))
    os._exit(0)  # gloo, where it was used, aborts now and then at the interpreter's end


def links(device: torch.device) -> dict[tuple[int, int], Link]:
    """Latency and bandwidth of pairs of ranks, all of them up to 16 ranks, else neighbours; every rank must call it.

    A short message goes to and fro, then ever longer ones, until one takes a twentieth of a second. Half the time of a
    round is one way.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    pairs = [
        (a, b) for a in range(size) for b in range(a + 1, size) if size <= _ALL_PAIRS or b in (a + 1, a + size - 1)
    ]
    mine: dict[tuple[int, int], Link] = {}
    for a, b in pairs:
        if rank in (a, b):
            found = _link(b if rank == a else a, rank == a, device)
            if rank == a:
                mine[a, b] = found
        dist.barrier()
    gathered: list[Any] = [None] * size
    dist.all_gather_object(gathered, mine)
    return {pair: link for some in gathered for pair, link in some.items()}


def overhead(device: torch.device, links: Mapping[tuple[int, int], Link]) -> float:
    """Seconds of an all-reduce of one number beyond its 2(n-1) latencies; every rank must call it."""
    one, spans = torch.zeros(1, device=device), []
    for _ in range(20):
        dist.barrier()
        start = now(device)
        dist.all_reduce(one)
        spans.append(now(device) - start)
    slowest = max((link.latency for link in links.values()), default=0.0)
    return max(0.0, statistics.median(spans[5:]) - 2 * (dist.get_world_size() - 1) * slowest)


def stretch(device: torch.device, network: Network) -> Stretch:
    """How much longer long collectives take than `network` says of their bytes; every rank must call it.

    Args:
        device: Of the buffers.
        network: What was measured between pairs of ranks.
    """
    size = dist.get_world_size()
    everyone = tuple(range(size))
    sent = min(_LARGEST, _LONG_COLLECTIVE * network.across.bandwidth)
    part = max(1, int(sent / (8 * size)))  # float32 entries

    def ratio(kind: Kind, nbytes: int, collective: Callable[[], object]) -> float:
        call, spans = Call(kind, nbytes, everyone), []
        for _ in range(3):
            dist.barrier()
            start = now(device)
            collective()
            spans.append(now(device) - start)
        slowest = torch.tensor([statistics.median(spans)], device=device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        fixed = network.seconds(Call(kind, 0, everyone))
        return max(_LEAST_STRETCH, (slowest.item() - fixed) / (network.seconds(call) - fixed))

    one, whole = (torch.zeros(count * part, device=device) for count in (2, 2 * size))
    half, received = whole[: size * part], torch.empty_like(whole)
    return Stretch(
        ratio("all_reduce", 4 * half.numel(), lambda: dist.all_reduce(half)),
        ratio("all_gather", 4 * one.numel(), lambda: dist.all_gather(list(received.chunk(size)), one)),
        ratio("all_to_all", 4 * (whole.numel() - one.numel()), lambda: dist.all_to_all_single(received, whole)),
    )


def machines() -> list[str]:
    """The name of every rank's machine."""
    names: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(names, socket.gethostname())
    return names


def _link(other: int, first: bool, device: torch.device) -> Link:
    latency = statistics.median(_round(1, other, first, device) for _ in range(20)) / 2
    nbytes, one_way = 1 << 14, 0.0
    while True:
        one_way = min(_round(nbytes, other, first, device) for _ in range(3)) / 2
        # Both must come to the same end, so the first one's clock decides.
        enough = torch.tensor([float(one_way > _LONG or nbytes >= _LARGEST)], device=device)
        _pass(enough, other, first)
        if bool(enough.item()):
            return Link(latency, nbytes / max(1e-9, one_way - latency))
        nbytes *= 4


def _round(nbytes: int, other: int, first: bool, device: torch.device) -> float:
    """Seconds of a message to the other rank and back."""
    message = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    start = now(device)
    _pass(message, other, first)
    _pass(message, other, not first)
    return now(device) - start


def _pass(message: torch.Tensor, other: int, sends: bool) -> None:
    if sends:
        dist.send(message, other)
    else:
        dist.recv(message, other)
