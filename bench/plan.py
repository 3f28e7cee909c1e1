"""`gradwire plan`: does compression pay on these links, for this model, and which?

A step is predicted (`gradwire.comm.planner`) from a few measurements: what computation takes, what each method's own
work takes, and what the links do. Under torchrun the links are those between the ranks; alone they are what options
say.
"""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import final

import torch.distributed as dist

from gradwire.bench import machine, plan_text
from gradwire.bench.launch import process_group
from gradwire.bench.plan_case import Case, Options, alone, among_ranks, buckets
from gradwire.bench.plan_measure import PLAIN, averager, is_late
from gradwire.bench.runs import Record, write_json
from gradwire.comm import planner
from gradwire.comm.planner import Compute, Network, Prediction
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

WORTH_IT = 0.01
"""Share of a step that compression must save to count as paying."""

_SLOWEST, _FASTEST = 1e6 / 8, 1e13 / 8  # bytes per second between which the break-even is looked for
_FEWEST, _MOST = 1 / 1024, 2.0**20  # times the tokens


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


def predict(
    method: str,
    shapes: Shapes,
    *,
    world_size: int,
    network: Network,
    compute: Compute,
    codec: float,
    host: str = "ddp",
    bucket_mb: float | None = None,
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
        bucket_mb: MiB; as `in_buckets` has it by default.
        every: >= 1.
        contention: See `gradwire.comm.planner.predict`.
    """
    if every > 1:
        found = planner.plan(averager(method), [list(shapes)], world_size, codec=codec, overlap=False)
        once = planner.predict(found, compute, network, contention=contention)
        shares = {name: value / every for name, value in asdict(once).items() if name not in ("step", "calls")}
        return Prediction(step=compute.step + once.exposed / every, calls=once.calls, **shares)
    found = buckets(method, shapes, world_size, codec=codec, host=host, bucket_mb=bucket_mb)
    return planner.predict(found, compute, network, contention=contention, late=is_late(method))


def make(case: Case) -> Plan:
    """Predict every method, and find where compression stops paying."""
    sent = {method: (case.buckets(method), is_late(method)) for method in case.codecs}

    def steps(compute: Compute, network: Network) -> dict[str, Prediction]:
        return {
            method: planner.predict(found, compute, network, contention=case.contention, late=late)
            for method, (found, late) in sent.items()
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
            case = among_ranks(options, methods, device)
            if dist.get_rank() == 0:
                _show(case, options)
    else:
        _show(alone(options, methods), options)


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
