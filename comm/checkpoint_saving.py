"""`Saving`: a checkpoint that is written while training goes on.

The state is copied to host memory first. Then a thread does what `gradwire.comm.checkpoint.save` does, through a group
of its own, so that its collectives never interleave with those of training.
"""

import logging
import threading
import warnings
from pathlib import Path
from typing import Any, final

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.checkpoint.stateful import Stateful

from gradwire.comm.checkpoint_folder import reason, replacing
from gradwire.comm.collectives import timeout_of
from gradwire.comm.errors import CheckpointError

_log = logging.getLogger("gradwire")

ALONE = "torch.distributed is disabled, unavailable or uninitialized"
"""How torch's warning about a single process begins; it is a case like any other here."""


@final
class Saving:
    """A checkpoint on its way to its place; `gradwire.comm.checkpoint.async_save` gives it.

    One is in flight at a time: the next save, asynchronous or not, and the next load wait for it first. A process that
    comes to its end finishes it; one that dies leaves the checkpoint that stood there before.

    Args:
        path: Folder of the checkpoint.
        state: What to write; nobody else may change it.
        group: What the ranks agree through, used for nothing else meanwhile; None in a single process.
    """

    def __init__(self, path: Path, state: dict[str, Any], group: dist.ProcessGroup | None) -> None:
        self._path, self._group = path, group
        self._state: dict[str, Any] | None = state
        self._error: CheckpointError | None = None
        self._told = False
        self._thread = threading.Thread(target=self._write, name="gradwire-checkpoint")
        self._thread.start()

    def done(self) -> bool:
        """Whether it stands in its place, or has failed; on this rank, and perhaps not yet on another."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Return when it stands in its place.

        Raises:
            CheckpointError: it could not be written, on whichever rank; all ranks raise it. What was there before
                still is.
        """
        self._thread.join()
        self._told = True
        if self._error is not None:
            raise self._error

    def settle(self) -> None:
        """Like `wait`, but raises only what nobody has been told."""
        self._thread.join()
        if not self._told:
            self.wait()

    def _write(self) -> None:
        warnings.filterwarnings("ignore", ALONE)  # not for a while only: filters are those of all threads
        try:
            assert self._state is not None
            write(self._path, self._state, self._group)
        except CheckpointError as error:
            self._error = error
        except Exception as error:
            self._error = CheckpointError(f"save: could not write {self._path}: {reason(error)}.")
        finally:
            self._state = None
        if self._error is not None:
            _log.error("%s", self._error)


def write(path: Path, state: dict[str, Any], group: dist.ProcessGroup | None = None) -> None:
    """Write a checkpoint that takes its place when all ranks have finished."""
    with replacing(path, group) as folder:
        dcp_save(state, storage_writer=_Writer(folder), process_group=group)


class _Writer(FileSystemWriter):
    """Says what the file system said, such as that the disk is full, which torch's serialization hides."""

    def write_data(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().write_data(*args, **kwargs)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise


def staged(state: dict[str, Any]) -> dict[str, Any]:
    """A copy in host memory (pinned, with CUDA) that training cannot change."""
    cuda = torch.cuda.is_available()
    options = StagingOptions(
        use_pinned_memory=cuda, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=cuda
    )
    stager = DefaultStager(options)
    try:
        copied = stager.stage(
            {name: value.state_dict() if isinstance(value, Stateful) else value for name, value in state.items()}
        )
    finally:
        stager.close()
    assert isinstance(copied, dict)
    return copied


def group_for_saving() -> dist.ProcessGroup | None:
    """A gloo group of all ranks for this purpose alone, made once; every rank must come here at the same point."""
    global _made
    if not (dist.is_available() and dist.is_initialized()):
        return None
    world = dist.group.WORLD
    if _made is None or _made[0] is not world:
        _made = world, dist.new_group(backend="gloo", timeout=timeout_of(world))
    return _made[1]


_made: tuple[object, dist.ProcessGroup] | None = None
