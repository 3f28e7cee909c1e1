"""`Simulated`: n workers in one process."""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from gradwire.comm.exchange.base import Bundle, Exchange, Merge, Outcome, check_merge, decompress_mean
from gradwire.comm.row_matrix import RowMatrix
from gradwire.compression.base import Compressor, compute_dtype

_BATCH = 1 << 22  # entries that are decompressed at once


@final
class Simulated(Exchange):
    """Average n workers that live in one process, as rows of one matrix.

    Gradients have a leading dimension of n workers (none if n is 1); after averaging, every worker's slice holds the
    mean. The same compressors, feedback and arithmetic run as with n processes, so experiments on theory need no
    processes at all.

    Args:
        workers: Number of simulated workers, >= 1.
        merge: As in `AllGather`.

    Cost:
        One batched compression and n decompressions. Nothing is sent; `payload_bytes` counts all workers' payloads, or
        of those that take part.

    State:
        None of its own; feedback keeps n times its state.

    Example:
        >>> Simulated(3)
        Simulated(3)

    Reference:
        None.
    """

    weighs = True

    def __init__(self, workers: int, merge: Merge = "mean") -> None:
        if workers < 1:
            raise ValueError(f"Simulated: expected workers >= 1, got workers={workers}.")
        check_merge("Simulated", merge)
        self.workers, self.merge = workers, merge

    def __repr__(self) -> str:
        return f"Simulated({self.workers})" if self.merge == "mean" else f"Simulated({self.workers}, {self.merge!r})"

    def check(self, compressor: Compressor) -> None:
        """Any compressor will do."""

    def mean(self, compressor: Compressor, bundles: Sequence[Bundle], bad: Tensor) -> Outcome:
        """Stack the workers as ranks."""
        means = []
        for bundle in bundles:
            many = _BATCH // max(1, bundle.matrix.rows * bundle.matrix.width)
            if self.merge == "mean" and min(many, self.workers) > 1:
                means.append(self._mean_of_batches(compressor, bundle, many))
            else:
                stacked = [part.view(self.workers, -1, part.shape[1]) for part in bundle.parts]
                shared = bundle.keys[: bundle.matrix.rows] if bundle.keys is not None else None
                means.append(decompress_mean(compressor, stacked, bundle.matrix, shared, self.merge, self.weights))
            sent = sum(part.numel() * part.element_size() for part in bundle.parts)
            self.ranks.bytes.payload += round(sent * self.participation)
        return Outcome(means, bad, [{} for _ in bundles])

    def _mean_of_batches(self, compressor: Compressor, bundle: Bundle, many: int) -> Tensor:
        """The mean, from as many workers at once as a batch holds: one call for many that have few rows each."""
        matrix = bundle.matrix
        dtype = compute_dtype(matrix.dtype)
        total = torch.zeros((matrix.rows, matrix.width), dtype=dtype, device=matrix.device)
        for first in range(0, self.workers, many):
            last = min(first + many, self.workers)
            rows = slice(first * matrix.rows, last * matrix.rows)
            keys = None if bundle.keys is None else bundle.keys[rows]
            each = compressor.decompress_rows(tuple(part[rows] for part in bundle.parts), matrix.width, keys)
            each = each.view(last - first, matrix.rows, matrix.width)
            if self.weights is None:
                total += each.sum(dim=0, dtype=dtype)
            else:
                weights = torch.tensor(self.weights[first:last], dtype=dtype, device=matrix.device)
                total += torch.tensordot(weights, each.to(dtype), dims=1)
        return total.div_(self.workers)

    def dense_mean(self, held: RowMatrix, x: Tensor, bad: Tensor) -> tuple[Tensor, Tensor]:
        """Average the workers."""
        size = x.numel() * x.element_size()
        self.ranks.bytes.payload += size
        self.ranks.bytes.uncompressed += size
        return x.view(self.workers, -1, x.shape[1]).mean(dim=0), bad
