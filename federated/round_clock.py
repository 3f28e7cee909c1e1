"""`RoundClock`: how long synchronous rounds take in virtual time, and who is not done in time."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, final

from gradwire.federated.client_runner import ClientRunner
from gradwire.federated.client_times import ClientTimes
from gradwire.federated.clock import TICKS_PER_SECOND, to_seconds, to_ticks
from gradwire.federated.workload import job_of

Stragglers = Literal["drop", "partial"]
"""What becomes of clients that would come after the deadline."""


@final
@dataclass
class RoundPlan:
    """Who takes part in a round, and until when.

    Args:
        clients: Those whose messages come in time, in order.
        steps: Batches of those among them that have to stop early.
        late: Clients that train in vain.
        end: Virtual seconds at which the round is over.
    """

    clients: list[int]
    end: float
    steps: dict[int, int] = field(default_factory=dict)
    late: int = 0


@final
@dataclass(frozen=True)
class RoundClock:
    """A round takes as long as its slowest client, and no longer than the deadline.

    Args:
        times: How long clients take; None for no time at all.
        deadline: Seconds after which the server goes on, > 0.
        stragglers: Whether clients that would come later are dropped, or send what they have by then, as FedProx has
            them do: as many whole batches as they can, at least one, or else they are dropped, too.
        seed: Of random times.

    Example:
        >>> RoundClock(deadline=2.0)
        Traceback (most recent call last):
        ValueError: Simulation: expected times with a deadline, got none. Give FixedTimes, TraceTimes or the like.
    """

    times: ClientTimes | None = None
    deadline: float | None = None
    stragglers: Stragglers = "drop"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.stragglers not in ("drop", "partial"):
            raise ValueError(f'Simulation: expected stragglers="drop" or "partial", got {self.stragglers!r}.')
        if self.deadline is None:
            return
        if self.times is None:
            raise ValueError(
                "Simulation: expected times with a deadline, got none. Give FixedTimes, TraceTimes or the like."
            )
        if not (self.deadline > 0 and math.isfinite(self.deadline)):
            raise ValueError(f"Simulation: expected a finite deadline > 0, got deadline={self.deadline}.")

    def plan(
        self, runner: ClientRunner, cohort: Sequence[int], round: int, *, now: float, bytes_down: int, lost: bool
    ) -> RoundPlan:
        """What a round will be.

        Args:
            runner: Knows what clients' work amounts to.
            cohort: Clients that begin.
            round: From 0.
            now: Virtual seconds.
            bytes_down: That each of them receives.
            lost: Whether the server waits for others that will not answer: it does so until the deadline.
        """
        plan = RoundPlan(list(cohort), now)
        if self.times is None:
            return plan
        start = round_ticks(now)
        deadline = None if self.deadline is None else to_ticks(self.deadline)
        last = deadline if lost and deadline is not None else 0
        plan.clients = []
        for client in cohort:
            job = job_of(runner, client, round=round, number=round, start=start, bytes_down=bytes_down)
            duration = self.times.duration(job, self.seed)
            if deadline is not None and duration > deadline:
                last = deadline
                share = self.times.share_done(job, self.seed, deadline) if self.stragglers == "partial" else 0.0
                steps = int(share * runner.load(client, round))
                if not steps:
                    plan.late += 1
                    continue
                plan.steps[client] = steps
            plan.clients.append(client)
            last = max(last, duration if deadline is None else min(duration, deadline))
        plan.end = to_seconds(start + last)
        return plan


def round_ticks(seconds: float) -> int:
    """The tick that `to_seconds` gave these seconds for."""
    return round(seconds * TICKS_PER_SECOND)
