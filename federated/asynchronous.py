"""`AsyncSimulation`: federated training in which the server does not wait, on a clock of virtual time."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, final

import torch
from torch import nn

from gradwire.compression import counter_rng
from gradwire.federated.algorithm import Algorithm, Round
from gradwire.federated.async_policy import AsyncPolicy, Workforce
from gradwire.federated.buffers import Buffers, Recalibrate
from gradwire.federated.checkpoint import load_simulation, save_simulation
from gradwire.federated.client_runner import ClientRunner
from gradwire.federated.client_store import ClientStore
from gradwire.federated.client_times import ClientTimes
from gradwire.federated.clients import Clients
from gradwire.federated.clock import Flight, to_seconds, to_ticks
from gradwire.federated.configuration import common_facts, described
from gradwire.federated.dispatcher import Dispatcher
from gradwire.federated.engine import Engine, SerialEngine
from gradwire.federated.evaluation import Evaluate, metrics_of
from gradwire.federated.flat_model import FlatModel
from gradwire.federated.link import Link
from gradwire.federated.local_training import LocalTrainer, LocalTraining, Loss
from gradwire.federated.participation_weights import ParticipationWeights
from gradwire.federated.random_state import kept_random_state
from gradwire.federated.round_record import RoundRecord
from gradwire.federated.server import OptimizerFactory, Server
from gradwire.federated.workload import bytes_up


@final
class AsyncSimulation:
    """A server that makes steps with the messages that are there, and clients that are at work meanwhile.

        free places --> clients begin with x_sent --(virtual time)--> messages --(policy)--> server optimizer --> x

    A record is of one step of the server. Clients are trained when their message arrives, from the version of the model
    that they were sent; a run depends on the seed alone and takes no longer than its training.

    Args:
        module: The model; it is the server's model whenever a step is over.
        clients: Their examples.
        algorithm: One without state of clients or server: `FedAvg()`, `FedProx()`.
        training: What a client does; a learning rate or number of steps that is a function of the round gets the number
            of the server's steps before the client began.
        loss: `loss(module, *batch)`: the mean loss of a batch.
        policy: When the server steps: `AsyncFedAvg()`, `FedAsync()`, `FedBuff()`, `FedFix()`.
        times: How long clients take: `FixedTimes`, `ExponentialTimes`, `HalfNormalTimes`, `TraceTimes`.
        concurrency: Clients at work at any time, 1 <= concurrency <= len(clients); all by default. A free place goes to
            a client drawn evenly from those who are available and not at work.
        uplink: Compresses what clients send; its feedback must lie with the client (`EF`).
        server_lr: Of plain server steps, > 0.
        server_optimizer: Makes another optimizer of the server's parameters; its lr is its own.
        evaluate: Called with the module, in `eval()` mode, after every `evaluate_every` steps.
        evaluate_every: Steps, >= 1.
        dropout: Probability that a client does not answer, 0 <= dropout < 1; its place is free when it would have.
        on_error: Whether an error in a client stops the run or is reported in the record and skipped.
        buffers: What becomes of buffers, such as BatchNorm's statistics: "server", they stay what they were at first,
            or `Recalibrate(batches)` after every step.
        store: Folder for clients' vectors; in memory by default.
        seed: Of every draw.

    Cost:
        One model to train in, 20 bytes per parameter at the server, and one vector for each version of the model that
        a client is still at work with. Nine passes over the parameters for a step of the server beside those of its
        optimizer, and one for every message.

    State:
        The server's; the clock with all messages on their way; versions in flight; counts of weights.

    Raises:
        ValueError: parts do not fit one another.

    Example:
        >>> from gradwire.federated import AsyncFedAvg, FedAvg, FixedTimes
        >>> clients = Clients((torch.eye(4), torch.ones(4, 1)), [[0, 1], [2, 3]])
        >>> simulation = AsyncSimulation(nn.Linear(4, 1), clients, FedAvg(), LocalTraining(lr=0.1),
        ...                              loss=lambda module, x, y: nn.functional.mse_loss(module(x), y),
        ...                              policy=AsyncFedAvg(), times=FixedTimes([1.0, 2.0]))
        >>> records = list(simulation.run(rounds=90))
        >>> records[-1].time, records[-1].staleness, records[-1].loss < 1e-3
        (60.0, 1.0, True)

    Reference:
        Fraboni, Vidal, Kameni, Lorenzi. A General Theory for Federated Optimization with Asynchronous and Heterogeneous
        Clients Updates. JMLR 2023. arXiv:2206.10189.
    """

    def __init__(
        self,
        module: nn.Module,
        clients: Clients,
        algorithm: Algorithm,
        training: LocalTraining,
        *,
        loss: Loss,
        policy: AsyncPolicy,
        times: ClientTimes,
        concurrency: int | None = None,
        uplink: Link | None = None,
        server_lr: float = 1.0,
        server_optimizer: OptimizerFactory | None = None,
        evaluate: Evaluate | None = None,
        evaluate_every: int = 1,
        dropout: float = 0.0,
        on_error: Literal["raise", "skip"] = "raise",
        buffers: Literal["server"] | Recalibrate = "server",
        store: Path | None = None,
        seed: int = 0,
    ) -> None:
        roster = [client for client, count in enumerate(clients.num_examples) if count]
        self.concurrency = len(roster) if concurrency is None else concurrency
        _check(algorithm, policy, uplink, dropout, self.concurrency, len(roster))
        times.check(len(clients))
        self.model = FlatModel(module)
        self.clients, self.algorithm, self.training = clients, algorithm, training
        algorithm.check(training, clients=len(roster), cohort_size=self.concurrency, numel=self.model.numel)
        self.policy, self.times, self.uplink = policy, times, uplink
        shapes = {name: part.shape for name, part in zip(self.model.names, self.model.parameters, strict=True)}
        self.server = Server(algorithm, self.model.vector, shapes, lr=server_lr, optimizer=server_optimizer)
        kept = ClientRunner.state_sizes(algorithm, uplink, self.model.numel)
        self.store = ClientStore(kept, len(clients), self.model.vector.dtype, store)
        trainer = LocalTrainer(self.model, loss, training)
        self.runner = ClientRunner(algorithm, self.model, trainer, clients, self.store, uplink, seed)
        if buffers != "server" and not isinstance(buffers, Recalibrate):
            raise ValueError(
                f'AsyncSimulation: expected buffers="server" or Recalibrate(batches), got {buffers!r}. Without rounds '
                "buffers have no mean."
            )
        self.buffers = Buffers(module, buffers)
        self.runner.buffers = self.buffers if self.buffers.tensors else None
        self.engine: Engine = SerialEngine()
        self.evaluate, self.evaluate_every = evaluate, evaluate_every
        self.dropout, self.on_error, self.seed = dropout, on_error, seed
        self.dispatcher = Dispatcher(
            self.runner, times, roster, concurrency=self.concurrency, open_slots=policy.open_slots, seed=seed
        )
        self.weights = self._make_weights(roster)
        self.rounds, self.bytes_up, self.bytes_down = 0, 0, 0
        self._version = 0
        self._sum = torch.zeros(self.model.numel, dtype=torch.float64, device=self.model.vector.device)

    def _make_weights(self, roster: list[int]) -> ParticipationWeights:
        policy, times, num_examples = self.policy, self.times, self.clients.num_examples
        varying = times.depends_on_work and callable(self.training.steps)
        jobs = [] if varying else [self.dispatcher.job(client) for client in roster]
        return ParticipationWeights(
            {client: self.algorithm.weight(client, num_examples[client]) for client in roster},
            arrivals=policy.arrivals_in_step(len(roster)),
            participation=policy.participation(Workforce(times, jobs, self.concurrency, len(roster))),
            weights=policy.weights,
            discounted=policy.discounts(self.concurrency),
            clip=policy.clip,
        )

    @property
    def module(self) -> nn.Module:
        """The server's model, between steps."""
        return self.model.module

    @property
    def time(self) -> float:
        """Virtual seconds so far."""
        return to_seconds(self.dispatcher.clock.now)

    @property
    def versions_in_flight(self) -> int:
        """Models that clients are at work with."""
        return self.dispatcher.versions_in_flight

    def run(self, rounds: int) -> Iterator[RoundRecord]:
        """Go through so many more steps of the server; each is done when its record is asked for."""
        for _ in range(rounds):
            yield self.step()

    def step(self) -> RoundRecord:
        """Until the server has made a step.

        It makes none if all messages of an interval were lost or dropped. Where messages are waited for, it goes on
        with those that are there after as many useless ones in a row as there are places, and a hundred at least.
        """
        found = _Found()
        self._sum.zero_()
        with kept_random_state(self.model.vector.device):
            self._collect(found)
            self._update(found)
        self.rounds += 1
        return RoundRecord(
            round=self.rounds,
            loss=found.loss / found.weight if found.weight else float("nan"),
            metrics=self._metrics(),
            bytes_up=self.bytes_up,
            bytes_down=self.bytes_down,
            time=self.time,
            participants=found.participants,
            lost=found.lost,
            not_finite=found.not_finite,
            failures=found.failures,
            late=found.late,
            staleness=found.staleness / found.participants if found.participants else 0.0,
        )

    def _update(self, found: "_Found") -> None:
        """The server's step, if there is anything to make it with."""
        if found.participants:
            mean = (self._sum / self.weights.total).to(self.model.vector.dtype)
            round = Round(
                number=self._version,
                participants=found.participants,
                clients=len(self.clients),
                lr=self.training.lr_at(self._version),
                scalars={},
                weight=found.weight,
                share=found.weight / self.weights.total,
            )
            self.server.step(self.algorithm.server_step({"pseudo_gradient": mean}, self.server.state, round))
            self.weights.step()
            self._version += 1
        self.model.vector.copy_(self.server.vector)
        self.buffers.settle(None, [], self.seed, self.rounds)

    def _collect(self, found: "_Found") -> None:
        """Let clients work until there are messages for a step."""
        clock, roster, dropped = self.dispatcher.clock, self.dispatcher.roster, 0
        self._fill_places()
        if self.policy.interval is not None:
            interval = to_ticks(self.policy.interval)
            step = -(-clock.next_tick // interval) * interval
            for flight in sorted(clock.arrivals_until(step), key=lambda flight: flight.client):
                self._receive(flight, found)
            return
        needed = self.policy.arrivals_in_step(len(roster))
        while dropped < max(self.concurrency, 100):
            lost = found.lost
            useful = self._receive(clock.next_arrival(), found)
            if found.participants == needed:
                return
            dropped = 0 if useful else dropped + (found.lost == lost)
            self._fill_places()

    def _fill_places(self) -> None:
        self.bytes_down += self.dispatcher.fill_places(self._version, self.server.vector)

    def _receive(self, flight: Flight, found: "_Found") -> bool:
        """Train a client whose message arrives now; returns whether the message counts."""
        sent = self.dispatcher.finish(flight)
        client, staleness, policy = flight.client, self._version - flight.version, self.policy
        if self._drops_out(flight):
            found.lost += 1
            return False
        if policy.max_staleness is not None and staleness > policy.max_staleness:
            found.late += 1
            self.bytes_up += bytes_up(self.runner)
            return False
        try:
            message = self.runner.run_one(client, flight.version, sent, {}, draw=flight.wave)
        except Exception as error:
            if self.on_error == "raise":
                raise
            found.failures[client] = f"{type(error).__name__}: {error}"
            return False
        self.bytes_up += message.nbytes
        if not message.finite:
            found.not_finite += 1
            return False
        if message.state:
            self.store.put(client, message.state)
        discount = policy.discount(staleness)
        weight = self.weights.arrive(client, discount) * discount * policy.scale(self._version)
        self._sum.add_(message.vectors["pseudo_gradient"], alpha=weight)
        if policy.delta_from == "current" and staleness:
            self._sum.add_(self.server.vector - sent, alpha=weight)
        found.participants += 1
        found.staleness += staleness
        found.weight += weight
        found.loss += weight * float(message.loss)
        return True

    def _drops_out(self, flight: Flight) -> bool:
        if not self.dropout:
            return False
        return counter_rng.fold(self.seed, "dropout", flight.wave, flight.client) < self.dropout * 2**62

    def _metrics(self) -> Mapping[str, float]:
        due = self.evaluate is not None and self.rounds % self.evaluate_every == 0
        return metrics_of(self.module, self.evaluate) if self.evaluate is not None and due else {}

    def configuration(self) -> dict[str, str]:
        """Every argument that results depend on, as text."""
        own = {"policy": self.policy, "times": self.times, "concurrency": self.concurrency}
        return common_facts(self) | described(own)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the steps to come depend on, but for clients' vectors, which `store` holds."""
        return {
            "server": self.server.state_dict(),
            "dispatcher": self.dispatcher.state_dict(),
            "weights": self.weights.state_dict(),
            "buffers": self.buffers.state_dict(),
            "version": self._version,
            "rounds": self.rounds,
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.server.load_state_dict(saved["server"])
        self.model.vector.copy_(self.server.vector)
        self.dispatcher.load_state_dict(saved["dispatcher"])
        self.weights.load_state_dict(saved["weights"])
        self.buffers.load_state_dict(saved["buffers"])
        self._version, self.rounds = saved["version"], saved["rounds"]
        self.bytes_up, self.bytes_down = saved["bytes_up"], saved["bytes_down"]

    def save(self, path: str | os.PathLike[str], extra: Any = None) -> None:
        """Write a checkpoint of everything that the steps to come depend on, as `Simulation.save` does."""
        save_simulation(path, self, extra)

    def load(self, path: str | os.PathLike[str]) -> Any:
        """Take over a checkpoint, as `Simulation.load` does; returns the `extra` that was saved."""
        return load_simulation(path, self)


def _check(
    algorithm: Algorithm, policy: AsyncPolicy, uplink: Link | None, dropout: float, concurrency: int, clients: int
) -> None:
    if not 1 <= concurrency <= clients:
        raise ValueError(f"AsyncSimulation: expected 1 <= concurrency <= {clients}, got concurrency={concurrency}.")
    if policy.open_slots > concurrency:
        raise ValueError(
            f"AsyncSimulation: expected open_slots <= concurrency={concurrency}, got open_slots={policy.open_slots}."
        )
    if not 0 <= dropout < 1:
        raise ValueError(f"AsyncSimulation: expected 0 <= dropout < 1, got dropout={dropout}.")
    alone = algorithm.messages == ("pseudo_gradient",) and not algorithm.scalars
    if algorithm.client_state or algorithm.server_state or not alone:
        raise ValueError(
            "AsyncSimulation: expected an algorithm whose clients send their pseudo-gradient and keep nothing, got "
            f"{algorithm!r}. Use FedAvg or FedProx, and a server optimizer."
        )
    if uplink is not None and uplink.estimates:
        raise ValueError(
            f"AsyncSimulation: expected feedback whose state lies with the client, got {uplink.feedback!r}. Use EF."
        )


@final
@dataclass
class _Found:
    """Counters of a step."""

    participants: int = 0
    weight: float = 0.0
    loss: float = 0.0
    staleness: int = 0
    lost: int = 0
    late: int = 0
    not_finite: int = 0
    failures: dict[int, str] = field(default_factory=dict)
