"""`ClientRunner`: one client's part of a round, from what the server sent to what it gets back."""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from gradwire.compression import counter_rng
from gradwire.federated.algorithm import Algorithm, LocalWork
from gradwire.federated.buffers import Buffers
from gradwire.federated.client_store import ClientStore
from gradwire.federated.clients import Clients
from gradwire.federated.flat_model import FlatModel
from gradwire.federated.link import Link
from gradwire.federated.local_training import LocalTrainer
from gradwire.federated.random_state import seed_modules
from gradwire.federated.vectorize import STACK, StackedTrainer, Vectorize

SCALAR_BYTES = 8
"""Of each number that travels beside the vectors."""
BATCH_COST = 8.0
"""Of every batch, in passes over single examples: about 7 for LeNet-5 on a CPU, more for smaller models."""


@final
@dataclass
class ClientMessage:
    """What a client sends, and what it keeps once the server has it.

    Args:
        client: Its number.
        vectors: Messages as they arrive at the server, by name, `[numel]`; valid until the next client runs.
        scalars: Numbers beside them.
        weight: Of the messages in their mean.
        state: The client's new vectors, to be stored when the server has accepted the message.
        nbytes: What travelled.
        loss: Mean over the client's batches.
        steps: Batches that it trained on.
        lr: Its learning rate.
        counters: Of its buffers, if it sends them.
        sound: Whether what a compressor that may hide inf and NaN was given had none.
    """

    client: int
    vectors: dict[str, Tensor]
    scalars: dict[str, float]
    weight: float
    state: dict[str, Tensor]
    nbytes: int
    loss: float
    steps: int
    lr: float
    counters: list[int] = field(default_factory=list)
    sound: bool = True

    @property
    def finite(self) -> bool:
        """Whether no entry is inf or NaN."""
        return self.sound and all(_finite(vector) for vector in self.vectors.values())


def _finite(vector: Tensor) -> bool:
    return math.isfinite(vector.sum().item()) or bool(torch.isfinite(vector).all())


@final
@dataclass
class ClientRunner:
    """Trains clients, one after the other, in one resident model.

    Args:
        algorithm: What is corrected, sent and kept.
        model: Where clients are trained.
        trainer: How.
        clients: Their examples.
        store: Their vectors.
        uplink: What compresses their messages; None to send them as they are.
        seed: Of every draw: batches by (seed, round, client), compression by (seed, round, client, message).
    """

    algorithm: Algorithm
    model: FlatModel
    trainer: LocalTrainer
    clients: Clients
    store: ClientStore
    uplink: Link | None
    seed: int
    buffers: Buffers | None = field(default=None, init=False)
    limits: Mapping[int, int] = field(default_factory=dict, init=False)
    """Batches of those clients that must stop early in this round."""
    vectorize: Vectorize = field(default="auto", init=False)
    """Whether clients are trained at once."""
    _generator: torch.Generator = field(default_factory=torch.Generator, init=False)

    def __post_init__(self) -> None:
        self._stacked = StackedTrainer(self.model, self.trainer.loss, self.trainer.training)
        self._must_be_alone: str | None = None
        self._gradient_sum = torch.empty_like(self.model.vector) if self.algorithm.needs_gradients else None
        self._start_gradient = torch.empty_like(self.model.vector) if self.algorithm.needs_start_gradient else None
        in_place = self._start_gradient is None and not self.algorithm.measures  # y is needed no more
        self._pseudo_gradient = self.model.vector if in_place else torch.empty_like(self.model.vector)

    @staticmethod
    def state_sizes(algorithm: Algorithm, uplink: Link | None, numel: int) -> dict[str, int]:
        """The vectors that every client keeps, by name: the algorithm's, and the uplink's for every message."""
        sizes = dict.fromkeys(algorithm.client_state, numel)
        if uplink is not None:
            for message in algorithm.messages:
                own = uplink.state_sizes(numel, replicated=False)
                sizes |= {f"uplink.{message}.{name}": size for name, size in own.items()}
        return sizes

    def load(self, client: int, round: int) -> int:
        """Batches that a client will train on in a round."""
        return self.trainer.training.steps_for(self.clients.num_examples[client], round, client)

    def cost(self, client: int, round: int) -> float:
        """Work of a client in a round, in passes over examples: a batch costs as much as some of them besides."""
        training, examples = self.trainer.training, self.clients.num_examples[client]
        batches = self.load(client, round)
        of_each = examples if training.batch_size is None else min(examples, training.batch_size)
        whole = training.steps_of(round, client) is None
        return (training.epochs * examples if whole else batches * of_each) + BATCH_COST * batches

    def run(
        self, cohort: Sequence[int], round: int, start: Tensor, received: Mapping[str, Tensor]
    ) -> Iterator[ClientMessage | Exception]:
        """What each client sends, or the error that it raised; each is trained when it is asked for.

        Args:
            cohort: Clients.
            round: From 0.
            start: x as clients receive it, `[numel]`.
            received: What they receive with it.
        """
        stacks = -(-len(cohort) // STACK)
        for stack in range(stacks):
            clients = cohort[stack * len(cohort) // stacks : (stack + 1) * len(cohort) // stacks]
            stacked = self._train_stacked(clients, round, start, received)
            for position, client in enumerate(clients):
                try:
                    if stacked is None:
                        message = self.run_one(client, round, start, received)
                    else:
                        message = self.send(*stacked[position], round)
                except Exception as error:
                    yield error
                else:
                    yield message

    def _train_stacked(
        self, cohort: Sequence[int], round: int, start: Tensor, received: Mapping[str, Tensor]
    ) -> list[tuple[LocalWork, float]] | None:
        """The work and losses of clients that were trained at once; None where that is not asked for, or fails."""
        training, stacked = self.trainer.training, self._stacked
        if self.vectorize is False or (self.vectorize == "auto" and stacked.too_large):
            return None
        steps = [self.limits.get(client, self.load(client, round)) for client in cohort]
        examples = [self.clients.num_examples[client] for client in cohort]
        if self.vectorize == "auto" and not stacked.pays(steps, examples):
            return None
        sources = []
        for client, count in zip(cohort, steps, strict=True):
            key = counter_rng.fold(self.seed, round, client)
            generator = torch.Generator().manual_seed(key) if training.shuffle else None
            sources.append(
                self.clients.batches(
                    client, training.batch_size, steps=count, epochs=training.epochs, generator=generator
                )
            )
        if self._must_be_alone is None:
            self._must_be_alone = self._why_alone(cohort[steps.index(max(steps))], start)
            if self._must_be_alone and self.vectorize is True:
                raise ValueError(
                    "Simulation: expected clients that can be trained at once with vectorize=True, got "
                    f'{self._must_be_alone}. Set vectorize="auto".'
                )
        if self._must_be_alone:
            return None
        states = [self._state_of(client, start.device) for client in cohort]
        corrections = [self.algorithm.correction(start, received, state) for state in states]
        try:
            trained = stacked.run(
                start,
                sources,
                steps,
                examples,
                training.lr_at(round),
                corrections=[correction.vector for correction in corrections],
                proximal=corrections[0].proximal,
                sums_gradients=self.algorithm.needs_gradients,
            )
        except Exception as error:  # one after the other, each raises what is its own
            if self.vectorize is True:
                warnings.warn(
                    f"Simulation: clients of round {round} are trained one by one, since all at once raised "
                    f"{type(error).__name__}: {error}",
                    stacklevel=2,
                )
            return None
        return [
            (
                LocalWork(
                    client=client,
                    round=round,
                    num_examples=count,
                    steps=result.steps,
                    lr=training.lr_at(round),
                    momentum=training.momentum,
                    pseudo_gradient=torch.sub(start, result.vector, out=result.vector),
                    gradient_sum=result.total_gradient,
                    start_gradient=None,
                    state=state,
                    received=received,
                ),
                result.loss,
            )
            for client, count, state, result in zip(cohort, examples, states, trained, strict=True)
        ]

    def _why_alone(self, client: int, start: Tensor) -> str:
        """What stands against training clients at once; empty if nothing does."""
        if self.algorithm.measures or self._start_gradient is not None:
            return f"{type(self.algorithm).__name__}, which needs every client's model"
        self.model.vector.copy_(start)
        return self._stacked.why_impossible(self.clients.examples(client)) or ""

    def _state_of(self, client: int, device: torch.device) -> Mapping[str, Tensor]:
        return {name: value.to(device) for name, value in self.store.get(client).items()} if self.store.sizes else {}

    def run_one(
        self,
        client: int,
        round: int,
        start: Tensor,
        received: Mapping[str, Tensor],
        *,
        draw: int | None = None,
    ) -> ClientMessage:
        """Train one client.

        Args:
            client: Its number.
            round: From 0.
            start: x as the client receives it, `[numel]`.
            received: What it receives with it.
            draw: Number that random draws depend on in place of the round.
        """
        draw = round if draw is None else draw
        state = self._state_of(client, start.device)
        training, algorithm = self.trainer.training, self.algorithm
        key = counter_rng.fold(self.seed, draw, client)
        seed_modules(key, start.device)
        generator = self._generator.manual_seed(key) if training.shuffle else None
        if self.buffers is not None:
            self.buffers.restore(state.get(Buffers.message))
        correction = algorithm.correction(start, received, state)
        lr = training.lr_at(round)
        batches = self.clients.batches(
            client,
            training.batch_size,
            steps=self.limits.get(client, training.steps_of(round, client)),
            epochs=training.epochs,
            generator=generator,
        )
        steps, loss = self.trainer.run(
            start,
            batches,
            lr,
            correction=correction.vector,
            proximal=correction.proximal,
            total_gradient=self._gradient_sum,
        )
        pseudo_gradient = torch.sub(start, self.model.vector, out=self._pseudo_gradient)
        measured: Mapping[str, Tensor] = {}
        if algorithm.measures:
            measured = algorithm.measure(self.model, self.trainer.loss, self.clients.examples(client))
        if self._start_gradient is not None:
            everything = self.clients.batches(client, training.batch_size, steps=None, epochs=1, generator=None)
            self.trainer.gradient_at(start, everything, self._start_gradient)
        work = LocalWork(
            client=client,
            round=round,
            num_examples=self.clients.num_examples[client],
            steps=steps,
            lr=lr,
            momentum=training.momentum,
            pseudo_gradient=pseudo_gradient,
            gradient_sum=self._gradient_sum,
            start_gradient=self._start_gradient,
            state=state,
            received=received,
            measured=measured,
        )
        message = self.send(work, loss, draw)
        return message if self.buffers is None else self._with_buffers(message, self.buffers)

    def _with_buffers(self, message: ClientMessage, buffers: Buffers) -> ClientMessage:
        """The message with what becomes of the buffers that training ended with."""
        if buffers.sends:
            message.vectors[Buffers.message], message.counters = buffers.take()
            message.nbytes += buffers.nbytes
        if buffers.state_size:
            message.state[Buffers.message] = buffers.own()
        return message

    def send(self, work: LocalWork, loss: float, draw: int) -> ClientMessage:
        """What a client sends after its work; compression draws by (seed, draw, client, message)."""
        algorithm = self.algorithm
        vectors, nbytes = algorithm.message(work), 0
        new: dict[str, Tensor] = {}
        scalars = algorithm.message_scalars(work)
        link, sound = self.uplink, True
        if link is None:
            for vector in vectors.values():
                nbytes += vector.nbytes
        else:
            for name, vector in vectors.items():
                prefix = f"uplink.{name}."
                own = {key.removeprefix(prefix): v for key, v in work.state.items() if key.startswith(prefix)}
                seed = counter_rng.fold(self.seed, draw, work.client, name)
                sound = sound and (link.compressor.carries_non_finite or _finite(vector))
                size, vectors[name], kept = link.send(vector, own, seed)
                new |= {prefix + key: value for key, value in kept.items()}
                nbytes += size
        state = algorithm.commit(work, vectors) if algorithm.client_state else {}
        return ClientMessage(
            client=work.client,
            vectors=vectors,
            scalars=scalars,
            weight=algorithm.weight(work.client, work.num_examples),
            state=state | new,
            nbytes=nbytes + SCALAR_BYTES * len(scalars),
            loss=loss,
            steps=work.steps,
            lr=work.lr,
            sound=sound,
        )
