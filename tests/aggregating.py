"""What the tests of aggregators share: messages, and a round of them."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradwire.federated import Aggregator

COUNT = 11
"""Messages of a round."""


def drawn(count: int = COUNT, d: int = 9, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Messages with something in common, and weights."""
    rng = np.random.default_rng(seed)
    return torch.tensor(rng.normal(0.5, 1.0, (count, d))), torch.tensor(rng.uniform(0.5, 3.0, count))


def aggregate(aggregator: Aggregator, messages: Tensor, weights: Tensor | None = None) -> Tensor:
    """One round; every message is overwritten once it was added."""
    aggregator.reset(messages.shape[1], messages.dtype, messages.device)
    buffer = messages.new_empty(messages.shape[1])
    for message, weight in zip(messages, [1.0] * len(messages) if weights is None else weights.tolist(), strict=True):
        aggregator.add(buffer.copy_(message), weight)
        assert torch.equal(buffer, message)
        buffer.fill_(float("nan"))
    return aggregator.result()


def assert_near(actual: Any, expected: Any, tolerance: float = 1e-12) -> None:
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=0, atol=tolerance)
