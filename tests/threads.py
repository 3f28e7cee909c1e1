"""Ranks as threads of one process, for arithmetic that needs n ranks but no processes."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gradwire.comm.collectives import Bytes


class Thread:
    """The collectives of one of n ranks that are threads of this process."""

    def __init__(self, rank: int, board: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size, self.bytes = rank, len(board), Bytes()
        self._board, self._barrier = board, barrier

    def _share(self, value: Any) -> list[Any]:
        self._board[self.rank] = value
        self._barrier.wait()
        everyone = list(self._board)
        self._barrier.wait()
        return everyone

    def all_reduce_(self, x: Tensor, *, uncompressed: int = 0) -> Tensor:
        return x.copy_(sum(self._share(x.clone())))

    def all_gather(self, message: Tensor) -> Tensor:
        return torch.stack(self._share(message.clone()))

    def all_to_all(self, messages: Sequence[Tensor], received: Sequence[int]) -> list[Tensor]:
        mine = [sent[self.rank] for sent in self._share([message.clone() for message in messages])]
        assert [message.numel() for message in mine] == list(received)
        return mine

    def gather_bytes(self, data: bytes, device: torch.device) -> list[bytes]:
        return self._share(data)


def on_threads(n: int, work: Callable[[int, Thread], None]) -> None:
    """Call `work(rank, collectives)` on n threads."""
    board, barrier, errors = [b""] * n, threading.Barrier(n, timeout=30), []

    def run(rank: int) -> None:
        try:
            work(rank, Thread(rank, board, barrier))
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
