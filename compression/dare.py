"""`DARE`: drop entries at random and rescale the rest; and what it shares with `DAREx`."""

import functools
import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from gradwire.compression import counter_rng
from gradwire.compression.base import Compressor, Part, Randomness, compute_dtype
from gradwire.compression.checks import check_positive


@functools.lru_cache(maxsize=256)
def _capacity_and_share(width: int, drop: float) -> tuple[int, float]:
    """Slots of a row, and the exact probability that an entry gets one.

    The number K of kept entries is binomial. Slots are its mean and one standard deviation: they are sent whether or
    not they are used, and each further deviation would cost more bytes than the entries it saves. All entries are
    treated alike, so each is sent with probability pi = E min(K, capacity) / width.
    """
    keep = 1 - drop
    capacity = min(width, math.ceil(width * keep + math.sqrt(width * keep * drop)))
    if drop == 0:
        return capacity, 1.0
    log_keep, log_drop, log_width = math.log(keep), math.log(drop), math.lgamma(width + 1)
    mean = math.fsum(
        min(j, capacity)
        * math.exp(log_width - math.lgamma(j + 1) - math.lgamma(width - j + 1) + j * log_keep + (width - j) * log_drop)
        for j in range(1, width + 1)
    )
    return capacity, min(keep, mean / width)


def _look_up(width: int, drop: float) -> tuple[int, float]:
    return _capacity_and_share(width, drop)


_constant: Any = torch.compiler.assume_constant_result  # has no types
capacity_and_share: Callable[[int, float], tuple[int, float]] = _constant(_look_up)
"""Slots of a row of this width, and the exact probability that an entry gets one; a compiler takes it as it is."""


@torch.library.custom_op("gradwire::kept_positions", mutates_args=())  # opaque: a compiler would not keep its table
def kept_positions(keys: Tensor, width: int, drop: float) -> Tensor:
    """Where the entries in the slots of each row stand: int64 `[len(keys), capacity]`, -1 for slots that are not used.

    The gaps between kept entries are geometric, so only kept entries cost a random number. A row is walked from a
    random entry on, around its end, so that those for which no slot is left may be any.
    """
    capacity, _ = capacity_and_share(width, drop)
    draws = counter_rng.bits(keys[:, None], torch.arange(capacity + 1, dtype=torch.int64, device=keys.device))
    gaps = torch.searchsorted(_gap_table(width, drop, keys.device), draws[:, :-1].contiguous(), right=True)
    walked = gaps.cumsum(1) + torch.arange(capacity, dtype=torch.int64, device=keys.device)
    start = draws[:, -1:] * width >> 32
    return torch.where(walked < width, (walked + start) % width, -1)


@kept_positions.register_fake
def _(keys: Tensor, width: int, drop: float) -> Tensor:
    return keys.new_empty((keys.shape[0], capacity_and_share(int(width), drop)[0]))  # a compiler may bring a symbol


@functools.lru_cache(maxsize=256)
def _gap_table(width: int, drop: float, device: torch.device) -> Tensor:
    """2^32 P(gap < j) for j = 1, ..., width, where P(gap < j) = 1 - drop^j: in integers, so that all machines agree."""
    factor, tail, table = round(drop * 2**64), 1 << 64, []
    for _ in range(width):
        tail = tail * factor >> 64
        table.append((1 << 32) - (tail >> 32))
    with torch.inference_mode(False):
        return torch.tensor(table, dtype=torch.int64, device=device)


class RandomDrop(Compressor):
    """Send entries that each rank draws on its own, and the key that they are drawn from in place of their positions.

    Subclasses say by what the entries are multiplied.
    """

    drop: float
    chunk: int

    def __post_init__(self) -> None:
        who = type(self).__name__
        if not 0 <= self.drop < 1:
            raise ValueError(f"{who}: expected 0 <= drop < 1, got drop={self.drop!r}.")
        check_positive(who, "chunk", self.chunk)
        if not 2 <= self.chunk <= 65536:
            raise ValueError(f"{who}: expected 2 <= chunk <= 65536, got chunk={self.chunk}.")

    @abstractmethod
    def scale(self, width: int) -> float:
        """What sent entries of a row of this width are multiplied by."""

    @property
    def rescales(self) -> bool:
        """Unless by 1."""
        return self.scale(self.chunk) != 1

    @property
    def randomness(self) -> Randomness:
        """Every rank draws for itself."""
        return "private"

    def row_width(self, shape: torch.Size) -> int:
        """Rows of `chunk` entries whatever the shape."""
        return self.chunk

    def layout(self, width: int, dtype: torch.dtype) -> tuple[Part, ...]:
        """Slots for the kept values, and the row's key."""
        return Part("values", dtype, capacity_and_share(width, self.drop)[0]), Part("key", torch.int64, 1)

    def compress_rows(self, x: Tensor, dtype: torch.dtype, keys: Tensor | None = None) -> tuple[Tensor, ...]:
        """Draw positions and gather."""
        assert keys is not None
        return _gather(x, kept_positions(keys, x.shape[1], self.drop)).to(dtype), keys[:, None].clone()

    def compress_rows_with_sent(
        self, x: Tensor, dtype: torch.dtype, keys: Tensor | None = None
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Draw positions once for both."""
        assert keys is not None
        positions = kept_positions(keys, x.shape[1], self.drop)
        values = _gather(x, positions).to(dtype)
        sent = _scatter_add_(torch.zeros_like(x), positions, values.to(x.dtype) * self.scale(x.shape[1]))
        return (values, keys[:, None].clone()), sent

    def decompress_rows(self, parts: tuple[Tensor, ...], width: int, keys: Tensor | None = None) -> Tensor:
        """Draw the positions again and scatter the scaled values."""
        values = parts[0].to(compute_dtype(parts[0].dtype))
        positions = kept_positions(parts[1][:, 0], width, self.drop)
        return _scatter_add_(values.new_zeros((len(values), width)), positions, values * self.scale(width))

    def add_rows_(
        self, total: Tensor, parts: tuple[Tensor, ...], keys: Tensor | None = None, *, counts: Tensor | None = None
    ) -> None:
        """Add the scaled values at their positions, which are distinct."""
        width = total.shape[1]
        values = parts[0].to(total.dtype) * self.scale(width)
        positions = kept_positions(parts[1][:, 0], width, self.drop)
        _scatter_add_(total, positions, values)
        if counts is not None:
            _scatter_add_(counts, positions, (values != 0).to(counts.dtype))

    def check_parts(self, parts: tuple[Tensor, ...], width: int) -> None:
        """Keys are such as `counter_rng` makes."""
        if not ((parts[1] >= 0) & (parts[1] < 1 << 62)).all():
            raise ValueError(f"{type(self).__name__}: expected keys in [0, 2^62), got others.")

    def share(self, numel: int) -> float:
        """Least probability that an entry is sent, of a tensor of `numel` entries or of a row as wide as it."""
        widths = {self.chunk, min(self.chunk, max(1, numel))}
        return min(capacity_and_share(width, self.drop)[1] for width in widths)


def _gather(x: Tensor, positions: Tensor) -> Tensor:
    """Entries at the positions, zero in slots that are not used."""
    return torch.where(positions >= 0, x.gather(1, positions.clamp(min=0)), 0)


def _scatter_add_(total: Tensor, positions: Tensor, values: Tensor) -> Tensor:
    """Add values at their positions, in place; whatever slots hold that are not used adds nothing."""
    return total.scatter_add_(1, positions.clamp(min=0), torch.where(positions >= 0, values, 0))


@final
@dataclass(frozen=True)
class DARE(RandomDrop):
    """Drop every entry with probability `drop`, on each rank for itself, and rescale the rest so that the mean is x.

        C(x)_i = m_i x_i / pi,   m_i ~ Bernoulli(1 - drop),   pi = P(m_i = 1 and a slot is left) <= 1 - drop

    Ranks draw independently, so that the errors of n ranks average out: the mean of their C(x_i) is off by omega / n.
    With `RandomK` all draw alike, which lets payloads be added on the way but leaves the error as it is.

    Args:
        drop: Probability that an entry is dropped, 0 <= drop < 1.
        chunk: Entries of a chunk, 2..65,536. A tensor's last chunk is padded with zeros.

    Shapes:
        x: any, cut into rows of `chunk` entries. Payload: values `[rows, slots]` of x's dtype, not yet scaled, with
        slots = ceil(mean + standard deviation) of the number kept, 429 of 4096 at drop=0.9; key `[rows, 1]` int64.

    Cost:
        `slots itemsize + 8` bytes a chunk. One random number, gather and scatter for each slot.

    State:
        None.

    Example:
        >>> dare = DARE(drop=0.5, chunk=8)
        >>> dare.decompress(dare.compress(torch.ones(8), seed=1))
        tensor([0.0000, 2.0197, 2.0197, 0.0000, 0.0000, 0.0000, 0.0000, 0.0000])

    Reference:
        Yu, Yu, Yu, Huang, Li. Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free
        Lunch. ICML 2024. arXiv:2311.03099.

    Differences from the paper:
        Entries beyond the slots of a row are dropped, too, and the scale is 1 / pi rather than 1 / (1 - drop), so that
        the mean is exact (up to 2^-32, the resolution of the random numbers). The paper applies it once, to the
        difference of a fine-tuned model from its base.
    """

    drop: float = 0.9
    chunk: int = 4096

    def scale(self, width: int) -> float:
        """1 / pi."""
        return 1 / capacity_and_share(width, self.drop)[1]

    def contraction(self, numel: int) -> float | None:
        """1 - omega, where that is positive."""
        return 1 - self.omega(numel) if self.omega(numel) < 1 else None

    def omega(self, numel: int) -> float:
        """Exactly 1 / pi - 1: E (m_i / pi - 1)^2 = 1 / pi - 1 for each entry."""
        return 1 / self.share(numel) - 1
