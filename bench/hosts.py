"""Where `gradwire train` trains: the hosts of `gradwire.comm.attach`, each with the few lines that it asks for."""

import os
from collections.abc import Callable
from typing import Any, ClassVar, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from gradwire.bench.errors import UsageError
from gradwire.bench.model import ByteTransformer
from gradwire.comm import attach, keep_local
from gradwire.comm.averager import Averager


class Host:
    """A model where gradients are averaged before the optimizer sees them.

    Args:
        model: The model, on its device; a host that shards does it in place, before there is an optimizer.
        bucket_mb: Size of a gradient bucket in MiB, where the host has buckets.
        shards: Ranks that share a copy of the model, where the host shards; 0 for its choice.
    """

    sharded: ClassVar[bool] = False
    """Whether all ranks must run the model equally often, in evaluation, too."""

    def __init__(self, model: ByteTransformer, *, bucket_mb: float, shards: int) -> None:
        if shards and not isinstance(self, HSDP):
            raise UsageError(f"--shards: expected --host hsdp with it, got shards={shards}.")
        self.model, self.bucket_mb = model, bucket_mb
        self.forward: nn.Module = model
        """What training calls."""
        self.group: dist.ProcessGroup | None = None
        """The ranks whose gradients a communicator averages; all by default."""

    def attach(
        self, communicator: Averager, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None
    ) -> Callable[[], None] | None:
        """Have the communicator average gradients; returns what to call after backward, if anything."""
        attach(self.forward, communicator, optimizer=optimizer, scaler=scaler)  # type: ignore[call-overload]
        return None

    def keep_local(self) -> None:
        """Leave gradients to an optimizer that exchanges by itself."""


@final
class Loop(Host):
    """A plain training loop."""

    def attach(
        self, communicator: Averager, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None
    ) -> Callable[[], None]:
        """Hooks on parameters; gradients have arrived once the returned function has."""
        named = self.model.named_parameters()
        return attach(named, communicator, optimizer=optimizer, scaler=scaler, bucket_mb=self.bucket_mb).wait


@final
class DDP(Host):
    """`DistributedDataParallel`."""

    def __init__(self, model: ByteTransformer, *, bucket_mb: float, shards: int) -> None:
        super().__init__(model, bucket_mb=bucket_mb, shards=shards)
        self.forward = self._ddp = DistributedDataParallel(model, bucket_cap_mb=bucket_mb)

    def keep_local(self) -> None:
        """DDP averages nothing."""
        keep_local(self._ddp)


@final
class HSDP(Host):
    """FSDP2 inside groups of ranks, which hold one copy of the model each, and a communicator across the copies."""

    sharded = True

    def __init__(self, model: ByteTransformer, *, bucket_mb: float, shards: int) -> None:
        super().__init__(model, bucket_mb=bucket_mb, shards=shards)
        world_size = dist.get_world_size()
        shards = shards or _ranks_inside(world_size)
        if world_size % shards:
            raise UsageError(f"--shards: expected a divisor of {world_size} ranks, got shards={shards}.")
        shape = (world_size // shards, shards)
        mesh = init_device_mesh(_device_type(model), shape, mesh_dim_names=("replicate", "shard"))
        self._replicate = mesh["replicate"]
        self.group = self._replicate.get_group()
        shard(model, mesh["shard"])

    def attach(
        self, communicator: Averager, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None
    ) -> None:
        """A hook after FSDP2's own reduce-scatter."""
        model: Any = self.model
        attach(model, communicator, replicate=self._replicate, optimizer=optimizer, scaler=scaler)


HOSTS: dict[str, type[Host]] = {"ddp": DDP, "loop": Loop, "hsdp": HSDP}
"""By the name that `--host` takes."""


def shard(model: ByteTransformer, mesh: Any) -> None:
    """FSDP2: every block on its own, and what is left."""
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


@torch.no_grad()
def whole(parameter: Tensor) -> Tensor:
    """All of a parameter, on every rank, whether it is sharded or not."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()


def _ranks_inside(world_size: int) -> int:
    """Ranks that share fast links: those of a machine among several, else two."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if 1 < local < world_size:
        return local
    return 2 if world_size % 2 == 0 else 1


def _device_type(model: nn.Module) -> str:
    return next(model.parameters()).device.type
