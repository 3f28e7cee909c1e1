"""The adapter to FSDP2: its shards stay dense inside a machine, and every shard is averaged across replicas."""

import functools
from typing import Any, final

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from gradwire.comm.averager import Averager
from gradwire.comm.errors import ConfigurationError
from gradwire.comm.fsdp_layout import ShardGroup, check_replicas, group_of_shards, shard_groups
from gradwire.comm.guard import skip_non_finite


@final
class FSDPHook:
    """Averages the gradient shards of an FSDP2 model over its replicas, module by module, while backward goes on.

    State is that of one shard. A step ends with the backward pass, and is skipped on all ranks of all shards if any
    of them met a non-finite gradient; a module that ran twice before it begins another step. Parameters without a
    gradient take part with zero from the step on in which their module first ran. Under
    `set_requires_gradient_sync(False)` gradients only accumulate. All ranks must run the same modules in the same
    order, as FSDP2 needs it, too.
    """

    def __init__(self, model: FSDPModule, communicator: Averager, replicate: DeviceMesh) -> None:
        self._groups = shard_groups(model)
        self._communicator = communicator
        self._known: set[tuple[str, str]] = set()
        self._arrived: list[str] = []
        self._hooks: list[Any] = []
        self._queued, self._first = False, True
        self._stream: torch.cuda.Stream | None = None
        self._found_inf: Tensor | None = None
        self._accumulates_found_inf = False
        shards = group_of_shards(model)
        check_replicas(communicator, replicate, shards)
        for group in self._groups:
            grads, names = group.cut(torch.empty(group.numel, dtype=group.dtype, device=group.device))
            communicator.prepare(names, grads)
        communicator.join_shards(shards)
        for group in self._groups:
            if hasattr(group.module, "set_reduce_scatter_unused_params"):
                group.module.set_reduce_scatter_unused_params(True, recurse=False)
            group.module.set_all_reduce_hook(functools.partial(self._average, group))

    def detach(self) -> None:
        """Remove all hooks; replicas then go different ways, unless the communicator is attached elsewhere."""
        for group in self._groups:
            group.module.set_all_reduce_hook(None)
        for hook in self._hooks:
            hook.remove()
        self._communicator.attached = False

    def skip_with(self, optimizer: torch.optim.Optimizer) -> None:
        """Skip a step if any of the backward passes before it met a non-finite gradient, not the last one alone."""
        self._accumulates_found_inf = True
        self._hooks.append(skip_non_finite(optimizer, self._communicator))
        self._hooks.append(optimizer.register_step_post_hook(lambda *_: setattr(self, "_found_inf", None)))

    def _average(self, group: ShardGroup, flat: Tensor) -> None:
        """Average a module's flat shard in place; FSDP2 calls it after its reduce-scatter, on a stream of its own."""
        if flat.numel() != group.numel:
            raise RuntimeError(
                f"attach: expected {group.numel} entries, the gradients of all parameters of module {group.name!r}, "
                f"got {flat.numel()}. Attach after freezing parameters, and again after each change; where torch lacks "
                "set_reduce_scatter_unused_params, use every parameter in each step."
            )
        if flat.is_cuda:
            self._stream = torch.cuda.current_stream(flat.device)
            flat.record_stream(self._stream)  # FSDP2 frees it on another one when it casts it
        if not self._queued:  # after FSDP2's own callback, in which modules whose inputs need no gradient come
            torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)
            self._queued = True
        if group.name in self._arrived:
            self._end_step()
        self._check_order(group)
        self._communicator.average_(*group.cut(flat), last=False)

    def _check_order(self, group: ShardGroup) -> None:
        """Compare with the other replicas which module comes next, unless it did so in the first backward pass.

        Replicas that went different ways would average gradients of different modules, without notice if the shapes
        are equal. Those that leave the first order together pay one small collective at each such place.
        """
        step = (self._arrived[-1] if self._arrived else "", group.name)
        self._arrived.append(group.name)
        if step not in self._known:
            ranks = self._communicator.connect()
            names = [name.decode() for name in ranks.gather_bytes(group.name.encode(), ranks.device)]
            other = next((rank for rank, name in enumerate(names) if name != names[0]), None)
            if other is not None:
                raise ConfigurationError(
                    "attach: expected all replicas to run the same modules in the same order, got the gradient of "
                    f"{names[0]!r} on replica 0 and of {names[other]!r} on replica {other}."
                )
            if self._first:
                self._known.add(step)

    def _end_backward(self) -> None:
        self._queued = self._first = False
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        self._end_step()

    def _end_step(self) -> None:
        self._arrived.clear()
        self._communicator.average_([], [], last=True)
        found_inf = self._communicator.found_inf
        if self._accumulates_found_inf and found_inf is not None:
            if self._found_inf is not None:
                found_inf = self._communicator.found_inf = torch.maximum(found_inf, self._found_inf)
            self._found_inf = found_inf
