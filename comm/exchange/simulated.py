"""`Simulated`: n workers in one process."""

from collections.abc import Sequence
from typing import final

from torch import Tensor

from gradwire.comm.exchange.base import Bundle, Exchange, Merge, Outcome, check_merge, decompress_mean
from gradwire.compression.base import Compressor


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
            stacked = [part.view(self.workers, -1, part.shape[1]) for part in bundle.parts]
            shared = bundle.keys[: bundle.matrix.rows] if bundle.keys is not None else None
            means.append(decompress_mean(compressor, stacked, bundle.matrix, shared, self.merge, self.weights))
            sent = sum(part.numel() * part.element_size() for part in bundle.parts)
            self.ranks.bytes.payload += round(sent * self.participation)
        return Outcome(means, bad, [{} for _ in bundles])

    def dense_mean(self, x: Tensor, bad: Tensor) -> tuple[Tensor, Tensor]:
        """Average the workers."""
        size = x.numel() * x.element_size()
        self.ranks.bytes.payload += size
        self.ranks.bytes.uncompressed += size
        return x.view(self.workers, -1, x.shape[1]).mean(dim=0), bad
