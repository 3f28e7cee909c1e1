"""One of every public compressor, feedback and exchange, and all their products.

A class stands here twice where a setting changes what is legal: with and without bias, rounded to the nearest or at
random, with and without sizes. Rows are 256 entries wide wherever a setting says so.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from itertools import combinations
from typing import Any, final

import torch

from gradwire.comm import (
    DIANA,
    EF,
    EF21,
    EF21SGDM,
    EF21W,
    MARINA,
    AllGather,
    AllReduce,
    Communicator,
    DecoupledMomentum,
    EControl,
    ErrorFeedback,
    Exchange,
    Gossip,
    Hierarchical,
    NoFeedback,
    ReduceScatter,
    TwoPhase,
)
from gradwire.compression import (
    DARE,
    QSGD,
    BlockQuantize,
    Cast,
    Chain,
    ChunkTopK,
    Compressor,
    DAREx,
    DCTTopK,
    Identity,
    NaturalCompression,
    RandomDithering,
    RandomK,
    Scaled,
    ScaledSign,
    TernGrad,
    ThresholdTopK,
    TopK,
)

RANKS = 2
"""Processes among whom products are tried: `EF21W` has a constant for each, `Gossip` a node, and `Hierarchical` puts
them in one node."""

_WIDTH = 256

COMPRESSORS: tuple[Compressor, ...] = (
    Identity(width=_WIDTH),
    Cast("bfloat16"),
    Cast("float16"),
    BlockQuantize(bits=8, block=_WIDTH),
    BlockQuantize(bits=2, block=_WIDTH, stochastic=True),
    ScaledSign(width=_WIDTH),
    TopK(ratio=0.05),
    ThresholdTopK(ratio=0.05),
    ChunkTopK(k=16, chunk=_WIDTH),
    DCTTopK(k=16, chunk=16),
    DCTTopK(k=16, chunk=16, values="sign"),
    RandomK(k=16, chunk=_WIDTH),
    RandomK(k=16, chunk=_WIDTH, unbiased=False),
    DARE(drop=0.9, chunk=_WIDTH),
    DAREx(drop=0.9, chunk=_WIDTH),
    Chain(ChunkTopK(k=16, chunk=_WIDTH), BlockQuantize(bits=8, block=16)),
    QSGD(bucket=_WIDTH),
    RandomDithering(bucket=_WIDTH),
    TernGrad(bucket=_WIDTH),
    NaturalCompression(),
    Scaled(QSGD(bucket=_WIDTH)),
)

FEEDBACKS: tuple[ErrorFeedback, ...] = (
    NoFeedback(),
    EF(),
    EF21(),
    EF21W(smoothness=(1.0, 3.0)),
    EF21SGDM(),
    EControl(),
    DIANA(),
    MARINA(),
    DecoupledMomentum(decay=0.9),
)

EXCHANGES: Mapping[str, Callable[[int], Exchange]] = {
    "AllReduce": lambda width: AllReduce(),
    "AllGather": lambda width: AllGather(),
    "AllGather, contributors": lambda width: AllGather(merge="contributors"),
    "TwoPhase": lambda width: TwoPhase(),
    "TwoPhase, 8 bits": lambda width: TwoPhase(second=BlockQuantize(bits=8, block=width)),
    "TwoPhase, lossless": lambda width: TwoPhase(second=Identity(width=width)),
    "Hierarchical, AllReduce": lambda width: Hierarchical(inside=RANKS, across=AllReduce()),
    "Hierarchical, AllGather": lambda width: Hierarchical(inside=RANKS, across=AllGather()),
    "ReduceScatter": lambda width: ReduceScatter(),
    "Gossip": lambda width: Gossip(1 - torch.eye(RANKS).numpy()),
}
"""By short name; made for rows of a width, since a second compressor must know it."""


@final
@dataclass(frozen=True)
class Product:
    """What a `Communicator` is made of, legal or not.

    Args:
        compressor: One of `COMPRESSORS`.
        feedback: One of `FEEDBACKS`.
        kind: One of `EXCHANGES`.
    """

    compressor: Compressor
    feedback: ErrorFeedback
    kind: str

    @property
    def exchange(self) -> Exchange:
        """A new one."""
        return EXCHANGES[self.kind](self.compressor.row_width(torch.Size([1 << 20])))

    @property
    def text(self) -> str:
        """As `gradwire train` reads it, if its exchange is not `Gossip`, which comes with a graph."""
        return " + ".join(map(spell, (self.compressor, self.feedback, self.exchange)))

    @property
    def attachable(self) -> bool:
        """Whether a host takes it: ranks end with the same mean."""
        return self.exchange.consensus

    def communicator(self, seed: int = 0) -> Communicator:
        """A new one.

        Raises:
            ValueError: the product is not legal.
        """
        return Communicator(self.compressor, feedback=self.feedback, exchange=self.exchange, seed=seed)

    @property
    def refusal(self) -> str | None:
        """The sentence with which it is refused; None if it is legal."""
        try:
            self.communicator()
        except ValueError as error:
            return str(error)
        return None


def products() -> list[Product]:
    """All, feedback by feedback and compressor by compressor."""
    return [Product(compressor, feedback, kind) for feedback in FEEDBACKS for compressor in COMPRESSORS
            for kind in EXCHANGES]  # fmt: skip


def legal_products() -> list[Product]:
    """Those that can be made, in the same order."""
    return [product for product in products() if product.refusal is None]


def cover(found: Sequence[Product], together: int) -> list[Product]:
    """Few of the products, such that every `together` parts (1 to 3) that meet in one of all meet in one of these."""

    def meetings(product: Product) -> set[tuple[str, ...]]:
        parts = f"{product.compressor!r}", f"{product.feedback!r}", product.kind
        return set(combinations(parts, together))

    left = set[tuple[str, ...]]().union(*map(meetings, found))
    chosen: list[Product] = []
    while left:
        best = max(found, key=lambda product: len(meetings(product) & left))  # the first of equals
        left -= meetings(best)
        chosen.append(best)
    return sorted(chosen, key=found.index)


def spell(part: Any) -> str:
    """A part as one would write it: what differs from its defaults, and a compressor's first argument in any case.

    Example:
        >>> spell(Chain(ChunkTopK(k=16, chunk=256), BlockQuantize(bits=8, block=16)))
        'Chain(first=ChunkTopK(k=16, chunk=256), second=BlockQuantize(bits=8, block=16))'
    """
    if not is_dataclass(part):
        second = getattr(part, "second", None)  # of an exchange
        return repr(part) if second is None else repr(part).replace(repr(second), spell(second))
    given = [
        f"{field.name}={spell(getattr(part, field.name))}"
        for place, field in enumerate(fields(part))
        if getattr(part, field.name) != field.default or (place == 0 and isinstance(part, Compressor))
    ]
    return f"{type(part).__name__}({', '.join(given)})"
