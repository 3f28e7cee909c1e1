"""`Gossip`: every rank averages with its neighbours on a graph alone."""

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor

from gradwire.comm.collectives import Collectives
from gradwire.comm.encoder import is_bad
from gradwire.comm.exchange.base import Bundle, Exchange, Outcome, decompress_mean
from gradwire.comm.exchange.message import MessageLayout
from gradwire.comm.graph import describe, metropolis_weights, neighbours
from gradwire.comm.row_matrix import RowMatrix
from gradwire.compression.base import Compressor


@final
class Gossip(Exchange):
    """Send payloads to the neighbours on a graph of ranks, and average what they and this rank sent.

        mean_i = sum_j W_ij decompress(payload_j),  W_ij = 1 / (1 + max(d_i, d_j)) for neighbours, W_ii = 1 - their sum

    Ranks do not end with the same mean: what they hold draws closer from step to step, by a factor of the second
    largest |eigenvalue| of W. So it is not for gradients of one model (`attach` refuses it) but for tensors that ranks
    bring to consensus: `mixing.choco_gossip_`. What the plan sends dense is all-reduced; let it send nothing so, with
    `Plan(min_ndim=0, min_numel=0)`.

    Args:
        graph: A `networkx.Graph` with as many nodes as ranks, 0, ..., n-1, or a symmetric adjacency matrix; connected.

    Cost:
        One all-to-all per bucket, in which only neighbours have something for each other, and one all-reduce of 4 bytes
        for the flag. Sends d payloads' bytes from a rank of degree d, however many ranks there are; decompresses d + 1.

    State:
        None.

    Example:
        >>> import networkx
        >>> Gossip(networkx.cycle_graph(4))
        Gossip(nodes=4, edges=4, fingerprint=004b591c)

    Reference:
        Boyd, Ghosh, Prabhakar, Shah. Randomized Gossip Algorithms. IEEE Transactions on Information Theory 2006; the
        weights: Xiao, Boyd, Kim. Distributed Average Consensus with Least-Mean-Square Deviation. JPDC 2007.
    """

    consensus = False

    def __init__(self, graph: Any) -> None:
        self._neighbours = neighbours(graph, "Gossip")
        self.mixing = metropolis_weights(self._neighbours)
        """W, `[n, n]`."""

    def __repr__(self) -> str:
        return f"Gossip({describe(self._neighbours)})"

    def connect(self, ranks: Collectives, *, feedback: bool) -> None:
        """The graph must have a node for each rank."""
        if ranks.size != len(self._neighbours):
            raise ValueError(
                f"Gossip: expected a graph of {ranks.size} nodes, one for each rank, got {len(self._neighbours)}."
            )
        super().connect(ranks, feedback=feedback)

    def check(self, compressor: Compressor) -> None:
        """Any compressor will do."""

    def mean(self, compressor: Compressor, bundles: Sequence[Bundle], bad: Tensor) -> Outcome:
        """One message to each neighbour; decompress in rank order."""
        rank, near = self.ranks.rank, self._neighbours[self.ranks.rank].tolist()
        parts = [bundle.parts for bundle in bundles]
        layout = MessageLayout(parts)
        message = layout.pack(parts, bad)
        to_send = [message if other in near else message[:0] for other in range(self.ranks.size)]
        arrived = self.ranks.all_to_all(to_send, [len(part) for part in to_send])
        senders = sorted([*near, rank])
        received = torch.stack([message if sender == rank else arrived[sender] for sender in senders])
        weights = (len(senders) * self.mixing[rank, senders]).tolist()
        means = [
            decompress_mean(compressor, sent, bundle.matrix, bundle.keys, weights=weights)
            for sent, bundle in zip(layout.unpack(received), bundles, strict=True)
        ]
        return Outcome(means, layout.bad(received), [{} for _ in bundles])

    def leave(self, matrices: Sequence[RowMatrix], estimates: list[Tensor], bad: Tensor) -> tuple[list[Tensor], Tensor]:
        """All ranks learn whether one met what is not finite, which neighbours alone would."""
        for estimate in estimates:
            bad = bad | is_bad(estimate)
        return estimates, self.ranks.all_reduce_(bad.to(torch.float32).view(1))[0] != 0
