"""One rank of the lab: a model, its optimizer, and one of the ways to bring gradients together."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.distributed import all_reduce  # as it is before hooks of torch are counted
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from gradwire.bench import specs
from gradwire.bench.data import Corpus
from gradwire.bench.model import ByteTransformer, nats_per_byte
from gradwire.bench.network.meter import CALLS
from gradwire.bench.network.methods import TORCH_RANK, Method
from gradwire.comm import attach, keep_local
from gradwire.comm.averager import Averager
from gradwire.optim import DeMo, DiLoCo

_HELD_OUT_WINDOWS = 256


@final
@dataclass(frozen=True)
class Shape:
    """The model and its training, the same for all methods.

    Args:
        layers: Blocks, >= 1.
        width: Size of the hidden state, a multiple of 2 heads.
        heads: Attention heads, >= 1.
        context: Bytes per sequence, >= 1.
        batch: Sequences per rank and step, >= 1.
        steps: Of the token budget, >= 1.
        eval_every: Steps between evaluations, >= 1.
        warmup: Share of the steps over which the learning rate rises; a cosine brings it down to a tenth.
        seed: Of weights, order of the data and random draws.
    """

    layers: int = 4
    width: int = 128
    heads: int = 4
    context: int = 64
    batch: int = 4
    steps: int = 300
    eval_every: int = 15
    warmup: float = 0.1
    seed: int = 0


@final
class Trainee:
    """Trains on one rank; every rank calls the same methods at the same points.

    Args:
        method: How gradients, or what stands for them, are brought together.
        shape: Model and training.
        corpus: The text.
    """

    def __init__(self, method: Method, shape: Shape, corpus: Corpus) -> None:
        self.method, self.shape, self.corpus = method, shape, corpus
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        torch.manual_seed(shape.seed)
        self.model = ByteTransformer(shape.layers, shape.width, shape.heads)
        self._forward: torch.nn.Module = self.model
        if method.host == "ddp":
            self._forward = DistributedDataParallel(self.model, bucket_cap_mb=method.bucket_mb)
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(self.model.parameters(), lr=method.lr)
        self._averager: Averager | None = None
        self._counted = 0.0  # bytes that torch's hooks have handed over
        self._steps = 0
        if method.kind in ("torch bf16", "torch PowerSGD"):
            self._register_hook_of_torch()
        elif method.kind == "rounds":
            self._train_in_rounds()
        elif method.kind == "gradwire":
            self._average_through_gradwire()

    @property
    def declared_bytes(self) -> float:
        """Bytes sent from this rank so far, by the sizes of the buffers and the usual algorithm of each collective."""
        ring = 2 * (self.world_size - 1) / self.world_size
        if self.method.kind == "DDP":
            return ring * self._steps * sum(4 * p.numel() for p in self.model.parameters())
        return self._counted if self._averager is None else self._averager.stats.bytes_sent

    def step(self, step: int) -> Tensor:
        """One optimizer step, counted from 0; returns this rank's loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.method.lr * self._schedule(step)
        inputs, targets = self.corpus.batch(self.shape.seed, step, self.rank, self.shape.batch, self.shape.context)
        loss = nats_per_byte(self._forward(inputs), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._steps += 1
        return loss.detach()

    def settle(self) -> None:
        """Let an exchange in flight end."""
        if isinstance(self.optimizer, DeMo):
            self.optimizer.wait()

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean loss in nats per byte over held-out windows, shared among the ranks."""
        self.settle()
        with self.optimizer.returned() if isinstance(self.optimizer, DeMo) else contextlib.nullcontext():
            inputs, targets = self.corpus.held_out(_HELD_OUT_WINDOWS, self.shape.context, self.rank, self.world_size)
            loss = nats_per_byte(self.model(inputs), targets).double() * len(inputs)
        total = torch.stack([loss, torch.tensor(float(len(inputs)), dtype=torch.float64)])
        all_reduce(total)
        return float(total[0] / total[1])

    def _register_hook_of_torch(self) -> None:
        assert isinstance(self._forward, DistributedDataParallel)
        if self.method.kind == "torch bf16":

            def rounded(state: Any, bucket: GradBucket) -> torch.futures.Future[Tensor]:
                # gloo refuses the hook by its name, not for what it does
                with self._counting():
                    return default_hooks.bf16_compress_hook(state, bucket)

            self._forward.register_comm_hook(None, rounded)
            return
        state = powerSGD_hook.PowerSGDState(
            process_group=None, matrix_approximation_rank=TORCH_RANK, start_powerSGD_iter=2
        )

        def low_rank(state: Any, bucket: GradBucket) -> torch.futures.Future[Tensor]:
            return powerSGD_hook.powerSGD_hook(state, bucket)

        dist.all_reduce = functools.partial(self._count, dist.all_reduce)
        self._forward.register_comm_hook(state, low_rank)

    @contextlib.contextmanager
    def _counting(self) -> Iterator[None]:
        """Count what is all-reduced inside."""
        original = dist.all_reduce
        dist.all_reduce = functools.partial(self._count, original)
        try:
            yield
        finally:
            dist.all_reduce = original

    def _count(self, all_reduce: Callable[..., Any], tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        CALLS["all_reduce"] += 1
        self._counted += 2 * (self.world_size - 1) / self.world_size * tensor.numel() * tensor.element_size()
        return all_reduce(tensor, *args, **kwargs)

    def _train_in_rounds(self) -> None:
        method = self.method
        inner = torch.optim.AdamW(self.model.named_parameters(), lr=method.lr)
        outer = torch.optim.SGD(
            self.model.named_parameters(),
            lr=method.outer_lr,
            momentum=method.outer_momentum,
            nesterov=method.outer_momentum > 0,
        )
        self._averager = specs.parse(method.text).communicator(self.shape.seed)
        self.optimizer = DiLoCo(inner, outer, every=method.every, communicator=self._averager)

    def _average_through_gradwire(self) -> None:
        method = self.method
        configuration = specs.parse(method.text)
        self.optimizer = configuration.optimizer(self.model.named_parameters(), lr=method.lr, seed=self.shape.seed)
        self._averager = specs.own_communicator(self.optimizer)
        if self._averager is not None:
            if isinstance(self._forward, DistributedDataParallel):
                keep_local(self._forward)
            return
        self._averager = configuration.communicator(self.shape.seed)
        if isinstance(self._forward, DistributedDataParallel):
            attach(self._forward, self._averager, optimizer=self.optimizer)
        else:
            named = self.model.named_parameters()
            attach(named, self._averager, optimizer=self.optimizer, bucket_mb=method.bucket_mb)

    def _schedule(self, step: int) -> float:
        """Share of the peak learning rate: a linear rise, then a cosine to a tenth."""
        rise = self.shape.warmup * self.shape.steps
        if step < rise:
            return (step + 1) / (rise + 1)
        done = min(1.0, (step - rise) / (self.shape.steps - rise))
        return 0.1 + 0.45 * (1 + math.cos(math.pi * done))
