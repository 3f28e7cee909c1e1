"""`Simulation`: rounds of federated training in one place, with every byte and every client's state."""

import os
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from gradwire.compression import counter_rng
from gradwire.federated.aggregators import Aggregator, WeightedMean
from gradwire.federated.algorithm import Algorithm, Round
from gradwire.federated.buffers import BufferPolicy, Buffers, Recalibrate
from gradwire.federated.checkpoint import load_simulation, save_simulation
from gradwire.federated.client_runner import ClientRunner
from gradwire.federated.client_store import ClientStore
from gradwire.federated.client_times import ClientTimes
from gradwire.federated.clients import Clients
from gradwire.federated.collector import Collector
from gradwire.federated.configuration import configuration_of
from gradwire.federated.downlink import Downlink
from gradwire.federated.engine import Engine, SerialEngine
from gradwire.federated.evaluation import Evaluate, metrics_of
from gradwire.federated.fit import check_parts
from gradwire.federated.flat_model import FlatModel
from gradwire.federated.link import Link
from gradwire.federated.local_training import LocalTrainer, LocalTraining, Loss
from gradwire.federated.random_state import kept_random_state
from gradwire.federated.round_clock import RoundClock, RoundPlan, Stragglers
from gradwire.federated.round_record import RoundRecord, Tally
from gradwire.federated.server import OptimizerFactory, Server
from gradwire.federated.uplink_state import estimate_, server_sizes
from gradwire.federated.vectorize import Vectorize
from gradwire.federated.workload import vector_bytes


@final
class Simulation:
    """A server and its clients.

        cohort --> clients train (Algorithm, LocalTraining) --uplink--> mean (Aggregator) --> server optimizer --> x

    Results depend on the seed alone: not on the order of clients, nor on the engine.

    Args:
        module: The model; it is the server's model whenever a round is over.
        clients: Their examples.
        algorithm: `FedAvg()`, `SCAFFOLD()`, `SCAFCOM(compressor)`, ….
        training: What a client does in a round.
        loss: `loss(module, *batch)`: the mean loss of a batch.
        cohort_size: Clients drawn per round, without replacement, 1 <= cohort_size <= len(clients); all by default.
        aggregator: How messages become one; their weighted mean by default.
        uplink: Compresses what clients send; for algorithms that do not do so themselves.
        downlink: Compresses the model that the server sends, as differences from what all clients have (`Downlink`);
            vectors that an algorithm sends along stay dense.
        buffers: What becomes of buffers, such as BatchNorm's statistics: "mean", "pooled", "local", "server" or
            `Recalibrate(batches)` (`Buffers`).
        server_lr: Of plain server steps, > 0.
        server_optimizer: Makes another optimizer of the server's parameters; its lr is its own.
        evaluate: Called with the module, in `eval()` mode, after every `evaluate_every` rounds.
        evaluate_every: Rounds, >= 1.
        dropout: Probability that a client that was drawn does not answer, 0 <= dropout < 1.
        on_error: Whether an error in a client stops the run or is reported in the record and skipped.
        times: How long clients take in virtual time: `FixedTimes`, `ExponentialTimes`, `HalfNormalTimes`, `TraceTimes`.
            A round takes as long as its slowest client.
        deadline: Virtual seconds after which the server goes on without those that are not done, > 0.
        stragglers: Whether those are dropped, or train on as many whole batches as they can before it ("partial").
        engine: Where clients run: in this process, or in all that torchrun started (`TorchrunEngine`).
        vectorize: Whether the clients of a cohort are trained at once, as one batched model, equal up to rounding. True
            raises where that is not possible; "auto" takes it where it is, and faster: in one process, small models,
            many clients with equally many examples (`StackedTrainer`).
        store: Folder for clients' vectors; in memory by default.
        seed: Of every draw.

    Cost:
        One model's memory whatever the number of clients, and 12 bytes per parameter at the server; clients' vectors as
        `ClientStore` says.

    Raises:
        ValueError: parts do not fit one another.

    Example:
        >>> from gradwire.federated import FedAvg
        >>> clients = Clients((torch.eye(4), torch.ones(4, 1)), [[0, 1], [2, 3]])
        >>> simulation = Simulation(nn.Linear(4, 1), clients, FedAvg(), LocalTraining(lr=0.5),
        ...                         loss=lambda module, x, y: nn.functional.mse_loss(module(x), y))
        >>> records = list(simulation.run(rounds=20))
        >>> records[-1].round, records[-1].bytes_up, records[-1].loss < 1e-3
        (20, 800, True)
    """

    def __init__(
        self,
        module: nn.Module,
        clients: Clients,
        algorithm: Algorithm,
        training: LocalTraining,
        *,
        loss: Loss,
        cohort_size: int | None = None,
        aggregator: Aggregator | None = None,
        uplink: Link | None = None,
        downlink: Link | None = None,
        buffers: BufferPolicy | Recalibrate = "mean",
        server_lr: float = 1.0,
        server_optimizer: OptimizerFactory | None = None,
        evaluate: Evaluate | None = None,
        evaluate_every: int = 1,
        dropout: float = 0.0,
        on_error: Literal["raise", "skip"] = "raise",
        times: ClientTimes | None = None,
        deadline: float | None = None,
        stragglers: Stragglers = "drop",
        engine: Engine | None = None,
        vectorize: Vectorize = "auto",
        store: Path | None = None,
        seed: int = 0,
    ) -> None:
        self.cohort_size = len(clients) if cohort_size is None else cohort_size
        check_parts(
            algorithm,
            aggregator,
            uplink,
            downlink,
            cohort_size=self.cohort_size,
            clients=len(clients),
            dropout=dropout,
        )
        self.engine: Engine = SerialEngine() if engine is None else engine
        self.model = FlatModel(module)
        self.engine.broadcast_(self.model.vector)
        self.clients, self.algorithm, self.training = clients, algorithm, training
        algorithm.check(
            training,
            clients=len(clients),
            cohort_size=self.cohort_size,
            numel=self.model.numel,
            server_lr=server_lr if server_optimizer is None else None,
        )
        compressor = algorithm.message_compressor
        self.uplink = Link(compressor) if compressor is not None else uplink
        if self.uplink is not None:
            self.uplink.check_participation(self.cohort_size, len(clients))
        self.server = Server(
            algorithm,
            self.model.vector,
            {name: parameter.shape for name, parameter in zip(self.model.names, self.model.parameters, strict=True)},
            lr=server_lr,
            optimizer=server_optimizer,
            sizes=server_sizes(algorithm, self.uplink, self.model.numel),
        )
        self.downlink = None if downlink is None else Downlink(downlink, self.model.vector, seed)
        kept = ClientRunner.state_sizes(algorithm, self.uplink, self.model.numel)
        own_buffers = Buffers(module, buffers)
        for buffer in own_buffers.tensors:
            self.engine.broadcast_(buffer)
        own_buffers.restore()
        self.buffers = own_buffers if own_buffers.tensors else None
        if self.buffers is not None and self.buffers.state_size:
            kept[Buffers.message] = self.buffers.state_size
        dtype, rank, world_size = self.model.vector.dtype, self.engine.rank, self.engine.world_size
        self.store = ClientStore(kept, len(clients), dtype, store, rank, world_size)
        trainer = LocalTrainer(self.model, loss, training)
        self.runner = ClientRunner(algorithm, self.model, trainer, clients, self.store, self.uplink, seed)
        # stacks differ with the number of ranks, and rounding with them
        self.runner.vectorize = vectorize if vectorize != "auto" or isinstance(self.engine, SerialEngine) else False
        template = WeightedMean() if aggregator is None else aggregator
        template.check(self.cohort_size)
        self.aggregators = {name: deepcopy(template) for name in algorithm.messages}
        if self.buffers is not None and self.buffers.sends:
            self.aggregators[self.buffers.message] = WeightedMean()
        self.runner.buffers = self.buffers
        self.collector = Collector(self.runner, self.aggregators, self.engine, self.store, on_error)
        self.evaluate, self.evaluate_every = evaluate, evaluate_every
        self.dropout, self.seed = dropout, seed
        if stragglers == "partial" and algorithm.needs_equal_steps:
            raise ValueError(
                f"Simulation: expected an algorithm whose clients may stop early with stragglers='partial', got "
                f"{algorithm!r}, whose clients must take the same number of steps. Use stragglers='drop'."
            )
        self.clock = RoundClock(times, deadline, stragglers, seed)
        if times is not None:
            times.check(len(clients))
        self.rounds, self.bytes_up, self.bytes_down, self.time = 0, 0, 0, 0.0
        self._total_weight = sum(algorithm.weight(i, count) for i, count in enumerate(clients.num_examples) if count)
        self.engine.agree(self.configuration())

    @property
    def module(self) -> nn.Module:
        """The server's model, between rounds."""
        return self.model.module

    def cohort(self, round: int) -> list[int]:
        """The clients that are drawn for a round, in order."""
        generator = torch.Generator().manual_seed(counter_rng.fold(self.seed, "cohort", round))
        drawn = torch.randperm(len(self.clients), generator=generator)[: self.cohort_size]
        return sorted(drawn.tolist())

    def run(self, rounds: int) -> Iterator[RoundRecord]:
        """Go through so many more rounds; each is done when its record is asked for."""
        for _ in range(rounds):
            yield self.step()

    def step(self) -> RoundRecord:
        """One round."""
        number = self.rounds
        cohort = self.cohort(number)
        working = [client for client in cohort if self.runner.load(client, number)]
        present = [client for client in working if not self._drops_out(number, client)]
        down = self._beside_model + vector_bytes(self.runner, None if self.downlink is None else self.downlink.link)
        plan = self.clock.plan(self.runner, present, number, now=self.time, bytes_down=down, lost=present != working)
        with kept_random_state(self.model.vector.device):
            tally = self._train(present, plan, number)
            self._update(tally, number)
        self.rounds += 1
        self.time = plan.end
        self.bytes_up += tally.nbytes
        self.bytes_down += self._download(present)
        return RoundRecord(
            round=self.rounds,
            loss=tally.loss,
            metrics=self._metrics(),
            bytes_up=self.bytes_up,
            bytes_down=self.bytes_down,
            time=self.time,
            participants=tally.participants,
            lost=len(cohort) - len(present),
            not_finite=tally.not_finite,
            failures=tally.failures,
            late=plan.late,
        )

    def _train(self, present: list[int], plan: RoundPlan, number: int) -> Tally:
        """Send the model to clients, have them trained, and add up what they send."""
        start = self.server.vector
        if self.downlink is not None and present:
            start = self.downlink.send(start, number)
        received = {name: self.server.state[name] for name in self.algorithm.broadcast}
        self.runner.limits = plan.steps
        try:
            return self.collector.collect(plan.clients, number, start, received)
        except Exception:
            self._rest()
            raise

    def _update(self, tally: Tally, number: int) -> None:
        """The server's step, and what clients keep of it."""
        settled: dict[int, dict[str, Tensor]] = {}
        sent_buffers: Tensor | None = None
        if tally.participants:
            mean = {name: aggregator.result() for name, aggregator in self.aggregators.items()}
            sent_buffers = mean.pop(Buffers.message, None)
            counts = {"participants": tally.participants, "clients": len(self.clients)}
            estimate_(mean, self.uplink, self.server.state, **counts)
            round = Round(
                number=number,
                participants=tally.participants,
                clients=len(self.clients),
                lr=self.training.lr_at(number),
                scalars=tally.scalars,
                weight=tally.weight,
                share=tally.weight / self._total_weight,
            )
            self.model.vector.copy_(self.server.vector)
            self.server.step(self.algorithm.server_step(mean, self.server.state, round))
            step = self.model.vector.sub_(self.server.vector)
            for sent in tally.pending:
                settled[sent.client] = self.algorithm.settle(sent.state, step, sent.steps, sent.lr)
        self.collector.keep(tally, settled)
        self._rest()
        if self.buffers is not None:
            self.buffers.settle(sent_buffers, tally.counters, self.seed, number)

    def _rest(self) -> None:
        """Give the module the server's model."""
        self.model.vector.copy_(self.server.vector)
        if self.buffers is not None:
            self.buffers.restore()

    def _download(self, present: list[int]) -> int:
        """Bytes that these clients received: the model and what is sent with it."""
        dense = vector_bytes(self.runner, None)
        models = dense * len(present) if self.downlink is None else self.downlink.deliver(present)
        return models + self._beside_model * len(present)

    @property
    def _beside_model(self) -> int:
        """Bytes that are sent to a client along with the model."""
        buffers = 0 if self.buffers is None else self.buffers.download
        return vector_bytes(self.runner, None) * len(self.algorithm.broadcast) + buffers

    def _drops_out(self, round: int, client: int) -> bool:
        if not self.dropout:
            return False
        return counter_rng.fold(self.seed, "dropout", round, client) < self.dropout * 2**62

    def _metrics(self) -> Mapping[str, float]:
        if self.evaluate is None or self.rounds % self.evaluate_every:
            return {}
        return metrics_of(self.module, self.evaluate)

    def configuration(self) -> dict[str, str]:
        """Every argument that results depend on, as text."""
        return configuration_of(self)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rounds to come depend on, but for clients' vectors, which `store` holds."""
        return {
            "server": self.server.state_dict(),
            "rounds": self.rounds,
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "time": self.time,
            "aggregators": {name: aggregator.state_dict() for name, aggregator in self.aggregators.items()},
            "buffers": None if self.buffers is None else self.buffers.state_dict(),
            "downlink": None if self.downlink is None else self.downlink.state_dict(),
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.server.load_state_dict(saved["server"])
        self.model.vector.copy_(self.server.vector)
        self.rounds, self.time = saved["rounds"], saved["time"]
        self.bytes_up, self.bytes_down = saved["bytes_up"], saved["bytes_down"]
        for name, aggregator in self.aggregators.items():
            aggregator.load_state_dict(saved["aggregators"][name])
        if self.buffers is not None:
            self.buffers.load_state_dict(saved["buffers"])
        if self.downlink is not None:
            self.downlink.load_state_dict(saved["downlink"])

    def save(self, path: str | os.PathLike[str], extra: Any = None) -> None:
        """Write a checkpoint of everything that the rounds to come depend on; every rank calls it.

        A run that is killed, started anew and loaded gives what it would have given, bit for bit, on any number of
        ranks, where clients are not trained at once. What stood at `path` stays until the new checkpoint is whole.
        Vectors of clients that lie in a folder stay there, and only the last checkpoint can use them.

        Args:
            path: Folder of the checkpoint, on a file system that all ranks share.
            extra: Anything of numbers, text, lists, dicts and tensors, such as the records so far.

        Raises:
            CheckpointError: a rank could not write.
        """
        save_simulation(path, self, extra)

    def load(self, path: str | os.PathLike[str]) -> Any:
        """Take over a checkpoint in a simulation that was made with the same arguments; every rank calls it.

        Returns:
            The `extra` that was saved.

        Raises:
            CheckpointError: there is none, it was altered, or an argument differs from the saved one (both are named).
        """
        return load_simulation(path, self)
