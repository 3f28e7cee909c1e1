"""`Collectives`: one process group, its counters of real bytes, and errors that reach every rank.

All algorithms of this package speak to other ranks through these few blocking calls, issued in program order by one
thread. Anything that a backend refuses (float8, 16-bit integers) travels as uint8.
"""

import contextlib
import datetime
import functools
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_store

# torch 2.13 renamed the flat collectives; the old names warn there and are the only ones before.
_all_gather_flat: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_flat: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_ERROR_KEY = "gradwire/error"
_HERE_KEY = "gradwire/here/"
_NO_ANSWER = re.compile("closed by peer|reset by peer|broken pipe|pair closure|timed out|refused", re.IGNORECASE)
_ROLL_CALL_S = 5.0  # how far apart ranks may notice that one is missing


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
            self._timeout = timeout or timeout_of(dist.group.WORLD if group is None else group)
            self._group = dist.new_group(ranks, timeout=self._timeout, use_local_synchronization=group is not None)

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
        if self._group is not None and self.size > 1:
            _tell(f"another rank failed: rank {dist.get_rank()}: {type(error).__name__}: {error}")
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
            no_answer = _NO_ANSWER.search(str(error)) is not None
            if no_answer and _first_error() is None:
                self._call_the_roll(late="timed out" in str(error).lower())
            if (cause := _first_error()) is not None:
                raise RuntimeError(f"Communicator: {cause}") from error
            if no_answer:
                raise RuntimeError(
                    "Communicator: a rank left while others were waiting, and so did the store, perhaps with it. "
                    "Restart from the last checkpoint."
                ) from error
            raise

    def _call_the_roll(self, *, late: bool) -> None:
        """Find out which ranks do not answer, and tell all.

        Every rank that notices something leaves a sign in the store, and closes its connections, which wakes those
        that wait for it; ranks without a sign are those that do not answer. A rank that misses none of its own group
        waits for others to tell.
        """
        if self._group is None:
            return
        ranks = dist.get_process_group_ranks(self._group)
        self.close()
        start, silent = time.monotonic(), ranks
        with contextlib.suppress(RuntimeError):
            store = _get_default_store()
            store.set(f"{_HERE_KEY}{dist.get_rank()}", "")
            while time.monotonic() < start + _ROLL_CALL_S * (1 if silent else 2):
                if _first_error() is not None:
                    return
                time.sleep(0.05)
                silent = [rank for rank in silent if not store.check([f"{_HERE_KEY}{rank}"])]
            names = " and ".join(f"rank {rank}" for rank in silent)
            if late and silent:
                _tell(f"{names} did not come within {self._timeout}, the timeout. Restart from the last checkpoint.")
            elif silent:
                _tell(f"{names} left, or gave no sign, while others were waiting. Restart from the last checkpoint.")


def _tell(what: str) -> None:
    """Leave what went wrong in the store, for all; later errors only follow from the first."""
    if _first_error() is None:
        with contextlib.suppress(RuntimeError):
            _get_default_store().set(_ERROR_KEY, what)


def timeout_of(group: Any) -> datetime.timedelta | None:
    """How long the collectives of a group wait; a new group has torch's default instead. None if it cannot be read."""
    for device in group._device_types:
        timeout = getattr(getattr(group._get_backend(device), "options", None), "_timeout", None)
        if isinstance(timeout, datetime.timedelta):
            return timeout
    return None


def _first_error() -> str | None:
    """What the first rank that failed has left in the store, which may be gone with the rank that hosts it."""
    with contextlib.suppress(RuntimeError):
        store = _get_default_store()
        if store.check([_ERROR_KEY]):
            return str(store.get(_ERROR_KEY).decode())
    return None
