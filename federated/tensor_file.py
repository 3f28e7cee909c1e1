"""Tensors in a file, and trees of plain values beside them: what a checkpoint is made of, without pickle.

The file is in the safetensors format: 8 bytes with the length of a JSON header, the header (dtype, shape and offsets of
every tensor), the bytes.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradwire.comm.errors import CheckpointError

_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_MAX_HEADER = 1 << 28


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors, and have them on the disk when this returns."""
    header: dict[str, Any] = {}
    offset = 0
    for name, value in tensors.items():
        if value.dtype not in _CODES:
            raise TypeError(f"save: expected {name} of a dtype among {sorted(_CODES.values())}, got {value.dtype}.")
        end = offset + value.numel() * value.element_size()
        header[name] = {"dtype": _CODES[value.dtype], "shape": list(value.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for value in tensors.values():
            flat = value.detach().to("cpu").contiguous().view(-1)
            if flat.numel():
                file.write(flat.view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read what `write_tensors` wrote.

    Raises:
        CheckpointError: the file is not of this form.
    """
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    found: dict[str, Tensor] = {}
    try:
        if not 0 < length <= min(_MAX_HEADER, len(data) - 8):
            raise ValueError(f"a header of {length} bytes")
        header = json.loads(bytes(data[8 : 8 + length]))
        start = 8 + length
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            dtype, shape = _DTYPES[entry["dtype"]], [int(size) for size in entry["shape"]]
            first, last = (int(at) for at in entry["data_offsets"])
            count = math.prod(shape)
            fits = 0 <= first <= last <= len(data) - start and last - first == count * dtype.itemsize
            if not fits or min(shape, default=0) < 0:
                raise ValueError(f"{name} of shape {shape} at {first}:{last}")
            part = torch.empty(count, dtype=dtype)
            if count:
                source = torch.frombuffer(data, dtype=torch.uint8, count=last - first, offset=start + first)
                part.view(torch.uint8).copy_(source)
            found[name] = part.view(shape)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"load: expected tensors in {path}, got {type(error).__name__}: {error}.") from error
    return found


def to_plain(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """A tree of dicts, lists, tuples, numbers, text and tensors as JSON; its tensors are put into `tensors`.

    Raises:
        TypeError: there is something else in it.
    """
    if isinstance(value, Tensor):
        while name in tensors:
            name += "'"
        tensors[name] = value
        return {"tensor": name}
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping):
        pairs = [[to_plain(k, tensors, name), to_plain(v, tensors, f"{name}.{k}")] for k, v in value.items()]
        return {"dict": pairs}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [to_plain(v, tensors, f"{name}.{i}") for i, v in enumerate(value)]}
    raise TypeError(f"save: expected tensors, numbers and text, got {type(value).__name__} at {name}.")


def from_plain(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `to_plain` was given.

    Raises:
        CheckpointError: it is not of that form.
    """
    if not isinstance(value, dict):
        return value
    match value:
        case {"tensor": str(name)} if name in tensors:
            return tensors[name]
        case {"dict": list(pairs)}:
            return {from_plain(k, tensors): from_plain(v, tensors) for k, v in pairs}
        case {"list": list(items)}:
            return [from_plain(item, tensors) for item in items]
        case {"tuple": list(items)}:
            return tuple(from_plain(item, tensors) for item in items)
    raise CheckpointError(f"load: expected a tree of plain values, got keys {sorted(value)}.")
