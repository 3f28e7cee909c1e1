"""`Dispatcher`: which clients are at work, with which version of the model, and until when."""

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Any, final

import torch
from torch import Tensor

from gradwire.compression import counter_rng
from gradwire.federated.client_runner import ClientRunner
from gradwire.federated.client_times import ClientTimes, Job
from gradwire.federated.clock import EventClock, Flight
from gradwire.federated.workload import job_of, vector_bytes


@final
class Dispatcher:
    """Hands the model out to clients as places become free, and takes their messages in the order of virtual time.

    A free place goes to a client drawn evenly, by (seed, wave), from those that are available and not at work. If no
    client is available, the clock goes on to when one is.

    Args:
        runner: Knows what a client's work amounts to.
        times: How long clients take.
        roster: Clients that have examples, in order.
        concurrency: Places.
        open_slots: Free places at which clients begin.
        seed: Of draws and of times.

    Cost:
        One vector for each version of the model that a client is at work with; O(len(roster)) per draw.

    State:
        The clock; versions that clients are at work with; clients that are idle, and those that are away; how many jobs
        each client and how many waves there were.
    """

    def __init__(
        self,
        runner: ClientRunner,
        times: ClientTimes,
        roster: Sequence[int],
        *,
        concurrency: int,
        open_slots: int,
        seed: int,
    ) -> None:
        self.runner, self.times, self.roster = runner, times, list(roster)
        self.concurrency, self.open_slots, self.seed = concurrency, open_slots, seed
        self.clock = EventClock()
        self._idle = list(roster)
        self._away: list[tuple[int, int]] = []  # a heap of when clients that were found away are back
        self._versions: dict[int, _Version] = {}
        self._jobs = dict.fromkeys(roster, 0)
        self._waves = 0
        self._bytes_down = vector_bytes(runner, None)

    @property
    def versions_in_flight(self) -> int:
        """Models that clients are at work with."""
        return len(self._versions)

    def fill_places(self, version: int, vector: Tensor) -> int:
        """Let clients begin where places are free; returns the bytes that were sent to them.

        Args:
            version: Number of the server's model.
            vector: The model, which is copied if a client begins with it.
        """
        clock, sent = self.clock, 0
        while (self._idle or self._away) and self.concurrency - len(clock) >= self.open_slots:
            drawn = self._draw()
            if not drawn:
                if len(clock) and self._away[0][0] >= clock.next_tick:
                    break
                clock.wait_until(self._away[0][0])
                continue
            for client in drawn:
                self._begin(client, version, vector)
                sent += self._bytes_down
            self._waves += 1
        return sent

    def _draw(self) -> list[int]:
        """As many of the available clients as there are free places, or all; they are idle no more."""
        now, free = self.clock.now, self.concurrency - len(self.clock)
        while self._away and self._away[0][0] <= now:
            insort(self._idle, heappop(self._away)[1])
        places = torch.arange(len(self._idle))
        if len(self._idle) > free:
            generator = torch.Generator().manual_seed(counter_rng.fold(self.seed, "cohort", self._waves))
            places = torch.randperm(len(self._idle), generator=generator)
        seen: list[int] = []
        drawn: list[int] = []
        while len(drawn) < free and len(seen) < len(places):
            for place in places[len(seen) : len(seen) + free - len(drawn)].tolist():
                client = self._idle[place]
                seen.append(client)
                begins = now if self.times.always_available else self.times.available_from(client, now)
                if begins > now:
                    heappush(self._away, (begins, client))
                else:
                    drawn.append(client)
        for client in seen:
            del self._idle[bisect_left(self._idle, client)]
        return sorted(drawn)

    def _begin(self, client: int, version: int, vector: Tensor) -> None:
        job = self.job(client, version, self._jobs[client])
        if version not in self._versions:
            self._versions[version] = _Version(vector.clone())
        self._versions[version].users += 1
        self.clock.send_off(client, self.times.duration(job, self.seed), version, self._waves)
        self._jobs[client] += 1

    def job(self, client: int, version: int = 0, number: int = 0) -> Job:
        """What a client has to do that begins now."""
        start = self.clock.now
        return job_of(self.runner, client, round=version, number=number, start=start, bytes_down=self._bytes_down)

    def finish(self, flight: Flight) -> Tensor:
        """The model that a client, which is free now, had been sent."""
        version = self._versions[flight.version]
        version.users -= 1
        if not version.users:
            del self._versions[flight.version]
        insort(self._idle, flight.client)
        return version.vector

    def state_dict(self) -> dict[str, Any]:
        """Everything that draws and arrivals to come depend on."""
        return {
            "clock": self.clock.state_dict(),
            "versions": {str(number): version.vector for number, version in self._versions.items()},
            "jobs": list(self._jobs.values()),
            "idle": list(self._idle),
            "away": [list(back) for back in self._away],
            "waves": self._waves,
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.clock.load_state_dict(saved["clock"])
        users = [flight.version for flight in self.clock.flights]
        self._idle = list(saved["idle"])
        self._away = [(tick, client) for tick, client in saved["away"]]
        like = self.runner.model.vector
        self._versions = {
            int(number): _Version(vector.to(like, copy=True), users.count(int(number)))
            for number, vector in saved["versions"].items()
        }
        self._jobs = dict(zip(self.roster, saved["jobs"], strict=True))
        self._waves = saved["waves"]


@final
@dataclass
class _Version:
    """A model that was sent, and how many clients are at work with it."""

    vector: Tensor
    users: int = 0
