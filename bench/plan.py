"""`gradwire plan`: does compression pay on these links, for this model, and which?

A step is predicted (`gradwire.comm.planner`) from a few measurements: what computation takes, what each method's own
work takes, and what the links do. Under torchrun the links are those between the ranks; alone they are what options
say.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, final

import torch
import torch.distributed as dist

from gradwire.bench import machine, plan_measure, plan_models, plan_text
from gradwire.bench.errors import UsageError
from gradwire.bench.launch import process_group
from gradwire.bench.plan_measure import PLAIN, averager
from gradwire.bench.plan_models import Model
from gradwire.bench.runs import Record, write_json
from gradwire.comm import planner
from gradwire.comm.planner import Bucket, Compute, Link, Network, Prediction
from gradwire.comm.planner_rehearsal import Shapes

CANDIDATES = (
    PLAIN,
    "Cast(dtype='bfloat16')",
    "BlockQuantize(bits=8) + EF + TwoPhase",
    "BlockQuantize(bits=4) + EF + TwoPhase(second=BlockQuantize(bits=8))",
    "ScaledSign + EF + TwoPhase",
    "ChunkTopK(k=32) + EF",
    "Chain(ChunkTopK(k=32), BlockQuantize(bits=8)) + EF",
    "PowerSGD(matrix_rank=4)",
    "PowerSGD(matrix_rank=1)",
)
"""What is compared, the baseline first. All are legal: texts are tried out when they are read."""

NESTED = (
    "BlockQuantize(bits=8) + EF + Hierarchical(inside={inside}, across=TwoPhase)",
    "ChunkTopK(k=32) + EF + Hierarchical(inside={inside}, across=AllGather)",
)
"""What is compared, too, where machines hold several ranks."""

FRAMING = 1.07
"""Bytes on a line over payload bytes: 1448 of the 1514 bytes of an Ethernet frame are payload, and some acknowledge."""

OVERHEAD = 2e-4
"""Seconds to begin a collective of gloo and to wake up after it, where they are not measured."""

WORTH_IT = 0.01
"""Share of a step that compression must save to count as paying."""

_SLOWEST, _FASTEST = 1e6 / 8, 1e13 / 8  # bytes per second between which the break-even is looked for
_FEWEST, _MOST = 1 / 1024, 2.0**20  # times the tokens


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
        bucket_mb: MiB, > 0.
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
    bucket_mb: float
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
        bucket_mb: MiB.
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
    bucket_mb: float = 25.0
    contention: float = 1.0
    pairs: Mapping[tuple[int, int], Link] | None = None

    def buckets(self, method: str) -> list[Bucket]:
        """What a method sends."""
        return buckets(
            method, self.shapes, self.world_size, codec=self.codecs[method], host=self.host, bucket_mb=self.bucket_mb
        )


@final
@dataclass(frozen=True)
class Plan:
    """The answers.

    Args:
        predictions: By method, the baseline first.
        best: The method of the shortest step.
        bandwidth: Bytes per second up to which the best of all compressing methods saves `WORTH_IT` of the baseline's
            step; None if it does at none, infinite if at all.
        tokens: Of a step on one rank, likewise.
    """

    predictions: Mapping[str, Prediction]
    best: str
    bandwidth: float | None
    tokens: float | None

    @property
    def gain(self) -> float:
        """The baseline's step over the best one's."""
        return self.predictions[PLAIN].step / self.predictions[self.best].step


def buckets(
    method: str, shapes: Shapes, world_size: int, *, codec: float, host: str = "ddp", bucket_mb: float = 25.0
) -> list[Bucket]:
    """What a method sends in a step: that of a configuration, or `PLAIN`.

    An optimizer that exchanges by itself has one bucket of all parameters, in their order, when backward has ended.
    """
    communicator = averager(method)
    itself = method != PLAIN and plan_measure.exchanges_itself(method)
    cut = [list(shapes)] if itself else planner.in_buckets(shapes, bucket_mb=bucket_mb, host=host)
    return planner.plan(communicator, cut, world_size, codec=codec, overlap=not itself)


def predict(
    method: str,
    shapes: Shapes,
    *,
    world_size: int,
    network: Network,
    compute: Compute,
    codec: float,
    host: str = "ddp",
    bucket_mb: float = 25.0,
    every: int = 1,
    contention: float = 1.0,
) -> Prediction:
    """The time of a step; with `every` > 1 of one of so many local steps, the last of which is followed by an exchange.

    Args:
        method: A configuration as for `gradwire train`, or `PLAIN`.
        shapes: Of the parameters.
        world_size: Ranks.
        network: Their links.
        compute: Measured step that sends nothing.
        codec: Measured seconds of compression per exchange.
        host: "ddp" or "loop".
        bucket_mb: MiB.
        every: >= 1.
        contention: See `gradwire.comm.planner.predict`.
    """
    if every > 1:
        found = planner.plan(averager(method), [list(shapes)], world_size, codec=codec, overlap=False)
        once = planner.predict(found, compute, network, contention=contention)
        shares = {name: value / every for name, value in asdict(once).items() if name not in ("step", "calls")}
        return Prediction(step=compute.step + once.exposed / every, calls=once.calls, **shares)
    found = buckets(method, shapes, world_size, codec=codec, host=host, bucket_mb=bucket_mb)
    return planner.predict(found, compute, network, contention=contention)


def make(case: Case) -> Plan:
    """Predict every method, and find where compression stops paying."""
    sent = {method: case.buckets(method) for method in case.codecs}

    def steps(compute: Compute, network: Network) -> dict[str, Prediction]:
        return {
            method: planner.predict(found, compute, network, contention=case.contention)
            for method, found in sent.items()
        }

    def gain(compute: Compute, network: Network) -> float:
        times = {method: prediction.step for method, prediction in steps(compute, network).items()}
        plain = times.pop(PLAIN)
        return (1 - WORTH_IT) * plain - min(times.values(), default=math.inf)

    def at_most(gain: Callable[[float], float], low: float, high: float) -> float | None:
        found = planner.greatest_gain(gain, low, high)
        return math.inf if found == high else found

    found = steps(case.compute, case.network)
    return Plan(
        found,
        min(found, key=lambda method: found[method].step),
        at_most(lambda x: gain(case.compute, planner.with_bandwidth(case.network, x)), _SLOWEST, _FASTEST),
        at_most(
            lambda x: gain(case.compute.scaled(x / case.tokens), case.network),
            _FEWEST * case.tokens,
            _MOST * case.tokens,
        ),
    )


def main(options: Options) -> None:
    """Measure, predict, print; every rank calls it.

    Raises:
        UsageError: An option is wrong or missing.
    """
    methods = list(dict.fromkeys([PLAIN, *(options.methods or CANDIDATES)]))
    for method in methods:
        averager(method)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        with process_group() as device:
            case = _among_ranks(options, methods, device)
            if dist.get_rank() == 0:
                _show(case, options)
    else:
        _show(_alone(options, methods), options)


def _show(case: Case, options: Options) -> None:
    plan = make(case)
    plan_text.show(case, plan)
    if options.output is not None:
        write_json(options.output, record(case, plan))


def record(case: Case, plan: Plan) -> Record:
    """The JSON form of a plan; what has no limit is null."""
    return {
        "benchmark": "plan",
        "machine": machine.describe(),
        "model": case.model,
        "tokens": case.tokens,
        "world_size": case.world_size,
        "network": asdict(case.network),
        "compute": asdict(case.compute),
        "pairs": [{"ranks": pair, **asdict(link)} for pair, link in (case.pairs or {}).items()],
        "predictions": {method: asdict(prediction) for method, prediction in plan.predictions.items()},
        "best": plan.best,
        "pays_up_to": {"bytes_per_second": plan.bandwidth, "tokens": plan.tokens},
    }


def _model(options: Options, device: torch.device) -> Model:
    if options.model is not None:
        return plan_models.of_factory(options.model, options.tokens)
    return plan_models.transformer(options.parameters, options.tokens, device)


def _alone(options: Options, methods: Sequence[str]) -> Case:
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
    methods = _nested(methods, options, network, options.world_size)
    processes = options.ranks_per_host if device.type == "cpu" else 1
    arguments = (options, methods, options.world_size, device.type)
    if processes == 1:
        found = [_measured(*arguments, lambda: None)]
    else:
        threads = max(1, (os.cpu_count() or 1) // processes)
        found = plan_measure.side_by_side(_measured, arguments, processes, threads)
    return _case(options, found, network, options.world_size, device, None)


def _among_ranks(options: Options, methods: Sequence[str], device: torch.device) -> Case:
    """Everything measured on the ranks that there are."""
    world_size = dist.get_world_size()
    if options.world_size not in (None, world_size):
        raise UsageError(f"--world-size: expected {world_size}, as torchrun says, got {options.world_size}.")
    names = plan_measure.machines()
    pairs = plan_measure.links(device)
    overhead = plan_measure.overhead(device, pairs)
    network = _network(options, pairs, world_size, plan_measure.ranks_per_machine(names), overhead)
    methods = _nested(methods, options, network, world_size)
    mine = _measured(options, methods, world_size, device.type, dist.barrier)
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
    return compute, plan_measure.codecs(methods, model.shapes, world_size, device, together)


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
