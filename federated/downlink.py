"""`Downlink`: a model that the server sends compressed, and that all clients hold alike."""

from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor

from gradwire.comm.feedback import NoFeedback
from gradwire.compression import counter_rng
from gradwire.federated.link import Link


@final
class Downlink:
    """The server broadcasts compressed differences from a shadow w of the model, which every client follows.

        w <- w + C(x - w), at the start of a round;  clients train from w

    What compression loses stays in x - w and is sent later. A client that missed rounds gets the messages that it
    missed, or the whole w, whichever is smaller; on its first round, the whole.

    Args:
        link: A compressor that contracts, without feedback: the shadow is its memory.
        vector: x at first, `[numel]`; w starts there.
        seed: Of draws.

    State:
        w; the bytes of all messages so far; for every client that took part, how many of them it has.

    Raises:
        ValueError: the link has feedback, or its compressor is no contraction.

    Example:
        >>> from gradwire.compression import TopK
        >>> downlink = Downlink(Link(TopK(ratio=0.25)), torch.zeros(4), seed=0)
        >>> downlink.send(torch.tensor([1.0, -3.0, 2.0, 0.0]), round=0)
        tensor([ 0., -3.,  0.,  0.])
        >>> downlink.deliver([0, 1])
        32

    Reference:
        Gruntkowska, Tyurin, Richtárik. EF21-P and Friends: Improved Theoretical Communication Complexity for
        Distributed Optimization with Bidirectional Compression. ICML 2023. arXiv:2209.15218, algorithm 1.

    Differences from the paper:
        Clients do local steps, and only some take part.
    """

    def __init__(self, link: Link, vector: Tensor, seed: int) -> None:
        if not isinstance(link.feedback, NoFeedback):
            raise ValueError(
                f"Simulation: expected a downlink without feedback, got {link.feedback!r}. What compression loses is "
                "kept in the difference between the server's model and its clients' already."
            )
        if link.compressor.contraction(vector.numel()) is None:
            raise ValueError(
                f"Simulation: expected a downlink that is a contraction, got {link.compressor!r}. Shrink one that is "
                "unbiased: Scaled(compressor)."
            )
        self.link, self.seed = link, seed
        self.vector = vector.detach().clone()
        self.sent = 0
        self.known: dict[int, int] = {}

    def send(self, x: Tensor, round: int) -> Tensor:
        """Move the shadow towards the server's model; returns it."""
        nbytes, arrived, _ = self.link.send(x - self.vector, {}, counter_rng.fold(self.seed, "downlink", round))
        self.vector += arrived
        self.sent += nbytes
        return self.vector

    def deliver(self, clients: Sequence[int]) -> int:
        """Bytes that bring these clients up to date."""
        whole, total = self.vector.numel() * self.vector.element_size(), 0
        for client in clients:
            known = self.known.get(client)
            total += whole if known is None else min(whole, self.sent - known)
            self.known[client] = self.sent
        return total

    def state_dict(self) -> dict[str, Any]:
        """Everything, as tensors and numbers."""
        known = torch.tensor(sorted(self.known.items()), dtype=torch.int64).view(-1, 2)
        return {"vector": self.vector, "sent": self.sent, "known": known}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.vector.copy_(saved["vector"])
        self.sent, self.known = saved["sent"], dict(saved["known"].tolist())
