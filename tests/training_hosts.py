"""One network in training on DDP, in a plain loop and on FSDP2, averaged by the host or through a communicator."""

import contextlib
from collections.abc import Callable
from typing import Any

import hsdp
import torch
import torch.distributed as dist
import toy
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from gradwire.comm import Averager, attach

HOSTS = ["ddp", "loop", "fsdp2"]
Make = Callable[..., Averager]


class _Block(nn.Module):
    def __init__(self, entries: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(entries, outputs)
        self.recompute: bool | None = None
        """None, or whether the backward pass that recomputes it is a reentrant one."""

    def forward(self, x: Tensor) -> Tensor:
        if self.recompute is None or not torch.is_grad_enabled():
            return self._run(x)
        return checkpoint(self._run, x, use_reentrant=self.recompute)  # type: ignore[no-any-return]

    def _run(self, x: Tensor) -> Tensor:
        return self.linear(x).tanh()  # type: ignore[no-any-return]


class _Network(nn.Module):
    """Two blocks and a head: 6,765 parameters. It is a class of its own because Dynamo leaves torch's alone."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([_Block(37, 61), _Block(61, 53)])
        self.head = nn.Linear(53, 23)

    def forward(self, x: Tensor) -> Tensor:
        if self.blocks[0].recompute:
            x = x.detach().requires_grad_()  # or a reentrant backward pass would not come to the first block
        for block in self.blocks:
            x = block(x)
        return self.head(x)  # type: ignore[no-any-return]


def network(dtype: torch.dtype = torch.float32, recompute: bool | None = None) -> _Network:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = _Network().to(dtype)
    for block in made.blocks:
        block.recompute = recompute
    return made


class Training:
    """A network on a host, which averages by itself or through a communicator."""

    def __init__(
        self,
        host: str,
        make: Make | None,
        network: nn.Module,
        *,
        policy: MixedPrecisionPolicy | None = None,
        scaler: torch.amp.GradScaler | None = None,
        lr: float = 0.1,
    ) -> None:
        self.host, self.scaler = host, scaler
        self.module: Any = network
        mesh = hsdp.mesh(replicas=2) if host == "fsdp2" else None
        if host == "ddp":
            self.module = toy.ddp(network, bucket_cap_mb=25)
        if mesh is not None:
            options = {"mesh": mesh if make is None else mesh["shard"], "mp_policy": policy or MixedPrecisionPolicy()}
            for block in network.blocks:
                fully_shard(block, **options)
            fully_shard(network, **options)
        self.optimizer = torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9)
        self.communicator = None if make is None else make(**({"group": mesh["replicate"].get_group()} if mesh else {}))
        self.handle: Any = None
        if self.communicator is not None:
            options = {"replicate": mesh["replicate"]} if mesh else {}
            target = network.named_parameters() if host == "loop" else self.module
            self.handle = attach(target, self.communicator, optimizer=self.optimizer, scaler=scaler, **options)

    def backward(self, loss: Tensor) -> None:
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def without_sync(self) -> contextlib.AbstractContextManager[Any]:
        """Backward passes inside only accumulate."""
        if self.host == "fsdp2":
            self.module.set_requires_gradient_sync(False)
            return contextlib.nullcontext()
        if self.host == "ddp":
            return self.module.no_sync()  # type: ignore[no-any-return]
        return contextlib.nullcontext() if self.handle is None else self.handle.no_sync()

    def with_sync(self) -> None:
        if self.host == "fsdp2":
            self.module.set_requires_gradient_sync(True)

    def step(self) -> None:
        if self.host == "loop" and self.handle is None:
            for p in self.module.parameters():
                dist.all_reduce(p.grad)
                p.grad /= dist.get_world_size()
        if self.scaler is None:
            self.optimizer.step()
        else:
            if self.host == "loop" and self.handle is not None:
                self.handle.wait()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad()

    def weights(self) -> list[Tensor]:
        return [p.detach() for p in hsdp.whole(self.module)]
