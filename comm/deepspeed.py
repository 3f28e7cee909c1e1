"""The adapter to DeepSpeed: gradients are averaged by a communicator where the engine would reduce them."""

from typing import Any, Protocol, final

import torch
from torch import Tensor

from gradwire.comm.averager import Averager
from gradwire.comm.deepspeed_checks import check_engine, check_local
from gradwire.comm.guard import skip_non_finite
from gradwire.comm.loop import fill_buckets


class DeepSpeedEngine(Protocol):
    """What tells `deepspeed.DeepSpeedEngine` from other hosts, for type checkers: DeepSpeed is an optional extra."""

    global_steps: int

    def allreduce_gradients(self, bucket_size: int = ...) -> None:
        """Reduce gradients after a backward pass."""
        ...

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether a step follows this backward pass."""
        ...


@final
class DeepSpeedHook:
    """Averages the gradients of a DeepSpeed engine through a communicator at ZeRO stages 0, 1 and 2.

    At stages 0 and 1 a step of the communicator is one of the engine, at the boundary of gradient accumulation; at
    stage 2, which reduces in every backward pass, it is one backward pass. State is that of whole gradients on every
    rank, keyed by parameter name. After a gradient that is not finite on any rank, in any of the backward passes before
    a step, the step is skipped on all ranks. All ranks must use the same parameters.
    """

    def __init__(self, engine: Any, communicator: Averager, *, bucket_bytes: int) -> None:
        check_engine(engine, communicator)
        self._engine, self._communicator = engine, communicator
        self._zero = engine.optimizer if engine.zero_optimization() else None
        parameters = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
        self._names = {p: name for name, p in parameters}
        self._buckets = fill_buckets(parameters, bucket_bytes)
        self._arrived = False
        self._found_inf: tuple[int, Tensor] | None = None
        communicator.prepare([name for name, _ in parameters], [p.detach() for _, p in parameters])
        communicator.loss_scale = self._loss_scale
        self._dense = engine.allreduce_gradients
        engine.allreduce_gradients = self._reduce
        if self._zero is not None:
            self._zero.gradient_reduction_w_predivide = self._average_bucket
        self._skip = skip_non_finite(engine.basic_optimizer, communicator)

    def detach(self) -> None:
        """Let the engine reduce gradients by itself again; the communicator may then be attached elsewhere."""
        del self._engine.allreduce_gradients
        if self._zero is not None:
            del self._zero.gradient_reduction_w_predivide
        self._skip.remove()
        self._communicator.loss_scale = _unscaled
        self._communicator.attached = False

    def _reduce(self, *args: Any, **kwargs: Any) -> None:
        """In place of the engine's `allreduce_gradients`, which it calls after each backward pass."""
        if self._zero is not None:
            self._dense(*args, **kwargs)
        elif self._engine.is_gradient_accumulation_boundary():
            for bucket in self._buckets:
                self._average([p for _, p in bucket])
        if self._arrived:
            self._end()

    @torch.no_grad()
    def _average(self, parameters: list[Tensor]) -> None:
        """Stage 0: average whole gradients; a parameter without one takes part with zero."""
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        grads = [p.grad for p in parameters if p.grad is not None]
        self._communicator.average_(grads, [self._names[p] for p in parameters], last=False)
        self._arrived = True

    @torch.no_grad()
    def _average_bucket(self, flat: Tensor, communication_data_type: torch.dtype) -> Tensor:
        """Stages 1 and 2: average a bucket, in which gradients stand one after the other, in place."""
        assert self._zero is not None
        if flat.numel() == 0:
            return flat
        bucket = self._zero.ipg_buckets[communication_data_type]
        parameters = [self._zero.bit16_groups[group][place] for group, place, _ in bucket.params]
        expected = sum(p.numel() for p in parameters)
        if flat.numel() != expected:
            raise RuntimeError(
                f"attach: expected DeepSpeed to reduce a bucket of {expected} entries, the gradients of "
                f"{len(parameters)} parameters, got {flat.numel()}. This version of DeepSpeed is not supported."
            )
        pieces = torch.split(flat, [p.numel() for p in parameters])
        grads = [piece.view(p.shape) for piece, p in zip(pieces, parameters, strict=True)]
        self._communicator.average_(grads, [self._names[p] for p in parameters], last=False)
        self._arrived = True
        return flat

    def _end(self) -> None:
        """End a step of the communicator; the engine's is skipped for any backward pass since its last one."""
        self._arrived = False
        self._communicator.average_([], [], last=True)
        found_inf, step = self._communicator.found_inf, self._engine.global_steps
        if found_inf is not None:
            if self._found_inf is not None and self._found_inf[0] == step:
                found_inf = self._communicator.found_inf = torch.maximum(found_inf, self._found_inf[1])
            self._found_inf = step, found_inf

    def _loss_scale(self) -> float:
        """The factor by which the engine scales gradients now."""
        if (scaler := self._engine.torch_autocast_z0_gradscaler) is not None:
            return float(scaler.get_scale())
        optimizer = self._engine.optimizer
        config = getattr(optimizer, "loss_scale_config", None)
        return float(config.cur_scale if config is not None else getattr(optimizer, "loss_scale", 1.0))


def keep_engine_local(engine: Any) -> None:
    """Leave a DeepSpeed engine's gradients as each rank has them.

    Raises:
        ValueError: ZeRO cuts gradients into partitions, which need a reduction.
    """
    check_local(engine)
    engine.enable_backward_allreduce = False


def _unscaled() -> float:
    return 1.0
