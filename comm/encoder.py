"""`Encoder`: compensate, compress, update: what a rank does to its rows before it sends."""

from collections.abc import Callable, Mapping, Sequence
from typing import final

import torch
from torch import Tensor

from gradwire.comm.feedback.base import ErrorFeedback
from gradwire.compression import counter_rng
from gradwire.compression.base import Compressor, Part
from gradwire.compression.fused import fuse
from gradwire.compression.rounding import round_to_format

_FUSED_BLOCK = 1 << 20  # entries: gradient, old and new residual are 12 MiB, which a shared cache holds
_EAGER_BLOCK = 1 << 18  # an eager pass writes every temporary, so it needs a smaller block to stay in the cache
_STATE = counter_rng.fold("state")


Kernel = Callable[..., Tensor]
"""Encodes one block of rows; see `encode_kernel`."""


def encode_kernel(compressor: Compressor, feedback: ErrorFeedback, *, fused: bool) -> Kernel:
    """The function that encodes a block of rows in place; compiled into one kernel if `fused`, for all matrices."""

    def encode(
        x: Tensor,
        dtype: torch.dtype,
        keys: Tensor | None,
        state: Mapping[str, Tensor],
        parts: Sequence[Tensor],
        out: Mapping[str, Tensor],
        present: Tensor | None,
    ) -> Tensor:
        target = feedback.compensate(x, state)
        if present is not None:
            target = target * present  # keeps what is not finite, so that the step is skipped
        # Most payloads show by themselves, after the exchange, what was not finite; that saves a pass.
        bad = is_bad(target if not compressor.carries_non_finite else target[:0])
        if out:
            made, sent = compressor.compress_rows_with_sent(target, dtype, keys)
            for name, new in feedback.update(target, sent.to(target.dtype), state).items():
                out[name].copy_(new if out[name].dtype != torch.bfloat16 else _rounded(new, keys))
        else:
            made = compressor.compress_rows(target, dtype, keys)
        for part, new in zip(parts, made, strict=True):
            part.copy_(new)
        return bad

    return fuse(encode) if fused else encode


def _rounded(x: Tensor, keys: Tensor | None) -> Tensor:
    """At random to one of the two numbers in bfloat16 around each, so that small changes count in the mean."""
    assert keys is not None
    keys = counter_rng.at_step(keys, _STATE)
    return round_to_format(x.float(), torch.bfloat16, counter_rng.uniform(keys, x.shape[1]))


@final
class Encoder:
    """Encodes the rows of one matrix into buffers that exist already.

        target = feedback.compensate(transform(x));  parts = compressor.compress(target)
        state' = feedback.update(target, decompress(parts))

    The first touch of fresh memory costs a CPU more than the arithmetic, so outputs are reused; and what passes over a
    row more than once goes block by block of rows there, so that the second pass finds it in the cache.

    Args:
        kernel: What encodes a block, compiled or not.
        layout: What each row of the payload carries.
        rows: Rows of the matrix (of all workers).
        width: Entries per row.
        dtype: Dtype of the tensors that the rows are cut from.
        device: Where the matrix lives.
        fused: Whether the kernel is compiled.
        transform: Brings rows into the compressor's basis, if that is another one.
    """

    def __init__(
        self,
        kernel: Kernel,
        layout: Sequence[Part],
        rows: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        fused: bool,
        transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._kernel, self._transform, self._dtype = kernel, transform, dtype
        self._parts = tuple(torch.empty((rows, part.columns), dtype=part.dtype, device=device) for part in layout)
        entries = rows * width if device.type != "cpu" else _FUSED_BLOCK if fused else _EAGER_BLOCK
        step = max(1, entries // width)
        self._blocks = [slice(first, first + step) for first in range(0, rows, step)]

    def encode(
        self,
        x: Tensor,
        keys: Tensor | None,
        state: Mapping[str, Tensor],
        out: Mapping[str, Tensor],
        present: Tensor | None = None,
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Encode `x [rows, width]`.

        Args:
            x: The gradient's rows.
            keys: Random keys `[rows]`, if the compressor needs them, or state in bfloat16 does.
            state: The feedback's state.
            out: Where the new values of the rank's own state go.
            present: `[rows, 1]` bool: whether the worker of a row takes part; all do by default.

        Returns:
            The parts of the payload, valid until the next call, and 0-d bool: whether an entry is not finite.
        """
        bad = torch.zeros((), dtype=torch.bool, device=x.device)
        for block in self._blocks:
            bad = bad | self._kernel(
                x[block] if self._transform is None else self._transform(x[block]),
                self._dtype,
                None if keys is None else keys[block],
                {name: state[name][block] for name in out},
                [part[block] for part in self._parts],
                {name: value[block] for name, value in out.items()},
                None if present is None else present[block],
            )
        return self._parts, bad


def is_bad(x: Tensor) -> Tensor:
    """0-d bool: whether any entry is inf or NaN."""
    if x.numel() == 0:
        return torch.zeros((), dtype=torch.bool, device=x.device)
    low, high = torch.aminmax(x)  # both are NaN if an entry is; ten times quicker on a CPU than isfinite(x).all()
    return ~(torch.isfinite(low) & torch.isfinite(high))
