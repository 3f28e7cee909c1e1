"""`attach`: put a communicator between a host's gradients and its optimizer."""

from collections.abc import Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradwire.comm.averager import Averager
from gradwire.comm.ddp import DDPHook
from gradwire.comm.guard import skip_non_finite
from gradwire.comm.loop import LoopHandle


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
    optimizer: torch.optim.Optimizer | None = None,
    scaler: torch.amp.GradScaler | None = None,
    overlap: bool = True,
    bucket_mb: float = 25.0,
) -> DDPHook | LoopHandle:
    """Average the gradients of `host` through `communicator` from now on.

    Every rank must call it at the same point: ranks compare their configurations, and the communicator makes a process
    group of its own.

    Args:
        host: A `DistributedDataParallel` module, or named parameters (`model.named_parameters()`) of a plain loop;
            parameters that do not require gradients are left out, tied ones count once.
        communicator: A communicator that is attached to nothing else.
        optimizer: With it, steps after a non-finite gradient on any rank are skipped for real on all ranks; and in a
            plain loop, `step()` waits for the communication by itself (not with a closure: call `wait()` in it).
        scaler: The `GradScaler` in use. Residuals are then kept in unscaled units, and the scaler sees every
            non-finite gradient and skips the step itself. In a plain loop call `wait()` before `scaler.step()` (and
            before `scaler.unscale_()`), because the scaler looks at gradients before the optimizer's hooks run.
        overlap: Plain loop: average while backward goes on, in buckets; otherwise all at once when waiting.
        bucket_mb: Plain loop: size of a bucket in MiB.

    Returns:
        A handle. That of a plain loop has `wait()`, `no_sync()` and `detach()`.

    Raises:
        TypeError: an unknown host, with what to pass instead.
        ValueError: a communicator that is attached already, or nothing to average.
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
    if not communicator.consensus:
        raise ValueError("attach: expected an exchange after which ranks agree, got Gossip; use average_ with it.")
    if communicator.attached:
        raise ValueError("attach: expected a communicator that is attached to nothing else. Make one for each host.")
    parameters = None if isinstance(host, DistributedDataParallel) else _named_parameters(host)
    if scaler is not None:
        communicator.loss_scale = _scale_of(scaler)
    if parameters is None:
        ddp = DDPHook(host, communicator)
        if optimizer is not None and scaler is None:
            skip_non_finite(optimizer, communicator)
        communicator.attached = True
        return ddp
    loop = LoopHandle(parameters, communicator, overlap=overlap, bucket_bytes=int(bucket_mb * 2**20))
    if optimizer is not None:
        before_step = loop.wait if scaler is None or not scaler.is_enabled() else loop.check_waited
        loop.hooks.append(optimizer.register_step_pre_hook(lambda *_: before_step()))
        if scaler is None:
            loop.hooks.append(skip_non_finite(optimizer, communicator))
    communicator.attached = True
    return loop


def _named_parameters(host: Any) -> list[tuple[str, Tensor]]:
    if isinstance(host, nn.Module):
        raise TypeError(
            f"attach: expected a DistributedDataParallel module or named parameters, got {type(host).__name__}. "
            "Pass model.named_parameters(), or wrap the model in DistributedDataParallel."
        )
    try:
        parameters = {name: p for name, p in host if p.requires_grad}
    except (TypeError, ValueError, AttributeError) as error:
        raise TypeError(f"attach: expected (name, parameter) pairs, got {type(host).__name__}.") from error
    if not parameters:
        raise ValueError("attach: expected at least one parameter that requires a gradient, got none.")
    once = {p: name for name, p in reversed(parameters.items())}
    return [(name, p) for name, p in parameters.items() if once[p] == name]


def _scale_of(scaler: torch.amp.GradScaler) -> Any:
    def scale() -> Tensor | float:
        if not scaler.is_enabled():
            return 1.0
        current = scaler._scale  # the tensor itself: get_scale() would wait for the device
        return 1.0 if current is None else current

    return scale
