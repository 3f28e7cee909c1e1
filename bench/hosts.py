"""Where `gradwire train` trains: the hosts of `gradwire.comm.attach`, each with the few lines that it asks for."""

import gc
import os
from collections.abc import Callable
from pathlib import Path
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
from gradwire.bench.specs import own_communicator
from gradwire.comm import attach, checkpoint, keep_local
from gradwire.comm.averager import Averager


class Host:
    """A model where gradients are averaged before the optimizer sees them.

    Args:
        model: The model, on its device; a host that shards does it in place, before there is an optimizer.
        bucket_mb: Size of a gradient bucket in MiB, where the host has buckets.
        shards: Ranks that share a copy of the model, with `HSDP`; 0 for its choice.
        zero_stage: With `DeepSpeed`.
        batch: Sequences per rank and step.
        dtype: Of matrix products.
    """

    sharded: ClassVar[bool] = False
    """Whether all ranks must run the model equally often, in evaluation, too."""

    exchange: ClassVar[str | None] = None
    """The exchange of a configuration that names none, where it is not the compressor's own."""

    def __init__(
        self, model: ByteTransformer, *, bucket_mb: float, shards: int, zero_stage: int, batch: int, dtype: str
    ) -> None:
        if shards and not isinstance(self, HSDP):
            raise UsageError(f"--shards: expected --host hsdp with it, got shards={shards}.")
        if zero_stage and not isinstance(self, DeepSpeed):
            raise UsageError(f"--zero-stage: expected --host deepspeed with it, got zero_stage={zero_stage}.")
        self.model, self.bucket_mb, self.zero_stage = model, bucket_mb, zero_stage
        self.batch, self.dtype = batch, dtype
        self.forward: nn.Module = model
        """What training calls."""
        self.group: dist.ProcessGroup | None = None
        """The ranks whose gradients a communicator averages; all by default."""
        self._wait: Callable[[], None] | None = None

    def attach(self, communicator: Averager, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
        """Have the communicator average gradients."""
        forward: Any = self.forward
        attach(forward, communicator, optimizer=optimizer, scaler=scaler if scaler.is_enabled() else None)

    def keep_local(self, optimizer: torch.optim.Optimizer) -> None:
        """Leave gradients to an optimizer that exchanges by itself."""

    def backward(self, loss: Tensor, scaler: torch.amp.GradScaler) -> None:
        """Backward pass; gradients have arrived afterwards."""
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        if self._wait is not None:
            self._wait()  # the scaler looks at gradients before the optimizer's own hook would wait for them

    def step(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
        """Update the weights; gradients are zero afterwards."""
        scaler.step(optimizer)
        if own_communicator(optimizer) is not None and scaler.is_enabled():
            # Gradients are local, and so is what the scaler has found in them; its scale is to be every rank's.
            for found_inf in scaler._found_inf_per_device(optimizer).values():
                dist.all_reduce(found_inf, dist.ReduceOp.MAX)
        scaler.update()
        optimizer.zero_grad()

    def save(self, path: Path, **state: Any) -> None:
        """Write a checkpoint."""
        checkpoint.save(path, **state)

    def load(self, path: Path, **state: Any) -> None:
        """Restore what `save` wrote."""
        checkpoint.load(path, **state)

    def close(self) -> None:
        """Let go of what would keep the processes from ending."""


@final
class Loop(Host):
    """A plain training loop."""

    def attach(self, communicator: Averager, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
        """Hooks on parameters, and something to wait for."""
        handle = attach(
            self.model.named_parameters(),
            communicator,
            optimizer=optimizer,
            scaler=scaler if scaler.is_enabled() else None,
            bucket_mb=self.bucket_mb,
        )
        self._wait = handle.wait


@final
class DDP(Host):
    """`DistributedDataParallel`."""

    def __init__(self, model: ByteTransformer, **options: Any) -> None:
        super().__init__(model, **options)
        self.forward = self._ddp = DistributedDataParallel(model, bucket_cap_mb=self.bucket_mb)

    def keep_local(self, optimizer: torch.optim.Optimizer) -> None:
        """DDP averages nothing."""
        keep_local(self._ddp)


@final
class FSDP2(Host):
    """One copy of the model, in shards on all ranks; the communicator takes the place of the reduce-scatter."""

    sharded = True
    exchange = "ReduceScatter"

    def __init__(self, model: ByteTransformer, **options: Any) -> None:
        super().__init__(model, **options)
        shard(model, init_device_mesh(_device_type(model), (dist.get_world_size(),)))

    def keep_local(self, optimizer: torch.optim.Optimizer) -> None:
        """There is nobody to exchange with."""
        name = type(optimizer).__name__
        raise UsageError(f"--host fsdp2: expected an optimizer that takes mean gradients, got {name}. Use --host hsdp.")


@final
class HSDP(Host):
    """FSDP2 inside groups of ranks, which hold one copy of the model each, and a communicator across the copies."""

    sharded = True

    def __init__(self, model: ByteTransformer, *, shards: int, **options: Any) -> None:
        super().__init__(model, shards=shards, **options)
        world_size = dist.get_world_size()
        shards = shards or _ranks_inside(world_size)
        if world_size % shards:
            raise UsageError(f"--shards: expected a divisor of {world_size} ranks, got shards={shards}.")
        shape = (world_size // shards, shards)
        mesh = init_device_mesh(_device_type(model), shape, mesh_dim_names=("replicate", "shard"))
        self._replicate = mesh["replicate"]
        self.group = self._replicate.get_group()
        shard(model, mesh["shard"])

    def attach(self, communicator: Averager, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
        """A hook after FSDP2's own reduce-scatter."""
        model: Any = self.model
        enabled = scaler if scaler.is_enabled() else None
        attach(model, communicator, replicate=self._replicate, optimizer=optimizer, scaler=enabled)


@final
class DeepSpeed(Host):
    """A DeepSpeed engine at ZeRO stage 0, 1 or 2."""

    def __init__(self, model: ByteTransformer, **options: Any) -> None:
        super().__init__(model, **options)
        self._engine: Any = None

    def attach(self, communicator: Averager, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
        """In place of the engine's own reduction."""
        self._start(optimizer, scaler)
        attach(self._engine, communicator, bucket_mb=self.bucket_mb)

    def keep_local(self, optimizer: torch.optim.Optimizer) -> None:
        """The engine averages nothing."""
        self._start(optimizer, None)
        keep_local(self._engine)

    def backward(self, loss: Tensor, scaler: torch.amp.GradScaler) -> None:
        """The engine's."""
        self._engine.backward(loss)

    def step(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
        """The engine's."""
        self._engine.step()

    def save(self, path: Path, **state: Any) -> None:
        """With ZeRO write the engine's own checkpoint, and beside it what that lacks; else all state of all ranks."""
        if self.zero_stage:
            self._engine.save_checkpoint(str(path.parent), tag=f"deepspeed-{path.name}", save_latest=False)
        super().save(path, **self._kept(state))

    def load(self, path: Path, **state: Any) -> None:
        """Restore what `save` wrote."""
        if self.zero_stage:
            self._engine.load_checkpoint(str(path.parent), tag=f"deepspeed-{path.name}")
        super().load(path, **self._kept(state))

    def _kept(self, state: dict[str, Any]) -> dict[str, Any]:
        engines_own = ("model", "optimizer") if self.zero_stage else ()
        return {name: value for name, value in state.items() if name not in engines_own}

    def close(self) -> None:
        """Drop the engine, whose threads gloo must outlive."""
        self.forward = self.model
        self._engine = None
        gc.collect()

    def _start(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None) -> None:
        if scaler is not None and scaler.is_enabled():
            raise UsageError("--dtype: expected float32 or bfloat16 with --host deepspeed, got float16.")
        try:
            import deepspeed
        except ImportError as error:
            raise UsageError(
                f'--host deepspeed: expected DeepSpeed, got none ({error}). pip install "gradwire[deepspeed]".'
            ) from None
        if _device_type(self.model) == "cpu":  # it would be compiled first, for minutes; training does not need it
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        zero = {"stage": self.zero_stage, "reduce_scatter": False, "overlap_comm": False}
        config = {
            "train_micro_batch_size_per_gpu": self.batch,
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,  # 1.0 unless it is said
            "zero_optimization": zero,
            # On GPUs the engine turns off an autocast that it was not told of.
            "torch_autocast": {"enabled": self.dtype == "bfloat16", "dtype": "bfloat16"},
        }
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
        self._engine, *_ = deepspeed.initialize(model=self.model, optimizer=optimizer, config=config)
        self.forward = self._engine


HOSTS: dict[str, type[Host]] = {"ddp": DDP, "deepspeed": DeepSpeed, "fsdp2": FSDP2, "hsdp": HSDP, "loop": Loop}
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
