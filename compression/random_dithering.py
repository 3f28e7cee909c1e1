"""`RandomDithering`: random rounding to even or doubling shares of a bucket's p-norm."""

from dataclasses import dataclass
from typing import final

from gradwire.compression.dithering import Dithering, Norm, Spacing


@final
@dataclass(frozen=True)
class RandomDithering(Dithering):
    """Round each entry to one of 2s + 1 levels between minus and plus a norm of its bucket, without bias.

        C(x)_i = ||x||_p sign(x_i) l_i,  l_i one of the two levels around |x_i| / ||x||_p,  E l_i = |x_i| / ||x||_p
        linear:  0, 1/s, 2/s, ..., 1;    natural:  0, 2^(1-s), ..., 1/4, 1/2, 1

    Natural levels are as dense as entries are small: 7 of them, 4 bits, have the first level of 64 even ones.
    `QSGD` is the case of norm 2 and linear levels, `BlockQuantize` with stochastic rounding that of norm "inf".

    Args:
        levels: s, levels of one sign beside zero, 1..127, or 1..32,767 if linear. 1, 4..7 and 64..127 (1.6, 4 and 8
            bits) are packed fastest.
        norm: p: 1, 2 or "inf". The larger p, the smaller the variance.
        spacing: "natural" or "linear".
        bucket: Entries that share a norm, >= 1. The norm should be a float32.

    Shapes:
        x: any, cut into rows of `bucket`. Payload: codes `[rows, ceil(bucket b / 8)]` uint8 with b = ceil(log2(2s + 1))
        bits, a code being s plus or minus the number of its level, or five codes to a byte if s = 1; scale `[rows, 1]`
        float32, the norm, or norm / s if linear.

    Cost:
        b/8 + 4/bucket bytes per entry (1/5 + 4/bucket if s = 1); one pass for the norm, one for the codes.

    State:
        None.

    Example:
        >>> dithering = RandomDithering(levels=3, norm="inf", bucket=4)
        >>> dithering.decompress(dithering.compress(torch.tensor([8.0, -4.0, 2.0, 0.0])))
        tensor([ 8., -4.,  2.,  0.])
        >>> [round(RandomDithering(norm=2, spacing=spacing).omega(10**6), 3) for spacing in ("natural", "linear")]
        [0.153, 2.232]

    Reference:
        S. Horvath, C.-Y. Ho, L. Horvath, A. N. Sahu, M. Canini, P. Richtarik, "Natural Compression for Distributed Deep
        Learning", 2019, arXiv:1905.10988, definitions of general and natural dithering.

    Differences from the paper:
        Codes of one length. The bound `omega` is smaller than the paper's
        1/8 + v min(1, v), v = d^(1/min(p,2)) 2^(1-s), for natural dithering.
    """

    levels: int = 7
    norm: Norm = "inf"
    spacing: Spacing = "natural"
    bucket: int = 512
