"""`Bucket`: parameters of one kind that are updated together, and what need not be prepared at every step."""

from typing import final

import torch

from gradwire.optim.compiled import Pack, Spares, pack
from gradwire.optim.layout import Flat


@final
class Bucket:
    """Parameters of one kind.

    Args:
        flats: The parameters.
        spares: What completes packs, if they are updated by compiled kernels.

    Attributes:
        steps: Step counts of `ordered`, then of the others; every state's `step` is a view of one of them.
        ordered: Those that hold anything, in the order of the packs, spares among them.
        packs: What compiled kernels take.
        sizes: `[len(ordered), dimensions]` float64, of whole parameters.
        keys: `[len(ordered)]` int64, random keys.
        sharded: Whether sums over them go over processes.
    """

    def __init__(self, flats: list[Flat], spares: Spares | None) -> None:
        self.flats, self.fused = flats, spares is not None
        self.sharded = bool(flats[0].groups)
        self.ordered = [flat for flat in flats if self.sharded or not flat.empty]
        self.packs: list[Pack] = []
        if self.ordered:
            if spares is not None:
                self.ordered, self.packs = pack(self.ordered, spares)
            self.sizes = torch.stack([flat.sizes for flat in self.ordered])
            self.keys = torch.stack([flat.key for flat in self.ordered])
        everything = [*self.ordered, *(flat for flat in flats if flat.empty and not self.sharded)]
        self.steps = torch.stack([flat.step for flat in everything])
        for i, flat in enumerate(everything):
            flat.count_in(self.steps, i)

    def is_for(self, flats: list[Flat], *, fused: bool) -> bool:
        """Whether it can be used again: for the same parameters, whose steps nobody else has counted since."""
        same = self.flats == flats and self.fused == fused
        return same and all(flat.counted_in is self.steps for flat in flats)
