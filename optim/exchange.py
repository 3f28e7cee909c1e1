"""`ExchangedGradients`: copies of local gradients that an optimizer averages by itself, bucket by bucket."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import final

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from gradwire.comm import Communicator, Plan
from gradwire.comm.averager import Averager
from gradwire.compression.base import compute_dtype
from gradwire.optim.layout import local


@final
class ExchangedGradients:
    """One buffer per parameter, in float32 or wider, and the order in which they are averaged.

    Buckets hold either what the plan compresses or what it sends dense, so each is one collective.

    Args:
        params: Parameters by name, on every rank the same; of a `DTensor`, this process's shard counts.
        communicator: What averages them.
        plan: What of it the communicator compresses.
        bucket_bytes: Most bytes of a bucket, unless one parameter alone has more.
        who: Whose errors these are.
    """

    def __init__(
        self, params: Mapping[str, Tensor], communicator: Averager, plan: Plan, bucket_bytes: int, who: str
    ) -> None:
        self._communicator, self._who = communicator, who
        self.buffers = {
            p: torch.zeros_like(local(p.detach()), dtype=compute_dtype(p.dtype), memory_format=torch.contiguous_format)
            for p in params.values()
        }
        why_dense = {name: plan.why_dense(name, self.buffers[p].shape) for name, p in params.items()}
        self.dense = {p for name, p in params.items() if why_dense[name] is not None}
        self.buckets: list[tuple[list[str], list[Tensor]]] = []
        for dense in (False, True):
            size, last = 0, None
            for name, p in params.items():
                buffer = self.buffers[p]
                if (p in self.dense) is not dense or buffer.numel() == 0:
                    continue
                nbytes = buffer.numel() * buffer.element_size()
                if last != buffer.device or size + nbytes > bucket_bytes:
                    self.buckets.append(([], []))
                    size, last = 0, buffer.device
                self.buckets[-1][0].append(name)
                self.buckets[-1][1].append(p)
                size += nbytes

    def take(self, params: Sequence[Tensor], factor: Tensor | float) -> None:
        """Copy gradients times `factor` into the buffers; zero where there is none."""
        with_grad = [p for p in params if p.grad is not None]
        for p in params:
            if p.grad is None:
                self.buffers[p].zero_()
            elif p.grad.layout != torch.strided:
                raise RuntimeError(
                    f"{self._who}: expected dense gradients, got {p.grad.layout} for a parameter of shape "
                    f"{tuple(p.shape)}. Use sparse=False in its layer."
                )
        if not with_grad:
            return
        buffers = [self.buffers[p] for p in with_grad]
        torch._foreach_copy_(buffers, [local(p.grad) for p in with_grad if p.grad is not None])
        if not (isinstance(factor, float) and factor == 1.0):
            torch._foreach_mul_(buffers, factor)

    def average(self, prefix: str = "") -> None:
        """Replace what the buffers hold by its average over ranks; one step of the communicator.

        Args:
            prefix: Put before every name, for tensors of another kind.
        """
        for i, (names, params) in enumerate(self.buckets, start=1):
            buffers, last = [self.buffers[p] for p in params], i == len(self.buckets)
            self._communicator.average_(buffers, [prefix + name for name in names], last=last)

    def read_state(self, name: str, into: Mapping[Tensor, Tensor]) -> None:
        """Copy a state of the communicator's feedback into one tensor per parameter; zero for what is sent dense."""
        assert isinstance(self._communicator, Communicator)
        for names, params in self.buckets:
            self._communicator.read_state(name, [into[p] for p in params], names)


@contextmanager
def obeying(optimizer: torch.optim.Optimizer, found_inf: Tensor | None) -> Iterator[None]:
    """Have an optimizer obey the exchange's flag in place of a `GradScaler`'s, and unscale nothing again."""
    kept = {name: vars(optimizer).pop(name) for name in ("grad_scale", "found_inf") if name in vars(optimizer)}
    optimizer.found_inf = found_inf  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del optimizer.found_inf  # type: ignore[attr-defined]
        for name, value in kept.items():
            setattr(optimizer, name, value)


def check_shards(who: str, params: Iterable[Tensor], *, group_given: bool) -> None:
    """Raise ValueError where sharded parameters cannot be exchanged: each rank must do so with its peers.

    Args:
        who: Whose error it is.
        params: Of which the `DTensor`s are looked at.
        group_given: Whether the user named the ranks that exchange.
    """
    for p in params:
        if not isinstance(p, DTensor):
            continue
        if not group_given:
            raise ValueError(
                f"{who}: expected the group across which sharded parameters are replicated, got group=None. "
                "Give group=mesh['replicate'].get_group()."
            )
        if any(placement.is_replicate() for placement in p.placements):
            raise ValueError(
                f"{who}: expected parameters that are only sharded, got placements {p.placements}, whose gradients "
                "are averaged already. Give fully_shard mesh['shard'] alone."
            )
