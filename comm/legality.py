"""Which compressor, feedback and exchange work together, and what to change where they do not."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from itertools import chain, combinations
from typing import Any

import torch

from gradwire.comm.exchange import AllGather, AllReduce, Exchange, Hierarchical, TwoPhase
from gradwire.comm.feedback import DIANA, EF, EF21, DecoupledMomentum, ErrorFeedback, NoFeedback
from gradwire.compression.base import Compressor
from gradwire.compression.identity import Identity
from gradwire.compression.scaled import Scaled

_NUMEL = 1 << 20


def check(compressor: Compressor, feedback: ErrorFeedback, exchange: Exchange, participants: int | None = None) -> None:
    """Raise ValueError if a product cannot work; the message says why, and names a legal one beside it."""
    problem = why_illegal(compressor, feedback, exchange, participants)
    if problem is not None:
        neighbour = legal_neighbour(compressor, feedback, exchange, participants)
        raise ValueError(problem if neighbour is None else f"{problem} Legal with all else as it is: {neighbour}.")


def why_illegal(
    compressor: Compressor, feedback: ErrorFeedback, exchange: Exchange, participants: int | None = None
) -> str | None:
    """What is wrong with a product, as one sentence with the remedy; None if it is legal."""
    try:
        exchange.check(compressor)
    except ValueError as error:
        return str(error)
    return (
        _requirement(feedback, compressor)
        or _growth(feedback, compressor)
        or _second_compression(compressor, feedback, exchange)
        or _merge(feedback, exchange)
        or _consensus(feedback, exchange)
        or _weights(feedback, exchange)
        or _participation(feedback, exchange, participants)
    )


def _requirement(feedback: ErrorFeedback, compressor: Compressor) -> str | None:
    """The mechanism must converge with this compressor."""
    name = type(feedback).__name__
    if feedback.requires == "contraction" and compressor.contraction(_NUMEL) is None:
        if compressor.omega(_NUMEL):
            remedy = "Set unbiased=False or stochastic=False, wrap it in Scaled, or use no feedback."
        else:
            remedy = "Use another, or no feedback."
        return f"{name}: expected a compressor that is a contraction, got {compressor!r}. {remedy}"
    if feedback.requires == "unbiased" and compressor.omega(_NUMEL) is None:
        return (
            f"{name}: expected an unbiased compressor, got {compressor!r}. Set unbiased=True or stochastic=True, or "
            "use EF or EF21."
        )
    return None


def _growth(feedback: ErrorFeedback, compressor: Compressor) -> str | None:
    """A momentum from which more than itself is taken out grows without bound."""
    omega = compressor.omega(_NUMEL)
    if not isinstance(feedback, DecoupledMomentum) or compressor.contraction(_NUMEL) is not None or omega is None:
        return None
    if (growth := feedback.growth(omega)) < 1:
        return None
    return (
        f"{feedback!r}: expected a compressor with which its momentum stays bounded, got {compressor!r}, which may "
        f"multiply its squared norm by {growth:.3g} a step. Wrap it in Scaled, or lower alpha."
    )


def _second_compression(compressor: Compressor, feedback: ErrorFeedback, exchange: Exchange) -> str | None:
    """What is compressed on the way back is remembered as a residual, which an unbiased mechanism does not expect."""
    if not exchange.compresses_twice:
        return None
    second = exchange.second if exchange.second is not None else compressor
    if feedback.requires == "unbiased" and second.omega(_NUMEL) != 0:
        return (
            f"{type(feedback).__name__}: expected an exchange that compresses once, got {exchange!r}. Use AllGather(), "
            "or a lossless second compressor."
        )
    return _requirement(feedback, second) if feedback.requires == "contraction" else None


def _merge(feedback: ErrorFeedback, exchange: Exchange) -> str | None:
    if feedback.needs_mean and exchange.merge != "mean":
        return (
            f"{type(feedback).__name__}: expected the mean over all ranks, got {exchange!r}. Use merge='mean', or "
            "DecoupledMomentum."
        )
    return None


def _consensus(feedback: ErrorFeedback, exchange: Exchange) -> str | None:
    """Where ranks end with other means of the same rows, what is replicated elsewhere is each rank's own."""
    if exchange.consensus or exchange.scatters or isinstance(feedback, NoFeedback) or feedback == EF21():
        return None
    return f"{exchange!r}: expected EF21() or no feedback, got {feedback!r}. Use either, or another exchange."


def _weights(feedback: ErrorFeedback, exchange: Exchange) -> str | None:
    if feedback.weights is not None and not exchange.weighs:
        return (
            f"{type(feedback).__name__}: expected an exchange that can weight ranks, got {exchange!r}. Use "
            "AllGather(), or EF21, which makes the same steps with most compressors."
        )
    return None


def _participation(feedback: ErrorFeedback, exchange: Exchange, participants: int | None) -> str | None:
    if participants is None:
        return None
    if feedback.absence == "refused":
        return (
            f"{type(feedback).__name__}: expected all ranks to take part, got participants={participants}. Use EF21, "
            "EF21W or no feedback."
        )
    agree = exchange.consensus or exchange.scatters
    if isinstance(exchange, Hierarchical) or not agree or exchange.merge != "mean":
        return f"{exchange!r}: expected all ranks to take part, got participants={participants}. Use AllGather()."
    return None


def legal_neighbour(
    compressor: Compressor, feedback: ErrorFeedback, exchange: Exchange, participants: int | None = None
) -> str | None:
    """A legal product beside this one, as the arguments to change: one if that will do, else two; None without any."""
    asked: dict[str, Any] = {
        "compressor": compressor,
        "feedback": feedback,
        "exchange": exchange,
        "participants": participants,
    }
    one: list[list[dict[str, Any]]] = [
        [{"exchange": other} for other in _exchanges(compressor)],
        [{"compressor": other} for other in _compressors(compressor)],
        [{"feedback": other} for other in (EF(), EF21(), DIANA(), NoFeedback())],
        [{"participants": None}] if participants is not None else [],
    ]
    two = [first | second for some, others in combinations(one, 2) for first in some for second in others]
    for changes in [*chain(*one), *two]:
        if why_illegal(**{**asked, **changes}) is None:
            return ", ".join(f"{name}={value!r}" for name, value in changes.items())
    return None


def _exchanges(compressor: Compressor) -> Iterator[Exchange]:
    yield AllGather()
    yield AllReduce()
    yield TwoPhase(second=Identity(width=compressor.row_width(torch.Size([_NUMEL]))))


def _compressors(compressor: Compressor) -> Iterator[Compressor]:
    """The same with its bias changed, and the same scaled."""
    known: Any = compressor
    names: set[str] = {field.name for field in fields(known)} if is_dataclass(known) else set()
    for name in ("unbiased", "stochastic"):
        if name in names:
            yield replace(known, **{name: not getattr(compressor, name)})
    if compressor.omega(_NUMEL) is not None:
        yield Scaled(compressor)
