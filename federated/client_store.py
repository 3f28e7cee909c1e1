"""`ClientStore`: the vectors that clients keep from round to round, in memory or in a file."""

import os
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from gradwire.comm.errors import CheckpointError


@final
class ClientStore:
    """Named vectors per client, all zeros until they are first put.

    A store with a folder keeps all vectors in one file there, read and written client by client. What a checkpoint
    refers to is never overwritten: a client's new vectors go to another place in the file, and the old place is free
    again when the next checkpoint stands. So a run that was killed in the middle of a round or of a write goes back to
    its last checkpoint, which holds places and checksums alone.

    Args:
        sizes: Entries of every vector, by name.
        clients: Number of clients.
        dtype: float32 or float64.
        folder: Where the file lies; None to keep vectors in memory. A file of an earlier run is kept until the first
            `put`, so that a checkpoint can still be loaded.
        rank: Of this process, among those that share a simulation.
        world_size: How many there are; each keeps the clients whose number is its rank modulo world_size.

    Cost:
        4 bytes per entry, client and name in float32, of clients that took part; in a file, at most twice that. A store
        with a folder holds no vectors in memory.

    Raises:
        ValueError: the dtype is another one.

    Example:
        >>> store = ClientStore({"control": 2}, clients=100)
        >>> store.put(7, {"control": torch.ones(2)})
        >>> store.get(7)["control"], store.get(8)["control"], store.touched
        (tensor([1., 1.]), tensor([0., 0.]), [7])
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        clients: int,
        dtype: torch.dtype = torch.float32,
        folder: Path | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"ClientStore: expected dtype float32 or float64, got {dtype}.")
        self.sizes, self.clients, self.dtype, self.folder = dict(sizes), clients, dtype, folder
        self.rank, self.world_size = rank, world_size
        self.numel = sum(self.sizes.values())
        self.lent: dict[int, dict[str, Tensor]] = {}
        """Vectors of clients that lie in another process and train here in this round."""
        self._zeros = {name: torch.zeros(size, dtype=dtype) for name, size in self.sizes.items()}
        self._memory: dict[int, dict[str, Tensor]] = {}
        self._file: _RowFile | None = None
        if folder is not None and self.sizes:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = _RowFile(self.path(folder, rank, world_size), self.numel, dtype)

    @staticmethod
    def path(folder: Path, rank: int, world_size: int) -> Path:
        """The file of a rank."""
        return folder / f"clients-{rank}-of-{world_size}.state"

    @property
    def touched(self) -> list[int]:
        """Clients of this process whose vectors were put, in order."""
        return sorted(self._memory if self._file is None else self._file.places)

    def owner(self, client: int) -> int:
        """The rank that keeps a client's vectors."""
        return client % self.world_size

    def get(self, client: int) -> dict[str, Tensor]:
        """A client's vectors, on the host; do not change them in place."""
        if client in self.lent:
            return self.lent[client]
        if self._file is None:
            return self._memory.get(client, self._zeros)
        return self._zeros if client not in self._file.places else self.split(self._file.read(client))

    def put(self, client: int, vectors: Mapping[str, Tensor]) -> None:
        """Keep new vectors of a client: all names that the store has; they must not be changed afterwards."""
        assert vectors.keys() == self.sizes.keys()
        assert self.owner(client) == self.rank
        if self._file is None:
            self._memory[client] = {name: vector.to("cpu", self.dtype) for name, vector in vectors.items()}
        else:
            self._file.write(client, self.row(vectors))

    def forget(self, clients: Iterable[int]) -> None:
        """Set the vectors of some clients back to zeros."""
        for client in clients:
            self._memory.pop(client, None)
            if self._file is not None:
                self._file.drop(client)

    def row(self, vectors: Mapping[str, Tensor]) -> Tensor:
        """All of a client's vectors in one, on the host, `[numel]`."""
        return torch.cat([vectors[name].to("cpu", self.dtype) for name in self.sizes])

    def split(self, row: Tensor) -> dict[str, Tensor]:
        """The vectors that lie in a row."""
        return dict(zip(self.sizes, torch.split(row, list(self.sizes.values())), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the vectors or, of a store with a folder, their places and checksums.

        `commit` must follow when the checkpoint stands; until then the one before stays whole, too.
        """
        if self._file is None:
            return {"kind": "vectors", "vectors": {str(client): dict(self._memory[client]) for client in self.touched}}
        return {"kind": "places", **self._file.state_dict()}

    def commit(self) -> None:
        """Free the places that the last `state_dict` does not need."""
        if self._file is not None:
            self._file.commit()

    def load_state_dict(self, saved: Mapping[str, Any], rank: int = 0, world_size: int = 1) -> None:
        """Take over from what a rank had saved the clients that this one keeps; others' stay.

        Args:
            saved: What `state_dict` gave there.
            rank: Who saved it.
            world_size: Of how many.

        Raises:
            CheckpointError: a file is missing or holds other vectors than it did then.
        """
        if saved["kind"] == "vectors":
            for client, vectors in saved["vectors"].items():
                if self.owner(int(client)) == self.rank:
                    self.put(int(client), vectors)
            return
        if self.folder is None:
            raise CheckpointError(
                "load: expected store=FOLDER, in which the checkpoint keeps clients' vectors, got none."
            )
        if (rank, world_size) == (self.rank, self.world_size):
            assert self._file is not None
            self._file.load_state_dict(saved)
            return
        source = _RowFile(self.path(self.folder, rank, world_size), self.numel, self.dtype)
        source.load_state_dict(saved, only=lambda client: self.owner(client) == self.rank)
        for client in list(source.places):
            if self.owner(client) == self.rank:
                self.put(client, self.split(source.read(client)))
        source.close()

    def clear(self) -> None:
        """Set all clients' vectors back to zeros."""
        self.forget(self.touched)


@final
class _RowFile:
    """Rows of one length in a file, by client; places that a checkpoint refers to are written no more."""

    def __init__(self, path: Path, numel: int, dtype: torch.dtype) -> None:
        self.path, self.numel, self.dtype = path, numel, dtype
        self.places: dict[int, int] = {}
        self._nbytes = numel * dtype.itemsize
        self._handle: int | None = None
        self._free: list[int] = []
        self._end = 0
        self._checksums: dict[int, int] = {}  # of places, where known
        self._kept: set[int] = set()  # places of the checkpoint that stands
        self._next: set[int] = set()  # places of the one that is being written

    def read(self, client: int) -> Tensor:
        """A client's row."""
        return self._read(self.places[client])

    def write(self, client: int, row: Tensor) -> None:
        """Put a client's row where no checkpoint looks."""
        before = self.places.get(client)
        place = before
        if place is None or place in self._kept or place in self._next:
            if self._free:
                place = self._free.pop()
            else:
                place, self._end = self._end, self._end + 1
        self._checksums.pop(place, None)
        view, offset = row.contiguous().numpy().data.cast("B"), place * self._nbytes
        while view:
            done = os.pwrite(self._open(), view, offset)
            view, offset = view[done:], offset + done
        self.places[client] = place

    def drop(self, client: int) -> None:
        """Forget a client's row."""
        place = self.places.pop(client, None)
        if place is not None and place not in self._kept and place not in self._next:
            self._free.append(place)

    def state_dict(self) -> dict[str, Any]:
        """Clients, places and checksums, once the rows are on the disk."""
        if self._handle is not None:
            os.fsync(self._handle)
        clients = sorted(self.places)
        places = [self.places[client] for client in clients]
        for place in places:
            if place not in self._checksums:
                self._checksums[place] = _checksum(self._read(place))
        self._next = set(places)
        return {
            "clients": torch.tensor(clients, dtype=torch.int64),
            "places": torch.tensor(places, dtype=torch.int64),
            "checksums": torch.tensor([self._checksums[place] for place in places], dtype=torch.int64),
        }

    def commit(self) -> None:
        """The checkpoint stands that the last `state_dict` is in."""
        self._kept, self._next = self._next, set()
        used = self._kept | set(self.places.values())
        self._free = [place for place in range(self._end - 1, -1, -1) if place not in used]

    def load_state_dict(self, saved: Mapping[str, Any], only: Any = None) -> None:
        """Take over places, after a look at what lies there."""
        columns = [saved[name].tolist() for name in ("clients", "places", "checksums")]
        self.places, self._checksums = {}, {}
        self._end = max(columns[1], default=-1) + 1
        self._open(empty=False)
        for client, place, checksum in zip(*columns, strict=True):
            if (only is None or only(client)) and (place < 0 or _checksum(self._read(place)) != checksum):
                raise CheckpointError(
                    f"load: expected the vectors of client {client} in {self.path} as they were saved, got others. "
                    "Only the last checkpoint of a store on disk can be loaded, with the file that it was saved beside."
                )
            self.places[client], self._checksums[place] = place, checksum
        self._next = set(columns[1])
        self.commit()

    def close(self) -> None:
        """Close the file."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def __del__(self) -> None:
        self.close()

    def _open(self, *, empty: bool = True) -> int:
        if self._handle is None:
            self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT | (os.O_TRUNC if empty else 0), 0o644)
        return self._handle

    def _read(self, place: int) -> Tensor:
        row = torch.zeros(self.numel, dtype=self.dtype)  # what lies beyond the end of a file that was cut
        view, offset = row.numpy().data.cast("B"), place * self._nbytes
        while view:
            done = os.preadv(self._open(), [view], offset)
            if done == 0:
                break
            view, offset = view[done:], offset + done
        return row


def _checksum(row: Tensor) -> int:
    return zlib.crc32(row.numpy().data.cast("B"))
