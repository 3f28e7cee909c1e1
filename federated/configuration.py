"""`configuration_of`: what a simulation was made with, as text, to be compared over ranks and with checkpoints."""

import dataclasses
import functools
import hashlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from gradwire.federated.asynchronous import AsyncSimulation
    from gradwire.federated.simulation import Simulation


def configuration_of(simulation: "Simulation") -> dict[str, str]:
    """Every argument that results depend on, by a dotted name."""
    parts: dict[str, Any] = {
        "downlink": None if simulation.downlink is None else simulation.downlink.link,
        "aggregator": next(iter(simulation.aggregators.values())),
        "cohort_size": simulation.cohort_size,
        "clock": simulation.clock,
    }
    return common_facts(simulation) | described(parts)


def common_facts(simulation: "Simulation | AsyncSimulation") -> dict[str, str]:
    """Those of all simulations."""
    optimizer, model = simulation.server.optimizer, simulation.model
    parts: dict[str, Any] = {
        "algorithm": simulation.algorithm,
        "training": simulation.training,
        "uplink": simulation.uplink,
        "buffers": None if simulation.buffers is None else simulation.buffers.policy,
        "dropout": simulation.dropout,
        "seed": simulation.seed,
        "server_optimizer": None if optimizer is None else type(optimizer).__name__,
        "server_lr": simulation.server.lr if optimizer is None else None,
        "clients": len(simulation.clients),
        "num_examples": torch.tensor(simulation.clients.num_examples),
        "model": str(
            [(n, list(p.shape)) for n, p in zip(simulation.model.names, simulation.model.parameters, strict=True)]
        ),
        "dtype": model.vector.dtype,
    }
    if optimizer is not None:
        parts |= {f"server_optimizer.{name}": value for name, value in optimizer.defaults.items()}
    return described(parts)


def described(parts: dict[str, Any]) -> dict[str, str]:
    """Values as text, by a dotted name; dataclasses field by field."""
    facts: dict[str, str] = {}
    for name, value in parts.items():
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            facts[name] = type(value).__name__
            own = {f"{name}.{f.name}": getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
            facts |= described(own)
        else:
            facts[name] = _text(value)
    return facts


def _text(value: Any) -> str:
    """A value as text that is the same in every process."""
    if isinstance(value, Tensor):
        if value.numel() == 1:
            return repr(value.item())
        data = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        return f"{tuple(value.shape)} {hashlib.sha256(data).hexdigest()[:16]}"
    if isinstance(value, functools.partial):
        return f"partial({_text(value.func)}, {_text(value.args)}, {_text(value.keywords)})"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_text(item)}' for key, item in value.items())}}}"
    if hasattr(value, "fingerprint"):
        return f"{type(value).__qualname__} {value.fingerprint}"
    if value is None or isinstance(value, str | bool | int | float | torch.dtype):
        return repr(value)
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return type(value).__qualname__
