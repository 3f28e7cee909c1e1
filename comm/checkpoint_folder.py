"""The folder of a checkpoint: it appears whole or not at all, and what was altered since is noticed.

A checkpoint is written beside its place and takes it by renaming, when all ranks have finished. The one that stood
there steps aside first, so that at every moment one of the two is whole, and `finished` finds it. Beside its files
every rank leaves their digests. What goes wrong on one rank is raised on all.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from gradwire.comm.errors import CheckpointError

_DIGESTS = "digests-{}.json"
_ALTERED = "It was cut or altered since; take an earlier checkpoint."


@contextlib.contextmanager
def replacing(path: Path, group: dist.ProcessGroup | None = None) -> Iterator[Path]:
    """Gives the folder to write to; what all ranks have written there becomes the checkpoint at `path` at the end.

    Args:
        path: Where the checkpoint is to stand.
        group: What the ranks agree through; the default group without it.

    Raises:
        CheckpointError: a rank could not write, or is gone. The checkpoint that stood at `path` still stands there,
            unless the new one already does.
    """
    rank = dist.get_rank() if _several() else 0
    partial, previous = _beside(path, "partial"), _beside(path, "previous")
    with _together(path, group):
        if rank == 0:
            if not (path / ".metadata").is_file() and (previous / ".metadata").is_file():
                _move(previous, path)  # an earlier save ended between its two renamings
            for left in (partial, previous):
                shutil.rmtree(left, ignore_errors=True)
            path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _together(path, group):
            yield partial
            _write_digests(partial, rank)
    except CheckpointError:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)  # perhaps for want of space
        raise
    with _together(path, group):
        if rank == 0:
            if path.exists():
                path.replace(previous)
            partial.replace(path)
            _flush(path.parent)
            shutil.rmtree(previous, ignore_errors=True)


def finished(path: Path) -> Path:
    """Where the checkpoint of this name stands: there, or beside, if a save ended while it took the place."""
    previous = _beside(path, "previous")
    return previous if not (path / ".metadata").is_file() and (previous / ".metadata").is_file() else path


def agreed(answer: bool) -> bool:
    """Whether all ranks say so."""
    return _least(int(answer)) == 1


def verify(path: Path, files: Sequence[str]) -> None:
    """Compare the files with their digests, each on one rank.

    Files without a digest, such as those of a checkpoint that torch wrote, are taken as they are.

    Raises:
        CheckpointError: a file was altered since it was saved; every rank raises it and names the file.
    """
    digests: dict[str, str] = {}
    for place in path.glob(_DIGESTS.format("*")):
        try:
            digests |= json.loads(place.read_text())
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"load: expected digests in {place}, got another content. {_ALTERED}") from error
    rank, size = (dist.get_rank(), dist.get_world_size()) if _several() else (0, 1)
    known = sorted(name for name in files if name in digests)
    altered = [i for i, name in enumerate(known) if i % size == rank and _digest(path / name) != digests[name]]
    first = _least(altered[0] if altered else len(known))
    if first < len(known):
        raise CheckpointError(
            f"load: expected {known[first]} in {path} as it was saved, got another content. {_ALTERED}"
        )


def _write_digests(folder: Path, rank: int) -> None:
    own = sorted(place.name for place in folder.glob(f"__{rank}_*")) + [".metadata"] * (rank == 0)
    text = json.dumps({name: _digest(folder / name) for name in own})
    place = folder / _DIGESTS.format(rank)
    with place.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _digest(place: Path) -> str:
    with place.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f"{path.name}.{suffix}")


def _move(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    source.replace(target)


def _flush(folder: Path) -> None:
    """Have the names in a folder outlive a loss of power, where the system can."""
    with contextlib.suppress(OSError):
        place = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(place)
        finally:
            os.close(place)


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextlib.contextmanager
def _together(path: Path, group: dist.ProcessGroup | None) -> Iterator[None]:
    """Wait at the end until all ranks have come there; what one of them raised inside is raised on all."""
    error: BaseException | None = None
    try:
        yield
    except (Exception, CheckpointException) as caught:
        error = caught
    rank, size = (dist.get_rank(), dist.get_world_size()) if _several() else (0, 1)
    what = ""
    try:
        first = _least(size if error is None else rank, group)
        if first < size:
            what = _told("" if error is None else reason(error, rank), first, group)
    except RuntimeError as broken:
        raise CheckpointError(
            f"save: a rank has ended or did not answer in time; {path} is as it was before or, if this was at the very "
            f"end, as it was to be ({reason(broken, rank)})."
        ) from (error or broken)
    if first < size:
        raise CheckpointError(f"save: could not write {path}: {what}. What was there before still is.") from error


def reason(error: BaseException, rank: int | None = None) -> str:
    """What went wrong and where, in one line, without the tracebacks of all ranks that torch puts in the message."""
    if isinstance(error, CheckpointException):
        return "; ".join(reason(cause, rank) for rank, (cause, _) in error.failures.items())
    first = str(error).strip().partition("\n")[0].rstrip(".")
    where = "" if rank is None else f"rank {rank}: "
    return f"{where}{type(error).__name__}: {first}"


def _told(text: str, rank: int, group: dist.ProcessGroup | None) -> str:
    """What one rank has to say, on every rank."""
    if not _several():
        return text
    texts = [text]
    dist.broadcast_object_list(texts, src=rank, group=group)
    return texts[0]


def _least(value: int, group: dist.ProcessGroup | None = None) -> int:
    """The least over all ranks."""
    if not _several():
        return value
    nccl = dist.get_backend(group) == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
    least = torch.tensor([value], device=device)
    dist.all_reduce(least, dist.ReduceOp.MIN, group=group)
    return int(least)
