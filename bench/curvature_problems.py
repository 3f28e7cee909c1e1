"""What `gradwire bench curvature` trains, and with which optimizers."""

import hashlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from gradwire.bench import data
from gradwire.bench.kfac import KFAC
from gradwire.bench.model import ByteTransformer, nats_per_byte
from gradwire.compression import counter_rng
from gradwire.optim import LAMB, MKOR, MKORH

HYBRID: Mapping[str, Any] = {
    "windows": (10, 50),
    "check_every": 25,
    "threshold": 0.03,
    "patience": 2,
    "min_steps": 75,
}
"""Of MKORH, whose defaults are for runs longer than these."""

SPREAD = (0.25, 0.5, 1.0, 2.0, 4.0)
"""A method's learning rates, relative to the middle one of its family: the same number for all."""

Family = Literal["SGD", "K-FAC", "AdamW", "LAMB"]


class Problem(ABC):
    """A model, its batches, and its loss on what is held out.

    Args:
        seed: Of weights and batches.
    """

    model: nn.Module

    @abstractmethod
    def __init__(self, seed: int, corpus: data.Corpus) -> None: ...

    @abstractmethod
    def loss(self, step: int) -> Tensor:
        """Of the batch of a step."""

    @abstractmethod
    def validation_loss(self) -> float:
        """Of what is held out."""


@final
class Digits(Problem):
    """An autoencoder 64-128-64-16-64-128-64 of scikit-learn's digits with tanh; the loss is the sum over pixels."""

    WIDTHS = (64, 128, 64, 16, 64, 128, 64)
    BATCH, HELD_OUT = 64, 297

    def __init__(self, seed: int, corpus: data.Corpus) -> None:
        self._train, self._held_out = digits()
        self._seed = seed
        torch.manual_seed(seed)
        layers = [part for a, b in itertools.pairwise(self.WIDTHS) for part in (nn.Linear(a, b), nn.Tanh())]
        self.model = nn.Sequential(*layers[:-1])

    def loss(self, step: int) -> Tensor:
        """Mean over the batch."""
        keys = counter_rng.row_keys(counter_rng.fold("batch", self._seed, step), self.BATCH)
        return self._error(self._train[keys % len(self._train)])

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Mean over images."""
        return float(self._error(self._held_out))

    def _error(self, x: Tensor) -> Tensor:
        error: Tensor = (self.model(x) - x).square().sum(1).mean()
        return error


@final
class Text(Problem):
    """The transformer of `gradwire bench sweep` on its text."""

    LAYERS, WIDTH, HEADS, BATCH, CONTEXT, WINDOWS = 2, 64, 2, 16, 64, 64

    def __init__(self, seed: int, corpus: data.Corpus) -> None:
        self._corpus, self._seed = corpus, seed
        self._held_out = corpus.held_out(self.WINDOWS, self.CONTEXT, 0, 1)
        torch.manual_seed(seed)
        self.model = ByteTransformer(self.LAYERS, self.WIDTH, self.HEADS)

    def loss(self, step: int) -> Tensor:
        """Nats per byte."""
        inputs, targets = self._corpus.batch(self._seed, step, 0, self.BATCH, self.CONTEXT)
        return nats_per_byte(self.model(inputs), targets)

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Nats per byte."""
        inputs, targets = self._held_out
        return float(nats_per_byte(self.model(inputs), targets))


@final
@dataclass(frozen=True)
class Setting:
    """How a problem is trained.

    Args:
        problem: What.
        title: For a reader.
        targets: Validation losses to be reached; a run ends at the last one.
        steps: At most.
        every: Steps from one evaluation to the next.
        warmup: Steps over which the learning rate rises; then it stays.
        lrs: The middle of each family's learning rates.
    """

    problem: type[Problem]
    title: str
    targets: tuple[float, float]
    steps: int
    every: int
    warmup: int
    lrs: Mapping[Family, float]


SETTINGS: dict[str, Setting] = {
    "digits": Setting(
        Digits,
        "Digits autoencoder",
        (1.23, 0.9),
        600,
        5,
        0,
        {"SGD": 0.016, "K-FAC": 0.001, "AdamW": 0.008, "LAMB": 0.01},
    ),
    "text": Setting(
        Text, "Text model", (2.4, 2.2), 300, 10, 20, {"SGD": 0.08, "K-FAC": 0.01, "AdamW": 0.006, "LAMB": 0.01}
    ),
}


@final
@dataclass(frozen=True)
class Method:
    """An optimizer to compare.

    Args:
        family: Whose learning rates it is tried at.
        build: Makes one.
        base: The method that it is without curvature.
    """

    family: Family
    build: Callable[[nn.Module, float], Any]
    base: str | None = None


def _sgd(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def _adamw(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr)


def _lamb(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return LAMB(model.parameters(), lr=lr)


METHODS: dict[str, Method] = {
    "SGD(momentum=0.9)": Method("SGD", _sgd),
    "MKOR(SGD)": Method("SGD", lambda model, lr: MKOR(model, _sgd(model, lr)), "SGD(momentum=0.9)"),
    "MKOR(SGD, inverse='reference')": Method(
        "SGD", lambda model, lr: MKOR(model, _sgd(model, lr), inverse="reference"), "SGD(momentum=0.9)"
    ),
    "MKORH(SGD)": Method("SGD", lambda model, lr: MKORH(model, _sgd(model, lr), **HYBRID), "SGD(momentum=0.9)"),
    "K-FAC(SGD)": Method("K-FAC", lambda model, lr: KFAC(model, _sgd(model, lr)), "SGD(momentum=0.9)"),
    "LAMB": Method("LAMB", _lamb),
    "MKOR(LAMB)": Method("LAMB", lambda model, lr: MKOR(model, _lamb(model, lr)), "LAMB"),
    "AdamW": Method("AdamW", _adamw),
    "MKOR(AdamW)": Method("AdamW", lambda model, lr: MKOR(model, _adamw(model, lr)), "AdamW"),
}


def digits() -> tuple[Tensor, Tensor]:
    """Images of scikit-learn's digits, `[n, 64]` in [0, 1], to train on and held out; always the same ones.

    Raises:
        UsageError: It is not installed.
    """
    images, _ = data.digits("bench curvature", ", or choose --problems text")
    shuffled = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
    return shuffled[: -Digits.HELD_OUT], shuffled[-Digits.HELD_OUT :]


def digest(problem: str, corpus: data.Corpus) -> str:
    """A hash of a problem's data."""
    if problem == "text":
        return corpus.digest
    both = hashlib.blake2b(digest_size=8)
    for part in digits():
        both.update(part.numpy().tobytes())
    return both.hexdigest()
