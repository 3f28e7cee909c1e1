"""`TokenWalk`: a model that travels from rank to rank."""

import contextlib
import copy
import datetime
import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor

from gradwire.comm.collectives import Collectives
from gradwire.comm.errors import ConfigurationError
from gradwire.comm.random_walk.self_repellent import SelfRepellentWalk

_ALIGNMENT = 16  # every tensor starts where its dtype can be viewed


@final
class TokenWalk:
    """Let one model walk over the ranks of a graph; whoever holds it steps on data of its own.

        while training:  if token.here: step on this rank's data;   token.move()

    Every rank knows graph, alpha and seed, so each makes the same walk by itself and knows where the model is: the
    holder sends it to the next rank in one message, and nobody else hears anything. A rank to which the model does not
    come is through with `move` at once; it waits only when the walk brings the model to it.

    Args:
        tensors: What travels: parameters, buffers, tensors of an optimizer's state (created before the first step), of
            the same shapes and dtypes on all ranks. What they hold on the rank where the walk starts is what counts.
        walk: The walk on the ranks 0, ..., n-1 of the group; the token goes on with a copy. alpha = 0 is a plain Markov
            chain.
        group: The ranks that take part; all ranks by default. A new group of the same ranks is created.
        timeout: How long a rank waits for another; the process group's setting by default. It must cover the time for
            which the model may be away.

    Raises:
        ConfigurationError: ranks differ in walk or tensors; every rank raises it.
        ValueError: the graph has another number of nodes than there are ranks, or there is nothing to carry.

    Cost:
        A move: one message of all tensors' bytes, from one rank to one; none if the walk stays. On CUDA with NCCL it is
        enqueued without waiting for the device. Memory: one buffer of that size.

    State:
        `walk`, equal on all ranks; tensors belong to the caller. To save a run, `share()` and save the model on any
        rank, and `state_dict()`; or every rank its own tensors.

    Example:
        >>> import networkx
        >>> weight = torch.zeros(2)
        >>> token = TokenWalk([weight], SelfRepellentWalk(networkx.empty_graph(1)))
        >>> token.here
        True
        >>> token.move()

    Reference:
        Johansson, Rabi, Johansson. A Randomized Incremental Subgradient Method for Distributed Optimization in
        Networked Systems. SIAM Journal on Optimization 2009; with a self-repellent walk: Hu, Doshi, Eun. ICLR 2024.
        arXiv:2401.09665.

    Differences from the paper: nodes tell each other nothing of their visits, because all compute the whole walk.
    """

    def __init__(
        self,
        tensors: Iterable[Tensor],
        walk: SelfRepellentWalk,
        *,
        group: dist.ProcessGroup | None = None,
        timeout: datetime.timedelta | None = None,
    ) -> None:
        self.walk = copy.deepcopy(walk)
        self._tensors = [tensor.detach() for tensor in tensors]
        self._ranks = Collectives(group, timeout)
        self._compare()
        if self.walk.chain.nodes != self._ranks.size:
            raise ValueError(
                f"TokenWalk: expected a graph of {self._ranks.size} nodes, one for each rank, got "
                f"{self.walk.chain.nodes}."
            )
        if not self._tensors:
            raise ValueError("TokenWalk: expected at least one tensor to carry, got none.")
        self._views: list[Tensor] = []
        self._buffer = self._new_buffer()

    @property
    def holder(self) -> int:
        """The rank, in the group, where the model is."""
        return self.walk.node

    @property
    def here(self) -> bool:
        """Whether the model is on this rank."""
        return self.walk.node == self._ranks.rank

    @property
    def bytes_sent(self) -> float:
        """Bytes that left this rank so far."""
        return self._ranks.bytes.sent

    @torch.no_grad()
    def move(self) -> None:
        """Go on by one step of the walk; every rank calls it equally often.

        Raises:
            RuntimeError: another rank failed or is gone.
        """
        source, target = self.walk.node, self.walk.step()
        if source == target:
            return
        with self._ending_all_on_error():
            if self._ranks.rank == source:
                self._pack()
                self._ranks.send(self._buffer, target)
            elif self._ranks.rank == target:
                self._ranks.receive_(self._buffer, source)
                self._unpack()

    @torch.no_grad()
    def share(self) -> None:
        """Copy the model from its holder to all ranks; every rank calls it. The walk stays where it is."""
        with self._ending_all_on_error():
            if self.here:
                self._pack()
            self._ranks.broadcast_(self._buffer, self.holder)
            if not self.here:
                self._unpack()

    def state_dict(self) -> dict[str, Any]:
        """The walk's state, equal on all ranks; without the tensors."""
        return {"walk": self.walk.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the walk; every rank calls it with the same state, and the holder must have the tensors.

        Raises:
            CheckpointError: the saved walk was configured in another way; names both.
        """
        self.walk.load_state_dict(state_dict["walk"])

    def close(self) -> None:
        """Destroy the process group; call it on every rank."""
        self._ranks.close()

    def _compare(self) -> None:
        """Raise ConfigurationError on every rank, with the first difference, unless all ranks are alike."""
        walk = f"{self.walk!r} at node {self.walk.node} after {self.walk.steps} steps"
        layout = [f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in self._tensors]
        text = json.dumps([walk, f"{len(layout)} tensors", *layout]).encode()
        digests = self._ranks.gather_bytes(hashlib.sha256(text).digest(), self._ranks.device)
        if len(set(digests)) == 1:
            return
        first, *others = [json.loads(data) for data in self._ranks.gather_bytes(text, self._ranks.device)]
        rank, ours, theirs = next(
            (rank, ours, theirs)
            for rank, other in enumerate(others, start=1)
            for ours, theirs in zip(first, other, strict=False)
            if ours != theirs
        )
        raise ConfigurationError(f"TokenWalk: ranks differ: rank 0 has {ours}, rank {rank} has {theirs}.")

    def _new_buffer(self) -> Tensor:
        """One buffer of bytes, and a view of it for each tensor."""
        sizes = [tensor.numel() * tensor.element_size() for tensor in self._tensors]
        spans = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]
        buffer = torch.zeros(sum(spans), dtype=torch.uint8, device=self._ranks.device)
        for tensor, size, run in zip(self._tensors, sizes, torch.split(buffer, spans), strict=True):
            self._views.append(run[:size].view(tensor.dtype).view(tensor.shape))
        return buffer

    def _pack(self) -> None:
        for view, tensor in zip(self._views, self._tensors, strict=True):
            view.copy_(tensor)

    def _unpack(self) -> None:
        for view, tensor in zip(self._views, self._tensors, strict=True):
            tensor.copy_(view)

    @contextlib.contextmanager
    def _ending_all_on_error(self) -> Iterator[None]:
        """An error here ends the waiting of other ranks."""
        try:
            yield
        except BaseException as error:
            self._ranks.fail(error)
            raise
