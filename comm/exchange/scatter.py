"""`scatter`: every owner of rows receives its shard of the payloads of all ranks."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradwire.comm.collectives import Collectives
from gradwire.comm.exchange.base import Bundle
from gradwire.comm.exchange.message import MessageLayout


def scatter(ranks: Collectives, bundles: Sequence[Bundle], bad: Tensor) -> tuple[list[tuple[Tensor, ...]], Tensor]:
    """Send every owner its shard of the payload; returns what all ranks sent here, stacked by rank."""
    outgoing = [
        [tuple(part[bundle.matrix.block(rank)] for part in bundle.parts) for bundle in bundles]
        for rank in range(ranks.size)
    ]
    layouts = [MessageLayout(parts) for parts in outgoing]
    messages = [layout.pack(parts, bad) for layout, parts in zip(layouts, outgoing, strict=True)]
    own = layouts[ranks.rank]
    received = torch.stack(ranks.all_to_all(messages, [own.nbytes] * ranks.size))
    return own.unpack(received), own.bad(received)
