"""`AllReduce`: payloads are added on their way."""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from gradwire.comm.exchange.base import Bundle, Exchange, Outcome
from gradwire.compression.base import Compressor


@final
class AllReduce(Exchange):
    """Add the payloads of all ranks in the network, then decompress the sum.

    Only for compressors whose payloads may be added (`reduction == "sum"`). The volume does not grow with the number
    of ranks. The sum is taken in the payload's dtype: rounding inside a bf16 or fp16 sum is outside of what error
    feedback can see; use `AllGather` or `TwoPhase`, which add in float32, where that matters.

    Cost:
        One all-reduce per bucket and payload dtype. Sends 2(n-1)/n payloads' bytes; decompresses one.

    State:
        None.

    Example:
        >>> AllReduce()
        AllReduce()

    Reference:
        Patarasuk, Yuan. Bandwidth optimal all-reduce algorithms for clusters of workstations. JPDC 2009.
    """

    def __repr__(self) -> str:
        return "AllReduce()"

    def check(self, compressor: Compressor) -> None:
        """Payloads must be addable."""
        if compressor.reduction != "sum":
            raise ValueError(
                f"AllReduce: expected a compressor whose payloads may be added, got {compressor!r}. "
                "Use AllGather() or TwoPhase()."
            )

    def mean(self, compressor: Compressor, bundles: Sequence[Bundle], bad: Tensor) -> Outcome:
        """Flatten the parts of equal dtype with the flag behind them, and add."""
        sums: list[list[Tensor]] = [list(bundle.parts) for bundle in bundles]
        any_bad = bad
        for dtype in dict.fromkeys(part.dtype for parts in sums for part in parts):
            places = [(i, j) for i, parts in enumerate(sums) for j, part in enumerate(parts) if part.dtype == dtype]
            flat = torch.cat([sums[i][j].reshape(-1) for i, j in places] + [bad.to(dtype).view(1)])
            sizes = [sums[i][j].numel() for i, j in places] + [1]
            runs = torch.split(self.ranks.all_reduce_(flat), sizes)
            for (i, j), run in zip(places, runs[:-1], strict=True):
                sums[i][j] = run.view(sums[i][j].shape)
            any_bad = any_bad | (runs[-1] != 0).squeeze(0)
        means = [
            compressor.decompress_rows(tuple(parts), bundle.matrix.width, bundle.keys).div_(self.ranks.size)
            for parts, bundle in zip(sums, bundles, strict=True)
        ]
        return Outcome(means, any_bad, [{} for _ in bundles])
