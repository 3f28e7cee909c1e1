"""torch's PowerSGD hook as the planner needs it: what it sends, and a training step of it that sends nothing."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from gradwire.bench.launch import process_group
from gradwire.bench.plan_models import Model
from gradwire.comm.planner import Bucket, Call
from gradwire.comm.planner_rehearsal import Shapes

_WORTH_IT = 2  # factors with more than half the entries of a matrix are not: the hook's default
_DENSE_STEPS = 2  # the least that the hook takes with error feedback


def bucket(shapes: Shapes, world_size: int, matrix_rank: int, *, codec: float) -> Bucket:
    """What the hook sends of one bucket in float32: what it does not compress, the left factors, then the right ones.

    Args:
        shapes: Of all parameters.
        world_size: Ranks, >= 2.
        matrix_rank: Of the approximation, >= 1.
        codec: Seconds of work per step.

    Example:
        >>> [call.nbytes for call in bucket([("w", (64, 32)), ("b", (32,))], 2, 4, codec=0.0).calls]
        [128, 1024, 512]
    """
    dense = left = right = 0
    for _, shape in shapes:
        rows, columns = shape[0], math.prod(shape[1:])
        rank = min(rows, columns, matrix_rank)
        if (rows + columns) * rank * _WORTH_IT < rows * columns:
            left, right = left + rank * rows, right + rank * columns
        else:
            dense += rows * columns
    ranks = tuple(range(world_size))
    return Bucket(tuple(Call("all_reduce", 4 * count, ranks) for count in (dense, left, right)), codec, ready=1.0)


@contextmanager
def training(model: Model, matrix_rank: int, together: Callable[[], object]) -> Iterator[Callable[[], None]]:
    """A training step with AdamW under DDP with the hook, in a process group of one rank; there must be none yet.

    Args:
        model: With one part.
        matrix_rank: Of the approximation, >= 1.
        together: Called in every collective.
    """

    def all_reduce(*args: Any, **kwargs: Any) -> Any:
        together()
        return original(*args, **kwargs)

    original = dist.all_reduce
    ((make, _),) = model.parts
    module, loss_of = make()
    with process_group(), mock.patch.object(dist, "all_reduce", all_reduce):
        host = DistributedDataParallel(_Loss(module, loss_of), bucket_cap_mb=1024)
        state = powerSGD_hook.PowerSGDState(
            None, matrix_approximation_rank=matrix_rank, start_powerSGD_iter=_DENSE_STEPS
        )
        host.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        optimizer = torch.optim.AdamW(host.parameters(), fused=True)

        def step() -> None:
            host().backward()
            optimizer.step()
            optimizer.zero_grad()

        yield step


class _Loss(torch.nn.Module):
    """A module whose output is its loss, as DDP wants it."""

    def __init__(self, module: torch.nn.Module, loss_of: Callable[[], torch.Tensor]) -> None:
        super().__init__()
        self.module, self.loss_of = module, loss_of

    def forward(self) -> torch.Tensor:
        return self.loss_of()
