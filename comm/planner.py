"""What a training step takes on a given network: the alpha-beta cost of collectives, compression, and their overlap.

Everything here is arithmetic on numbers that somebody has measured or assumed; nothing is sent. Which collectives a
communicator makes is found by `rehearse`, which runs the communicator itself.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch

from gradwire.comm.averager import Averager
from gradwire.comm.loop import fill_buckets
from gradwire.comm.planner_rehearsal import Call, Kind, Shapes, rehearse

__all__ = [
    "GLOO",
    "Bucket",
    "Call",
    "Compute",
    "Link",
    "Network",
    "Prediction",
    "Stretch",
    "greatest_gain",
    "in_buckets",
    "plan",
    "predict",
    "with_bandwidth",
]

_BUCKET_MB = 25.0
_FIRST_DDP_BUCKET = 1 << 20  # DDP's own: backward is short of work for the link when it begins


@final
@dataclass(frozen=True)
class Link:
    """What lies between two ranks.

    Args:
        latency: Seconds from one end to the other for an empty message, >= 0.
        bandwidth: Payload bytes per second in each direction, > 0; may be infinite.
        overhead: Seconds that each collective takes beside that, >= 0: starting it, and waking up.

    Example:
        >>> Link(latency=1e-3, bandwidth=125e6)
        Link(latency=0.001, bandwidth=125000000.0, overhead=0.0)
    """

    latency: float
    bandwidth: float
    overhead: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("latency", self.latency), ("overhead", self.overhead)):
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"Link: expected {name} >= 0, got {name}={value}.")
        if not self.bandwidth > 0:
            raise ValueError(f"Link: expected bandwidth > 0, got bandwidth={self.bandwidth}.")


@final
@dataclass(frozen=True)
class Stretch:
    """How many times longer a transport needs for the bytes of a collective than a message of as many does.

    Args:
        all_reduce: > 0; below 1 where collectives go several ways at once.
        all_gather: > 0.
        all_to_all: > 0.
    """

    all_reduce: float = 1.0
    all_gather: float = 1.0
    all_to_all: float = 1.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"Stretch: expected {name} > 0, got {name}={value}.")

    def of(self, kind: Kind) -> float:
        """That of one kind; 1 for a message.

        Example:
            >>> Stretch(all_to_all=1.5).of("all_to_all"), Stretch(all_to_all=1.5).of("message")
            (1.5, 1.0)
        """
        return {"all_reduce": self.all_reduce, "all_gather": self.all_gather, "all_to_all": self.all_to_all}.get(
            kind, 1.0
        )


GLOO = Stretch(all_reduce=1.03, all_gather=1.15, all_to_all=1.45)
"""Of gloo over links that are slow for its messages: 4 hosts at 10 Mbit/s, 640 kB a rank.

Its all-to-all hands the kernel one peer's whole message after the other's, so that the uplink's queue holds the next
one's back, and its notices that a buffer is ready stand behind them. A ring has one peer on each side, and hardly
waits.
"""


@final
@dataclass(frozen=True)
class Network:
    """Machines of equally many ranks, one link each to a network without limits of its own.

        all_reduce of S bytes: overhead + 2(n-1) latency + stretch 2(n-1)/n S / bandwidth
        all_gather:            overhead +  (n-1) latency + stretch    (n-1) S / bandwidth
        all_to_all:            overhead +  (n-1) latency + stretch        S' / bandwidth,   S' to others
        message:               overhead +        latency +                S / bandwidth

    n are the ranks that take part. With several ranks to a machine, what leaves it counts: a ring leaves it once,
    all-to-all sends from each of its ranks to all others, and groups that exchange at the same time share the link.

    Args:
        across: The link of a machine.
        inside: Between ranks of one machine; as `across` by default.
        ranks_per_machine: Consecutive ranks, as torchrun numbers them, >= 1.
        stretch: Of collectives over `across`, a fact of the transport: 1 unless given, `GLOO` or what was measured.

    Example:
        >>> Network(Link(latency=0.0, bandwidth=100.0)).seconds(Call("all_reduce", 100, (0, 1, 2, 3)))
        1.5

    Reference:
        Hockney. The communication challenge for MPP: Intel Paragon and Meiko CS-2. Parallel Computing 1994 (latency
        and bandwidth); Patarasuk, Yuan. Bandwidth optimal all-reduce algorithms for clusters of workstations. JPDC
        2009 (the ring); Thakur, Rabenseifner, Gropp. Optimization of Collective Communication Operations in MPICH.
        IJHPCA 2005 (the others).
    """

    across: Link
    inside: Link | None = None
    ranks_per_machine: int = 1
    stretch: Stretch = Stretch()

    def __post_init__(self) -> None:
        if self.ranks_per_machine < 1:
            raise ValueError(f"Network: expected ranks_per_machine >= 1, got {self.ranks_per_machine}.")

    def seconds(self, call: Call) -> float:
        """How long a collective takes."""
        size, machines = len(call.ranks), {rank // self.ranks_per_machine for rank in call.ranks}
        if size == 1:
            return 0.0
        link, stretch = self.across, self.stretch.of(call.kind)
        if len(machines) == 1 and self.inside is not None:
            link, stretch = self.inside, 1.0
        hops = {"all_reduce": 2 * (size - 1), "all_gather": size - 1, "all_to_all": size - 1, "message": 1}[call.kind]
        sent = call.sent
        if len(machines) > 1:
            here = size / len(machines)  # ranks of this group on a machine
            sent *= self.ranks_per_machine / here  # groups like this one, side by side
            if call.kind == "all_to_all":
                sent *= here * (size - here) / (size - 1)
        return link.overhead + hops * link.latency + stretch * sent / link.bandwidth


@final
@dataclass(frozen=True)
class Compute:
    """A training step of one rank that sends nothing.

    Args:
        step: Seconds of all of it: forward, backward, optimizer.
        backward: Of these, those of the backward pass, 0 <= backward <= step.
    """

    step: float
    backward: float

    def __post_init__(self) -> None:
        if not 0 <= self.backward <= self.step:
            raise ValueError(
                f"Compute: expected 0 <= backward <= step, got backward={self.backward}, step={self.step}."
            )

    def scaled(self, factor: float) -> "Compute":
        """With so many times the tokens."""
        return Compute(self.step * factor, self.backward * factor)


@final
@dataclass(frozen=True)
class Bucket:
    """Gradients that are averaged together.

    Args:
        calls: The collectives that it takes, one after the other.
        codec: Seconds of work on this rank: compensation, compression, decompression.
        ready: Share of the backward pass after which its gradients are there, 0 <= ready <= 1.
    """

    calls: tuple[Call, ...]
    codec: float
    ready: float


@final
@dataclass(frozen=True)
class Prediction:
    """A training step, in seconds.

    Args:
        step: All of it.
        exposed: What is left of it without computation: communication and compression that nothing hides.
        network: Of all collectives, hidden or not.
        codec: Of all compression, hidden or not.
        sent: Bytes from one rank, as `Stats.bytes_sent` counts them.
        calls: Number of collectives.
    """

    step: float
    exposed: float
    network: float
    codec: float
    sent: float
    calls: int


def predict(
    buckets: Iterable[Bucket], compute: Compute, network: Network, *, contention: float = 1.0, late: bool = False
) -> Prediction:
    """The time of a step whose buckets are averaged, one after the other, beside the backward pass.

        ready_i  = share_i backward + contention (codec_1 + ... + codec_{i-1})
        finish_i = max(ready_i, finish_{i-1}) + codec_i + network_i
        step     = compute - backward + max(backward + contention (codec_1 + ... + codec_{m-1}), finish_m)

    Late, all of it runs beside the whole of the next step, and ends before that one's update:

        step     = max(compute + contention codec, codec + network)

    Args:
        buckets: In the order in which they are averaged.
        compute: A step that sends nothing.
        network: Where it is sent.
        contention: Seconds by which a second of compression puts off a backward pass beside it, 0 <= contention <= 1: 1
            where both want the same cores, as ranks on a busy CPU do.
        late: Whether means are used one step late, as in the overlapped form of DeMo.

    Example:
        >>> bucket = Bucket((Call("all_reduce", 100, (0, 1)),), codec=0.0, ready=0.5)
        >>> predict([bucket], Compute(step=3.0, backward=2.0), Network(Link(0.0, 50.0))).step  # 2 s, the first hidden
        4.0
    """
    if not 0 <= contention <= 1:
        raise ValueError(f"predict: expected 0 <= contention <= 1, got contention={contention}.")
    finish = stolen = total = codec = sent = 0.0
    count = 0
    backward = compute.backward
    for bucket in buckets:
        backward = compute.backward + stolen
        seconds = sum(network.seconds(call) for call in bucket.calls)
        finish = max(bucket.ready * compute.backward + stolen, finish) + bucket.codec + seconds
        stolen += contention * bucket.codec
        total, codec, count = total + seconds, codec + bucket.codec, count + len(bucket.calls)
        sent += sum(call.sent for call in bucket.calls)
    step = compute.step - compute.backward + max(backward, finish)
    if late:
        step = max(compute.step + contention * codec, codec + total)
    return Prediction(step, step - compute.step, total, codec, sent, count)


def in_buckets(
    shapes: Shapes, *, bucket_mb: float | None = None, host: str = "ddp", element_size: int = 4
) -> list[Shapes]:
    """Parameters as a host puts them in buckets, in the order in which these are averaged.

    Args:
        shapes: In the order of the model; backward meets the last one first.
        bucket_mb: MiB, > 0; 25 by default, where DDP's first bucket is of 1 MiB.
        host: "ddp" or "loop".
        element_size: Bytes per entry.

    Example:
        >>> [[name for name, _ in bucket] for bucket in in_buckets([("a", (9,)), ("b", (512, 512)), ("c", (9,))])]
        [['c', 'b'], ['a']]
    """
    limit = int((_BUCKET_MB if bucket_mb is None else bucket_mb) * 2**20)
    if host == "loop":
        dtype = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[element_size]
        tensors = [(name, torch.empty(tuple(shape), dtype=dtype, device="meta")) for name, shape in shapes]
        return [[(name, tuple(tensor.shape)) for name, tensor in bucket] for bucket in fill_buckets(tensors, limit)]
    buckets: list[list[tuple[str, Sequence[int]]]] = [[]]
    filled, full = 0, _FIRST_DDP_BUCKET if bucket_mb is None else limit
    for name, shape in reversed(shapes):
        if filled >= full:
            buckets.append([])
            filled, full = 0, limit
        buckets[-1].append((name, tuple(shape)))
        filled += math.prod(shape) * element_size
    return list(buckets)


def plan(
    communicator: Averager | None,
    buckets: Sequence[Shapes],
    world_size: int,
    *,
    codec: float = 0.0,
    overlap: bool = True,
    steps: int = 2,
) -> list[Bucket]:
    """What `predict` needs to know of a communicator.

    Gradients are there in the order of buckets, after a share of backward that is theirs of all entries.

    Args:
        communicator: A new one, of no use afterwards; None for all-reduce of the gradients as they are.
        buckets: As `in_buckets` gives them.
        world_size: Ranks, >= 1.
        codec: Seconds of compression per step, shared among buckets by their entries.
        overlap: Whether averaging begins before backward ends.
        steps: How many to go through, >= 1; the last one counts.
    """
    entries = [sum(math.prod(shape) for _, shape in bucket) for bucket in buckets]
    everything, so_far, made = sum(entries), 0, []
    if communicator is None:
        ranks = tuple(range(world_size))
        calls = [[Call("all_reduce", 4 * count, ranks)] if world_size > 1 else [] for count in entries]
    else:
        calls = [found for found, _ in rehearse(communicator, buckets, world_size, steps=steps)]
    for count, found in zip(entries, calls, strict=True):
        so_far += count
        made.append(Bucket(tuple(found), codec * count / everything, so_far / everything if overlap else 1.0))
    return made


def greatest_gain(gain: Callable[[float], float], low: float, high: float) -> float | None:
    """The greatest x, low <= x <= high, up to which there is something to gain; None if there is nothing at all.

    Args:
        gain: Positive where it pays. Looked at on a grid of eighths of powers of ten, then bisected.
        low: > 0.
        high: Returned if it still pays there.

    Example:
        >>> round(greatest_gain(lambda x: 300.0 - x, 1.0, 1e6), 3)
        300.0
    """
    count = max(1, round(8 * math.log10(high / low)))
    grid: list[float] = [low * (high / low) ** (place / count) for place in range(count + 1)]
    last = max((place for place, x in enumerate(grid) if gain(x) > 0), default=None)
    if last is None:
        return None
    if last == count:
        return high
    pays, does_not = grid[last], grid[last + 1]
    for _ in range(60):
        middle = math.sqrt(pays * does_not)
        pays, does_not = (middle, does_not) if gain(middle) > 0 else (pays, middle)
    return pays


def with_bandwidth(network: Network, bandwidth: float) -> Network:
    """The same network with another bandwidth between machines."""
    return replace(network, across=replace(network.across, bandwidth=bandwidth))
