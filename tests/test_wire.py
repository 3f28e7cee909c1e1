"""The byte form of payloads: exact round trips, and nothing but PayloadError for bytes that are damaged or hostile."""

import struct
import tracemalloc
import zlib

import pytest
import torch
from cases import COMPRESSORS
from hypothesis import given
from hypothesis import strategies as st

from gradwire.compression import (
    BlockQuantize,
    Cast,
    Chain,
    ChunkTopK,
    Compressor,
    Payload,
    PayloadError,
    RandomK,
    ScaledSign,
    TopK,
    counter_rng,
    from_bytes,
    to_bytes,
)

SMALL: list[Compressor] = [
    BlockQuantize(bits=4, block=4),
    Cast("float8_e4m3fn"),
    Chain(ChunkTopK(k=2, chunk=8), BlockQuantize(bits=8, block=4)),
    RandomK(k=2, chunk=8),
    TopK(0.2),
]
COMPRESSOR_IDS = [repr(case.compressor) for case in COMPRESSORS]


def signed(data: bytes | bytearray) -> bytes:
    """The same bytes with the checksum that belongs to them: what somebody who knows the format sends."""
    data = bytearray(data)
    data[8:12] = bytes(4)
    data[8:12] = zlib.crc32(data).to_bytes(4, "little")
    return bytes(data)


def header(compressor: Compressor, shape: tuple[int, ...], *, dtype: int = 0, dims: int | None = None) -> bytes:
    """A header with any shape, and nothing behind it."""
    dims = len(shape) if dims is None else dims
    fixed = struct.pack("<4sHBBIQ", b"gwpl", 1, dtype, dims, 0, counter_rng.fold(repr(compressor)))
    return signed(fixed + struct.pack(f"<{len(shape)}Q", *shape))


def assert_equal(a: Payload, b: Payload) -> None:
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    pairs = [*zip(a.parts, b.parts, strict=True)]
    if a.keys is not None or b.keys is not None:
        pairs.append((a.keys, b.keys))
    for ours, theirs in pairs:
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("compressor", [case.compressor for case in COMPRESSORS], ids=COMPRESSOR_IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (7, 5, 3), (4100,)], ids=str)
def test_round_trip_is_exact(compressor: Compressor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    payload = compressor.compress(torch.randn(shape, dtype=torch.float64).to(dtype), seed=3)
    data = to_bytes(compressor, payload)
    assert_equal(from_bytes(compressor, data), payload)
    keys = payload.rows * 8 if compressor.randomness == "shared" else 0
    assert len(data) == 20 + 8 * len(shape) + keys + compressor.payload_bytes(shape, dtype)
    assert torch.equal(compressor.decompress(from_bytes(compressor, data)), compressor.decompress(payload))


@pytest.mark.parametrize("compressor", SMALL, ids=repr)
def test_every_flipped_byte_and_every_truncation_is_refused(compressor: Compressor) -> None:
    data = to_bytes(compressor, compressor.compress(torch.randn(3, 7)))
    for position in range(len(data)):
        for flip in (0x01, 0x80, 0xFF):
            damaged = bytearray(data)
            damaged[position] ^= flip
            with pytest.raises(PayloadError):
                from_bytes(compressor, damaged)
        with pytest.raises(PayloadError):
            from_bytes(compressor, data[:position])
    with pytest.raises(PayloadError):
        from_bytes(compressor, data + b"\0")


@pytest.mark.parametrize("compressor", SMALL, ids=repr)
@given(data=st.binary(max_size=200))
def test_random_bytes_are_refused(compressor: Compressor, data: bytes) -> None:
    with pytest.raises(PayloadError):
        from_bytes(compressor, data)


@pytest.mark.parametrize("compressor", SMALL, ids=repr)
@given(data=st.data())
def test_a_forged_payload_is_refused_or_decompresses(compressor: Compressor, data: st.DataObject) -> None:
    genuine = to_bytes(compressor, compressor.compress(torch.linspace(-1, 2, 21)))
    forged = bytearray(genuine)
    for _ in range(data.draw(st.integers(1, 4))):
        forged[data.draw(st.integers(0, len(forged) - 1))] = data.draw(st.integers(0, 255))
    forged = forged[: data.draw(st.integers(len(forged) - 3, len(forged)))]
    try:
        payload = from_bytes(compressor, signed(forged), max_numel=1 << 12)
    except PayloadError:
        return
    assert compressor.decompress(payload).shape == payload.shape


@pytest.mark.parametrize("compressor", SMALL, ids=repr)
@pytest.mark.parametrize(
    "shape",
    [
        (2**63,),
        (2**64 - 1,),
        (2**32, 2**32),
        (0, 2**63),
        (2**40, 0, 2**40),
        (2**20,),
        (2,) * 64,
        (1,) * 65,
        (2**31 + 1,),
    ],
    ids=str,
)
def test_hostile_shapes_are_refused_without_allocating(compressor: Compressor, shape: tuple[int, ...]) -> None:
    data = header(compressor, shape)
    tracemalloc.start()
    with pytest.raises(PayloadError):
        from_bytes(compressor, data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_small_body_cannot_stand_for_more_entries_than_allowed() -> None:
    compressor = TopK(1e-3)
    data = to_bytes(compressor, compressor.compress(torch.randn(100_000)))
    assert from_bytes(compressor, data, max_numel=100_000).shape == (100_000,)
    with pytest.raises(PayloadError, match="at most 99999 entries"):
        from_bytes(compressor, data, max_numel=99_999)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "at least 20 bytes, got 0"),
        (b"PK\3\4" + bytes(60), "start with b'gwpl'"),
        (signed(b"gwpl" + (9).to_bytes(2, "little") + bytes(30)), "version 1, got 9"),
        (header(ScaledSign(), (3,)), "another compressor"),
        (header(TopK(0.2), (3,), dtype=4), "known dtype"),
        (header(TopK(0.2), (3,), dims=3), "3 dimensions, got 28 bytes"),
    ],
)
def test_the_message_says_what_is_wrong(data: bytes, message: str) -> None:
    with pytest.raises(PayloadError, match=message):
        from_bytes(TopK(0.2), data)


def forge(compressor: Compressor, payload: Payload, part: int, value: float) -> bytes:
    """A payload whose part holds a value that the compressor never gives, as a client would write it."""
    data = bytearray(to_bytes(compressor, payload))
    start = 20 + 8 * len(payload.shape) + sum(p.numel() * p.element_size() for p in payload.parts[:part])
    raw = torch.tensor([value], dtype=payload.parts[part].dtype).view(torch.uint8).numpy().tobytes()
    data[start : start + len(raw)] = raw
    return signed(data)


@pytest.mark.parametrize(
    ("compressor", "part", "value", "message"),
    [
        (TopK(0.2), 1, 0xFF, "indices"),
        (Chain(ChunkTopK(k=1, chunk=9), BlockQuantize()), 0, 15, "indices"),
        (Chain(ChunkTopK(k=1, chunk=9), BlockQuantize()), 2, -1.0, "scales"),
        (BlockQuantize(bits=8), 0, 255, "codes <= 254"),
        (BlockQuantize(bits=4), 0, 0xF0, "codes <= 14"),
        (BlockQuantize(bits=2), 0, 0b11, "codes <= 2"),
        (BlockQuantize(bits=8), 1, -1.0, "scales"),
        (BlockQuantize(bits=8), 1, float("inf"), "scales"),
        (ScaledSign(), 1, float("nan"), "scales"),
        (Cast("float8_e4m3fn"), 0, 0x7F, "NaN"),
        (Cast("float8_e5m2"), 0, 0xFC, "infinity"),
        (Cast("float8_e5m2"), 1, -0.5, "scales"),
    ],
    ids=str,
)
def test_forged_values_are_refused(compressor: Compressor, part: int, value: float, message: str) -> None:
    payload = compressor.compress(torch.linspace(-1, 1, 9))
    with pytest.raises(PayloadError, match=message):
        from_bytes(compressor, forge(compressor, payload, part, value))


def test_forged_keys_are_refused() -> None:
    compressor = RandomK(k=2, chunk=8)
    data = bytearray(to_bytes(compressor, compressor.compress(torch.randn(8))))
    data[28:36] = (-1).to_bytes(8, "little", signed=True)
    with pytest.raises(PayloadError, match="keys"):
        from_bytes(compressor, signed(data))


def test_a_payload_of_another_compressor_or_of_infinity_is_not_written() -> None:
    quantize = BlockQuantize()
    with pytest.raises(PayloadError, match="made by BlockQuantize"):
        to_bytes(quantize, ScaledSign().compress(torch.randn(9)))
    with pytest.raises(PayloadError, match="scales"):
        to_bytes(quantize, quantize.compress(torch.tensor([1.0, torch.inf])))
