"""Unbiased quantisers: their omega is a bound and attained where they say so, and their codes hold at every edge."""

import itertools
import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference.sparsifiers import Array
from torch import Tensor

from gradwire.compression import (
    QSGD,
    BlockQuantize,
    Chain,
    ChunkTopK,
    Compressor,
    Identity,
    NaturalCompression,
    PayloadError,
    RandomDithering,
    RandomK,
    Scaled,
    TernGrad,
    TopK,
    counter_rng,
    from_bytes,
    to_bytes,
)
from gradwire.compression.fused import fuse
from gradwire.compression.rounding import binade, power_of_two
from gradwire.compression.trits import pack_trits, unpack_trits


def draws(compressor: Compressor, x: Tensor, count: int) -> Tensor:
    """`C(x)` of one row for `count` keys, float64."""
    keys = counter_rng.row_keys(1, count)
    parts = compressor.compress_rows(x.repeat(count, 1), x.dtype, keys)
    return compressor.decompress_rows(parts, x.numel(), keys).double()


def relative_variance(x: Array, grid: Array, norm: float) -> Array:
    """E||C(x) - x||^2 / ||x||^2 of every row, by summing over the two outcomes of every entry."""
    y = np.abs(x) / np.linalg.norm(x, ord=norm, axis=1, keepdims=True)
    upper = np.clip(np.searchsorted(grid, y), 1, len(grid) - 1)
    low, high = grid[upper - 1], grid[upper]
    p = (y - low) / (high - low)
    return ((1 - p) * (y - low) ** 2 + p * (high - y) ** 2).sum(1) / (y**2).sum(1)


def worst_of_many(d: int, grid: Array, norm: float) -> float:
    """The largest relative variance of rows with d entries of two magnitudes, and of random ones."""
    rows = [np.abs(np.random.default_rng(d).standard_normal((300, d))) ** 3 + 1e-9]
    for large in {1, 2, d // 4, d // 2, d - 1, d} & set(range(1, d + 1)):
        ratio = np.geomspace(1e-4, 1, 2000)[:, None]
        rows.append(np.concatenate([np.ones((2000, large)), np.repeat(ratio, d - large, 1)], axis=1))
    return float(max(relative_variance(x, grid, norm).max() for x in rows))


@pytest.mark.parametrize("spacing", ["linear", "natural"])
@pytest.mark.parametrize("norm", [1, 2, "inf"])
def test_omega_bounds_the_variance_and_is_nearly_attained(norm: int | str, spacing: str) -> None:
    for d, levels in itertools.product([1, 2, 3, 8, 40, 300], [1, 2, 3, 7]):
        compressor = RandomDithering(levels, norm, spacing, bucket=d)  # type: ignore[arg-type]
        natural = [0.0] + [2.0 ** (j - levels) for j in range(1, levels + 1)]
        grid = np.array(natural) if spacing == "natural" else np.arange(levels + 1) / levels
        found = worst_of_many(d, grid, np.inf if norm == "inf" else float(norm))
        omega = compressor.omega(d)
        assert omega is not None
        assert found <= omega * (1 + 1e-9) + 1e-12
        first, above = grid[1], 1 / 8 if spacing == "natural" else 0
        equal = levels == 1 or d ** (1 / norm) * first >= 2 * (1 + above) if norm != "inf" else omega > above
        if equal and d > 1:
            assert found >= omega * (1 - 1e-4)  # attained, up to the grid of ratios
        assert compressor.omega(10**9) == omega  # of a bucket, however long the tensor
        assert all(compressor.omega(n) <= compressor.omega(n + 1) for n in range(1, d))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("compressor", "x", "omega"),
    [
        (QSGD(levels=2, bucket=100), torch.ones(100), 4.0),  # sqrt(100) / 2 - 1
        (QSGD(levels=1, bucket=16), torch.ones(16), 3.0),
        (RandomDithering(levels=4, norm=1, spacing="linear", bucket=32), torch.ones(32), 7.0),
        (RandomDithering(levels=3, norm=2, bucket=256), -torch.ones(256), 3.0),  # 16 / 4 - 1
        (TernGrad(bucket=25), torch.tensor([1.0] + [1 / 6] * 24), 2.0),  # (5 - 1) / 2, attained at 1 / (2 (1 + omega))
        (NaturalCompression(), torch.full((256,), 4 / 3), 1 / 8),
    ],
    ids=lambda value: repr(value) if isinstance(value, Compressor) else "",
)
def test_omega_is_attained_by_the_code(compressor: Compressor, x: Tensor, omega: float) -> None:
    assert compressor.omega(x.numel()) == pytest.approx(omega, rel=1e-12)
    error = (draws(compressor, x, 20_000) - x).square().sum(1) / x.double().square().sum()
    assert error.mean() == pytest.approx(omega, abs=5 * error.std().item() / 20_000**0.5)


@pytest.mark.parametrize("norm", [1, 2, "inf"])
def test_one_entry_alone_is_exact(norm: int | str) -> None:
    for spacing in ("linear", "natural"):
        x = torch.zeros(64)
        x[7] = -3.5
        compressor = RandomDithering(4, norm, spacing, bucket=64)  # type: ignore[arg-type]
        assert torch.equal(compressor.decompress(compressor.compress(x)), x)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (TernGrad(bucket=64), BlockQuantize(bits=2, block=64, stochastic=True)),
        (
            RandomDithering(levels=7, norm="inf", spacing="linear", bucket=64),
            BlockQuantize(bits=4, block=64, stochastic=True),
        ),
        (RandomDithering(levels=9, norm=2, spacing="linear", bucket=64), QSGD(levels=9, bucket=64)),
    ],
    ids=repr,
)
def test_cases_of_one_another(one: Compressor, other: Compressor) -> None:
    x = torch.randn(1000)
    assert torch.equal(one.decompress(one.compress(x, seed=4)), other.decompress(other.compress(x, seed=4)))
    assert one.omega(1000) == other.omega(1000)


@pytest.mark.parametrize(
    "compressor",
    [
        QSGD(levels=3, bucket=64),
        RandomDithering(levels=5, norm=1, bucket=64),
        RandomDithering(levels=127, norm=2, bucket=64),
        TernGrad(bucket=64, clip=1.0),
        NaturalCompression(),
    ],
    ids=repr,
)
@pytest.mark.parametrize("exponent", [90, -70])
def test_squares_neither_overflow_nor_vanish(compressor: Compressor, exponent: int) -> None:
    x = torch.randn(640)
    scaled = compressor.decompress(compressor.compress(x * 2.0**exponent))
    assert torch.equal(scaled, compressor.decompress(compressor.compress(x)) * 2.0**exponent)


@pytest.mark.parametrize(("levels", "bits"), [(1, 1.6), (2, 3), (3, 3), (4, 4), (7, 4), (8, 5), (127, 8), (128, 9)])
def test_bytes(levels: int, bits: float) -> None:
    assert QSGD(levels, bucket=1000).payload_bytes((3000,), torch.float32) == 3 * (1000 * bits / 8 + 4)


@pytest.mark.parametrize("levels", [1, 2, 4, 8, 100, 127, 128, 32767])
def test_every_level_comes_back(levels: int) -> None:
    steps = 2 * levels + 1
    width = -(-steps // 5) * 5 + 3  # whatever is left of a byte
    signed = torch.arange(width) % steps - levels
    compressor = RandomDithering(levels, norm="inf", spacing="linear", bucket=width)
    payload = compressor.compress(signed.float())
    compressor.check_parts(payload.parts, width)
    assert torch.equal(compressor.decompress(payload).long(), signed)


@given(rows=st.integers(0, 4), columns=st.integers(1, 40), seed=st.integers(0, 99))
def test_trits_come_back(rows: int, columns: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 3, (rows, columns), dtype=np.uint8)
    packed = pack_trits(torch.from_numpy(values))
    stride = -(-columns // 5)
    expected = np.zeros((rows, stride), dtype=np.int64)
    for column in range(columns):
        expected[:, column % stride] += values[:, column].astype(np.int64) * 3 ** (column // stride)
    assert np.array_equal(packed.numpy(), expected)
    assert np.array_equal(unpack_trits(packed, columns).numpy(), values)


def test_every_byte_of_trits_is_read_as_its_digits() -> None:
    digits = unpack_trits(torch.arange(243, dtype=torch.uint8)[:, None], 5).numpy()
    assert [np.base_repr(n, 3).zfill(5)[::-1] for n in range(243)] == ["".join(map(str, row)) for row in digits]


def test_clipping() -> None:
    x = torch.cat([torch.full((99,), 0.1), torch.tensor([10.0])])
    free, clipped = TernGrad(bucket=100), TernGrad(bucket=100, clip=2.5)
    limit = 2.5 * math.sqrt((99 * 0.01 + 100) / 100)
    assert draws(clipped, x, 3)[:, -1].tolist() == pytest.approx([limit] * 3)
    y = draws(clipped, x, 20_000)
    assert y[:, :-1].mean().item() == pytest.approx(0.1, abs=5 * limit * 0.2 / y[:, :-1].numel() ** 0.5)
    assert (y[:, :-1] - 0.1).square().mean() < 0.5 * (draws(free, x, 2000)[:, :-1] - 0.1).square().mean()
    assert clipped.omega(100) is None
    assert clipped.contraction(100) is None
    equal = torch.full((100,), -0.1)
    assert torch.equal(draws(TernGrad(bucket=100, clip=1.1), equal, 1)[0], equal.double())


# Powers of two.


def bit_pattern(value: float) -> int:
    return int(struct.unpack("<I", struct.pack("<f", value))[0])


def test_binade_takes_a_float_apart() -> None:
    values = torch.tensor([0.0, 2.0**-149, 2.0**-127, 2.0**-126, 1.0, 1.5, 3.4e38, torch.inf, torch.nan])
    exponent, fraction = binade(values)
    assert exponent.tolist() == [bit_pattern(value) >> 23 for value in values.tolist()]
    rebuilt = torch.where(exponent > 0, 1 + fraction, fraction).double() * 2.0 ** (exponent.clamp(min=1) - 127).double()
    assert torch.equal(rebuilt[:-2].float(), values[:-2])
    assert power_of_two(exponent)[:-1].tolist() == [0, 0, 0, 2.0**-126, 1, 1, 2.0**127, torch.inf]


@pytest.mark.parametrize(
    ("value", "outcomes"),
    [
        (0.0, {0.0}),
        (-8.0, {-8.0}),
        (3.0, {2.0, 4.0}),
        (-0.3, {-0.25, -0.5}),
        (2.0**-126, {2.0**-126}),
        (2.0**-127, {0.0, 2.0**-126}),
        (-(2.0**-128), {0.0, -(2.0**-126)}),
        (1.5 * 2.0**126, {2.0**126, 2.0**127}),
        (2.0**127, {2.0**127}),
        (-3.4e38, {-(2.0**127)}),
        (math.inf, {math.inf}),
        (-math.inf, {-math.inf}),
    ],
)
def test_natural_compression_of_every_kind_of_float(value: float, outcomes: set[float]) -> None:
    y = draws(NaturalCompression(), torch.full((256,), value), 40)
    assert set(y.unique().tolist()) == outcomes
    if math.isfinite(value) and abs(value) < 2.0**127:
        spread = max(outcomes) - min(outcomes)
        assert abs(y.mean().item() - value) <= 5 * 0.5 * spread / y.numel() ** 0.5


def test_natural_compression_shows_nan() -> None:
    x = torch.tensor([torch.nan, -torch.nan, 1.0])
    assert torch.equal(draws(NaturalCompression(), x, 1)[0].abs(), torch.tensor([torch.inf, torch.inf, 1.0]).double())


def test_natural_compression_of_float64_has_the_range_of_float32() -> None:
    natural = NaturalCompression()
    y = natural.decompress(natural.compress(torch.tensor([1e300, 1e-300, 2.0], dtype=torch.float64)))
    assert torch.equal(y, torch.tensor([torch.inf, 0.0, 2.0], dtype=torch.float64))


# Scaled, and in chains.


def test_scaled_divides_by_one_plus_omega() -> None:
    inner = QSGD(levels=1, bucket=100)  # omega is 9
    scaled, x = Scaled(inner), torch.randn(300)
    torch.testing.assert_close(
        scaled.decompress(scaled.compress(x, seed=2)), inner.decompress(inner.compress(x, seed=2)) / 10
    )
    assert inner.contraction(300) is None
    assert scaled.contraction(300) == pytest.approx(0.1)
    assert scaled.contraction(25) == pytest.approx(2 / 10 - 5 / 100)  # fewer entries than a row: omega is 4
    assert scaled.omega(300) is None
    assert Scaled(Identity()).contraction(9) == 1
    assert Scaled(Identity()).omega(9) == 0


def test_contraction_of_scaled_is_attained() -> None:
    scaled = Scaled(QSGD(levels=1, bucket=64))
    for numel in (64, 16):
        x = torch.cat([torch.ones(numel), torch.zeros(64 - numel)])
        error = (draws(scaled, x, 20_000) - x).square().sum(1) / numel
        delta = scaled.contraction(numel)
        assert error.mean().item() == pytest.approx(1 - delta, abs=5 * error.std().item() / 20_000**0.5)


def test_scaled_random_k_adds_on_its_way_and_is_the_unscaled_form() -> None:
    scaled, plain = Scaled(RandomK(k=8, chunk=64)), RandomK(k=8, chunk=64, unbiased=False)
    assert (scaled.reduction, scaled.randomness) == ("sum", "shared")
    x = torch.randn(640)
    assert torch.equal(scaled.decompress(scaled.compress(x)), plain.decompress(plain.compress(x)))
    assert scaled.contraction(640) == plain.contraction(640) == 1 / 8


def test_scaled_needs_an_unbiased_compressor() -> None:
    for biased in (TopK(), BlockQuantize(), RandomK(unbiased=False), Scaled(TernGrad())):
        with pytest.raises(ValueError, match=r"Scaled: expected an unbiased compressor, got .* unbiased form"):
            Scaled(biased)
    with pytest.raises(TypeError, match="Scaled: expected a Compressor, got 3"):
        Scaled(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("second", "delta"),
    [
        (QSGD(levels=7, bucket=32), 1 - 32 / (4 * 49)),
        (TernGrad(bucket=32), None),
        (NaturalCompression(), 7 / 8),
        (Scaled(TernGrad(bucket=32)), 1 / (1 + (math.sqrt(32) - 1) / 2)),
        (Scaled(QSGD(levels=1, bucket=32)), 1 / math.sqrt(32)),
    ],
    ids=repr,
)
def test_chained_after_a_sparsifier(second: Compressor, delta: float | None) -> None:
    chain = Chain(ChunkTopK(k=32, chunk=256), second)
    assert chain.randomness == "private"
    assert chain.contraction(1024) == (None if delta is None else pytest.approx(delta * 32 / 256, rel=1e-12))
    if delta is None:
        return
    x = torch.full((256,), -0.7)  # the sparsifier keeps least of equal entries
    error = (draws(chain, x, 4000) - x).square().sum(1) / x.double().square().sum()
    assert error.mean() <= 1 - delta * 32 / 256 + 4 * error.std() / 4000**0.5


# From outside, and compiled.


@pytest.mark.parametrize(
    ("compressor", "part", "byte", "message"),
    [
        (QSGD(levels=5, bucket=4), 0, 0xFF, "QSGD: expected codes <= 10, got 15"),
        (QSGD(levels=3, bucket=4), 0, 0xFF, "QSGD: expected codes <= 6, got 7"),
        (RandomDithering(levels=100, bucket=4), 0, 201, "RandomDithering: expected codes <= 200, got 201"),
        (TernGrad(bucket=5), 0, 243, "TernGrad: expected codes <= 242, got 243"),
        (TernGrad(bucket=4), 1, 0xFF, "TernGrad: expected finite scales >= 0"),
        (NaturalCompression(), 1, 255, "NaturalCompression: expected exponents <= 254"),
        (Scaled(TernGrad(bucket=5)), 0, 255, "TernGrad: expected codes <= 242"),
    ],
    ids=repr,
)
def test_what_is_never_sent_is_refused(compressor: Compressor, part: int, byte: int, message: str) -> None:
    payload = compressor.compress(torch.linspace(-1, 1, 5))
    raw = payload.parts[part].view(torch.uint8)
    raw[0] = byte
    with pytest.raises(PayloadError, match=message):
        to_bytes(compressor, payload)
    assert from_bytes(compressor, to_bytes(compressor, compressor.compress(torch.zeros(5)))).shape == (5,)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from inside torch.compile
@pytest.mark.parametrize(
    "compressor",
    [RandomDithering(levels=5, norm=1, bucket=64), TernGrad(bucket=64, clip=2.0), NaturalCompression()],
    ids=repr,
)
def test_compiled_payloads_have_the_same_bits(compressor: Compressor) -> None:
    torch._dynamo.reset()
    x, keys = torch.randn(50, 64), counter_rng.row_keys(3, 50)
    parts, sent = fuse(lambda x, keys: compressor.compress_rows_with_sent(x, x.dtype, keys))(x, keys)
    expected, expected_sent = compressor.compress_rows_with_sent(x, x.dtype, keys)
    assert torch.equal(parts[0], expected[0])
    torch.testing.assert_close(parts[1], expected[1], rtol=1e-6, atol=0)
    assert torch.equal(sent, compressor.decompress_rows(parts, 64, keys))
    torch.testing.assert_close(sent, expected_sent, rtol=1e-6, atol=0)
