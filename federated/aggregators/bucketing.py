"""`Bucketing`: means of a few clients each, before a robust rule."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from gradwire.compression import counter_rng
from gradwire.federated.aggregators.base import Aggregator, Individual


@final
@dataclass
class Bucketing(Individual):
    """Deal messages into buckets of s at random, and hand the buckets' means to a robust rule.

        shuffle;  b_k = mean of s messages, k = 1 … ceil(n / s);  then(b_1, b_2, …)

    Clients with data of different kinds send messages that robust rules take for attacks; means of s of them differ by
    a factor s less in variance. A Byzantine client spoils its whole bucket, so `then` must withstand as many of n / s
    messages as there are Byzantine clients. Weights do not count.

    Args:
        then: The rule.
        s: Messages in a bucket, >= 1; the last bucket may have fewer.
        seed: Of the draws, which differ from round to round.

    Shapes:
        Messages `[numel]`.

    Cost:
        All messages of a round are kept, one pass over them, and what `then` costs for n / s messages.

    State:
        round: Of the draws. then: That of `then`.

    Raises:
        ValueError: s is out of range.

    Example:
        >>> from gradwire.federated import CoordinateMedian
        >>> bucketing = Bucketing(CoordinateMedian(), s=2)
        >>> bucketing.reset(1, torch.float32, torch.device("cpu"))
        >>> for value in (1.0, 1.0, 3.0, 3.0, 2.0, 1e9):
        ...     bucketing.add(torch.tensor([value]))
        >>> bool(1 <= bucketing.result() <= 3)
        True

    Reference:
        Karimireddy, He, Jaggi. Byzantine-Robust Learning on Heterogeneous Datasets via Bucketing. ICLR 2022.
        arXiv:2006.09365, algorithm 1.
    """

    then: Aggregator
    s: int = 2
    seed: int = 0
    _round: int = field(default=-1, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.s >= 1:
            raise ValueError(f"Bucketing: expected s >= 1, got s={self.s}.")

    def _buckets(self, count: int) -> int:
        return -(-count // self.s)

    @property
    def fewest(self) -> int:
        """So many that `then` gets enough."""
        return (self.then.fewest - 1) * self.s + 1

    def check(self, count: int) -> None:
        """Raise ValueError if there are too few messages, or buckets."""
        if count < self.fewest:
            raise ValueError(
                f"Bucketing: expected at least {self.fewest} messages in a round, for {self.then.fewest} buckets of "
                f"{self.s}, got {count}. Take a larger cohort, or a smaller s."
            )
        self.then.check(self._buckets(count))

    def tolerates(self, count: int) -> int:
        """As many as `then` does, of buckets."""
        return self.then.tolerates(self._buckets(count))

    def reset(self, numel: int, dtype: torch.dtype, device: torch.device) -> None:
        """Begin a round, with a new draw."""
        super().reset(numel, dtype, device)
        self._round += 1

    def result(self) -> Tensor:
        """What `then` makes of the buckets."""
        stacked = self.stacked
        generator = torch.Generator().manual_seed(counter_rng.fold(self.seed, "bucketing", self._round))
        order = torch.randperm(len(stacked), generator=generator).to(stacked.device)
        self.then.reset(stacked.shape[1], stacked.dtype, stacked.device)
        for bucket in torch.split(order, self.s):
            self.then.add(stacked[bucket].mean(0, dtype=torch.float64).to(stacked.dtype))
        return self.then.result()

    def state_dict(self) -> dict[str, Any]:
        """The number of the draw, and the state of `then`."""
        return {"round": self._round, "then": self.then.state_dict()}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        if saved.keys() != {"round", "then"}:
            raise ValueError(f"Bucketing: expected state of ['round', 'then'], got {sorted(saved)}.")
        self._round = saved["round"]
        self.then.load_state_dict(saved["then"])
