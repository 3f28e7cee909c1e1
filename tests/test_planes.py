"""Packing in planes: exact round trips, the documented layout, and equal bits when compiled."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradwire.compression import BlockQuantize, Compressor, ScaledSign
from gradwire.compression.bits import packed_columns
from gradwire.compression.fused import fuse
from gradwire.compression.planes import pack_planes, unpack_planes


@given(bits=st.sampled_from([1, 2, 4, 8]), rows=st.integers(0, 4), columns=st.integers(1, 40), seed=st.integers(0, 99))
def test_layout_and_round_trip(bits: int, rows: int, columns: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 2**bits, (rows, columns), dtype=np.uint8)
    packed = pack_planes(torch.from_numpy(values), bits)
    stride = packed_columns(columns, bits)
    expected = np.zeros((rows, stride), dtype=np.uint8)
    for column in range(columns):
        expected[:, column % stride] |= values[:, column] << bits * (column // stride)
    assert np.array_equal(packed.numpy(), expected)
    assert np.array_equal(unpack_planes(packed, columns, bits).numpy(), values)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from inside torch.compile
@pytest.mark.parametrize("compressor", [ScaledSign(), BlockQuantize(bits=4, stochastic=True)], ids=repr)
def test_compiled_payloads_have_the_same_bits(compressor: Compressor) -> None:
    torch._dynamo.reset()
    x = torch.randn(3, compressor.row_width(torch.Size([3000])))
    keys = torch.tensor([3, 2**61, 77]) if compressor.randomness == "private" else None
    codes, scale = fuse(lambda x: compressor.compress_rows(x, x.dtype, keys))(x)
    expected_codes, expected_scale = compressor.compress_rows(x, x.dtype, keys)
    assert torch.equal(codes, expected_codes)
    assert torch.allclose(scale, expected_scale, rtol=1e-6, atol=0)
