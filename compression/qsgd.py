"""`QSGD`: random rounding to evenly spaced shares of a bucket's 2-norm."""

from dataclasses import dataclass
from typing import ClassVar, final

from gradwire.compression.dithering import Dithering, Norm, Spacing


@final
@dataclass(frozen=True)
class QSGD(Dithering):
    """Round each entry to one of 2s + 1 evenly spaced levels between minus and plus the 2-norm of its bucket.

        C(x)_i = q round(x_i / q),  q = ||x||_2 / s,  the norm over the bucket of i

    Rounding is stochastic: up or down with expectation x_i / q. Most entries are far below the norm, so few levels
    leave most of them zero, which the paper's variable codes turn into fewer bits. At codes of one length
    `BlockQuantize(stochastic=True)`, which scales by the maximum, has the smaller variance.

    Args:
        levels: s, levels of one sign beside zero, 1..32,767. 1, 4..7 and 64..127 (1.6, 4 and 8 bits) are packed
            fastest.
        bucket: Entries that share a norm, >= 1.

    Shapes:
        x: any, cut into rows of `bucket`. Payload: codes `[rows, ceil(bucket b / 8)]` uint8 with b = ceil(log2(2s + 1))
        bits, a code being its level plus s, or five codes to a byte if s = 1; scale q `[rows, 1]` float32.

    Cost:
        b/8 + 4/bucket bytes per entry (1/5 + 4/bucket if s = 1); one pass for the norm, one for the codes.

    State:
        None.

    Example:
        >>> qsgd = QSGD(levels=5, bucket=2)
        >>> qsgd.decompress(qsgd.compress(torch.tensor([3.0, -4.0])))
        tensor([ 3., -4.])
        >>> round(QSGD(levels=7, bucket=512).omega(10**6), 3)
        2.232

    Reference:
        D. Alistarh, D. Grubic, J. Li, R. Tomioka, M. Vojnovic, "QSGD: Communication-Efficient SGD via Gradient
        Quantization and Encoding", 2016, arXiv:1610.02132, section 3.

    Differences from the paper:
        Codes of one length instead of Elias codes, so that the size of a payload is known before its values are. The
        bound `omega` is smaller than the paper's min(d / s^2, sqrt(d) / s).
    """

    levels: int = 7
    bucket: int = 512
    norm: ClassVar[Norm] = 2
    spacing: ClassVar[Spacing] = "linear"
