"""`TorchrunEngine`: the clients of a cohort spread over the processes that torchrun started."""

import json
import logging
import os
from collections.abc import Sequence
from typing import Literal, Self, final

import torch
import torch.distributed as dist
from torch import Tensor

from gradwire.comm.collectives import Collectives
from gradwire.comm.errors import ConfigurationError

_log = logging.getLogger("gradwire")


@final
class TorchrunEngine:
    """The same script under torchrun, on one or many nodes: every rank is the server, and has its share of the cohort.

        cohort, the same on all ranks --> dealt by load --> local training --> one all-reduce of all sums --> x

    Clients are dealt out the longest first, each to the rank with the least to do so far. Every client's vectors have
    an owner, rank `client % world_size`; where a client trains elsewhere they travel there and back, in one all-to-all
    before and one after the round. Batches and draws are functions of (seed, round, client), so that a client does the
    same wherever it runs. The result is that of one process: sums of float32 messages are taken in float64, where the
    order of adding them up matters to about one entry in 2^29, and numbers beside them are added up in cohort order.
    Since clients trained at once end equal up to rounding only, `vectorize="auto"` trains them one by one here.
    Processes compared must have the same number of threads: some of torch's own kernels (BatchNorm) round by it.

    Args:
        backend: "gloo" or "nccl", if this is to initialise `torch.distributed`; by default NCCL where every process of
            the node can have a GPU of its own, which becomes the current device, else gloo.
        threads: Intra-op threads of this process, >= 1; None to leave them. Processes that share cores fight over them
            with more.
        placement: "load" as above; or "owner": every client trains where its vectors lie, and nothing travels, but
            work is as even as chance has it.
        exact: Gather messages and add them up in the order of the cohort, so that any number of ranks gives the same
            bits in every dtype: at the cost of the cohort's messages in every process's memory.

    Cost:
        8 bytes per parameter and message in one all-reduce a round; for aggregators that see single messages, and with
        `exact`, the cohort's messages to every rank. Without torchrun, as `SerialEngine`.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> engine = TorchrunEngine(threads=None)
        >>> engine.world_size, engine.deal([5.0, 1.0, 4.0])
        (1, [0, 0, 0])
    """

    def __init__(
        self,
        *,
        backend: Literal["gloo", "nccl"] | None = None,
        threads: int | None = 1,
        placement: Literal["load", "owner"] = "load",
        exact: bool = False,
    ) -> None:
        if threads is not None and not threads >= 1:
            raise ValueError(f"TorchrunEngine: expected threads >= 1, got threads={threads}.")
        if placement not in ("load", "owner"):
            raise ValueError(f'TorchrunEngine: expected placement "load" or "owner", got {placement!r}.')
        self.placement, self.exact = placement, exact
        self._made = False
        if threads is not None:
            torch.set_num_threads(threads)
        if not dist.is_initialized() and "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            each = torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
            chosen = backend or ("nccl" if each else "gloo")
            if chosen == "nccl":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group(chosen)
            self._made = True
        self._collectives = Collectives()
        self.rank, self.world_size = self._collectives.rank, self._collectives.size
        if threads is not None and self.rank == 0:
            _log.info("TorchrunEngine: %d ranks with %d intra-op thread(s) each.", self.world_size, threads)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if error is None:
            self.close()

    def deal(self, loads: Sequence[float], owners: Sequence[int] | None = None) -> list[int]:
        """The rank that each client runs on.

        Args:
            loads: Work of each client of the cohort, >= 0.
            owners: Where its vectors lie, if it has any: it stays there if that is no more than the rank's fair share.
        """
        if owners is not None and self.placement == "owner":
            return list(owners)
        fair = sum(loads) / self.world_size
        given, ranks = [0.0] * self.world_size, [0] * len(loads)
        for position in sorted(range(len(loads)), key=lambda at: (-loads[at], at)):
            rank = min(range(self.world_size), key=lambda r: (given[r], r))
            if owners is not None and given[owners[position]] + loads[position] <= fair:
                rank = owners[position]
            ranks[position] = rank
            given[rank] += loads[position]
        return ranks

    def agree(self, facts: dict[str, str]) -> None:
        """Raise ConfigurationError on all ranks, with what differs, if a fact is not the same on all."""
        everyone = [json.loads(text) for text in self.gather_text(json.dumps(facts))]
        for rank, other in enumerate(everyone):
            for name in [*everyone[0], *(name for name in other if name not in everyone[0])]:
                first, second = everyone[0].get(name, "none"), other.get(name, "none")
                if first != second:
                    raise ConfigurationError(
                        f"TorchrunEngine: expected the same simulation on all ranks, got {name}={first} on rank 0 and "
                        f"{second} on rank {rank}."
                    )

    def broadcast_(self, tensor: Tensor) -> None:
        """Copy the first rank's values to all."""
        if self.world_size > 1 and tensor.numel():
            message = tensor.to(self._collectives.device).contiguous().view(-1).view(torch.uint8)
            self._collectives.broadcast_(message, 0, count=False)
            tensor.copy_(message.view(tensor.dtype).view(tensor.shape))

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Add up float64 tensors over ranks, in place, in one all-reduce."""
        if self.world_size == 1:
            return
        flat = torch.cat([tensor.to(self._collectives.device).view(-1) for tensor in tensors])
        self._collectives.all_reduce_(flat)
        for tensor, total in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view(tensor.shape))

    def gather(self, rows: Tensor, counts: Sequence[int]) -> list[Tensor]:
        """Every rank's rows `[counts[rank], width]`, in the order of ranks."""
        if self.world_size == 1:
            return [rows]
        found = []
        for rank, count in enumerate(counts):
            mine = rank == self.rank
            shape = (count, rows.shape[1])
            message = (rows if mine else rows.new_empty(shape)).to(self._collectives.device).contiguous()
            if message.numel():
                self._collectives.broadcast_(message, rank)
            found.append(rows if mine else message.to(rows.device))
        return found

    def gather_text(self, text: str) -> list[str]:
        """Every rank's text, in the order of ranks."""
        gathered = self._collectives.gather_bytes(text.encode(), self._collectives.device)
        return [data.decode() for data in gathered]

    def exchange(self, rows: Sequence[Tensor], received: Sequence[int]) -> list[Tensor]:
        """Send `rows[r]`, 1-D, to rank r; returns what each rank sent here, of `received[r]` entries, on the host."""
        device = self._collectives.device
        found = self._collectives.all_to_all([row.to(device) for row in rows], received)
        return [row.to("cpu") for row in found]

    def close(self) -> None:
        """Wait for the others and leave; if this has initialised `torch.distributed`, destroy its process group."""
        if self.world_size > 1 and dist.is_initialized():
            dist.barrier()
        self._collectives.close()
        if self._made and dist.is_initialized():
            dist.destroy_process_group()
