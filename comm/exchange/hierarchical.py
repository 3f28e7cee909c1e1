"""`Hierarchical`: dense among close ranks, compressed between groups of them."""

from collections.abc import Sequence
from itertools import pairwise
from typing import final

import torch
from torch import Tensor

from gradwire.comm.collectives import Collectives
from gradwire.comm.exchange.base import Bundle, Exchange, Outcome
from gradwire.comm.feedback.base import StateTensor
from gradwire.comm.row_matrix import RowMatrix
from gradwire.compression.base import Compressor


@final
class Hierarchical(Exchange):
    """Average densely inside a node, then exchange each rank's share of the rows, compressed, across nodes.

        enter:  rank l of a node receives shard l of the rows from its node and averages it in float32
        across: the l-th ranks of all nodes exchange their compressed shards
        leave:  every node gathers its ranks' shards

    Compression work, residual memory and the number of payloads all shrink by the size of a node, and averaging inside
    lowers the noise before a biased compressor sees it. Do not compress inside a node's fast links.

    Args:
        inside: Ranks of one node, >= 1, a divisor of the world size; consecutive ranks form a node, as torchrun
            numbers them.
        across: Exchange between nodes: `AllReduce`, `AllGather` or `TwoPhase`.

    Cost:
        Inside: one all-to-all and one all-gather of uncompressed rows. Across: `across` on 1/inside of the rows.

    State:
        Feedback state of the rank's own rows only, 1/inside of the whole, and that of `across`.

    Example:
        >>> from gradwire.comm.exchange.all_gather import AllGather
        >>> Hierarchical(inside=8, across=AllGather())
        Hierarchical(inside=8, across=AllGather())

    Reference:
        The topology of Wang et al. ZeRO++. 2023. arXiv:2306.10209, section 3.3, with any compressor and feedback.
    """

    def __init__(self, inside: int, across: Exchange) -> None:
        if inside < 1:
            raise ValueError(f"Hierarchical: expected inside >= 1, got inside={inside}.")
        if across.workers != 1 or not across.consensus or isinstance(across, Hierarchical):
            raise ValueError(f"Hierarchical: expected across to be AllReduce, AllGather or TwoPhase, got {across!r}.")
        self.inside = inside
        self.across = across
        self.second, self.merge = across.second, across.merge
        self.compresses_twice = across.compresses_twice

    def __repr__(self) -> str:
        return f"Hierarchical(inside={self.inside}, across={self.across!r})"

    def connect(self, ranks: Collectives, *, feedback: bool) -> None:
        """Make the groups inside nodes and across them."""
        super().connect(ranks, feedback=feedback)
        if ranks.size % self.inside:
            raise ValueError(
                f"Hierarchical: expected inside to divide the world size {ranks.size}, got inside={self.inside}."
            )
        node, local = divmod(ranks.rank, self.inside)
        self._node = ranks.split(range(node * self.inside, (node + 1) * self.inside))
        self._peers = ranks.split(range(local, ranks.size, self.inside))
        self.across.connect(self._peers, feedback=feedback)

    @property
    def shards(self) -> int:
        """One shard per rank of a node, dealt again if `across` deals rows to owners."""
        return self.inside * self.across.shards

    @property
    def state(self) -> tuple[StateTensor, ...]:
        """That of `across`."""
        return self.across.state

    def held(self, matrix: RowMatrix) -> RowMatrix:
        """The rows of this rank's place in the node."""
        return self._shard(matrix, self._node.rank)

    def owned(self, held: RowMatrix) -> RowMatrix:
        """As `across` says."""
        return self.across.owned(held)

    def check(self, compressor: Compressor) -> None:
        """As `across` says."""
        self.across.check(compressor)

    def enter(self, matrix: RowMatrix, x: Tensor) -> Tensor:
        """Reduce-scatter within the node, in float32 and rank order."""
        bounds = [bound * matrix.width for bound in matrix.bounds[:: self.across.shards]]
        messages = [x.view(-1)[start:stop] for start, stop in pairwise(bounds)]
        mine = messages[self._node.rank].numel()
        total, *others = self._node.all_to_all(messages, [mine] * self.inside)
        for other in others:
            total = total + other
        return (total / self.inside).view(-1, matrix.width)

    def mean(self, compressor: Compressor, bundles: Sequence[Bundle], bad: Tensor) -> Outcome:
        """Across nodes."""
        return self.across.mean(compressor, bundles, bad)

    def dense_mean(self, held: RowMatrix, x: Tensor, bad: Tensor) -> tuple[Tensor, Tensor]:
        """Across nodes."""
        return self.across.dense_mean(held, x, bad)

    def leave(self, matrices: Sequence[RowMatrix], estimates: list[Tensor], bad: Tensor) -> tuple[list[Tensor], Tensor]:
        """All-gather within the node, the flag behind the rows."""
        whole = []
        for matrix, estimate in zip(matrices, estimates, strict=True):
            message = torch.cat([estimate.reshape(-1), bad.to(estimate.dtype).view(1)])
            sizes = [self._shard(matrix, rank).rows * matrix.width + 1 for rank in range(self.inside)]
            received = self._node.all_to_all([message] * self.inside, sizes)
            bad = torch.stack([run[-1] for run in received]).any()
            whole.append(torch.cat([run[:-1] for run in received]).view(-1, matrix.width))
        return whole, bad

    def _shard(self, matrix: RowMatrix, rank: int) -> RowMatrix:
        return matrix.owners(rank * self.across.shards, (rank + 1) * self.across.shards)
