"""The toy model in shards inside and replicas across, for tests with real processes."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
import toy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from gradwire.comm import EF, EF21, Averager, Communicator, Plan, PowerSGD, TwoPhase, Warmup, attach
from gradwire.compression import BlockQuantize, ChunkTopK, Identity

CHUNK = ChunkTopK(k=8, chunk=256)
INT8 = BlockQuantize(bits=8, block=256)
ALL = Plan(min_ndim=0, min_numel=0)
Make = Callable[..., Averager]

MAKERS: dict[str, Make] = {
    "dense": lambda **o: Communicator(Identity(), **o),
    "dense-two-phase": lambda **o: Communicator(Identity(), feedback=EF(), exchange=TwoPhase(), **o),
    "chunk-EF21": lambda **o: Communicator(CHUNK, feedback=EF21(), plan=Plan(min_numel=256), **o),
    "int8-two-phase": lambda **o: Communicator(INT8, exchange=TwoPhase(second=INT8), **o),
    "int8-EF-two-phase": lambda **o: Communicator(INT8, feedback=EF(), exchange=TwoPhase(second=INT8), **o),
    "powersgd": lambda **o: PowerSGD(4, **o),
    "warmup": lambda **o: Warmup(Communicator(Identity(), **o), Communicator(CHUNK, feedback=EF(), **o), 2),
}


def mesh(replicas: int = 2) -> DeviceMesh:
    shape = replicas, dist.get_world_size() // replicas
    return init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))


def shard(model: nn.Sequential, mesh: DeviceMesh, **options: Any) -> Any:
    for layer in model:
        if not isinstance(layer, nn.Tanh):
            fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def attached(model: Any, mesh: DeviceMesh, make_communicator: Make, **options: Any) -> Averager:
    communicator = make_communicator(group=mesh["replicate"].get_group())
    attach(model, communicator, replicate=mesh["replicate"], **options)
    return communicator


def whole(model: nn.Module) -> list[Tensor]:
    return [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]


def train(model: Any, optimizer: Any, first: int, last: int) -> None:
    for step in range(first, last):
        optimizer.zero_grad()
        toy.loss(model, step).backward()
        optimizer.step()
