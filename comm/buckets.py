"""`Buckets`: what a communicator keeps for the tensors of each `average_` call, and state that moves by name.

Hosts cut a model into buckets as they like, and cut it anew while training goes on. State belongs to parameters: when a
bucket with new tensors comes, it takes over the state of its parameters from whichever buckets held them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Generic, Protocol, TypeVar, final

from torch import Tensor


class Bucket(Protocol):
    """State of some parameters; keys are `state/parameter/first:last`, with a range of rows."""

    def rows(self) -> dict[str, Tensor]:
        """Views of the state tensors."""
        ...

    def fill(self, known: Mapping[str, Tensor]) -> None:
        """Copy values in from state tensors of the same parameters."""
        ...

    def commit(self, bad: Tensor) -> None:
        """Take new values over unless `bad`."""
        ...


B = TypeVar("B", bound=Bucket)


@final
class Buckets(Generic[B]):
    """All buckets of one communicator, by the names of their tensors."""

    def __init__(self) -> None:
        self._buckets: dict[tuple[str, ...], B] = {}
        self._waiting: dict[str, Tensor] = {}  # loaded, for parameters that no bucket holds yet

    def __iter__(self) -> Iterator[B]:
        return iter(self._buckets.values())

    def get(self, names: Sequence[str], make: Callable[[], B]) -> B:
        """The bucket of these tensors; a new one takes the place of all that share a tensor with it."""
        key = tuple(names)
        if key not in self._buckets:
            known = self.rows()
            for other in [other for other in self._buckets if not set(other).isdisjoint(names)]:
                self._buckets.pop(other)
            bucket = make()
            bucket.fill(known)
            self._buckets[key] = bucket
            self._wait(known)
        return self._buckets[key]

    def rows(self) -> dict[str, Tensor]:
        """Views of all state tensors."""
        rows = dict(self._waiting)
        for bucket in self:
            rows |= bucket.rows()
        return rows

    def load(self, rows: Mapping[str, Tensor]) -> None:
        """Take over state tensors; those of parameters not seen yet wait for them."""
        for bucket in self:
            bucket.fill(rows)
        self._wait({key: value.clone() for key, value in rows.items()})

    def commit(self, bad: Tensor) -> None:
        """Take new values over in all buckets unless `bad`."""
        for bucket in self:
            bucket.commit(bad)

    def _wait(self, rows: Mapping[str, Tensor]) -> None:
        here = {name for names in self._buckets for name in names}
        self._waiting = {
            key: value for key, value in rows.items() if key.partition("/")[2].rpartition("/")[0] not in here
        }
