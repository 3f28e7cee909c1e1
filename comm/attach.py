"""`attach`: put a communicator between a host's gradients and its optimizer."""

from collections.abc import Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from gradwire.comm.averager import Averager
from gradwire.comm.ddp import DDPHook
from gradwire.comm.deepspeed import DeepSpeedEngine, DeepSpeedHook
from gradwire.comm.deepspeed_checks import is_engine
from gradwire.comm.fsdp import FSDPHook
from gradwire.comm.fsdp_shard import FSDPScatter
from gradwire.comm.guard import before_update, skip_non_finite
from gradwire.comm.loop import LoopHandle
from gradwire.comm.plain_name import plain_name


@overload
def attach(
    host: DistributedDataParallel,
    communicator: Averager,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> DDPHook: ...


@overload
def attach(
    host: FSDPModule,
    communicator: Averager,
    *,
    replicate: DeviceMesh,
    optimizer: torch.optim.Optimizer | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> FSDPHook: ...


@overload
def attach(
    host: FSDPModule,
    communicator: Averager,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> FSDPScatter: ...


@overload
def attach(host: DeepSpeedEngine, communicator: Averager, *, bucket_mb: float = 25.0) -> DeepSpeedHook: ...


@overload
def attach(
    host: Iterable[tuple[str, nn.Parameter]],
    communicator: Averager,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    scaler: torch.amp.GradScaler | None = None,
    overlap: bool = True,
    bucket_mb: float = 25.0,
) -> LoopHandle: ...


def attach(
    host: Any,
    communicator: Averager,
    *,
    replicate: DeviceMesh | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    scaler: torch.amp.GradScaler | None = None,
    overlap: bool = True,
    bucket_mb: float = 25.0,
) -> DDPHook | FSDPHook | FSDPScatter | DeepSpeedHook | LoopHandle:
    """Average the gradients of `host` through `communicator` from now on.

    Every rank must call it at the same point: ranks compare their configurations, and the communicator makes a process
    group of its own.

    Args:
        host: A `DistributedDataParallel` module, an FSDP2 model sharded over one dimension of a mesh, a DeepSpeed
            engine at ZeRO stage 0, 1 or 2, or named parameters (`model.named_parameters()`) of a plain loop; parameters
            that do not require gradients are left out, tied ones count once.
        communicator: A communicator that is attached to nothing else.
        replicate: FSDP2: the dimension of the mesh across which replicas are averaged, whose group is the
            communicator's, too. State is then that of one shard. Without it the communicator, with
            `exchange=ReduceScatter()`, takes the place of FSDP2's own reduce-scatter, and state is that of whole
            gradients.
        optimizer: With it, steps after a non-finite gradient on any rank are skipped for real on all ranks; and in a
            plain loop, `step()` waits for the communication by itself, with a closure after each call of it.
        scaler: The `GradScaler` in use. Residuals are then kept in unscaled units, and the scaler sees every
            non-finite gradient and skips the step itself. In a plain loop call `wait()` before `scaler.step()` (and
            before `scaler.unscale_()`), because the scaler looks at gradients before the optimizer's hooks run.
        overlap: Plain loop: average while backward goes on, in buckets; otherwise all at once when waiting.
        bucket_mb: Plain loop, and DeepSpeed at stage 0: size of a bucket in MiB.

    Returns:
        A handle. That of a plain loop has `wait()`, `no_sync()` and `detach()`, those of FSDP2 and DeepSpeed
            `detach()`.

    Raises:
        TypeError: an unknown host, with what to pass instead.
        ValueError: a communicator that is attached already, nothing to average, or an FSDP2 model or DeepSpeed engine
            in a form that cannot be averaged (native HSDP, tensor parallelism, several meshes; stage 3, pipelines,
            experts), with what to do instead.
        ConfigurationError: ranks differ in configuration or layout.

    Example:
        >>> from gradwire.comm import EF, Communicator
        >>> from gradwire.compression import Identity
        >>> model = nn.Linear(64, 64)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> handle = attach(model.named_parameters(), Communicator(Identity(), feedback=EF()), optimizer=optimizer)
        >>> model(torch.ones(2, 64)).sum().backward()
        >>> optimizer.step()  # waits for the mean of the gradients
    """
    if not isinstance(communicator, Averager):
        raise TypeError(f"attach: expected a communicator, got {type(communicator).__name__}.")
    if communicator.workers != 1:
        raise ValueError("attach: expected an exchange between processes, got Simulated; use average_ with it.")
    _check_scatters(host, communicator, replicate)
    if not communicator.consensus and not communicator.scatters:
        raise ValueError("attach: expected an exchange after which ranks agree, got Gossip; use average_ with it.")
    if communicator.attached:
        raise ValueError("attach: expected a communicator that is attached to nothing else. Make one for each host.")
    _check_not_compiled(host)
    if is_engine(host):
        if replicate is not None or optimizer is not None or scaler is not None:
            raise TypeError(
                "attach: expected a DeepSpeed engine alone, which has its own, got replicate=, optimizer= or scaler=."
            )
        engine = DeepSpeedHook(host, communicator, bucket_bytes=int(bucket_mb * 2**20))
        communicator.attached = True
        return engine
    sharded = isinstance(host, FSDPModule)
    if replicate is not None and not sharded:
        raise TypeError(
            "attach: expected replicate=mesh['replicate'] with an FSDP2 model alone, got it with "
            f"{type(host).__name__}."
        )
    parameters = None if sharded or isinstance(host, DistributedDataParallel) else _named_parameters(host)
    if scaler is not None:
        communicator.loss_scale = _scale_of(scaler)
    if sharded:
        fsdp = FSDPScatter(host, communicator) if replicate is None else FSDPHook(host, communicator, replicate)
        if optimizer is not None and scaler is None:
            fsdp.skip_with(optimizer)
        communicator.attached = True
        return fsdp
    if parameters is None:
        ddp = DDPHook(host, communicator)
        if optimizer is not None and scaler is None:
            skip_non_finite(optimizer, communicator)
        communicator.attached = True
        return ddp
    loop = LoopHandle(parameters, communicator, overlap=overlap, bucket_bytes=int(bucket_mb * 2**20))
    if optimizer is not None:
        before_step = loop.wait if scaler is None or not scaler.is_enabled() else loop.check_waited
        loop.hooks.append(before_update(optimizer, before_step))
        if scaler is None:
            loop.hooks.append(skip_non_finite(optimizer, communicator))
    communicator.attached = True
    return loop


def _named_parameters(host: Any) -> list[tuple[str, Tensor]]:
    if isinstance(host, nn.Module):
        raise TypeError(
            "attach: expected a DistributedDataParallel module, an FSDP2 model or named parameters, got "
            f"{type(host).__name__}. Pass model.named_parameters(), or wrap the model in DistributedDataParallel."
        )
    try:
        parameters = {plain_name(name): p for name, p in host if p.requires_grad}
    except (TypeError, ValueError, AttributeError) as error:
        raise TypeError(f"attach: expected (name, parameter) pairs, got {type(host).__name__}.") from error
    if not parameters:
        raise ValueError("attach: expected at least one parameter that requires a gradient, got none.")
    once = {p: name for name, p in reversed(parameters.items())}
    return [(name, p) for name, p in parameters.items() if once[p] == name]


def _check_scatters(host: Any, communicator: Averager, replicate: DeviceMesh | None) -> None:
    """`ReduceScatter` goes with an FSDP2 model without `replicate`, and nothing else does."""
    shards = isinstance(host, FSDPModule) and replicate is None
    if communicator.scatters and not shards:
        got = type(host).__name__ if replicate is None else "replicate="
        raise TypeError(
            f"attach: expected an FSDP2 model alone for a communicator with exchange=ReduceScatter(), got {got}. Use "
            "TwoPhase() or AllGather(), after which all ranks have the whole mean."
        )
    if shards and not communicator.scatters:
        raise TypeError(
            "attach: expected replicate=mesh['replicate'] with an FSDP2 model, to average across replicas, or a "
            "communicator with exchange=ReduceScatter(), to compress FSDP2's own reduce-scatter, got "
            f"{communicator!r} alone. Pass either."
        )


def _check_not_compiled(host: Any) -> None:
    inside = getattr(host, "_orig_mod", None)
    if isinstance(inside, DistributedDataParallel):
        raise TypeError(
            "attach: expected a DistributedDataParallel module, got torch.compile of one. Compile what it wraps, "
            "DDP(torch.compile(model)), and attach to that."
        )
    if isinstance(inside, FSDPModule):
        raise TypeError(
            "attach: expected an FSDP2 model, got torch.compile of one. Attach to the model first, or compile each of "
            "its blocks instead."
        )


def _scale_of(scaler: torch.amp.GradScaler) -> Any:
    def scale() -> Tensor | float:
        if not scaler.is_enabled():
            return 1.0
        current = scaler._scale  # the tensor itself: get_scale() would wait for the device
        return 1.0 if current is None else current

    return scale
