"""`Link`: what a vector becomes on its way between a client and the server, and how many bytes it takes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from gradwire.comm.exchange import AllGather
from gradwire.comm.feedback import ErrorFeedback, NoFeedback, StateTensor
from gradwire.comm.legality import why_illegal
from gradwire.compression import counter_rng
from gradwire.compression.base import Compressor, compute_dtype


@final
@dataclass(frozen=True)
class Link:
    """A compressor and error feedback between one client and the server.

        x --compensate--> target --compress--> payload --decompress--> arrived
        mean of arrived --estimate--> what the server uses

    These are the parts that communicators are made of; the sender's state lies with the client that sends, and what a
    communicator replicates on all ranks lies with the server.

    Args:
        compressor: Of whole vectors of all trainable parameters.
        feedback: What the sender remembers. Where only some clients take part, those without state that the server
            shares (`NoFeedback`, `EF`), and `EF21`, of which absent clients count as unchanged.

    Raises:
        ValueError: the two do not fit.

    Example:
        >>> from gradwire.compression import TopK
        >>> payload_bytes, arrived, _ = Link(TopK(ratio=0.25)).send(torch.tensor([1.0, -3.0, 2.0, 0.0]), {}, 0)
        >>> payload_bytes, arrived
        (5, tensor([ 0., -3.,  0.,  0.]))
    """

    compressor: Compressor
    feedback: ErrorFeedback = field(default_factory=NoFeedback)

    def __post_init__(self) -> None:
        if (problem := why_illegal(self.compressor, self.feedback, AllGather())) is not None:
            raise ValueError(problem)
        object.__setattr__(self, "feedback", self.feedback.fit(self.compressor))

    @property
    def estimates(self) -> bool:
        """Whether what the server uses is not the mean of what arrives, but follows from it and the server's state."""
        return any(tensor.replicated for tensor in self.feedback.state_tensors)

    def check_participation(self, cohort_size: int, clients: int) -> None:
        """Raise ValueError if the feedback expects all clients in every round and they are not there."""
        if cohort_size < clients and self.estimates and self.feedback.absence != "unchanged":
            raise ValueError(
                f"{type(self.feedback).__name__}: expected all clients in every round, got cohort_size={cohort_size} "
                f"of {clients}. Use EF, EF21 or no feedback, or SCAFCOM."
            )

    def state_sizes(self, numel: int, *, replicated: bool) -> dict[str, int]:
        """Entries of every vector of state, the sender's own or the server's, for vectors of `numel` entries."""
        shape = torch.Size([numel])
        size = self.compressor.num_rows(shape) * self.compressor.row_width(shape)
        return {t.name: size for t in self.feedback.state_tensors if t.replicated == replicated}

    def send(self, x: Tensor, state: Mapping[str, Tensor], seed: int) -> tuple[int, Tensor, dict[str, Tensor]]:
        """Compress a vector.

        Args:
            x: `[numel]`.
            state: The sender's own vectors.
            seed: Of every draw of this message. What communicators draw alike on all ranks, so that payloads may be
                added, each sender draws here by itself, so that errors average out; the server knows the seed.

        Returns:
            Bytes of the payload, what arrives `[numel]`, and the sender's new state, to be kept once it has arrived.
        """
        compressor, shape = self.compressor, x.shape
        tile, width = compressor.tile(shape), compressor.row_width(shape)
        rows = compressor.transform_rows(compressor.to_rows(x), tile)
        keys = None
        if compressor.randomness != "none":
            keys = counter_rng.row_keys(seed, rows.shape[0], x.device)
        kept = {name: value.view(-1, width) for name, value in state.items()}
        target = self.feedback.compensate(rows, kept)
        parts, sent = compressor.compress_rows_with_sent(target, x.dtype, keys)
        if not (compressor.preserves_zero or compressor.changes_basis):
            sent.view(-1)[x.numel() :] = 0
        arrived = compressor.from_rows(compressor.inverse_transform_rows(sent, tile), shape).to(x.dtype)
        if not isinstance(self.feedback, NoFeedback) and arrived.data_ptr() == sent.data_ptr():
            arrived = arrived.clone()  # `update` may overwrite what was sent
        new = self.feedback.update(target, sent, kept)
        return (
            sum(part.numel() * part.element_size() for part in parts),
            arrived,
            {name: value.reshape(-1) for name, value in new.items()},
        )

    def estimate(
        self, mean: Tensor, state: Mapping[str, Tensor], participants: int, clients: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What the server uses in place of the mean of what arrived, and its new state.

        Args:
            mean: Of the participants, `[numel]`.
            state: The server's vectors for this link.
            participants: How many sent.
            clients: How many there are.
        """
        if not self.estimates:
            return mean, {}
        compressor, shape = self.compressor, mean.shape
        tile, width = compressor.tile(shape), compressor.row_width(shape)
        rows = compressor.transform_rows(compressor.to_rows(mean), tile)
        if self.feedback.absence == "unchanged":
            rows = rows * (participants / clients)
        kept = {name: value.view(-1, width) for name, value in state.items()}
        estimate, new = self.feedback.estimate(rows, kept)
        estimate = compressor.from_rows(compressor.inverse_transform_rows(estimate, tile), shape)
        return estimate.to(mean.dtype).clone(), {name: value.reshape(-1) for name, value in new.items()}


def state_dtype(tensor: StateTensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a vector of a link's state, for messages of this dtype."""
    return tensor.dtype or compute_dtype(dtype)
