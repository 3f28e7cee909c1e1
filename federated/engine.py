"""`Engine`: where the clients of a cohort run; `SerialEngine`, one after the other in this process."""

from collections.abc import Sequence
from typing import Protocol, final

from torch import Tensor


class Engine(Protocol):
    """Deals a cohort out to processes that all run the same simulation, and brings together what they found.

    Every process draws the same cohort and holds the same server. All but `deal` is collective: every process calls it
    at the same point.
    """

    rank: int
    world_size: int
    exact: bool
    """Whether messages are gathered and added up in the order of the cohort, even where sums would do."""

    def deal(self, loads: Sequence[float], owners: Sequence[int] | None = None) -> list[int]:
        """The rank that each client of the cohort runs on, given the work of each and who keeps its vectors."""

    def agree(self, facts: dict[str, str]) -> None:
        """Raise ConfigurationError on all ranks, with what differs, if a fact is not the same on all."""

    def broadcast_(self, tensor: Tensor) -> None:
        """Copy the first rank's values to all."""

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Add up float64 tensors over processes, in place, in one collective."""

    def gather(self, rows: Tensor, counts: Sequence[int]) -> list[Tensor]:
        """Every rank's rows `[counts[rank], width]`, in the order of ranks."""

    def gather_text(self, text: str) -> list[str]:
        """Every rank's text, in the order of ranks."""

    def exchange(self, rows: Sequence[Tensor], received: Sequence[int]) -> list[Tensor]:
        """Send `rows[r]`, 1-D, to rank r; returns what each rank sent here, of `received[r]` entries."""

    def close(self) -> None:
        """Wait for the others and leave; nothing can be run afterwards."""


@final
class SerialEngine:
    """All clients, one after the other, in this process.

    Example:
        >>> SerialEngine().deal([3, 1, 2])
        [0, 0, 0]
    """

    rank = 0
    world_size = 1
    exact = False

    def deal(self, loads: Sequence[float], owners: Sequence[int] | None = None) -> list[int]:
        """All here."""
        return [0] * len(loads)

    def agree(self, facts: dict[str, str]) -> None:
        """Nobody disagrees."""

    def broadcast_(self, tensor: Tensor) -> None:
        """They are the values."""

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """They are the sums."""

    def gather(self, rows: Tensor, counts: Sequence[int]) -> list[Tensor]:
        """They are all."""
        return [rows]

    def gather_text(self, text: str) -> list[str]:
        """It is all."""
        return [text]

    def exchange(self, rows: Sequence[Tensor], received: Sequence[int]) -> list[Tensor]:
        """What is sent here."""
        return [rows[0]]

    def close(self) -> None:
        """There is nobody to wait for."""
