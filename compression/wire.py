"""The byte form of a payload, for files and for clients that are not trusted.

    magic "gwpl" | version u16 | dtype u8 | dims u8 | crc32 u32 | compressor u64 | dims x u64 | keys | parts

Numbers are little-endian. `compressor` is a hash of the compressor's repr, so both ends must agree on every
hyper-parameter. `keys` are present for shared randomness only; parts follow in the order of the layout. All lengths
follow from the header, so nothing else is stored and a payload has one size.

The checksum finds damage, not forgery: who may write a payload may write its checksum. So everything that decides what
is read, allocated or indexed is checked as well, before it is used, and whatever passes can be decompressed safely. It
may still hold any finite or non-finite plain values; those are for the aggregator to judge.
"""

import math
import struct
import zlib

import torch
from torch import Tensor

from gradwire.compression import counter_rng
from gradwire.compression.base import Compressor, Part, Payload

_MAGIC = b"gwpl"
_VERSION = 1
_HEADER = struct.Struct("<4sHBBIQ")
_CHECKSUM = slice(8, 12)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_MAX_DIMS = 64  # torch's own limit


class PayloadError(ValueError):
    """Bytes or a payload that are not what the compressor makes."""


def to_bytes(compressor: Compressor, payload: Payload) -> bytes:
    """Write a payload.

    Raises:
        PayloadError: the payload was not made by `compressor`, or holds what `from_bytes` refuses (a scale that is not
            finite, from a tensor that is not).

    Example:
        >>> from gradwire.compression import BlockQuantize
        >>> compressor = BlockQuantize(bits=8, block=4)
        >>> data = to_bytes(compressor, compressor.compress(torch.tensor([1.0, -127.0])))
        >>> len(data), compressor.decompress(from_bytes(compressor, data))
        (36, tensor([   1., -127.]))
    """
    if payload.dtype not in _DTYPES:
        raise PayloadError(f"to_bytes: expected a dtype in {_DTYPES}, got {payload.dtype}.")
    expected = _layout(compressor, payload.shape, payload.dtype)
    tensors = [*([] if payload.keys is None else [payload.keys[:, None]]), *payload.parts]
    found = [(part.shape[0], part.shape[1], part.dtype) for part in tensors]
    if found != [(rows, part.columns, part.dtype) for rows, part in expected]:
        raise PayloadError(
            f"to_bytes: expected a payload made by {compressor!r}, got parts (rows, columns, dtype) {found}."
        )
    _check_values(compressor, payload)
    header = _HEADER.pack(
        _MAGIC, _VERSION, _DTYPES.index(payload.dtype), len(payload.shape), 0, counter_rng.fold(repr(compressor))
    )
    data = bytearray(b"".join([header, struct.pack(f"<{len(payload.shape)}Q", *payload.shape), *map(_dump, tensors)]))
    data[_CHECKSUM] = zlib.crc32(data).to_bytes(4, "little")
    return bytes(data)


def from_bytes(compressor: Compressor, data: bytes | bytearray | memoryview, *, max_numel: int = 1 << 31) -> Payload:
    """Read a payload on the CPU, from bytes that may be damaged or hostile.

    Args:
        compressor: The compressor that made it.
        data: The bytes, whole.
        max_numel: Most entries the tensor may have. A few bytes can stand for a large tensor, so set it to what you
            expect.

    Raises:
        PayloadError: the bytes are not a payload of this compressor; nothing larger than them was allocated.
    """
    if len(data) < _HEADER.size:
        raise PayloadError(f"from_bytes: expected at least {_HEADER.size} bytes, got {len(data)}.")
    magic, version, dtype_code, dims, checksum, made_by = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        raise PayloadError(f"from_bytes: expected bytes that start with {_MAGIC!r}, got {magic!r}.")
    if version != _VERSION:
        raise PayloadError(f"from_bytes: expected version {_VERSION}, got {version}. Use one gradwire on both ends.")
    zeroed = bytearray(data)
    zeroed[_CHECKSUM] = bytes(4)
    if zlib.crc32(zeroed) != checksum:
        raise PayloadError(
            f"from_bytes: expected checksum {checksum:#010x}, got {zlib.crc32(zeroed):#010x}: damaged bytes."
        )
    if made_by != counter_rng.fold(repr(compressor)):
        raise PayloadError(f"from_bytes: expected a payload of {compressor!r}, got one of another compressor.")
    if dtype_code >= len(_DTYPES) or dims > _MAX_DIMS:
        raise PayloadError(
            f"from_bytes: expected a known dtype and at most {_MAX_DIMS} dimensions, got {dtype_code}, {dims}."
        )
    body = _HEADER.size + 8 * dims
    if len(data) < body:
        raise PayloadError(f"from_bytes: expected {dims} dimensions, got {len(data)} bytes.")
    sizes = struct.unpack_from(f"<{dims}Q", data, _HEADER.size)
    if math.prod(max(1, size) for size in sizes) > max_numel:
        raise PayloadError(f"from_bytes: expected a tensor of at most {max_numel} entries, got shape {sizes}.")
    shape, dtype = torch.Size(sizes), _DTYPES[dtype_code]
    expected = _layout(compressor, shape, dtype)
    length = body + sum(rows * part.row_bytes for rows, part in expected)
    if len(data) != length:
        raise PayloadError(f"from_bytes: expected {length} bytes for shape {sizes}, got {len(data)}.")

    tensors = []
    for rows, part in expected:
        tensors.append(_load(zeroed[body : body + rows * part.row_bytes], rows, part))
        body += rows * part.row_bytes
    keys = tensors.pop(0)[:, 0] if compressor.randomness == "shared" else None
    payload = Payload(tuple(tensors), shape, dtype, keys)
    _check_values(compressor, payload)
    return payload


def _layout(compressor: Compressor, shape: torch.Size, dtype: torch.dtype) -> list[tuple[int, Part]]:
    """Rows and description of every tensor of the body."""
    parts = compressor.layout(compressor.row_width(shape), dtype)
    if compressor.randomness == "shared":
        parts = (Part("keys", torch.int64, 1), *parts)
    return [(compressor.num_rows(shape), part) for part in parts]


def _check_values(compressor: Compressor, payload: Payload) -> None:
    keys = payload.keys
    if keys is not None and not ((keys >= 0) & (keys < 1 << 62)).all():
        raise PayloadError("payload: expected random keys in [0, 2^62), got others.")
    try:
        compressor.check_parts(payload.parts, compressor.row_width(payload.shape))
    except ValueError as error:
        raise PayloadError(str(error)) from error


def _dump(tensor: Tensor) -> bytes:
    raw: bytes = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return raw


def _load(raw: bytearray, rows: int, part: Part) -> Tensor:
    flat = torch.frombuffer(raw, dtype=part.dtype) if raw else torch.empty(0, dtype=part.dtype)
    return flat.view(rows, part.columns)
