"""A small model, its data and digests of its state, for tests with real processes."""

import functools
import hashlib
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from gradwire.comm import Averager

BUCKET_MB = 0.005  # two or three buckets for this model


def model(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Three matrices whose sizes are no multiples of any row width, three biases and a norm: 6,965 parameters."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = nn.Linear(37, 61), nn.Tanh(), nn.LayerNorm(61), nn.Linear(61, 53), nn.Tanh(), nn.Linear(53, 23)
    return nn.Sequential(*layers).to(dtype)


@functools.cache
def batch(step: int, rank: int, rows: int = 8) -> tuple[Tensor, Tensor]:
    """Inputs and targets of a fixed linear map; every rank and step has its own."""
    numbers = torch.Generator().manual_seed(1000 * step + rank)
    x = torch.randn(rows, 37, generator=numbers)
    teacher = torch.randn(37, 23, generator=torch.Generator().manual_seed(7)) / 6
    return x, x @ teacher


def loss(module: nn.Module, step: int, rank: int | None = None) -> Tensor:
    """Mean squared error on this rank's batch, in the module's dtype."""
    x, y = batch(step, dist.get_rank() if rank is None else rank)
    dtype = next(module.parameters()).dtype
    return F.mse_loss(module(x.to(dtype)), y.to(dtype))


def evaluate(module: nn.Module) -> float:
    """Loss on a batch that no rank trains on."""
    with torch.no_grad():
        return loss(module, 10**6, 0).item()


def ddp(module: nn.Module, **options: object) -> DistributedDataParallel:
    """Wrapped with several buckets, unless the options say otherwise."""
    return DistributedDataParallel(module, **{"bucket_cap_mb": BUCKET_MB, **options})


def digest(tensors: Iterable[Tensor]) -> str:
    """Equal if and only if all bits are equal."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]


def state_digest(communicator: Averager) -> str:
    """Digest of all state of this rank's communicator."""
    rows: Mapping[str, Tensor] = communicator.state_rows()
    return digest(rows[key] for key in sorted(rows))


def all_equal(values: Iterable[object]) -> bool:
    """Whether all ranks gave the same."""
    first, *others = values
    return all(other == first for other in others)
