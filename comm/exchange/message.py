"""`MessageLayout`: all parts of a bucket's payloads, and the non-finite flag, in one byte buffer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

_ALIGNMENT = 16  # every part starts where its dtype can be viewed, in each row of a stack of messages


@dataclass(frozen=True)
class _Field:
    start: int
    stop: int
    dtype: torch.dtype
    shape: torch.Size


@final
class MessageLayout:
    """Where each part lies in the buffer: a function of shapes and dtypes only, so both ends know it.

    Args:
        parts: For every matrix of the bucket, its parts or anything of their shape and dtype.

    Attributes:
        nbytes: Size of the buffer: the parts, at most 15 bytes of alignment after each, and the flag.
    """

    def __init__(self, parts: Sequence[Sequence[Tensor]]) -> None:
        self._fields: list[list[_Field]] = []
        end = 0
        for group in parts:
            fields = []
            for part in group:
                size = part.numel() * part.element_size()
                fields.append(_Field(end, end + size, part.dtype, part.shape))
                end += -(-size // _ALIGNMENT) * _ALIGNMENT
            self._fields.append(fields)
        self._flag = end
        self.nbytes = end + _ALIGNMENT

    def pack(self, parts: Sequence[Sequence[Tensor]], bad: Tensor) -> Tensor:
        """Copy the parts and the flag into a new buffer `[nbytes]` uint8."""
        device = bad.device
        message = torch.zeros(self.nbytes, dtype=torch.uint8, device=device)
        for group, fields in zip(parts, self._fields, strict=True):
            for part, where in zip(group, fields, strict=True):
                message[where.start : where.stop].view(where.dtype).view(where.shape).copy_(part)
        message[self._flag : self._flag + 1].copy_(bad)
        return message

    def unpack(self, messages: Tensor) -> list[tuple[Tensor, ...]]:
        """Views of the parts of a stack of messages `[n, nbytes]`: one `[n, rows, columns]` per part."""
        count = messages.shape[0]
        return [
            tuple(messages[:, where.start : where.stop].view(where.dtype).view(count, *where.shape) for where in fields)
            for fields in self._fields
        ]

    def bad(self, messages: Tensor) -> Tensor:
        """Whether any of the messages carries the flag: 0-d bool."""
        return messages[:, self._flag].bool().any()  # of bytes, any() would be a byte
