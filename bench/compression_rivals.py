"""What `gradwire bench compression` measures beside the compressors: torch's own equivalents, and PowerSGD whole."""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook, quantization_hooks

from gradwire.bench.launch import leave_process_groups
from gradwire.comm import PowerSGD

_MATRIX_RANK = 4
_quantize: Callable[..., Tensor] = quantization_hooks._quantize_per_tensor_backend
_dequantize: Callable[..., Tensor] = quantization_hooks._dequantize_per_tensor_backend

Functions = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Candidate:
    """Something to measure.

    Args:
        name: What it is.
        source: "gradwire" or "torch".
        nbytes: Bytes that travel.
        functions: "encode eager", "decode fused", ..., without arguments.
    """

    name: str
    source: str
    nbytes: int
    functions: Functions


@contextmanager
def candidates(x: Tensor, density: float) -> Iterator[list[Candidate]]:
    """All of them for a flat float32 tensor; a process group of one stands meanwhile, since DDP hooks ask for one."""
    backend = "gloo" if x.device.type == "cpu" else "nccl"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        yield [_global_topk(x, density), _bf16(x), _quantization(x), *_power_sgd(x)]
    finally:
        leave_process_groups()


def _global_topk(x: Tensor, density: float) -> Candidate:
    """Top-k of the whole tensor with a residual and 32-bit indices, as libraries write it."""
    k = max(1, round(density * x.numel()))
    residual, out = torch.zeros_like(x), torch.empty_like(x)
    indices, values = x.abs().topk(k).indices, x.new_empty(k)

    def encode() -> None:
        target = x + residual
        kept = target.abs().topk(k, sorted=False).indices
        values.copy_(target[kept])
        indices.copy_(kept)
        residual.copy_(target.index_fill_(0, kept, 0))

    def decode() -> None:
        out.zero_().scatter_(0, indices, values)

    return Candidate("topk of the whole tensor", "torch", 8 * k, {"encode eager": encode, "decode eager": decode})


def _bf16(x: Tensor) -> Candidate:
    """The arithmetic of `bf16_compress_hook`, without a residual."""
    narrow, out = x.bfloat16(), torch.empty_like(x)
    functions: Functions = {"encode eager": lambda: narrow.copy_(x), "decode eager": lambda: out.copy_(narrow)}
    return Candidate("bf16_compress_hook", "torch", 2 * x.numel(), functions)


def _quantization(x: Tensor) -> Candidate:
    """The arithmetic of `quantization_pertensor_hook`, without a residual; the other hook loops over rows in Python."""
    out = torch.empty_like(x)
    codes = torch.empty_like(x, dtype=torch.uint8)

    def encode() -> tuple[Tensor, Tensor]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's observers are deprecated, and the hook uses them
            observer: Any = torch.ao.quantization.MinMaxObserver().to(x.device)
            observer(x)
            scale, zero_point = (value.to(x.device) for value in observer.calculate_qparams())
        codes.copy_(_quantize(x, scale, zero_point))
        return scale, zero_point

    scale, zero_point = encode()

    def decode() -> None:
        out.copy_(_dequantize(codes, scale, zero_point))

    functions: Functions = {"encode eager": encode, "decode eager": decode}
    return Candidate("quantization_pertensor_hook", "torch", x.numel(), functions)


def _power_sgd(x: Tensor) -> list[Candidate]:
    """A whole step of PowerSGD on a square matrix, ours and that of torch's hook."""
    side = math.isqrt(x.numel())
    if side < 4 * _MATRIX_RANK:
        return []  # the hook would send it dense
    matrix = x[: side * side].view(side, side)
    ours, theirs = matrix.clone(), matrix.clone()
    communicator = PowerSGD(_MATRIX_RANK)
    state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=_MATRIX_RANK, start_powerSGD_iter=2)
    bucket: Any = _OneTensor(theirs)

    def step() -> None:
        ours.copy_(matrix)
        communicator.average_([ours], ["matrix"])

    def hook() -> None:
        theirs.copy_(matrix)
        powerSGD_hook.powerSGD_hook(state, bucket).wait()

    for _ in range(2):  # it starts densely
        hook()
    nbytes = 2 * side * _MATRIX_RANK * 4
    return [
        Candidate(f"PowerSGD({_MATRIX_RANK}), whole step", "gradwire", nbytes, {"encode eager": step}),
        Candidate(f"powerSGD_hook, rank {_MATRIX_RANK}, whole step", "torch", nbytes, {"encode eager": hook}),
    ]


@dataclass(frozen=True)
class _OneTensor:
    """Stands for a DDP bucket of one gradient."""

    tensor: Tensor

    def buffer(self) -> Tensor:
        return self.tensor.view(-1)

    def gradients(self) -> list[Tensor]:
        return [self.tensor]

    def index(self) -> int:
        return 0

    def is_last(self) -> bool:
        return True
