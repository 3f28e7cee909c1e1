"""Bit packing against NumPy's `packbits`, and its edges."""

import numpy as np
import pytest
import torch

from gradwire.compression import bits

WIDTHS = range(1, 17)


def packed_by_numpy(values: np.ndarray, width: int) -> np.ndarray:
    single = values[..., None] >> np.arange(width) & 1
    return np.packbits(single.reshape(len(values), values.shape[1] * width).astype(np.uint8), axis=1, bitorder="little")


@pytest.mark.parametrize("width", WIDTHS)
def test_equals_packbits_and_comes_back(width: int) -> None:
    random = np.random.default_rng(width)
    for rows, columns in [(1, 1), (3, 7), (2, 8), (4, 9), (1, 64), (5, 100), (0, 5)]:
        values = random.integers(0, 2**width, (rows, columns))
        packed = bits.pack(torch.from_numpy(values), width)
        assert packed.dtype == torch.uint8
        assert packed.shape == (rows, bits.packed_columns(columns, width))
        assert packed.is_contiguous()
        np.testing.assert_array_equal(packed.numpy(), packed_by_numpy(values, width))
        np.testing.assert_array_equal(bits.unpack(packed, columns, width).numpy(), values)


@pytest.mark.parametrize("width", WIDTHS)
def test_largest_values_do_not_carry(width: int) -> None:
    values = torch.full((2, 17), 2**width - 1)
    packed = bits.pack(values, width)
    assert (packed[:, :-1] == 255).all()
    assert torch.equal(bits.unpack(packed, 17, width, torch.int64), values)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_integer_dtypes_pack_alike(dtype: torch.dtype) -> None:
    values = torch.arange(120).view(2, 60) % 16
    assert torch.equal(bits.pack(values.to(dtype), 4), bits.pack(values, 4))
    assert torch.equal(bits.pack(values.to(dtype), 7), bits.pack(values, 7))


@pytest.mark.parametrize("width", [1, 4, 7, 8, 12])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32])
def test_unpacks_to_the_dtype_asked_for(width: int, dtype: torch.dtype) -> None:
    values = (torch.arange(30) % 2**width).view(2, 15)
    unpacked = bits.unpack(bits.pack(values, width), 15, width, dtype)
    assert unpacked.dtype == dtype
    assert torch.equal(unpacked, values.to(dtype))


@pytest.mark.parametrize("width", WIDTHS)
def test_strides_do_not_matter(width: int) -> None:
    values = torch.randint(2**width, (40, 6)).t()[:, ::2]
    packed = bits.pack(values, width)
    assert torch.equal(packed, bits.pack(values.contiguous(), width))
    wide = torch.stack([packed, packed], 2)[..., 0]
    assert torch.equal(bits.unpack(wide, 20, width, torch.int64), values)


def test_input_is_unchanged() -> None:
    for width in WIDTHS:
        values = torch.randint(2**width, (2, 16)).to(torch.uint8 if width <= 8 else torch.int32)  # taken as they are
        before = values.clone()
        packed = bits.pack(values, width)
        kept = packed.clone()
        bits.unpack(packed, 16, width).zero_()
        assert torch.equal(values, before)
        assert torch.equal(packed, kept)
