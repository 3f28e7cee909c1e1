"""The adapter to FSDP2: its shards stay dense inside a machine, and every shard is averaged across replicas."""

import functools
from typing import final

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from gradwire.comm.averager import Averager
from gradwire.comm.errors import ConfigurationError
from gradwire.comm.fsdp_handle import WRONG_SIZE, FSDPHandle, take_unused_along
from gradwire.comm.fsdp_layout import ShardGroup, check_replicas, group_of_shards, shard_groups


@final
class FSDPHook(FSDPHandle):
    """Averages the gradient shards of an FSDP2 model over its replicas, module by module, while backward goes on.

    State is that of one shard. A step ends with the backward pass, and is skipped on all ranks of all shards if any
    of them met a non-finite gradient; a module that ran twice before it begins another step. Parameters without a
    gradient take part with zero from the step on in which their module first ran. Under
    `set_requires_gradient_sync(False)` gradients only accumulate. All ranks must run the same modules in the same
    order, as FSDP2 needs it, too.
    """

    def __init__(self, model: FSDPModule, communicator: Averager, replicate: DeviceMesh) -> None:
        super().__init__(communicator)
        self._groups = shard_groups(model)
        self._known: set[tuple[str, str]] = set()
        shards = group_of_shards(model)
        check_replicas(communicator, replicate, shards)
        for group in self._groups:
            grads, names = group.cut(torch.empty(group.numel, dtype=group.dtype, device=group.device))
            communicator.prepare(names, grads)
        communicator.join_shards(shards)
        for group in self._groups:
            take_unused_along(group.module)
            group.module.set_all_reduce_hook(functools.partial(self._average, group))

    def detach(self) -> None:
        """Remove all hooks; replicas then go different ways, unless the communicator is attached elsewhere."""
        for group in self._groups:
            group.module.set_all_reduce_hook(None)
        super().detach()

    def _average(self, group: ShardGroup, flat: Tensor) -> None:
        """Average a module's flat shard in place; FSDP2 calls it after its reduce-scatter, on a stream of its own."""
        if flat.numel() != group.numel:
            raise RuntimeError(WRONG_SIZE.format(expected=group.numel, name=group.name, got=flat.numel()))
        self.begin(group.name, flat)
        self._check_order(group)
        self._communicator.average_(*group.cut(flat), last=False)

    def _check_order(self, group: ShardGroup) -> None:
        """Compare with the other replicas which module comes next, unless it did so in the first backward pass.

        Replicas that went different ways would average gradients of different modules, without notice if the shapes
        are equal. Those that leave the first order together pay one small collective at each such place.
        """
        step = (self._arrived[-2] if len(self._arrived) > 1 else "", group.name)
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
