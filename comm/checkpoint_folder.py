"""The folder of a checkpoint: it appears whole or not at all, and what was altered since is noticed.

A checkpoint is written beside its place and takes it by renaming, when all ranks have finished. The one that stood
there steps aside first, so that at every moment one of the two is whole, and `finished` finds it. Beside its files
every rank leaves their digests.
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

from gradwire.comm.errors import CheckpointError

_DIGESTS = "digests-{}.json"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives the folder to write to; what all ranks have written there becomes the checkpoint at `path` at the end.

    After an error, on whichever rank, the checkpoint that stood at `path` still stands there.
    """
    rank = dist.get_rank() if _several() else 0
    partial, previous = _beside(path, "partial"), _beside(path, "previous")
    if rank == 0:
        if not (path / ".metadata").is_file() and (previous / ".metadata").is_file():
            _move(previous, path)  # an earlier save ended between its two renamings
        for left in (partial, previous):
            shutil.rmtree(left, ignore_errors=True)
        path.parent.mkdir(parents=True, exist_ok=True)
    _wait()
    yield partial
    _write_digests(partial, rank)
    _wait()
    if rank == 0:
        if path.exists():
            path.replace(previous)
        partial.replace(path)
        shutil.rmtree(previous, ignore_errors=True)
    _wait()


def finished(path: Path) -> Path:
    """Where the checkpoint of this name stands: there, or beside, if a save ended while it took the place."""
    previous = _beside(path, "previous")
    return previous if not (path / ".metadata").is_file() and (previous / ".metadata").is_file() else path


def verify(path: Path, files: Sequence[str]) -> None:
    """Compare the files with their digests, each on one rank.

    Files without a digest, such as those of a checkpoint that torch wrote, are taken as they are.

    Raises:
        CheckpointError: a file was altered since it was saved; every rank raises it and names the file.
    """
    digests: dict[str, str] = {}
    for place in path.glob(_DIGESTS.format("*")):
        digests |= json.loads(place.read_text())
    rank, size = (dist.get_rank(), dist.get_world_size()) if _several() else (0, 1)
    known = sorted(name for name in files if name in digests)
    altered = [i for i, name in enumerate(known) if i % size == rank and _digest(path / name) != digests[name]]
    first = _least(altered[0] if altered else len(known))
    if first < len(known):
        raise CheckpointError(
            f"load: expected {known[first]} in {path} as it was saved, got another content. It was cut or altered "
            "since; take an earlier checkpoint."
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


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _wait() -> None:
    """Until all ranks have come here."""
    _least(0)


def _least(value: int) -> int:
    """The least over all ranks."""
    if not _several():
        return value
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    least = torch.tensor([value], device=device)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return int(least)
