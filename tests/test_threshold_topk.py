"""`ThresholdTopK`: both ways to find the entries agree, and the declared contraction is the worst case."""

import math

import numpy as np
import pytest
import torch
from reference import sparsifiers
from torch import Tensor

from gradwire.compression import Chain, ChunkTopK, ThresholdTopK, TopK
from gradwire.compression.threshold_topk import _bisected, _filtered, _on_cpu, threshold_indices

LONG = 1 << 14  # from here on the CPU filters


def filtered(x: Tensor, k: int, mantissa_bits: int) -> Tensor:
    return torch.stack([_filtered(row, k, mantissa_bits) for row in x])


def rows(width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal, heavy-tailed, sparse, constant, zero, clustered, tiny, huge, and rows with what is not finite."""
    normal = torch.randn(10, width, dtype=dtype)
    normal[1] /= torch.rand(width) ** 2 + 1e-6
    normal[2] *= torch.rand(width) < 0.002
    normal[3] = -1.7
    normal[4] = 0
    normal[5] *= torch.linspace(-30, 0, width).exp()
    normal[6] *= 1e-38
    normal[7] *= 1e37
    normal[8, ::7] = torch.inf
    normal[9, 3::11] = -torch.nan
    return normal


@pytest.mark.parametrize("mantissa_bits", [0, 5, 7])
@pytest.mark.parametrize(("width", "k"), [(LONG, 1), (LONG + 5, 164), (20001, 2001), (17000, 17000), (16400, 9000)])
def test_both_forms_choose_the_same_entries_in_the_same_order(width: int, k: int, mantissa_bits: int) -> None:
    for dtype in (torch.float32, torch.float64):
        x = rows(width, dtype)
        found = _bisected(x, k, mantissa_bits)
        assert found.shape == (10, k)
        assert torch.equal(found, filtered(x, k, mantissa_bits))
        in_order = found.sort(1).values
        assert (in_order[:, 1:] > in_order[:, :-1]).all()
        assert in_order[:, 0].min() >= 0
        assert in_order[:, -1].max() < width


@pytest.mark.parametrize("width", [1, 2, 3, 100])
def test_both_forms_agree_on_short_rows(width: int) -> None:
    x = rows(width)
    for k in {1, (width + 1) // 2, width}:
        assert torch.equal(_bisected(x, k, 5), filtered(x, k, 5))


def test_no_rows_and_many() -> None:
    assert threshold_indices(torch.empty(0, LONG), 3, 5).shape == (0, 3)
    assert threshold_indices(torch.empty(0, 8), 3, 5).shape == (0, 3)
    x = torch.randn(500, 40)
    assert torch.equal(threshold_indices(x, 4, 7)[17:18], threshold_indices(x[17:18], 4, 7))


@pytest.mark.parametrize("mantissa_bits", [0, 3, 5])
def test_long_rows_equal_the_reference(mantissa_bits: int) -> None:
    x = torch.randn(70001)
    compressor = ThresholdTopK(ratio=0.013, mantissa_bits=mantissa_bits)
    expected = sparsifiers.threshold_top_k(x[None].double().numpy(), 0.013, mantissa_bits)
    np.testing.assert_array_equal(compressor.decompress(compressor.compress(x)).double().numpy(), expected[0])


@pytest.mark.parametrize("mantissa_bits", [0, 2, 5, 7])
def test_the_contraction_is_the_worst_case(mantissa_bits: int) -> None:
    """The entries that are kept stand at the lower edge of a bin, and all others, behind them, at its upper edge."""
    d, compressor = 1000, ThresholdTopK(ratio=0.1, mantissa_bits=mantissa_bits)
    edge = torch.tensor(1 + 2.0**-mantissa_bits)
    x = torch.nextafter(edge, torch.tensor(0.0)).repeat(d)
    x[:100] = 1.0
    kept = compressor.decompress(compressor.compress(x)).double().square().sum() / x.double().square().sum()
    assert float(kept) == pytest.approx(compressor.contraction(d), rel=1e-6)
    assert compressor.contraction(d) < TopK(ratio=0.1).contraction(d)
    x[100:] = 1.0  # and without that trick the bound of an exact choice
    kept = compressor.decompress(compressor.compress(x)).double().square().sum() / x.double().square().sum()
    assert float(kept) == pytest.approx(0.1)


def test_it_loses_less_than_a_thousandth_of_what_topk_keeps() -> None:
    for x in (torch.randn(200_000), torch.randn(200_000) / (torch.rand(200_000) + 1e-2) ** 2):
        exact, close = (
            compressor.decompress(compressor.compress(x)).double().square().sum()
            for compressor in (TopK(0.01), ThresholdTopK(0.01))
        )
        assert 0.999 * exact < close <= exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_payloads_are_laid_out_as_those_of_topk(dtype: torch.dtype) -> None:
    for width in (1, 100, 65536, 65537):
        assert ThresholdTopK(ratio=0.02).layout(width, dtype) == TopK(ratio=0.02).layout(width, dtype)


def test_everything_and_nothing() -> None:
    x = torch.randn(20000)
    everything = ThresholdTopK(ratio=1.0)
    assert torch.equal(everything.decompress(everything.compress(x)), x)
    assert everything.contraction(20000) == 1.0
    assert everything.omega(20000) == 0.0
    assert ThresholdTopK(ratio=1e-9).kept(20000) == 1
    assert math.isclose(ThresholdTopK(ratio=0.5, mantissa_bits=0).contraction(10), 5 / 4 / (5 / 4 + 5))


def test_indices_from_outside_are_checked() -> None:
    with pytest.raises(ValueError, match=r"ThresholdTopK: expected indices in \[0, 70000\)"):
        ThresholdTopK(ratio=1e-9).check_parts((torch.ones(1, 1), torch.tensor([[-1]], dtype=torch.int32)), 70000)


def test_chained() -> None:
    chain = Chain(ThresholdTopK(ratio=0.1), ChunkTopK(k=1, chunk=10))
    assert chain.contraction(100) == pytest.approx(ThresholdTopK(ratio=0.1).contraction(100) / 10)


def test_the_operator_tells_a_compiler_what_it_returns() -> None:
    torch.library.opcheck(_on_cpu, (torch.randn(2, 100), 7, 5), test_utils=("test_schema", "test_faketensor"))
