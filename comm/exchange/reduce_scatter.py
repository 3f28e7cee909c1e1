"""`ReduceScatter`: every rank ends with the mean of its own shard alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import starmap
from typing import final

import torch
from torch import Tensor

from gradwire.comm.exchange.base import Bundle, Exchange, Outcome, decompress_mean
from gradwire.comm.exchange.scatter import scatter
from gradwire.comm.row_matrix import RowMatrix
from gradwire.compression.base import Compressor


@final
@dataclass(frozen=True)
class Slot:
    """One rank's shard of a parameter.

    Args:
        parameter: The parameter's name.
        whole: Its shape.
        dim: The dimension along which it is cut as `torch.chunk` cuts.
        owner: The rank that has this shard.
        owners: How many ranks share it.
    """

    parameter: str
    whole: torch.Size
    dim: int
    owner: int
    owners: int

    @property
    def name(self) -> str:
        """By which its gradient and its state are known."""
        return f"{self.parameter}[{self.owner}/{self.owners}]"

    @property
    def shape(self) -> torch.Size:
        """Of the shard, which is smaller than the others or empty at the end of an uneven dimension."""
        size = self.whole[self.dim]
        most = -(-size // self.owners)
        own = max(0, min(most, size - self.owner * most))
        return torch.Size([*self.whole[: self.dim], own, *self.whole[self.dim + 1 :]])

    def among(self, owners: int) -> "list[Slot]":
        """All shards of the parameter, if so many ranks share it."""
        return [Slot(self.parameter, self.whole, self.dim, owner, owners) for owner in range(owners)]


@final
class ReduceScatter(Exchange):
    """Send every rank its shard of the gradient, compressed, where it is averaged and stays.

        rank s receives C(p_i)[shard s] from every rank i;  m_s = mean_i C(p_i)[shard s]

    The first phase of `TwoPhase`, for a host that shards parameters and needs no second one, since every rank updates
    its shard alone: FSDP2, by `attach(fsdp_model, communicator)`, which says whose each tensor is. Feedback sees the
    whole gradient of a module, which it must keep on every rank, so it costs the memory that sharding saves; `EF` can
    keep it in 16 bits. What belongs to the mean (H of `EF21`) is kept for the own shard alone.

    What the plan sends dense travels in the same message, is summed in float32, and is decided on by whole parameters.
    Ranks learn of what is not finite from the messages and, once a step, by an all-reduce of four bytes.

    Cost:
        One all-to-all per bucket. Sends (n-1)/n of one payload's bytes from each rank; decompresses as much as one.

    State:
        None of its own. That of the feedback covers the shards of all ranks, but for what belongs to the mean.

    Example:
        >>> ReduceScatter()
        ReduceScatter()

    Reference:
        The gradients of Wang et al. ZeRO++. 2023. arXiv:2306.10209, section 3.3, with any compressor and with feedback.
    """

    consensus = False
    scatters = True
    weighs = True

    def __init__(self) -> None:
        self.slots: dict[str, Slot] = {}
        """The shards by name."""

    def __repr__(self) -> str:
        return "ReduceScatter()"

    def check(self, compressor: Compressor) -> None:
        """Any compressor will do."""

    @property
    def shards(self) -> int:
        """One shard per rank."""
        return self.ranks.size

    def deal(self, slots: Sequence[Slot]) -> None:
        """Whose each tensor is, from now on."""
        self.slots = {slot.name: slot for slot in slots}

    def owners(self, names: Sequence[str]) -> list[int]:
        """The rank whose shard each is.

        Raises:
            ValueError: nobody has said so.
        """
        if unknown := [name for name in names if name not in self.slots]:
            raise ValueError(
                f"ReduceScatter: expected the shards of an FSDP2 model, got {unknown[0]!r}. Use "
                "attach(fsdp_model, communicator), or TwoPhase(), after which all ranks have the whole mean."
            )
        return [self.slots[name].owner for name in names]

    def planned_as(self, name: str, shape: torch.Size) -> tuple[str, torch.Size]:
        """The whole parameter, so that all its shards go the same way."""
        return self.slots[name].parameter, self.slots[name].whole

    def averaged(self, held: RowMatrix) -> RowMatrix:
        """This rank's shard."""
        return held.owners(self.ranks.rank, self.ranks.rank + 1)

    def kept(self, matrix: RowMatrix) -> RowMatrix:
        """This rank's shard."""
        return self.averaged(matrix)

    def mean(self, compressor: Compressor, bundles: Sequence[Bundle], bad: Tensor) -> Outcome:
        """Scatter, and average the own shard."""
        if self.ranks.size > 1:
            sent = (part for bundle in bundles if bundle.dense is not None for part in bundle.parts)
            self.ranks.bytes.uncompressed += sum(part.numel() * part.element_size() for part in sent)
        shards, bad = scatter(self.ranks, bundles, bad)
        means = []
        for bundle, received in zip(bundles, shards, strict=True):
            keys = None if bundle.keys is None else bundle.keys[bundle.matrix.block(self.ranks.rank)]
            own, weights = self.averaged(bundle.matrix), None if bundle.dense is not None else self.weights
            means.append(decompress_mean(bundle.dense or compressor, received, own, keys, weights=weights))
        return Outcome(means, bad, [{} for _ in bundles])

    def dense_mean(self, held: RowMatrix, x: Tensor, bad: Tensor) -> tuple[Tensor, Tensor]:
        """Scatter the rows as they are, the flag behind them, and average the own shard in rank order."""
        flag = bad.to(x.dtype).view(1)
        messages = [torch.cat([x[held.block(rank)].reshape(-1), flag]) for rank in range(self.ranks.size)]
        total, *others = self.ranks.all_to_all(messages, [messages[self.ranks.rank].numel()] * self.ranks.size)
        for other in others:
            total = total + other
        if others:
            self.ranks.bytes.uncompressed += x.numel() * x.element_size()
        return (total[:-1] / self.ranks.size).view(-1, held.width), total[-1] != 0

    def recut(self, rows: Mapping[str, Tensor], compressor: Compressor) -> dict[str, Tensor]:
        """State of shards, by key `state/shard/first:last`, as that of the shards of so many ranks as there are now.

        Raises:
            ValueError: nobody has said what the shards are.
        """
        if not self.slots and rows:
            raise ValueError("ReduceScatter: expected a communicator that is attached, got none. Load after attach.")
        cut: dict[str, Tensor] = {}
        old: dict[tuple[str, str], dict[str, Tensor]] = {}
        for key, value in rows.items():
            state, _, rest = key.partition("/")
            name = rest.rpartition("/")[0]
            if name in self.slots:
                cut[key] = value
            else:
                old.setdefault((state, name.rpartition("[")[0]), {})[name] = value
        ours = {slot.parameter: slot for slot in self.slots.values()}
        for (state, parameter), values in old.items():
            if parameter not in ours:
                continue
            slot, owners = ours[parameter], int(next(iter(values)).rpartition("/")[2].removesuffix("]"))
            dtype = next(iter(values.values())).dtype
            shards = [
                _entries(values[old.name][0], old.shape, compressor)
                if old.name in values
                else torch.zeros(old.shape, dtype=torch.float64)
                for old in slot.among(owners)
            ]
            whole = torch.cat(shards, dim=slot.dim)
            runs = starmap(whole.narrow, _runs(slot))
            for new, run in zip(slot.among(slot.owners), runs, strict=True):
                if new.shape.numel():
                    made = _rows(run.contiguous(), compressor).to(dtype)
                    cut[f"{state}/{new.name}/0:{made.shape[0]}"] = made[None]
        return cut


def _runs(slot: Slot) -> list[tuple[int, int, int]]:
    """Where each shard lies in the whole: dimension, start, length."""
    most = -(-slot.whole[slot.dim] // slot.owners)
    size = slot.whole[slot.dim]
    return [(slot.dim, min(size, s.owner * most), s.shape[slot.dim]) for s in slot.among(slot.owners)]


def _matrix(shape: torch.Size, compressor: Compressor) -> RowMatrix:
    device = torch.device("cpu")
    tile = compressor.tile(shape)
    return RowMatrix([""], [shape], [0], torch.float64, tile, shards=1, workers=1, device=device)


def _rows(x: Tensor, compressor: Compressor) -> Tensor:
    """A tensor's rows, in the basis of the compressor."""
    matrix = _matrix(x.shape, compressor)
    return compressor.transform_rows(matrix.load([x], 1.0), matrix.tile)


def _entries(rows: Tensor, shape: torch.Size, compressor: Compressor) -> Tensor:
    """The inverse of `_rows`."""
    matrix = _matrix(shape, compressor)
    x = torch.empty(shape, dtype=torch.float64)
    matrix.store(compressor.inverse_transform_rows(rows.to(x), matrix.tile), [x], 1.0)
    return x
