"""`DAREx`: drop entries at random and rescale the rest by a number of one's choice."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

from gradwire.compression.dare import RandomDrop


@final
@dataclass(frozen=True)
class DAREx(RandomDrop):
    """Drop every entry with probability `drop`, on each rank for itself, and multiply the rest by `rescale`.

        C(x)_i = s m_i x_i,   m_i ~ Bernoulli(1 - drop),   1 <= s <= 1 / (1 - drop)

    The greatest s is `DARE`'s, whose mean is x and whose error grows without bound as drop goes to 1. s = 1 has the
    least mean square error and contracts, which error feedback needs. What a model's quality asks lies between: `tuned`
    looks for it.

    Args:
        drop: Probability that an entry is dropped, 0 <= drop < 1.
        rescale: s, in 1..1 / (1 - drop).
        chunk: Entries of a chunk, 2..65,536. A tensor's last chunk is padded with zeros.

    Shapes:
        As `DARE`.

    Cost:
        As `DARE`.

    State:
        None.

    Example:
        >>> change = torch.linspace(-1, 1, 8)
        >>> def score(darex: DAREx) -> float:
        ...     return -float((darex.decompress(darex.compress(change)) - change).square().sum())
        >>> DAREx.tuned(score, drop=0.75, chunk=8)
        DAREx(drop=0.75, rescale=1.0, chunk=8)

    Reference:
        Deng, Zhao, Vakilian, Chen, Li, Thrampoulidis. DARE the Extreme: Revisiting Delta-Parameter Pruning for
        Fine-Tuned Models. ICLR 2025. arXiv:2410.09344 (DAREx-q with one rescale for all layers).

    Differences from the paper:
        Rows have a fixed number of slots, as in `DARE`. The paper's rescale per layer is one compressor per layer.
    """

    drop: float = 0.9
    rescale: float = 1.0
    chunk: int = 4096

    def __post_init__(self) -> None:
        super().__post_init__()
        greatest = 1 / (1 - self.drop)
        if not 1 <= self.rescale <= greatest * (1 + 1e-12):
            raise ValueError(f"DAREx: expected 1 <= rescale <= {greatest:.6g}, got rescale={self.rescale!r}.")

    @classmethod
    def tuned(
        cls,
        score: Callable[["DAREx"], float],
        *,
        drop: float = 0.9,
        chunk: int = 4096,
        rescales: Sequence[float] | None = None,
    ) -> "DAREx":
        """The compressor with the best score; of equal ones, the first.

        Args:
            score: What a compressor is worth, more is better: say, minus the loss on validation data of a model whose
                change went through it.
            drop: Probability that an entry is dropped.
            chunk: Entries of a chunk.
            rescales: Candidates; nine from 1 to 1 / (1 - drop), in equal ratios, if None.

        Raises:
            ValueError: there is no candidate, or one scores NaN.
        """
        if rescales is None:
            rescales = [(1 - drop) ** (-i / 8) for i in range(9)]
        if not rescales:
            raise ValueError("DAREx.tuned: expected at least one of rescales, got none.")
        candidates = [cls(drop, rescale, chunk) for rescale in rescales]
        scores = [score(candidate) for candidate in candidates]
        if any(math.isnan(value) for value in scores):
            raise ValueError(f"DAREx.tuned: expected numbers from score, got {scores} for rescales {list(rescales)}.")
        return candidates[scores.index(max(scores))]

    def scale(self, width: int) -> float:
        """As given."""
        return self.rescale

    def contraction(self, numel: int) -> float | None:
        """For s < 2 delta = s pi (2 - s), pi the share that is sent: E (s m_i - 1)^2 = 1 - 2 s pi + s^2 pi."""
        delta = self.rescale * self.share(numel) * (2 - self.rescale)
        return delta if delta > 0 else None

    def omega(self, numel: int) -> float | None:
        """Biased unless nothing is dropped."""
        return 0.0 if self.drop == 0 else None
