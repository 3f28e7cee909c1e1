"""The adapter to FSDP2's own reduce-scatter: every rank compresses what it sends to each other rank's shard."""

import logging
import warnings
from collections.abc import Sequence
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from gradwire.comm.averager import Averager
from gradwire.comm.collectives import reduce_scatter_flat
from gradwire.comm.encoder import is_bad
from gradwire.comm.fsdp_handle import WRONG_SIZE, FSDPHandle, take_unused_along
from gradwire.comm.fsdp_layout import ShardGroup, check_shards, group_of_shards, parameters_of, shard_groups

_log = logging.getLogger("gradwire")


@final
class FSDPScatter(FSDPHandle):
    """Reduces the gradients of an FSDP2 model to shards through a communicator, module by module, during backward.

    Feedback sees the whole gradient of a module before it is cut into shards, so every rank keeps state of the size of
    all gradients, which FSDP2 never holds at once: `residual_bytes`, said once in the log. A step ends with the
    backward pass, and is skipped on all ranks if one of them met a non-finite gradient; a module that ran twice before
    it begins another step. Parameters without a gradient take part with zero from the step on in which their module
    first ran. Under `set_requires_gradient_sync(False)` gradients only accumulate. With one rank FSDP2 reduces nothing.
    """

    def __init__(self, model: FSDPModule, communicator: Averager) -> None:
        super().__init__(communicator)
        self._dense: dict[str, Any] = {}
        self._groups = shard_groups(model, self._dense)
        shards = group_of_shards(model, self._dense.values())
        check_shards(communicator, shards)
        size = shards.size()
        slots = [group.slots(size) for group in self._groups]
        communicator.deal([slot for owned in slots for some in owned for slot in some])
        self._reductions = [
            ModuleReduceScatter(self, communicator, group, owned)
            for group, owned in zip(self._groups, slots, strict=True)
        ]
        for reduction in self._reductions:
            reduction.prepare(size)
        for group, reduction in zip(self._groups, self._reductions, strict=True):
            take_unused_along(group.module)
            group.module.set_custom_reduce_scatter(reduction)
        self._report()

    @property
    def dense_modules(self) -> list[str]:
        """Modules whose gradients FSDP2 reduces by itself, since they have several groups of parameters."""
        return list(self._dense)

    @property
    def residual_bytes(self) -> int:
        """Memory that feedback takes on this rank, with the coming values of a step that has not ended."""
        return self._communicator.state_bytes

    def detach(self) -> None:
        """Let FSDP2 reduce by itself again."""
        for reduction in self._reductions:
            reduction.compresses = False
        super().detach()

    def _end_step(self) -> None:
        grads = [p.grad for module in self._dense.values() for p in parameters_of(module)]
        for grad in grads:
            if isinstance(grad, DTensor):
                self._communicator.note(is_bad(grad.to_local()))
        super()._end_step()

    def _report(self) -> None:
        if self.residual_bytes:
            _log.info("Feedback on gradients before sharding keeps %.1f MiB on each rank.", self.residual_bytes / 2**20)
        if self._dense:
            warnings.warn(
                f"attach: expected one group of parameters per FSDP2 module, got several for {self.dense_modules}, "
                "which shard them over different meshes. FSDP2 reduces these densely; call fully_shard on the modules "
                "that hold them, each with one mesh, to compress them.",
                UserWarning,
                stacklevel=4,
            )


@final
class ModuleReduceScatter:
    """What takes the place of the reduce-scatter of one FSDP2 module; of the interface that torch asks for."""

    def __init__(
        self, handle: FSDPScatter, communicator: Averager, group: ShardGroup, slots: Sequence[Sequence[Any]]
    ) -> None:
        self._handle, self._communicator, self._group = handle, communicator, group
        self._slots = [list(owned) for owned in slots]
        self._names = [slot.name for owned in slots for slot in owned]
        self.compresses = True

    def prepare(self, size: int) -> None:
        """Compare configurations over ranks, and create state."""
        flat = torch.empty(self._group.numel * size, dtype=self._group.dtype, device=self._group.device)
        self._communicator.prepare(self._names, self._group.cut_all(flat, self._slots))

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A buffer for FSDP2 to copy gradients into, or take the shard from."""
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> dist.Work | None:
        """Reduce `input_tensor`, shard after shard, to this rank's in `output_tensor`; on CUDA: enqueued."""
        if not self.compresses:
            return reduce_scatter_flat(output_tensor, input_tensor, op=op, group=group, async_op=async_op)  # type: ignore[no-any-return]
        expected, got = self._group.numel, input_tensor.numel() // group.size()
        if got != expected:
            raise RuntimeError(WRONG_SIZE.format(expected=expected, name=self._group.name, got=got))
        factor = _factor(op, group.size())
        self._handle.begin(self._group.name, input_tensor)
        scale = self._communicator.loss_scale
        divided = _divided_before(self._group.divide_factor or group.size(), input_tensor.dtype)
        try:
            self._communicator.loss_scale = lambda: scale() / divided
            self._communicator.average_(self._group.cut_all(input_tensor, self._slots), self._names, last=False)
        finally:
            self._communicator.loss_scale = scale
        output_tensor.copy_(input_tensor.view(group.size(), -1)[group.rank()])
        if factor != 1:
            output_tensor.mul_(factor)
        return _Enqueued(output_tensor.device) if async_op else None


def _factor(op: Any, size: int) -> float:
    """By what the mean is multiplied to be what the operation gives."""
    if op == dist.ReduceOp.AVG:
        return 1.0
    if op == dist.ReduceOp.SUM:
        return float(size)
    if op == dist.ReduceOp.PREMUL_SUM:
        _, factor = op.__getstate__()  # there is no other way to read it
        return size * float(factor)
    raise ValueError(
        f"attach: expected FSDP2 to reduce by AVG, SUM or PREMUL_SUM, got {op}. Leave the operation to FSDP2; "
        "set_gradient_divide_factor scales gradients."
    )


def _divided_before(factor: float, dtype: torch.dtype) -> float:
    """By which part of `factor` FSDP2 divides beforehand where sums may overflow; it depends on the number of ranks.

    Residuals are kept without it, so that they mean the same among other ranks.
    """
    before = 1.0
    if dtype not in (torch.float32, torch.bfloat16):
        while factor % before == 0 and factor / before > before:
            before *= 2
    return before


class _Enqueued(dist.Work):
    """Work that is done, or on its way on a stream."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._event = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None

    def wait(self, timeout: Any = None) -> bool:
        """Let the current stream wait; the host does not."""
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)
        return True
