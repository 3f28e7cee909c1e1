"""`Collectives`: one process group, its counters of real bytes, and errors that reach every rank.

All algorithms of this package speak to other ranks through these few blocking calls, issued in program order by one
thread. Anything that a backend refuses (float8, 16-bit integers) travels as uint8.
"""

import contextlib
import datetime
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_store

# torch 2.13 renamed the flat all-gather; the old name warns there and is the only one before.
_all_gather_flat: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

_ERROR_KEY = "gradwire/error"


@final
@dataclass
class Bytes:
    """Counters of one rank.

    Args:
        payload: Bytes handed to collectives.
        uncompressed: Of these, what the plan sends dense.
        sent: Bytes that the usual algorithm of each collective sends from this rank: ring all-reduce 2(n-1)/n of the
            buffer, all-gather n-1 times the message, all-to-all everything but the rank's own share.
    """

    payload: int = 0
    uncompressed: int = 0
    sent: float = 0.0


@final
class Collectives:
    """Blocking collectives on a group of this communicator's own, with byte counters.

    Without an initialised `torch.distributed`, or with one rank, every call is the identity and sends nothing.

    Args:
        group: The ranks that take part; all ranks by default. A new group of the same ranks is created, so that
            these collectives never interleave with anybody else's. Every rank of it must make the object at the same
            point of the program.
        timeout: How long a collective waits for the others; the default group's setting by default.

    State:
        `bytes`, the counters, shared with groups that were split off.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, timeout: datetime.timedelta | None = None) -> None:
        self.rank, self.size = 0, 1
        self.first, self.groups = 0, 1  # the least of its ranks in the world; how many groups of this size fit there
        self.bytes = Bytes()
        self._group: dist.ProcessGroup | None = None
        self._timeout = timeout
        self._parts: list[Collectives] = []
        if dist.is_available() and dist.is_initialized():
            ranks = dist.get_process_group_ranks(group if group is not None else dist.group.WORLD)
            self.rank, self.size = ranks.index(dist.get_rank()), len(ranks)
            self.first, self.groups = min(ranks), dist.get_world_size() // len(ranks)
            self._group = dist.new_group(ranks, timeout=timeout, use_local_synchronization=group is not None)

    def split(self, members: Sequence[int]) -> "Collectives":
        """A group of some of these ranks, given by their numbers here; only its members may call."""
        part = object.__new__(Collectives)
        part.rank, part.size = list(members).index(self.rank), len(members)
        part.bytes, part._group, part._timeout, part._parts = self.bytes, None, self._timeout, []
        part.first, part.groups = self.first, self.groups
        if self._group is not None:
            mine = [dist.get_process_group_ranks(self._group)[i] for i in members]
            part._group = dist.new_group(mine, timeout=self._timeout, use_local_synchronization=True)
        self._parts.append(part)
        return part

    def beside(self, group: dist.ProcessGroup) -> "Collectives":
        """A group of other ranks that this one belongs to; it counts into the same counters and closes with this."""
        other = Collectives(group, self._timeout)
        other.bytes = self.bytes
        self._parts.append(other)
        return other

    @property
    def device(self) -> torch.device:
        """Where a message may live whatever the gradients' device is."""
        nccl = self._group is not None and dist.get_backend(self._group) == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")

    def all_reduce_(self, x: Tensor, *, uncompressed: int = 0) -> Tensor:
        """Sum `x` over the ranks, in place; of its entries, so many are sent dense by plan."""
        if self.size > 1:
            self.bytes.uncompressed += uncompressed * x.element_size()
            self._count(x, 2 * (self.size - 1) / self.size)
            self._run(dist.all_reduce, x)
        return x

    def all_gather(self, message: Tensor) -> Tensor:
        """Every rank's message in rank order: `[n, *message.shape]`."""
        self._count(message, self.size - 1)
        return self._gather(message)

    def all_to_all(self, messages: Sequence[Tensor], received: Sequence[int]) -> list[Tensor]:
        """Send `messages[r]` (1-D, one dtype) to rank r; returns what each rank sent here, of `received[r]` entries."""
        if self.size == 1:
            return [messages[0]]
        flat = torch.cat(list(messages))
        sizes = [message.numel() for message in messages]
        self._count(flat, 1 - sizes[self.rank] / max(1, flat.numel()))
        out = flat.new_empty(sum(received))
        self._run(dist.all_to_all_single, out, flat, list(received), sizes)
        return list(torch.split(out, list(received)))

    def send(self, message: Tensor, rank: int) -> None:
        """Send a message to one rank, which must be at `receive_` for it."""
        self._count(message, 1)
        self._run(functools.partial(dist.send, group_dst=rank), message)

    def receive_(self, message: Tensor, rank: int) -> None:
        """Fill a buffer with what this rank sends."""
        self._run(functools.partial(dist.recv, group_src=rank), message)

    def broadcast_(self, message: Tensor, rank: int, *, count: bool = True) -> None:
        """Copy one rank's buffer to all; not counted where it is for agreement at start."""
        if self.rank == rank and count:
            self._count(message, self.size - 1)
        if self.size > 1:
            self._run(functools.partial(dist.broadcast, group_src=rank), message)

    def gather_bytes(self, data: bytes, device: torch.device) -> list[bytes]:
        """Every rank's byte string, of any length; for agreement at start, not counted."""
        if self.size == 1:
            return [data]
        mine = torch.tensor(list(data), dtype=torch.uint8, device=device)
        sizes = self._gather(torch.tensor([len(data)], device=device)).flatten().tolist()
        padded = mine.new_zeros(max(sizes))
        padded[: len(data)] = mine
        return [bytes(row[:size].tolist()) for row, size in zip(self._gather(padded), sizes, strict=True)]

    def fail(self, error: BaseException) -> None:
        """Tell the other ranks of an error here: leave it in the store and close all connections of this group."""
        if self._group is not None and self.size > 1 and _first_error() is None:  # later ones only follow from it
            with contextlib.suppress(RuntimeError):
                _get_default_store().set(_ERROR_KEY, f"rank {dist.get_rank()}: {type(error).__name__}: {error}")
        self.close()  # drops the last references: gloo closes its sockets and waiting ranks wake with an error

    def close(self) -> None:
        """Destroy the group and what was split off it; call it on every rank."""
        for part in self._parts:
            part.close()
        if self._group is not None and dist.is_initialized():
            dist.destroy_process_group(self._group)
        self._group = None

    def _gather(self, message: Tensor) -> Tensor:
        if self.size == 1:
            return message[None]
        gathered = message.new_empty((self.size, *message.shape))
        self._run(_all_gather_flat, gathered.view(-1), message.reshape(-1))
        return gathered

    def _count(self, buffer: Tensor, share: float) -> None:
        if self.size > 1:
            size = buffer.numel() * buffer.element_size()
            self.bytes.payload += size
            self.bytes.sent += size * share

    def _run(self, collective: Any, *args: Any) -> None:
        if self._group is None:
            raise RuntimeError("Communicator: its process group was closed by an earlier error; restart the job.")
        try:
            collective(*args, group=self._group)
        except RuntimeError as error:
            if (cause := _first_error()) is not None:
                raise RuntimeError(f"Communicator: another rank failed: {cause}") from error
            raise


def _first_error() -> str | None:
    """What the first rank that failed left in the store, which may itself be gone with the rank that hosts it."""
    with contextlib.suppress(RuntimeError):
        store = _get_default_store()
        if store.check([_ERROR_KEY]):
            return str(store.get(_ERROR_KEY).decode())
    return None
