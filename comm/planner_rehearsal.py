"""A communicator's step in one process: which collectives it would make on n ranks, and what its own work costs.

The collectives of a `Rehearsal` send nothing. They act as if every rank had sent what this one sends, and write down
what they were asked for. On the meta device nothing is computed either, so that the traffic of a model of any size is
known at once; on a real device what remains is the time of compression.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
import torch.distributed as dist
from torch import Tensor

from gradwire.comm.averager import Averager
from gradwire.comm.collectives import Bytes, Collectives, _all_gather_flat

Kind = Literal["all_reduce", "all_gather", "all_to_all", "message"]
Shapes = Sequence[tuple[str, Sequence[int]]]
"""Names and shapes of parameters, in the order of the model."""


@final
@dataclass(frozen=True)
class Call:
    """One collective as this rank sees it.

    Args:
        kind: Which; "message" is from one rank to another.
        nbytes: Of the buffer that this rank hands in; of an all-to-all, without its own share.
        ranks: Who takes part, by their numbers in the world.
    """

    kind: Kind
    nbytes: int
    ranks: tuple[int, ...]

    @property
    def sent(self) -> float:
        """Bytes that the usual algorithm sends from this rank, as `Stats.bytes_sent` counts them.

        Example:
            >>> Call("all_reduce", 100, (0, 1, 2, 3)).sent, Call("all_gather", 100, (0, 1, 2, 3)).sent
            (150.0, 300.0)
        """
        size = len(self.ranks)
        factors = {"all_reduce": 2 * (size - 1) / size, "all_gather": size - 1, "all_to_all": 1, "message": 1}
        return float(self.nbytes * factors[self.kind])


class Rehearsal(Collectives):
    """Collectives of one rank among n that send nothing and write down what they are asked for.

    Args:
        world_size: Ranks that it pretends to be among, >= 1.
        rank: Which of them it is.
        together: Called in every collective.

    Attributes:
        calls: What was asked for, in order, of groups that were split off, too.

    Example:
        >>> ranks = Rehearsal(4)
        >>> ranks.all_reduce_(torch.ones(2))
        tensor([4., 4.])
        >>> ranks.calls
        [Call(kind='all_reduce', nbytes=8, ranks=(0, 1, 2, 3))]
    """

    def __init__(self, world_size: int, rank: int = 0, together: Callable[[], object] = lambda: None) -> None:
        self.rank, self.size = rank, world_size
        self.first, self.groups = 0, 1
        self.bytes = Bytes()
        self._group, self._timeout, self._parts = None, None, []
        self.members = tuple(range(world_size))
        self.calls: list[Call] = []
        self.together = together

    def split(self, members: Sequence[int]) -> "Rehearsal":
        """A group of some of these ranks, which writes into the same list."""
        part = Rehearsal(len(members), list(members).index(self.rank), self.together)
        part.bytes, part.calls = self.bytes, self.calls
        part.members = tuple(self.members[member] for member in members)
        return part

    def gather_bytes(self, data: bytes, device: torch.device) -> list[bytes]:
        """Everybody agrees."""
        return [data] * self.size

    def _run(self, collective: Any, *args: Any) -> None:
        """Write the call down, and fill in what ranks like this one would have sent."""
        if collective is dist.all_reduce:
            (summed,) = args
            self._note("all_reduce", summed)
            summed.mul_(self.size)
        elif collective is dist.all_to_all_single:
            received, sent, counts, sizes = args
            others = sum(sizes) - sizes[self.rank]
            self.calls.append(Call("all_to_all", others * sent.element_size(), self.members))
            own = torch.split(sent, sizes)[self.rank]
            for run, count in zip(torch.split(received, counts), counts, strict=True):
                run[: own.numel()].copy_(own[:count])
                run[own.numel() :].zero_()
        elif isinstance(collective, functools.partial):  # to or from one rank
            if collective.func is dist.send:
                self._note("message", args[0])
        else:
            assert collective is _all_gather_flat
            gathered, message = args
            self._note("all_gather", message)
            gathered.view(self.size, -1).copy_(message)
        self.together()

    def _note(self, kind: Kind, buffer: Tensor) -> None:
        self.calls.append(Call(kind, buffer.numel() * buffer.element_size(), self.members))


def rehearse(
    communicator: Averager,
    buckets: Iterable[Shapes],
    world_size: int,
    *,
    rank: int = 0,
    steps: int = 1,
    device: torch.device | str = "meta",
    dtype: torch.dtype = torch.float32,
    clock: Callable[[], float] | None = None,
    together: Callable[[], object] = lambda: None,
) -> list[tuple[list[Call], list[float]]]:
    """The collectives that one step makes on `world_size` ranks, and the seconds that this rank works, by bucket.

    Args:
        communicator: A new one, which is of no use afterwards.
        buckets: Parameters by bucket, in the order in which they are averaged.
        world_size: Ranks, >= 1.
        rank: Which of them, 0 <= rank < world_size.
        steps: Steps, >= 1; calls are those of the last one, the first may be another (`dense_start`).
        device: "meta" to count alone; elsewhere gradients are random.
        dtype: Of the gradients.
        clock: Seconds now, after all work on the device is done; nothing is timed without it.
        together: Called before every step and in every collective: waits for others that do the same on this machine,
            which share its cores and keep each other waiting.

    Returns:
        For every bucket the calls of the last step, and the seconds of every step.

    Example:
        >>> from gradwire import comm, compression
        >>> weight = [("weight", (64, 64))]
        >>> [(calls, _)] = rehearse(comm.Communicator(compression.Cast("bfloat16")), [weight], world_size=2)
        >>> calls  # and a number that says whether all are finite
        [Call(kind='all_reduce', nbytes=8194, ranks=(0, 1))]
    """
    ranks = Rehearsal(world_size, rank, together)
    communicator.join(ranks)
    made = [
        ([name for name, _ in bucket], [torch.empty(tuple(shape), dtype=dtype, device=device) for _, shape in bucket])
        for bucket in buckets
    ]
    found: list[tuple[list[Call], list[float]]] = [([], []) for _ in made]
    for _ in range(steps):
        for grads in (grads for _, grads in made):
            for grad in grads:
                grad.normal_()  # the last step has left means
        together()
        for place, (names, grads) in enumerate(made):
            ranks.calls.clear()
            start = clock() if clock else 0.0
            communicator.average_(grads, names, last=place == len(made) - 1)
            if clock:
                found[place][1].append(clock() - start)
            found[place] = list(ranks.calls), found[place][1]
    return found
