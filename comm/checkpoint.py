"""Save and load communicators, models and optimizers with `torch.distributed.checkpoint`.

Every rank's residuals are saved. At the same world size they come back bit for bit; at another one every rank starts
from the mean over the old ranks, which is what the sum of all future steps depends on.
"""

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from gradwire.comm.averager import Averager
from gradwire.comm.checkpoint_folder import agreed, finished, reason, verify
from gradwire.comm.checkpoint_saving import ALONE, Saving, group_for_saving, staged, write
from gradwire.comm.errors import CheckpointError
from gradwire.comm.local_sgd import LocalSGD
from gradwire.comm.rank_state import RankState


def save(path: str | os.PathLike[str], **objects: Any) -> None:
    """Write a checkpoint; every rank calls it.

    It takes its place when all ranks have finished: whatever fails before, a process that dies included, leaves an
    earlier checkpoint of this name as it was.

    Args:
        path: Folder of the checkpoint, on a file system that all ranks share.
        **objects: By name: communicators, modules, optimizers (with their module as `model`; the `communicator` of one
            that exchanges by itself is taken along), `LocalSGD`, and anything that `torch.distributed.checkpoint` takes
            (state dicts, objects with `state_dict` and `load_state_dict`).

    Raises:
        CheckpointError: a rank could not write, or did not answer; or an `async_save` before has failed, and nobody
            has waited for it. Every rank raises it.

    Example:
        >>> save(folder, communicator=communicator, model=model, optimizer=optimizer)  # doctest: +SKIP
    """
    wait()
    with _one_process_is_fine():
        state = _state(objects)  # first: taking an optimizer's state may finish what its communicator does
        write(Path(path), {**state, **_communicators_of(objects)})


def async_save(path: str | os.PathLike[str], **objects: Any) -> Saving:
    """Write a checkpoint while training goes on; every rank calls it.

    It holds the state as of this call, which returns when that is copied to host memory. Otherwise it is as `save` is:
    whole or not at all. The ranks agree through a gloo group of its own, made at the first call.

    Args:
        path: Folder of the checkpoint, on a file system that all ranks share.
        **objects: As in `save`.

    Returns:
        A handle with `wait()`, which raises what went wrong, and `done()`. Before `destroy_process_group()`, wait: for
        it, or with `gradwire.comm.checkpoint.wait()` for whichever is in flight.

    Cost:
        A copy of the state in host memory until it is written. One is in flight at a time: a further save waits.

    Raises:
        CheckpointError: the `async_save` before has failed, and nobody has waited for it.

    Example:
        >>> saving = async_save(folder, communicator=communicator, model=model)  # doctest: +SKIP
        >>> saving.wait()  # doctest: +SKIP
    """
    global _in_flight
    wait()
    with _one_process_is_fine():
        state = _state(objects)
    copied = staged({**state, **_communicators_of(objects)})
    _in_flight = Saving(Path(path), copied, group_for_saving())
    return _in_flight


_in_flight: Saving | None = None


def wait() -> None:
    """Return when no `async_save` is in flight; to be called before `destroy_process_group()`.

    Raises:
        CheckpointError: it has failed, and nobody has waited for it.
    """
    global _in_flight
    saving, _in_flight = _in_flight, None
    if saving is not None:
        saving.settle()


def exists(path: str | os.PathLike[str]) -> bool:
    """Whether a finished checkpoint stands there, the same on every rank; every rank calls it.

    With it a script that is started anew after a fault, as elastic launchers do, goes on where it was.
    """
    return agreed((finished(Path(path)) / ".metadata").is_file())


def load(path: str | os.PathLike[str], **objects: Any) -> None:
    """Restore the objects that `save` wrote, in place; every rank calls it.

    Load only what you trust: torch keeps the metadata of a checkpoint as a pickle.

    Args:
        path: Folder of the checkpoint.
        **objects: As in `save`; any part of what was saved.

    Raises:
        CheckpointError: a file or entry is missing or was altered (named), or a hyper-parameter of a communicator
            differs from the saved one (both values named); or an `async_save` before has failed, and nobody has waited
            for it.
    """
    wait()
    with _one_process_is_fine():
        _load(finished(Path(path)), objects)


def _load(path: Path, objects: dict[str, Any]) -> None:
    metadata = _read_metadata(path)
    communicators: dict[str, Averager | RankState] = {
        name: value for name, value in objects.items() if isinstance(value, Averager)
    }
    others = {name: value for name, value in objects.items() if name not in communicators}
    communicators |= _communicators_of(objects)
    if others:
        state = _state(others)
        try:
            dcp_load(state, checkpoint_id=os.fspath(path))
        except (Exception, CheckpointException) as error:
            raise CheckpointError(f"load: could not read {sorted(others)} from {path}: {reason(error)}") from error
        _restore(others, state)
    for name, communicator in communicators.items():  # last: loading an optimizer may run its hooks
        _load_communicator(path, name, communicator, metadata.state_dict_metadata)


@contextlib.contextmanager
def _one_process_is_fine() -> Iterator[None]:
    """Keep torch from warning about a single process, which is a case like any other here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ALONE)
        yield


def _state(objects: Mapping[str, Any]) -> dict[str, Any]:
    """What torch's checkpoint takes for each object; plain names of parameters, so that wrappers may change."""
    state: dict[str, Any] = {}
    for name, value in objects.items():
        if isinstance(value, nn.Module):
            state[name] = get_model_state_dict(value)
        elif isinstance(value, torch.optim.Optimizer):
            state[name] = get_optimizer_state_dict(_model_of(objects, name), value)
        elif not isinstance(value, LocalSGD):
            state[name] = value
    return state


def _communicators_of(objects: Mapping[str, Any]) -> dict[str, Averager | RankState]:
    """Communicators and other state of each rank that belong to optimizers and `LocalSGD`, under names of their own."""
    owned = {
        f"{name}/{part}": getattr(value, part, None)
        for name, value in objects.items()
        if isinstance(value, torch.optim.Optimizer | LocalSGD)
        for part in ("communicator", "rank_state")
    }
    return {name: value for name, value in owned.items() if isinstance(value, Averager | RankState)}


def _restore(objects: Mapping[str, Any], state: dict[str, Any]) -> None:
    for name, value in objects.items():
        if isinstance(value, nn.Module):
            set_model_state_dict(value, state[name])
        elif isinstance(value, torch.optim.Optimizer):
            set_optimizer_state_dict(_model_of(objects, name), value, state[name])
        elif isinstance(value, dict):
            value.update(state[name])


def _model_of(objects: Mapping[str, Any], name: str) -> nn.Module:
    model = objects.get("model")
    if not isinstance(model, nn.Module):
        raise TypeError(f"checkpoint: expected model=... beside the optimizer {name!r}, got {type(model).__name__}.")
    return model


def _read_metadata(path: Path) -> Any:
    """Metadata of a checkpoint whose files are all there."""
    if not (path / ".metadata").is_file():
        raise CheckpointError(f"load: expected a finished checkpoint in {path}, found no .metadata file there.")
    verify(path, [".metadata"])
    try:
        metadata = FileSystemReader(path).read_metadata()
    except Exception as error:
        raise CheckpointError(f"load: expected the metadata of a checkpoint in {path}, got {reason(error)}.") from error
    files = {info.relative_path for info in (metadata.storage_data or {}).values()}
    missing = sorted(name for name in files if not (path / name).is_file())
    if missing:
        raise CheckpointError(
            f"load: expected {len(files)} files in {path}, missing {', '.join(missing)}. Every rank writes its own."
        )
    verify(path, sorted(files))
    return metadata


def _load_communicator(path: Path, name: str, communicator: Averager | RankState, entries: Mapping[str, Any]) -> None:
    if f"{name}.head" not in entries:
        raise CheckpointError(f"load: expected the state of {name!r} in {path}, found none.")
    head_of = {name: {"head": ""}}
    dcp_load(head_of, checkpoint_id=os.fspath(path))
    head = communicator.check_head(head_of[name]["head"])
    ranks = communicator.connect()

    keys: list[dict[str, str]] = []  # of every saved rank: the entry of each state tensor
    for rank in range(head["world_size"]):
        prefix = f"{name}.rows.{communicator.saved_as(rank)}"
        keys.append({entry.removeprefix(prefix): entry for entry in entries if entry.startswith(prefix)})
    lost = [rank for rank, found in enumerate(keys) if not found and any(keys)]
    if lost:
        raise CheckpointError(f"load: expected the state of {len(keys)} ranks for {name!r}, missing rank {lost[0]}.")

    if head["world_size"] == ranks.size:
        communicator.restore(head, _read_rows(path, name, keys[ranks.rank], entries))
    else:
        communicator.restore(head, _mean_rows(path, name, keys, entries))


def _read_rows(path: Path, name: str, keys: Mapping[str, str], entries: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state tensors of one saved rank."""
    rows = {}
    for entry in keys.values():
        saved = entries[entry]
        assert isinstance(saved, TensorStorageMetadata)
        rows[entry.removeprefix(f"{name}.rows.")] = torch.empty(saved.size, dtype=saved.properties.dtype)
    dcp_load({name: {"rows": rows}}, checkpoint_id=os.fspath(path))
    return {key: rows[entry.removeprefix(f"{name}.rows.")] for key, entry in keys.items()}


def _mean_rows(path: Path, name: str, keys: list[dict[str, str]], entries: Mapping[str, Any]) -> dict[str, Tensor]:
    """For every state tensor the mean over the ranks (and workers) that hold a row: keys `state/parameter/0:rows`."""
    rows: dict[str, int] = {}
    for found in keys:
        for key in found:
            tensor, _, span = key.rpartition("/")
            rows[tensor] = max(rows.get(tensor, 0), int(span.partition(":")[2]))
    total: dict[str, Tensor] = {}
    holders = {tensor: torch.zeros(count, dtype=torch.float64) for tensor, count in rows.items()}
    dtypes: dict[str, torch.dtype] = {}
    for found in keys:
        for key, value in _read_rows(path, name, found, entries).items():
            tensor, _, span = key.rpartition("/")
            first, last = map(int, span.split(":"))
            dtypes[tensor] = value.dtype
            if tensor not in total:
                total[tensor] = torch.zeros((1, rows[tensor], value.shape[2]), dtype=torch.float64)
            total[tensor][0, first:last] += value.to(torch.float64).sum(0)
            holders[tensor][first:last] += value.shape[0]
    return {
        f"{tensor}/0:{rows[tensor]}": (value / holders[tensor].clamp(min=1)[:, None]).to(dtypes[tensor])
        for tensor, value in total.items()
    }
