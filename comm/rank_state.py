"""`RankState`: tensors that differ from rank to rank, in the form in which communicators are saved."""

import json
from collections.abc import Callable, Mapping
from typing import Any, final

import torch
from torch import Tensor

from gradwire.comm.averager import Averager
from gradwire.comm.collectives import Collectives
from gradwire.comm.errors import CheckpointError

Contents = tuple[dict[str, Tensor], dict[str, Any]]


@final
class RankState:
    """What every rank must save of its own; on another number of ranks each starts from the mean over the old ones.

    Args:
        who: Its name in errors.
        communicator: Whose ranks these are.
        read: Gives tensors by name, and what is not a tensor (equal on all ranks, as JSON takes it).
        write: Takes both back.
    """

    def __init__(
        self,
        who: str,
        communicator: Averager,
        read: Callable[[], Contents],
        write: Callable[[dict[str, Tensor], dict[str, Any]], None],
    ) -> None:
        self._who, self._communicator, self._read, self._write = who, communicator, read, write

    def connect(self) -> Collectives:
        """The ranks."""
        return self._communicator.connect()

    def saved_as(self, rank: int) -> str:
        """The prefix of the state of this rank."""
        return self._communicator.saved_as(rank)

    def state_dict(self) -> dict[str, Any]:
        """This rank's state; keys carry the rank, and the shape of what a flat row holds."""
        ranks = self.connect()
        prefix = self.saved_as(ranks.rank)
        tensors, others = self._read()
        head = {"world_size": ranks.size, "who": self._who, "others": others}
        rows = {
            f"{prefix}{key}@{'x'.join(map(str, value.shape))}/0:1": value.detach().reshape(1, 1, -1).clone()
            for key, value in tensors.items()
        }
        return {"head": json.dumps(head), "rows": rows}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` of the same rank gave."""
        prefix = self.saved_as(self.connect().rank)
        rows = {key.removeprefix(prefix): row for key, row in state_dict["rows"].items() if key.startswith(prefix)}
        self.restore(self.check_head(state_dict["head"]), rows)

    def check_head(self, text: str) -> dict[str, Any]:
        """Parse a saved head.

        Raises:
            CheckpointError: it is something else's.
        """
        head: dict[str, Any] = json.loads(text)
        if head.get("who") != self._who:
            raise CheckpointError(f"load: expected the state of {self._who}, got that of {head.get('who')}.")
        return head

    def restore(self, head: Mapping[str, Any], rows: Mapping[str, Tensor]) -> None:
        """Take over a checked head and its tensors."""
        tensors = {}
        for path, flat in rows.items():
            key, _, shape = path.removesuffix("/0:1").rpartition("@")
            tensors[key] = flat.reshape([int(size) for size in shape.split("x") if size])
        with torch.no_grad():
            self._write(tensors, head["others"])
