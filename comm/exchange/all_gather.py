"""`AllGather`: every rank receives every payload."""

from collections.abc import Sequence
from typing import final

from torch import Tensor

from gradwire.comm.exchange.base import Bundle, Exchange, Outcome, decompress_mean
from gradwire.comm.exchange.message import MessageLayout
from gradwire.compression.base import Compressor


@final
class AllGather(Exchange):
    """Gather all payloads on all ranks, decompress each in rank order, and average in float32.

    Right for sparse payloads and few ranks: what a rank receives grows with their number.

    Cost:
        One all-gather per bucket. Sends n-1 payloads' bytes from each rank; decompresses n payloads.

    State:
        None.

    Example:
        >>> AllGather()
        AllGather()

    Reference:
        The sparse exchange of Lin, Han, Mao, Wang, Dally. Deep Gradient Compression. ICLR 2018. arXiv:1712.01887.
    """

    def __repr__(self) -> str:
        return "AllGather()"

    def check(self, compressor: Compressor) -> None:
        """Any compressor will do."""

    def mean(self, compressor: Compressor, bundles: Sequence[Bundle], bad: Tensor) -> Outcome:
        """One message to all."""
        parts = [bundle.parts for bundle in bundles]
        layout = MessageLayout(parts)
        gathered = self.ranks.all_gather(layout.pack(parts, bad))
        means = [
            decompress_mean(compressor, received, bundle.matrix.width, bundle.keys)
            for received, bundle in zip(layout.unpack(gathered), bundles, strict=True)
        ]
        return Outcome(means, layout.bad(gathered), [{} for _ in bundles])
