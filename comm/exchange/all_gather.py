"""`AllGather`: every rank receives every payload."""

from collections.abc import Sequence
from typing import final

from torch import Tensor

from gradwire.comm.exchange.base import Bundle, Exchange, Merge, Outcome, check_merge, decompress_mean
from gradwire.comm.exchange.message import MessageLayout
from gradwire.compression.base import Compressor


@final
class AllGather(Exchange):
    """Gather all payloads on all ranks, decompress each in rank order, and average in float32.

    Right for sparse payloads and few ranks: what a rank receives grows with their number.

    Args:
        merge: "mean" over all ranks, or over the "contributors" of an entry, those which sent something other than zero
            there: a lone sender then counts as much as all together. For maps that look at directions (`DeMo`); the
            estimate is no longer unbiased, and feedback that tracks means (`EF21`) does not allow it.

    Cost:
        One all-gather per bucket. Sends n-1 payloads' bytes from each rank; decompresses n payloads.

    State:
        None.

    Example:
        >>> AllGather()
        AllGather()

    Reference:
        The sparse exchange of Lin, Han, Mao, Wang, Dally. Deep Gradient Compression. ICLR 2018. arXiv:1712.01887;
        contributors: Peng, Quesnelle, Kingma. DeMo: Decoupled Momentum Optimization. 2024. arXiv:2411.19870.
    """

    weighs = True

    def __init__(self, merge: Merge = "mean") -> None:
        check_merge("AllGather", merge)
        self.merge = merge

    def __repr__(self) -> str:
        return "AllGather()" if self.merge == "mean" else f"AllGather(merge={self.merge!r})"

    def check(self, compressor: Compressor) -> None:
        """Any compressor will do."""

    def mean(self, compressor: Compressor, bundles: Sequence[Bundle], bad: Tensor) -> Outcome:
        """One message to all."""
        parts = [bundle.parts for bundle in bundles]
        layout = MessageLayout(parts)
        gathered = self.ranks.all_gather(layout.pack(parts, bad))
        means = [
            decompress_mean(compressor, received, bundle.matrix, bundle.keys, self.merge, self.weights)
            for received, bundle in zip(layout.unpack(gathered), bundles, strict=True)
        ]
        return Outcome(means, layout.bad(gathered), [{} for _ in bundles])
