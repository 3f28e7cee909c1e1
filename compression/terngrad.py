"""`TernGrad`: minus, zero or plus the bucket's largest magnitude, five entries to a byte."""

import math
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from gradwire.compression.dithering import Dithering, Norm, Spacing


@final
@dataclass(frozen=True)
class TernGrad(Dithering):
    """Send the sign of an entry with the probability of its share of the bucket's largest magnitude, else zero.

        C(x)_i = m sign(x_i) b_i,  m = max_j |x_j|,  P(b_i = 1) = |x_i| / m,  j in the bucket of i

    Without clipping it is unbiased, and what `BlockQuantize(bits=2, stochastic=True)` sends in 2 bits. Clipping at
    `clip` standard deviations keeps one large entry from silencing the others, at the price of a bias.

    Args:
        bucket: Entries that share a scale, >= 1. Multiples of 5 waste nothing.
        clip: Clip entries to this many standard deviations of their bucket before, > 0; None to leave them. The paper
            takes 2.5. A clipped TernGrad has neither an `omega` nor a contraction.

    Shapes:
        x: any, cut into rows of `bucket`. Payload: codes `[rows, ceil(bucket / 5)]` uint8; scale m `[rows, 1]` float32.

    Cost:
        1/5 + 4/bucket bytes per entry; one pass for the maximum, one for the codes, and one before to clip.

    State:
        None.

    Example:
        >>> terngrad = TernGrad(bucket=5)
        >>> terngrad.decompress(terngrad.compress(torch.tensor([2.0, -2.0, 0.0, 0.0, 2.0])))
        tensor([ 2., -2.,  0.,  0.,  2.])
        >>> terngrad.payload_bytes((1000,), torch.float32)
        1000

    Reference:
        W. Wen, C. Xu, F. Yan, C. Wu, Y. Wang, Y. Chen, H. Li, "TernGrad: Ternary Gradients to Reduce Communication in
        Distributed Deep Learning", 2017, arXiv:1705.07878, algorithm 1.

    Differences from the paper:
        Buckets instead of layers; each rank keeps its own scale, where the paper shares the largest. The standard
        deviation is taken about zero, so that a bucket of equal entries is not clipped to nothing; the padding of a
        tensor's last bucket counts in it.
    """

    bucket: int = 512
    clip: float | None = None
    levels: ClassVar[int] = 1
    norm: ClassVar[Norm] = "inf"
    spacing: ClassVar[Spacing] = "linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clip is not None and not 0 < self.clip < math.inf:
            raise ValueError(f"TernGrad: expected a finite clip > 0 or None, got clip={self.clip!r}.")

    def _round(self, x: Tensor, keys: Tensor | None) -> tuple[Tensor, Tensor]:
        """Clip first."""
        if self.clip is not None:
            # In float64, where squares neither overflow nor vanish.
            norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float64)
            limit = (norm * (self.clip / math.sqrt(x.shape[1]))).float()
            x = torch.clamp(x, -limit, limit)
        return super()._round(x, keys)

    def omega(self, numel: int) -> float | None:
        """(sqrt(d) - 1) / 2 for d = min(bucket, numel), attained; None if clipped, which is biased."""
        return None if self.clip is not None else super().omega(numel)
