"""`Stats`: what a communicator has done so far."""

from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True)
class Stats:
    """Totals of one rank: steps since training began, bytes since this process did.

    Args:
        steps: Finished steps, skipped ones included; a checkpoint restores them.
        skipped: Steps skipped because a gradient was not finite on some rank; a checkpoint restores them.
        payload_bytes: Bytes handed to collectives, from the real buffers.
        uncompressed_bytes: Of these, what the plan sends dense.
        bytes_sent: Bytes that the collectives' usual algorithms send from this rank for those buffers.
        dense_bytes: What a ring all-reduce of the uncompressed gradients would have sent in its place.
        residual_norm: Euclidean norm of this rank's residual; 0 where the feedback keeps none.
    """

    steps: int
    skipped: int
    payload_bytes: int
    uncompressed_bytes: int
    bytes_sent: float
    dense_bytes: float
    residual_norm: float

    @property
    def compression_rate(self) -> float:
        """Bytes of dense averaging over bytes sent; 1 if nothing was sent."""
        return self.dense_bytes / self.bytes_sent if self.bytes_sent else 1.0
