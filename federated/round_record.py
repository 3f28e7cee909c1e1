"""`RoundRecord`: what happened in a round; `Tally`, from which it is made."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from gradwire.federated.client_runner import ClientMessage
from gradwire.federated.engine import Engine


@final
@dataclass(frozen=True)
class RoundRecord:
    """What happened in a round.

    Args:
        round: From 1.
        loss: The clients' mean loss in local training, weighted like their messages.
        metrics: What `evaluate` found; empty where it was not called.
        bytes_up: From clients to the server, of all rounds so far.
        bytes_down: From the server to clients, of all rounds so far.
        time: Virtual seconds so far; 0 without a model of time.
        participants: Clients whose messages count.
        lost: Clients that were drawn and did not answer.
        not_finite: Clients whose messages held inf or NaN and were dropped.
        failures: Clients that raised an error, and what it said.
        late: Clients whose messages were dropped since they came after the deadline, or were too stale.
        staleness: Mean number of steps that the server had made since it sent out the models that messages count from.
    """

    round: int
    loss: float
    metrics: Mapping[str, float]
    bytes_up: int
    bytes_down: int
    time: float
    participants: int
    lost: int = 0
    not_finite: int = 0
    failures: Mapping[int, str] = field(default_factory=dict)
    late: int = 0
    staleness: float = 0.0


_COLUMNS = ("accepted", "weight", "loss", "nbytes", "not_finite", "failed", "raised")


@final
class Tally:
    """Numbers of every client of a cohort, known on all ranks once their sums are: a client runs on one of them.

    Totals are added up in the order of the cohort, and so do not depend on who ran where.

    Args:
        cohort: Clients that take part.
        scalars: Names of the numbers that clients send.
        counters: How many integers they send beside them, of which the greatest counts.
    """

    def __init__(self, cohort: Sequence[int], scalars: Sequence[str], counters: int = 0) -> None:
        self.cohort, self._scalars, self._counters = list(cohort), list(scalars), counters
        self._width = len(_COLUMNS) + len(self._scalars) + counters
        self._rows: list[list[float]] = [[0.0] * self._width for _ in self.cohort]
        self.sums = torch.zeros(0, dtype=torch.float64)
        self.errors: dict[int, Exception] = {}
        """Of clients that ran here."""
        self.pending: list[ClientMessage] = []
        """Of clients that ran here, whose new vectors are to be kept."""
        self.failures: dict[int, str] = {}

    def take(self, position: int, message: ClientMessage) -> None:
        """Count a message that is accepted."""
        counts = [1.0, message.weight, message.weight * float(message.loss), message.nbytes, 0.0, 0.0, 0.0]
        weighed = [message.weight * message.scalars[name] for name in self._scalars]
        self._rows[position] = [*counts, *weighed, *map(float, message.counters)]

    def drop(self, position: int, nbytes: int) -> None:
        """Count a message that holds inf or NaN."""
        self._rows[position][3:5] = [nbytes, 1.0]

    def fail(self, position: int, error: Exception, *, raised: bool) -> None:
        """Count a client that raised an error, which is to stop the run or not."""
        self.errors[self.cohort[position]] = error
        self._rows[position][5:7] = [1.0, float(raised)]

    def pack(self) -> Tensor:
        """Everything that is counted, to be added up over processes in place."""
        self.sums = torch.tensor(self._rows, dtype=torch.float64).view(-1)
        return self.sums

    def unpack(self, engine: Engine) -> None:
        """Take the sums over processes; tell all of errors, and raise those that stop the run."""
        self._rows = self.sums.view(-1, self._width).tolist()
        if not any(row[5] for row in self._rows):
            return
        mine = {client: f"{type(error).__name__}: {error}" for client, error in self.errors.items()}
        for rank, text in enumerate(engine.gather_text(json.dumps(mine))):
            told = {int(client): what for client, what in json.loads(text).items()}
            self.failures |= told
            if any(row[6] for row in self._rows) and told and rank != engine.rank and not self.errors:
                client, what = next(iter(told.items()))
                raise RuntimeError(f"Simulation: client {client} on rank {rank} failed: {what}")
        if any(row[6] for row in self._rows):
            raise next(iter(self.errors.values()))
        self.failures = dict(sorted(self.failures.items()))

    @property
    def accepted(self) -> list[bool]:
        """Whether each client's message counts."""
        return [bool(row[0]) for row in self._rows]

    @property
    def weights(self) -> list[float]:
        """Of each client's message."""
        return [row[1] for row in self._rows]

    @property
    def participants(self) -> int:
        """Clients whose messages count."""
        return sum(self.accepted)

    @property
    def weight(self) -> float:
        """Sum of their weights."""
        return self._total(1)

    @property
    def loss(self) -> float:
        """Their mean loss."""
        return self._total(2) / self.weight if self.weight else float("nan")

    @property
    def nbytes(self) -> int:
        """What travelled up, messages that were dropped included."""
        return int(self._total(3))

    @property
    def not_finite(self) -> int:
        """Messages that were dropped."""
        return int(self._total(4))

    @property
    def scalars(self) -> dict[str, float]:
        """Weighted means of the numbers that were sent."""
        return {name: self._total(len(_COLUMNS) + at) / self.weight for at, name in enumerate(self._scalars)}

    @property
    def counters(self) -> list[int]:
        """The greatest of each integer that was sent."""
        first = self._width - self._counters
        return [int(max((row[first + at] for row in self._rows), default=0)) for at in range(self._counters)]

    def _total(self, column: int) -> float:
        return sum(row[column] for row in self._rows)
