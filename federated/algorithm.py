"""`Algorithm`: what clients and server keep, send and do, in vectors of all trainable parameters."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from gradwire.compression.base import Compressor
from gradwire.federated.flat_model import FlatModel
from gradwire.federated.local_training import LocalTraining, Loss

Weighting = Literal["samples", "uniform"] | Callable[[int, int], float]
"""Of clients in means: by `num_examples`, all alike, or a function of (client, num_examples) that is >= 0."""

Vectors = Mapping[str, Tensor]


@dataclass(frozen=True)
class LocalWork:
    """What a client has done in a round.

    Args:
        client: Its number.
        round: Of the server, from 0.
        num_examples: Of the client.
        steps: Batches that it trained on, K.
        lr: Its learning rate.
        momentum: Of its SGD.
        pseudo_gradient: x - y, what the server sent minus what the client ended at, `[numel]`: it points uphill. May be
            overwritten.
        gradient_sum: Sum of the raw gradients of its batches, `[numel]`, if the algorithm `needs_gradients`; may be
            overwritten.
        start_gradient: Gradient of the mean loss of its examples at x, `[numel]`, if the algorithm
            `needs_start_gradient`; may be overwritten.
        state: The client's vectors, by the names of `client_state`; never changed in place.
        received: The server's vectors that were sent along with x, by the names of `broadcast`.
        measured: What `Algorithm.measure` found, if the algorithm `measures`.
    """

    client: int
    round: int
    num_examples: int
    steps: int
    lr: float
    momentum: float
    pseudo_gradient: Tensor
    gradient_sum: Tensor | None
    start_gradient: Tensor | None
    state: Vectors
    received: Vectors
    measured: Vectors = field(default_factory=dict)


@dataclass(frozen=True)
class Correction:
    """Terms that a client adds to every gradient: `vector + proximal (y - x)`."""

    vector: Tensor | None = None
    proximal: float = 0.0


_NO_CORRECTION = Correction()


@dataclass(frozen=True)
class Round:
    """What the server knows of a round beside the means of messages.

    Args:
        number: Of the round, from 0.
        participants: Clients whose messages count, S.
        clients: All clients, N.
        lr: The clients' learning rate.
        scalars: Means of the scalars that clients sent, by name, weighted like their messages.
        weight: Sum of the participants' weights.
        share: That sum over the sum of all clients' weights: S / N if they are uniform.
    """

    number: int
    participants: int
    clients: int
    lr: float
    scalars: Mapping[str, float]
    weight: float
    share: float


class Algorithm(ABC):
    """A federated optimization algorithm: what one client does around local training, and what the server does.

    One round, for each client of the cohort and then for the server:

        correction(start, received, state) --> local training --> message(work) --uplink--> commit(work, arrived)
        mean of arrived messages --> server_step --> pseudo-gradient --> server optimizer

    All vectors are `[numel]`, in the space of trainable parameters. Everything is element-wise, so that the same
    functions serve a cohort stacked to `[clients, numel]`. A subclass is a frozen dataclass of hyper-parameters
    without state of its own.
    """

    linear: ClassVar[bool] = True
    """Whether the vectors that clients and server keep are right only for means: median, Krum and the like are refused
    where there are any."""

    weighting: Weighting = "samples"

    # What it is made of; a subclass gives other values.

    @property
    def client_state(self) -> tuple[str, ...]:
        """Vectors that every client keeps from round to round; zeros at first."""
        return ()

    @property
    def server_state(self) -> tuple[str, ...]:
        """Vectors that the server keeps beside the model; zeros at first."""
        return ()

    @property
    def broadcast(self) -> tuple[str, ...]:
        """Of these, those that are sent to clients along with the model."""
        return ()

    @property
    def messages(self) -> tuple[str, ...]:
        """Vectors that a client sends."""
        return ("pseudo_gradient",)

    @property
    def scalars(self) -> tuple[str, ...]:
        """Numbers that a client sends beside them."""
        return ()

    @property
    def needs_gradients(self) -> bool:
        """Whether clients sum up their raw gradients."""
        return False

    @property
    def needs_start_gradient(self) -> bool:
        """Whether clients compute the gradient of all their examples at the model that they receive."""
        return False

    @property
    def measures(self) -> bool:
        """Whether clients call `measure` after their training; such clients train one after the other."""
        return False

    @property
    def needs_plain_sgd(self) -> bool:
        """Whether x - y must be lr times the sum of corrected gradients: no momentum, no other local optimizer."""
        return False

    @property
    def needs_equal_steps(self) -> bool:
        """Whether all clients must take the same number of steps."""
        return False

    @property
    def settles(self) -> bool:
        """Whether clients use the server's step: they need its next model exactly then."""
        return type(self).settle is not Algorithm.settle

    @property
    def message_compressor(self) -> Compressor | None:
        """What the algorithm itself compresses its message with; if there is one, no other uplink is taken."""
        return None

    # What it does.

    def check(
        self,
        training: LocalTraining,
        *,
        clients: int,
        cohort_size: int,
        numel: int,
        server_lr: float | None = 1.0,
    ) -> None:
        """Raise ValueError where the algorithm does not fit the local training, cohort, model or server.

        Args:
            training: What clients do.
            clients: Their number.
            cohort_size: How many take part in a round.
            numel: Trainable parameters.
            server_lr: Of plain server steps; None if the server has another optimizer.
        """
        if self.needs_plain_sgd and not training.plain:
            raise ValueError(
                f"{type(self).__name__}: expected local training by plain SGD, got {training}. Its state is the mean "
                "gradient (x - y) / (lr K), which it is not with momentum, weight decay or another optimizer."
            )

    def weight(self, client: int, num_examples: int) -> float:
        """Weight of a client's messages in their mean."""
        if self.weighting == "samples":
            return float(num_examples)
        return 1.0 if self.weighting == "uniform" else float(self.weighting(client, num_examples))

    def correction(self, start: Tensor, received: Vectors, state: Vectors) -> Correction:
        """What the client adds to every gradient of this round, which it begins at `start`, x."""
        return _NO_CORRECTION

    def measure(self, model: FlatModel, loss: Loss, examples: Sequence[Tensor]) -> dict[str, Tensor]:
        """Vectors that a client computes beside its training, in the model where it ended, if the algorithm `measures`.

        Args:
            model: The client's, which must be left as it is.
            loss: Of the module and a batch.
            examples: All of the client's.
        """
        return {}

    def message(self, work: LocalWork) -> dict[str, Tensor]:
        """The vectors that the client sends, by the names of `messages`."""
        return {"pseudo_gradient": work.pseudo_gradient}

    def message_scalars(self, work: LocalWork) -> dict[str, float]:
        """The numbers that it sends beside them, by the names of `scalars`."""
        return {}

    def commit(self, work: LocalWork, arrived: Vectors) -> dict[str, Tensor]:
        """The client's new vectors once the server has its message, which may be compressed, as `arrived`."""
        return {}

    def settle(self, state: Vectors, step: Tensor, steps: int, lr: float) -> dict[str, Tensor]:
        """The client's new vectors once it has the server's next model.

        Args:
            state: What `commit` gave.
            step: x before minus x after the server's step.
            steps: Batches that the client trained on.
            lr: Its learning rate.
        """
        return dict(state)

    @abstractmethod
    def server_step(self, mean: Vectors, state: dict[str, Tensor], round: Round) -> Tensor:
        """The pseudo-gradient that the server's optimizer is fed with, `[numel]`.

        Args:
            mean: Of the participants' messages; may be overwritten.
            state: The server's vectors, which are changed in place.
            round: What else is known.
        """
