"""`ChunkTopK`: keep the largest entries of every chunk."""

from dataclasses import dataclass
from typing import final

import torch

from gradwire.compression.checks import check_positive
from gradwire.compression.topk import RowTopK


@final
@dataclass(frozen=True)
class ChunkTopK(RowTopK):
    """Keep the k entries of largest magnitude in every chunk of a tensor: the default sparsifier.

        C(x)_i = x_i if |x_i| is among the k largest of its chunk, else 0

    Chunks are chosen and sent on their own, so a position costs ceil(log2 chunk) bits (12 for 4096, 10 for 1024, 8 for
    256, 7 for 128), all chunks are selected at once, and each may go to another rank.

    Args:
        k: Entries kept in a chunk, 1 <= k <= chunk.
        chunk: Entries of a chunk, 2..65,536. A tensor's last chunk is padded with zeros. Multiples of 16 are fastest.

    Shapes:
        x: any, cut into rows of `chunk` entries. Payload: values `[rows, k]` of x's dtype; indices
        `[rows, ceil(k ceil(log2 chunk) / 8)]` uint8.

    Cost:
        `k itemsize + k ceil(log2 chunk) / 8` bytes a chunk: at the defaults and float32, 1/93 of the input. About two
        passes over memory on the CPU, and a selection among 768 of 4096 entries.

    State:
        None.

    Example:
        >>> chunk_topk = ChunkTopK(k=1, chunk=2)
        >>> chunk_topk.decompress(chunk_topk.compress(torch.tensor([1.0, -3.0, 0.5, 0.2])))
        tensor([ 0.0000, -3.0000,  0.5000,  0.0000])

    Reference:
        D. Alistarh, T. Hoefler, M. Johansson, S. Khirirat, N. Konstantinov, C. Renggli, "The Convergence of Sparsified
        Gradient Methods", 2018, arXiv:1809.10505.

    Differences from the paper:
        The k largest of each chunk, not of the whole gradient.
    """

    k: int = 32
    chunk: int = 4096

    def __post_init__(self) -> None:
        check_positive("ChunkTopK", "k", self.k)
        check_positive("ChunkTopK", "chunk", self.chunk)
        if not 2 <= self.chunk <= 65536:
            raise ValueError(f"ChunkTopK: expected 2 <= chunk <= 65536, got chunk={self.chunk}.")
        if self.k > self.chunk:
            raise ValueError(f"ChunkTopK: expected k <= chunk, got k={self.k} and chunk={self.chunk}.")

    def row_width(self, shape: torch.Size) -> int:
        """Rows of `chunk` entries whatever the shape."""
        return self.chunk

    def kept(self, width: int) -> int:
        """Keep k entries, or all of a narrower row."""
        return min(self.k, width)

    def contraction(self, numel: int) -> float:
        """Worst case, all magnitudes of a chunk equal: delta = k / min(chunk, numel), at most 1."""
        return min(1.0, self.k / min(self.chunk, max(1, numel)))

    def omega(self, numel: int) -> float | None:
        """Biased unless everything is kept."""
        return 0.0 if self.contraction(numel) == 1.0 else None
