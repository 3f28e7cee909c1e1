"""How clients and server work, as text: `"SCAFCOM(TopK(ratio=0.01))"`, `"FedAvg + QSGD(levels=15) + FedAdam(lr=0.03)"`.

The grammar is that of `gradwire.bench.specs`: a sum of terms, at most one of each family.
"""

import ast
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import nn

from gradwire.bench import specs
from gradwire.bench.errors import UsageError
from gradwire.federated import Aggregator, Algorithm, AsyncPolicy, ClientTimes, ClientTrace, FedAvg, Link, TraceTimes
from gradwire.federated.server import OptimizerFactory

FAMILIES = ("algorithm", "policy", "compressor", "feedback", "aggregator", "server optimizer")
"""What the terms of a method may be, in the order in which they are written."""

DEFAULT = "FedAvg"

_MORE = {"algorithm": ("algorithm", "policy"), "compressor": ("compressor", "feedback")}
"""Families of the terms that an option for the first of them may hold."""

_SECONDS_PER_EXAMPLE, _BYTES_DOWN, _BYTES_UP, _SPREAD = 1e-3, 125e3, 31e3, 0.5


@final
@dataclass(frozen=True)
class Method:
    """An algorithm with its uplink, aggregator and server optimizer; `FedAvg` unless the text names another.

    With a policy, such as `FedBuff`, the server does not wait for its clients.

    Args:
        text: As the user wrote it.
        terms: The parsed terms by family.

    Example:
        >>> method = parse("fedprox(mu=0.1) + TopK(ratio=0.01) + EF")
        >>> method.algorithm(), method.uplink(), method.aggregator()
        (FedProx(mu=0.1, weighting='samples'), Link(compressor=TopK(ratio=0.01), feedback=EF(decay=1.0)), None)
    """

    text: str
    terms: Mapping[str, ast.expr]

    def algorithm(self) -> Algorithm:
        """What clients and server do."""
        if "algorithm" not in self.terms:
            return FedAvg()
        made = specs.make(self.terms["algorithm"], "algorithm")
        assert isinstance(made, Algorithm)
        return made

    def policy(self) -> AsyncPolicy | None:
        """When a server steps that does not wait; None for rounds."""
        if "policy" not in self.terms:
            return None
        made = specs.make(self.terms["policy"], "policy")
        assert isinstance(made, AsyncPolicy)
        return made

    def uplink(self) -> Link | None:
        """What compresses messages; None if nothing does, or if the algorithm does by itself."""
        return _link(self.terms)

    def aggregator(self) -> Aggregator | None:
        """How messages become one; None for their mean."""
        if "aggregator" not in self.terms:
            return None
        made = specs.make(self.terms["aggregator"], "aggregator")
        assert isinstance(made, Aggregator)
        return made

    def server_optimizer(self, lr: float | None) -> OptimizerFactory | None:
        """Makes the server's optimizer; None for plain steps.

        Args:
            lr: Unless the text gives one; None for the optimizer's own, and 1 for SGD.
        """
        if "server optimizer" not in self.terms:
            return None
        term = self.terms["server optimizer"]
        name = ast.unparse(term.func if isinstance(term, ast.Call) else term)
        rate = 1.0 if lr is None and name.lower() == "sgd" else lr

        def factory(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
            return specs.make_optimizer(term, "server optimizer", parameters, lr=rate)

        return factory


def parse(text: str) -> Method:
    """Read a method and try its parts out, so that every mistake shows before anything is trained.

    Raises:
        UsageError: one sentence on what is wrong, and what exists.
    """
    terms = specs.terms(text, FAMILIES)
    if terms.pop("exchange", None) is not None:  # of `dense`
        terms.pop("compressor")
    method = Method(text, terms)
    method.algorithm()
    method.policy()
    method.aggregator()
    method.uplink()
    if (factory := method.server_optimizer(None)) is not None:
        factory([nn.Parameter(torch.zeros(1))])
    return method


def join(terms: Mapping[str, str]) -> str:
    """One text from texts by family, each checked to be of its family; the uplink's may name a feedback, too.

    Raises:
        UsageError: a name is unknown in its family.
    """
    texts = {"algorithm": DEFAULT, **terms}
    for family, text in texts.items():
        specs.terms(text, _MORE.get(family, (family,)))
    return " + ".join(texts[family] for family in FAMILIES if family in texts)


def link(text: str, option: str) -> Link:
    """A link of its own: `"TopK(ratio=0.01) + EF"`.

    Raises:
        UsageError: a name or value is wrong, or the two do not fit.
    """
    made = _link(specs.terms(text, ("compressor", "feedback")))
    if made is None:
        raise UsageError(f"{option}: expected a compressor, got {text!r}.")
    return made


def client_times(text: str, clients: int, seed: int) -> ClientTimes:
    """How long clients take.

    Args:
        text: "devices" for phones of unlike speed, drawn by the seed; "ExponentialTimes(2.0)" and the like; or the path
            of a trace in CSV.
        clients: How many there are.
        seed: Of the draw.

    Raises:
        UsageError: there is no such thing, or it has fewer clients.
    """
    try:
        if text.endswith(".csv"):
            times: Any = TraceTimes.from_csv(Path(text))
        elif text == "devices":
            times = devices(clients, seed)
        else:
            times = specs.make(specs.terms(text, ("client times",))["client times"], "client times")
        assert isinstance(times, ClientTimes)
        times.check(clients)
    except (OSError, ValueError) as error:
        raise UsageError(f"--times: {error}") from None
    return times


def devices(clients: int, seed: int) -> TraceTimes:
    """Phones that train 1000 examples a second, with 1 Mbit/s down and 0.25 Mbit/s up, each times a log-normal factor.

    The factors' logarithms have a standard deviation of one half.
    """
    factors = np.exp(_SPREAD * np.random.default_rng(seed).standard_normal((clients, 3)))
    typical = (_SECONDS_PER_EXAMPLE, _BYTES_DOWN, _BYTES_UP)
    return TraceTimes([ClientTrace(*(t * f for t, f in zip(typical, own, strict=True))) for own in factors.tolist()])


def _link(terms: Mapping[str, ast.expr]) -> Link | None:
    if "compressor" not in terms:
        return None
    parts = [specs.make(terms[family], family) for family in ("compressor", "feedback") if family in terms]
    try:
        return Link(*parts)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from None
