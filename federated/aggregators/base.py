"""`Aggregator`: how the server makes one vector of its clients'."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor


class Aggregator(ABC):
    """Combines the messages of a round as they come in.

        reset --> add, add, … --> result

    A round may be spread over processes: a `linear` aggregator's `sums` of all of them are added up before `result`;
    of others, every process adds all messages, in the same order. What it keeps from round to round is its
    `state_dict`.
    """

    @property
    def linear(self) -> bool:
        """Whether the result follows from sums of what `add` takes: a round may be spread over processes."""
        return False

    @property
    def passes(self) -> int:
        """Sums over clients, one after the other, that the result can be had from; 0 if sums are not enough."""
        return 1 if self.linear else 0

    @property
    def needs_individual(self) -> bool:
        """Whether the server must see every client's message by itself, so that none can be summed securely."""
        return self.passes == 0

    averages: ClassVar[bool] = False
    """Whether the result is the weighted mean: what control variates and quotients of messages are right for alone."""

    @property
    def weighs(self) -> bool:
        """Whether weights of clients count; rules by rank or distance take all clients alike."""
        return True

    @property
    def fewest(self) -> int:
        """Messages that a round needs."""
        return 1

    def tolerates(self, count: int) -> int:
        """How many of `count` messages may be anything, the result staying near the others'."""
        return 0

    def check(self, count: int) -> None:
        """Raise ValueError if `count` messages are too few."""
        if count < self.fewest:
            raise ValueError(
                f"{type(self).__name__}: expected at least {self.fewest} message{'s' * (self.fewest > 1)} in a round, "
                f"got {count}. Take a larger cohort."
            )

    @abstractmethod
    def reset(self, numel: int, dtype: torch.dtype, device: torch.device) -> None:
        """Begin a round of messages `[numel]` of this dtype."""

    @abstractmethod
    def add(self, message: Tensor, weight: float | Tensor = 1.0) -> None:
        """Take one client's message `[numel]`, which the caller may overwrite afterwards.

        Args:
            message: Finite numbers.
            weight: >= 0; or one weight per entry, `[numel]`, where a client has only some of them.
        """

    @property
    def sums(self) -> Tensor:
        """What is added up over processes, float64, 1-D: changed in place by the caller. Of linear aggregators only."""
        raise AssertionError(f"{type(self).__name__} is not linear")

    @abstractmethod
    def result(self) -> Tensor:
        """The aggregate `[numel]`, in the dtype of `reset`; a new tensor.

        Raises:
            ValueError: there are too few messages.
        """

    def state_dict(self) -> dict[str, Any]:
        """What later rounds depend on."""
        return {}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        if saved:
            raise ValueError(f"{type(self).__name__}: expected an empty state, got {sorted(saved)}.")


class Individual(Aggregator):
    """An aggregator that keeps every message of the round: `self.stacked` is `[clients, numel]`.

    Messages are copied into one matrix, which doubles its rows as they come and serves later rounds again.
    """

    weighs = False

    def reset(self, numel: int, dtype: torch.dtype, device: torch.device) -> None:
        """Forget what was kept."""
        rows: Tensor | None = getattr(self, "_rows", None)
        if rows is None or (rows.shape[1], rows.dtype, rows.device) != (numel, dtype, device):
            self._rows = torch.empty((0, numel), dtype=dtype, device=device)
        self._kept: list[float] = []

    def add(self, message: Tensor, weight: float | Tensor = 1.0) -> None:
        """Keep a copy."""
        if isinstance(weight, Tensor):
            raise ValueError(
                f"{type(self).__name__}: expected one weight per message, got one per entry. "
                "Use WeightedMean(by_entry=True)."
            )
        count = len(self._kept)
        if count == len(self._rows):
            grown = self._rows.new_empty((max(8, 2 * count), self._rows.shape[1]))
            grown[:count] = self._rows
            self._rows = grown
        self._rows[count] = message
        self._kept.append(weight)

    @property
    def stacked(self) -> Tensor:
        """All messages, in the order in which they came: a view that lasts until the next round."""
        self.check(len(self._kept))
        return self._rows[: len(self._kept)]

    @property
    def shares(self) -> Tensor:
        """Weights over their sum, `[clients]`, float64."""
        weights = torch.tensor(self._kept, dtype=torch.float64, device=self._rows.device)
        if not sum(self._kept) > 0:
            raise ValueError(f"{type(self).__name__}: expected a positive sum of weights, got 0.")
        return weights / weights.sum()
