"""Checkpoints of simulations: tensors and JSON in a folder that appears whole or not at all.

    .metadata               configuration, numbers, where each tensor is (JSON)
    __0_server.safetensors  tensors of the server
    __R_clients.safetensors vectors of the clients that rank R keeps, or their places in its file

Nothing is unpickled. `gradwire.comm.checkpoint.exists` says whether one stands there.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from gradwire.comm.checkpoint_folder import finished, reason, replacing, verify
from gradwire.comm.errors import CheckpointError
from gradwire.federated.client_store import ClientStore
from gradwire.federated.engine import Engine
from gradwire.federated.tensor_file import from_plain, read_tensors, to_plain, write_tensors

_FORMAT = "gradwire.federated 1"


class Saved(Protocol):
    """What can be saved: a simulation."""

    engine: Engine
    store: ClientStore

    def configuration(self) -> dict[str, str]:
        """Arguments that results depend on, as text."""

    def state_dict(self) -> dict[str, Any]:
        """Everything beside clients' vectors."""

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""


def save_simulation(path: str | os.PathLike[str], simulation: Saved, extra: Any = None) -> None:
    """Write a checkpoint; every rank calls it.

    Raises:
        CheckpointError: a rank could not write. What was there before still is.
    """
    rank, world_size = simulation.engine.rank, simulation.engine.world_size
    with replacing(Path(path)) as folder:
        folder.mkdir(exist_ok=True)
        tensors: dict[str, Tensor] = {}
        clients = to_plain(simulation.store.state_dict(), tensors, "clients")
        write_tensors(folder / f"__{rank}_clients.safetensors", tensors)
        _write_json(folder / f"__{rank}_clients.json", clients)
        if rank == 0:
            tensors = {}
            state = to_plain(simulation.state_dict(), tensors, "state")
            more = to_plain(extra, tensors, "extra")
            write_tensors(folder / "__0_server.safetensors", tensors)
            head = {"format": _FORMAT, "world_size": world_size, "configuration": simulation.configuration()}
            _write_json(folder / ".metadata", head | {"state": state, "extra": more})
    simulation.store.commit()


def load_simulation(path: str | os.PathLike[str], simulation: Saved) -> Any:
    """Take over a checkpoint; every rank calls it. Returns the `extra` that was saved.

    Raises:
        CheckpointError: there is none, a file was altered, or an argument differs from the saved one.
    """
    folder = finished(Path(path))
    if not (folder / ".metadata").is_file():
        raise CheckpointError(f"load: expected a finished checkpoint in {path}, found no .metadata file there.")
    verify(folder, [".metadata"])
    head = _read_json(folder / ".metadata")
    if not isinstance(head, dict) or head.get("format") != _FORMAT:
        raise CheckpointError(f"load: expected a checkpoint of a simulation in {folder}, got another one.")
    _compare(head["configuration"], simulation.configuration())
    ranks = range(head["world_size"])
    files = ["__0_server.safetensors", *(f"__{r}_clients.{kind}" for r in ranks for kind in ("safetensors", "json"))]
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"load: expected {len(files)} files in {folder}, missing {', '.join(missing)}.")
    verify(folder, files)
    tensors = read_tensors(folder / "__0_server.safetensors")
    try:
        state, extra = (from_plain(head[name], tensors) for name in ("state", "extra"))
        simulation.store.clear()
        for rank in ranks:
            own = read_tensors(folder / f"__{rank}_clients.safetensors")
            clients = from_plain(_read_json(folder / f"__{rank}_clients.json"), own)
            simulation.store.load_state_dict(clients, rank, len(ranks))
        simulation.load_state_dict(state)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"load: expected the state of this simulation in {folder}, got {reason(error)}."
        ) from error
    return extra


def _compare(saved: Mapping[str, str], now: Mapping[str, str]) -> None:
    for name in [*now, *(name for name in saved if name not in now)]:
        if saved.get(name) != now.get(name):
            raise CheckpointError(
                f"load: expected {name}={saved.get(name)} as in the checkpoint, got {name}={now.get(name)}. Make the "
                "simulation with the same arguments."
            )


def _write_json(place: Path, value: Any) -> None:
    with place.open("w") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())


def _read_json(place: Path) -> Any:
    try:
        return json.loads(place.read_text())
    except ValueError as error:
        raise CheckpointError(f"load: expected JSON in {place}, got another content.") from error
