"""What a plan follows from: what options say, and measurements in place of what they do not say."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, final

import torch
import torch.distributed as dist

from gradwire.bench import plan_measure, plan_models, plan_work
from gradwire.bench.errors import UsageError
from gradwire.bench.plan_measure import averager, exchanges_itself
from gradwire.bench.plan_models import Model
from gradwire.comm import planner
from gradwire.comm.planner import GLOO, Bucket, Compute, Link, Network, Stretch
from gradwire.comm.planner_rehearsal import Shapes

NESTED = (
    "BlockQuantize(bits=8) + EF + Hierarchical(inside={inside}, across=TwoPhase)",
    "ChunkTopK(k=32) + EF + Hierarchical(inside={inside}, across=AllGather)",
)
"""What is compared, too, where machines hold several ranks."""

FRAMING = 1.07
"""Bytes on a line over payload bytes: 1448 of the 1514 bytes of an Ethernet frame are payload, and some acknowledge."""

OVERHEAD = 2e-4
"""Seconds to begin a collective of gloo and to wake up after it, where they are not measured."""

STRETCHES = {"gloo": GLOO, "nccl": Stretch()}
"""By backend, where collectives are not measured."""

Backend = Literal["gloo", "nccl"]


@final
@dataclass(frozen=True)
class Options:
    """What the command line says; what is None is measured.

    Args:
        parameters: Of the model, >= 1.
        model: `package.module:function` in its place.
        tokens: Of a step on one rank, >= 1.
        bandwidth: Between machines, bytes per second of the line.
        latency: Between machines, seconds one way.
        world_size: Ranks, >= 2.
        ranks_per_host: Consecutive ranks of one machine; a divisor of `world_size`.
        compute: Seconds of a step without communication.
        backward: Of these, those of backward.
        methods: What is compared with `PLAIN`; `CANDIDATES` if empty.
        host: "ddp" or "loop".
        bucket_mb: MiB, > 0; as `in_buckets` has it by default.
        backend: Whose `STRETCHES` hold; by default, collectives are measured under torchrun, and are else those of the
            device's usual backend.
        output: A JSON.
    """

    parameters: int
    model: str | None
    tokens: int
    bandwidth: float | None
    latency: float | None
    world_size: int | None
    ranks_per_host: int
    compute: float | None
    backward: float | None
    methods: Sequence[str]
    host: str
    bucket_mb: float | None
    backend: Backend | None = None
    output: Path | None = None


@final
@dataclass(frozen=True)
class Case:
    """Everything that a plan follows from.

    Args:
        model: In words.
        shapes: Of its parameters.
        tokens: Of a step on one rank.
        world_size: Ranks.
        network: Their links.
        compute: A step that sends nothing.
        codecs: Seconds of work per step, by method, the baseline first.
        host: "ddp" or "loop".
        bucket_mb: MiB; as `in_buckets` has it by default.
        contention: See `gradwire.comm.planner.predict`.
        pairs: Measured links by pair of ranks.
    """

    model: str
    shapes: Shapes
    tokens: int
    world_size: int
    network: Network
    compute: Compute
    codecs: Mapping[str, float]
    host: str = "ddp"
    bucket_mb: float | None = None
    contention: float = 1.0
    pairs: Mapping[tuple[int, int], Link] | None = None

    def buckets(self, method: str) -> list[Bucket]:
        """What a method sends."""
        return buckets(
            method, self.shapes, self.world_size, codec=self.codecs[method], host=self.host, bucket_mb=self.bucket_mb
        )


def buckets(
    method: str, shapes: Shapes, world_size: int, *, codec: float, host: str = "ddp", bucket_mb: float | None = None
) -> list[Bucket]:
    """What a method sends in a step: that of a configuration, or `PLAIN`.

    An optimizer that exchanges by itself has one bucket of all parameters, in their order, when backward has ended.
    """
    communicator = averager(method)
    itself = method != plan_measure.PLAIN and exchanges_itself(method)
    cut = [list(shapes)] if itself else planner.in_buckets(shapes, bucket_mb=bucket_mb, host=host)
    return planner.plan(communicator, cut, world_size, codec=codec, overlap=not itself)


def _model(options: Options, device: torch.device) -> Model:
    if options.model is not None:
        return plan_models.of_factory(options.model, options.tokens)
    return plan_models.transformer(options.parameters, options.tokens, device)


def alone(options: Options, methods: Sequence[str]) -> Case:
    """Links from options; the rest is measured in as many processes as a machine has ranks."""
    if options.bandwidth is None or options.world_size is None:
        raise UsageError(
            "plan: expected --bandwidth and --world-size, or torchrun around it to measure the links between its ranks."
        )
    if options.world_size < 2 or options.world_size % options.ranks_per_host:
        raise UsageError(
            f"--world-size: expected a number from 2 on that --ranks-per-host={options.ranks_per_host} divides, "
            f"got {options.world_size}."
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = _network(options, {}, options.world_size, options.ranks_per_host, OVERHEAD)
    network = replace(network, stretch=STRETCHES[options.backend or ("nccl" if device.type == "cuda" else "gloo")])
    methods = _nested(methods, options, network, options.world_size)
    processes = options.ranks_per_host if device.type == "cpu" else 1
    arguments = (options, methods, options.world_size, device.type)
    if processes == 1:
        found = [_measured(*arguments, lambda: None)]
    else:
        threads = max(1, (os.cpu_count() or 1) // processes)
        found = plan_measure.side_by_side(_measured, arguments, processes, threads)
    return _case(options, found, network, options.world_size, device, None)


def among_ranks(options: Options, methods: Sequence[str], device: torch.device) -> Case:
    """Everything measured on the ranks that there are."""
    world_size = dist.get_world_size()
    if options.world_size not in (None, world_size):
        raise UsageError(f"--world-size: expected {world_size}, as torchrun says, got {options.world_size}.")
    names = plan_measure.machines()
    pairs = plan_measure.links(device)
    overhead = plan_measure.overhead(device, pairs)
    ranks = plan_measure.ranks_per_machine(names)
    if options.backend is None:
        measured = replace(options, bandwidth=None, latency=None)
        stretch = plan_measure.stretch(device, _network(measured, pairs, world_size, ranks, overhead))
    else:
        stretch = STRETCHES[options.backend]
    network = replace(_network(options, pairs, world_size, ranks, overhead), stretch=stretch)
    methods = _nested(methods, options, network, world_size)
    mine = _measured(options, methods, world_size, device.type, plan_measure.neighbours(names))
    everyone: list[Any] = [None] * world_size
    dist.all_gather_object(everyone, mine)
    return _case(options, everyone, network, world_size, device, pairs)


def _measured(
    options: Options, methods: Sequence[str], world_size: int, device_type: str, together: Callable[[], object]
) -> tuple[Compute, dict[str, float]]:
    """Compute and compression of this process; a function of the module, since others are started with it."""
    device = torch.device(device_type)
    model = _model(options, device)
    if options.compute is not None:
        compute = Compute(options.compute, options.compute * 2 / 3 if options.backward is None else options.backward)
    elif model.parts:
        compute = plan_measure.compute(model, device, together)
    else:
        raise UsageError(f"--model: expected {options.model} to return a loss, too, or --compute with the step's time.")
    return compute, plan_work.seconds(methods, model, compute, world_size, device, together)


def _case(
    options: Options,
    found: Sequence[tuple[Compute, dict[str, float]]],
    network: Network,
    world_size: int,
    device: torch.device,
    pairs: Mapping[tuple[int, int], Link] | None,
) -> Case:
    """The slowest process counts: all wait for it."""
    model = _model(options, torch.device("meta"))
    compute = max((compute for compute, _ in found), key=lambda compute: compute.step)
    codecs = {method: max(codecs[method] for _, codecs in found) for method in found[0][1]}
    # Ranks that leave a core free compress on it; on a GPU compression and backward share its memory's bandwidth.
    free = device.type == "cpu" and (os.cpu_count() or 1) >= 2 * network.ranks_per_machine
    return Case(
        model.name,
        model.shapes,
        options.tokens,
        world_size,
        network,
        compute,
        codecs,
        options.host,
        options.bucket_mb,
        0.0 if free else 1.0,
        pairs,
    )


def _network(
    options: Options, pairs: Mapping[tuple[int, int], Link], world_size: int, ranks: int, overhead: float
) -> Network:
    """The slowest measured link between machines and inside them, with what options say in its place."""
    inside = [link for (a, b), link in pairs.items() if a // ranks == b // ranks]
    across = [link for (a, b), link in pairs.items() if a // ranks != b // ranks]
    slow = _slowest(across or inside, overhead) if pairs else Link(1e-4, math.inf, overhead)
    if options.bandwidth is not None:
        slow = replace(slow, bandwidth=options.bandwidth / FRAMING)
    if options.latency is not None:
        slow = replace(slow, latency=options.latency)
    several = 1 < ranks < world_size
    near = (_slowest(inside, overhead) if inside else Link(2e-5, 2e9, overhead)) if several else None
    return Network(slow, near, ranks if several else 1)


def _slowest(links: Sequence[Link], overhead: float) -> Link:
    return Link(max(link.latency for link in links), min(link.bandwidth for link in links), overhead)


def _nested(methods: Sequence[str], options: Options, network: Network, world_size: int) -> list[str]:
    inside = network.ranks_per_machine
    if options.methods or not 1 < inside < world_size:
        return list(methods)
    return [*methods, *(text.format(inside=inside) for text in NESTED)]
