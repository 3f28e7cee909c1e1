"""What holds for every compressor at any shape, dtype and magnitude."""

import hypothesis.strategies as st
import pytest
import torch
from cases import COMPRESSORS
from hypothesis import given
from torch import Tensor

from gradwire.compression import Cast, Chain, Compressor, bits, counter_rng

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
KINDS = ["normal", "heavy-tailed", "sparse", "constant", "zero", "mixed"]
MAGNITUDES = [1e-30, 1e-3, 1.0, 1e3, 1e30]

every_compressor = pytest.mark.parametrize(
    "compressor", [case.compressor for case in COMPRESSORS], ids=lambda compressor: repr(compressor)
)


def make(kind: str, shape: tuple[int, ...], magnitude: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(shape, generator=generator, dtype=torch.float64)
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    x = {
        "normal": normal,
        "heavy-tailed": normal / (uniform + 1e-3) ** 2,
        "sparse": normal * (uniform < 0.05),
        "constant": torch.ones_like(normal),
        "zero": torch.zeros_like(normal),
        "mixed": normal * 10 ** (8 * uniform - 6),
    }[kind]
    return x * magnitude


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape = tuple(draw(st.lists(st.integers(0, 40), max_size=3)))
    x = make(draw(st.sampled_from(KINDS)), shape, draw(st.sampled_from(MAGNITUDES)), draw(st.integers(0, 2**20)))
    dtype = draw(st.sampled_from(DTYPES))
    return x.clamp(-1e38, 1e38).to(dtype).nan_to_num()  # what overflows the dtype becomes its largest number


def rounds_to_half(compressor: Compressor) -> bool:
    if isinstance(compressor, Chain):
        return rounds_to_half(compressor.second)
    return isinstance(compressor, Cast) and compressor.dtype == "float16"


@every_compressor
@given(x=tensors())
def test_payload_and_output_have_their_form(compressor: Compressor, x: Tensor) -> None:
    payload = compressor.compress(x)
    y = compressor.decompress(payload)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    assert payload.nbytes == compressor.payload_bytes(x.shape, x.dtype)
    largest = 600.0 if x.dtype == torch.float16 else 1e37  # nothing that a scaling by at most 100 pushes out of range
    if not rounds_to_half(compressor) and (x.abs() < largest).all():
        assert y.isfinite().all()


@every_compressor
@given(
    kind=st.sampled_from(KINDS),
    numel=st.integers(1, 700),
    magnitude=st.sampled_from([1e-15, 1.0, 1e12]),
    seed=st.integers(0, 2**20),
)
def test_contraction_and_omega(compressor: Compressor, kind: str, numel: int, magnitude: float, seed: int) -> None:
    x = make(kind, (numel,), magnitude, seed).float()
    delta, omega = compressor.contraction(numel), compressor.omega(numel)
    rows = compressor.to_rows(x)
    count = 1 if compressor.randomness == "none" else 400
    keys = None if count == 1 else counter_rng.row_keys(seed, count * len(rows))
    parts = compressor.compress_rows(rows.repeat(count, 1), torch.float32, keys)
    y = compressor.decompress_rows(parts, rows.shape[1], keys if compressor.randomness == "shared" else None)
    error = (y.reshape(count, -1)[:, :numel].double() - x).square().sum(1)
    norm = x.double().square().sum()
    # The mean of 400 draws is off by its standard error, and a rare large error may be missing from the sample.
    noise = 5 * error.std() / count**0.5 if count > 1 else 0.0
    for bound in ([] if delta is None else [1 - delta]) + ([] if omega is None else [omega]):
        assert error.mean() <= bound * norm * (1 + 1e-5) + noise + 1e-12 * norm


@given(width=st.integers(1, 16), rows=st.integers(0, 5), columns=st.integers(1, 70), seed=st.integers(0, 2**20))
def test_bits_come_back(width: int, rows: int, columns: int, seed: int) -> None:
    values = torch.randint(2**width, (rows, columns), generator=torch.Generator().manual_seed(seed))
    packed = bits.pack(values, width)
    assert packed.shape == (rows, -(-columns * width // 8))
    assert torch.equal(bits.unpack(packed, columns, width, torch.int64), values)


@given(key=st.integers(0, 2**62 - 1), first=st.integers(0, 100), rows=st.integers(1, 50))
def test_row_keys_of_a_shard_are_those_of_the_whole(key: int, first: int, rows: int) -> None:
    whole = counter_rng.row_keys(key, first + rows)
    assert torch.equal(counter_rng.row_keys(key, rows, first=first), whole[first:])
    assert ((whole >= 0) & (whole < 2**62)).all()
