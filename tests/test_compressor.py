"""What every compressor must do, for each case of `cases.COMPRESSORS`."""

import pickle

import numpy as np
import pytest
import torch
from cases import COMPRESSORS, CompressorCase
from torch import Tensor

from gradwire import compression
from gradwire.compression import (
    DARE,
    Chain,
    ChunkTopK,
    Compressor,
    DAREx,
    Identity,
    RandomK,
    ScaledSign,
    TopK,
    counter_rng,
)
from gradwire.compression.base import compute_dtype

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(), (0,), (1,), (3, 5), (7, 11, 13), (4096,)]

every_case = pytest.mark.parametrize("case", COMPRESSORS, ids=lambda case: repr(case.compressor))
every_compressor = pytest.mark.parametrize(
    "compressor", [case.compressor for case in COMPRESSORS], ids=lambda compressor: repr(compressor)
)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def keys_of(compressor: Compressor, rows: int, seed: int = 0) -> Tensor | None:
    return None if compressor.randomness == "none" else counter_rng.row_keys(seed, rows)


def through_rows(compressor: Compressor, rows: Tensor, seed: int = 0) -> Tensor:
    """Compress and decompress a matrix of rows, in the basis that it is given in."""
    keys = keys_of(compressor, rows.shape[0], seed)
    parts = compressor.compress_rows(rows, rows.dtype, keys)
    return compressor.decompress_rows(parts, rows.shape[1], keys if compressor.randomness == "shared" else None)


@every_dtype
@every_compressor
def test_shape_dtype_and_device_are_kept(compressor: Compressor, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        x = torch.randn(shape).to(dtype)
        y = compressor.decompress(compressor.compress(x))
        assert (y.shape, y.dtype, y.device) == (x.shape, x.dtype, x.device)
        assert y.isfinite().all()


@every_compressor
def test_input_is_unchanged_and_not_aliased(compressor: Compressor) -> None:
    x = torch.randn(300)
    before = x.clone()
    payload = compressor.compress(x)
    parts = [part.clone() for part in payload.parts]
    compressor.decompress(payload).zero_()
    assert torch.equal(x, before)
    x.zero_()
    assert all(torch.equal(part, kept) for part, kept in zip(payload.parts, parts, strict=True))


@every_dtype
@every_compressor
def test_payload_is_what_the_layout_declares_whatever_the_values(compressor: Compressor, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        random = torch.randn(shape)
        for x in (random, random * 1e4, torch.zeros(shape), random * float("inf"), random * float("nan")):
            payload = compressor.compress(x.to(dtype))
            layout = compressor.layout(compressor.row_width(payload.shape), dtype)
            for part, declared in zip(payload.parts, layout, strict=True):
                assert part.dtype == declared.dtype
                assert part.shape == (compressor.num_rows(payload.shape), declared.columns)
                assert part.is_contiguous()
            buffers = b"".join(part.reshape(-1).view(torch.uint8).numpy().tobytes() for part in payload.parts)
            assert len(buffers) == payload.nbytes == compressor.payload_bytes(shape, dtype)


@every_dtype
@every_compressor
def test_what_is_sent_is_what_arrives(compressor: Compressor, dtype: torch.dtype) -> None:
    """`compress_rows_with_sent` gives the same parts and, to the bit, what they decompress to."""
    for shape in [(0,), (1,), (7, 300), (5000,)]:
        rows = compressor.to_rows(torch.randn(shape).to(dtype))
        before = rows.clone()
        keys = keys_of(compressor, rows.shape[0])
        parts, sent = compressor.compress_rows_with_sent(rows, dtype, keys)
        for part, other in zip(parts, compressor.compress_rows(rows, dtype, keys), strict=True):
            assert torch.equal(part, other)
        arrives = compressor.decompress_rows(parts, rows.shape[1], keys)
        if compressor.keeps_size:
            assert torch.equal(sent, arrives)
        else:
            assert torch.equal(sent.sign(), arrives)
            assert torch.equal(sent, torch.where(arrives != 0, rows, 0))
        kept = [part.clone() for part in parts]
        sent.fill_(5.0)  # the caller's own
        assert torch.equal(rows, before)
        assert all(torch.equal(part, other) for part, other in zip(parts, kept, strict=True))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@every_compressor
def test_non_finite_entries_show_where_promised(compressor: Compressor, value: float) -> None:
    numel = 3 * compressor.row_width(torch.Size([2000]))
    for place in (0, numel // 2, numel - 1):
        x = torch.randn(numel)
        x[place] = value
        rows = compressor.to_rows(x)
        parts = compressor.compress_rows(rows, x.dtype, keys_of(compressor, rows.shape[0]))
        if compressor.carries_non_finite:
            keys = keys_of(compressor, rows.shape[0])
            assert not compressor.decompress_rows(parts, rows.shape[1], keys).isfinite().all()
    first = compressor.first if isinstance(compressor, Chain) else compressor
    assert compressor.carries_non_finite != (isinstance(first, RandomK | DARE | DAREx) or not compressor.keeps_size)


@every_compressor
def test_own_parts_pass_the_check(compressor: Compressor) -> None:
    payload = compressor.compress(torch.randn(300))
    compressor.check_parts(payload.parts, compressor.row_width(payload.shape))


@every_compressor
def test_parts_have_names_of_their_own(compressor: Compressor) -> None:
    names = [part.name for part in compressor.layout(compressor.row_width(torch.Size([300])), torch.float32)]
    assert len(set(names)) == len(names)


@every_case
def test_equals_the_reference(case: CompressorCase) -> None:
    compressor = case.compressor
    rows = torch.randn(3, compressor.row_width(torch.Size([505])))
    rows *= torch.tensor([[1.0], [1e-3], [1e3]])
    keys = keys_of(compressor, len(rows))
    facts = {} if keys is None else {"keys": keys.numpy()}
    expected = case.reference(rows.double().numpy(), **facts)
    scale = rows.abs().amax(1, keepdim=True).double().numpy()
    np.testing.assert_allclose(
        through_rows(compressor, rows).double().numpy() / scale, expected / scale, rtol=case.rtol, atol=case.rtol
    )


def spiky(n: int) -> Tensor:
    return torch.randn(n) * torch.rand(n) ** 8


INPUTS = {
    "normal": lambda: torch.randn(900),
    "spiky": lambda: spiky(900),
    "sparse": lambda: torch.randn(900) * (torch.rand(900) < 0.02),
    "equal": lambda: torch.full((900,), -0.3),
    "small": lambda: torch.randn(37),
    "one": lambda: torch.tensor([2.5]),
}


def draws(compressor: Compressor, x: Tensor, count: int) -> Tensor:
    """`C(x)` for `count` independent seeds: `[count, numel]` float64."""
    tile = compressor.tile(x.shape)
    rows = compressor.transform_rows(compressor.to_rows(x), tile)
    many = compressor.inverse_transform_rows(through_rows(compressor, rows.repeat(count, 1)), tile)
    return many.reshape(count, -1)[:, : x.numel()].double()


@pytest.mark.parametrize("name", INPUTS)
@every_compressor
def test_declared_contraction_holds(compressor: Compressor, name: str) -> None:
    x = INPUTS[name]()
    delta = compressor.contraction(x.numel())
    if delta is None:
        return
    assert 0 < delta <= 1
    error = (draws(compressor, x, 1 if compressor.randomness == "none" else 1000) - x).square().sum(1)
    bound = (1 - delta) * x.double().square().sum()
    noise = 4 * error.std() / len(error) ** 0.5 if len(error) > 1 else 0.0
    assert error.mean() <= bound * (1 + 1e-5) + noise + 1e-12 * x.square().sum()


@pytest.mark.parametrize("name", INPUTS)
@every_compressor
def test_declared_omega_holds_and_the_mean_is_the_input(compressor: Compressor, name: str) -> None:
    x = INPUTS[name]()
    omega = compressor.omega(x.numel())
    if omega is None:
        return
    count = 4000
    y, norm = draws(compressor, x, count), x.double().square().sum()
    error = (y - x).square().sum(1)
    assert error.mean() <= omega * norm * (1 + 1e-5) + 4 * error.std() / count**0.5 + 1e-12 * norm
    # ||mean - x||^2 has mean omega ||x||^2 / count, and by Chebyshev in each entry is rarely above ten times that.
    assert (y.mean(0) - x).square().sum() <= 10 * omega * norm / count + 1e-12 * norm


@every_compressor
def test_seeds(compressor: Compressor) -> None:
    x = torch.randn(4096)
    one, again, other = (compressor.compress(x, seed=seed).parts for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    same = all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert same == (compressor.randomness == "none")


@every_compressor
def test_zeros_stay_zeros(compressor: Compressor) -> None:
    for shape in SHAPES:
        assert not compressor.decompress(compressor.compress(torch.zeros(shape))).any()


@every_compressor
def test_zero_entries_stay_zero_where_promised(compressor: Compressor) -> None:
    x = torch.randn(1000) * (torch.rand(1000) < 0.3)
    y = compressor.decompress(compressor.compress(x))
    assert (not y[x == 0].any()) == compressor.preserves_zero


@every_compressor
def test_strides_do_not_matter(compressor: Compressor) -> None:
    x = torch.randn(40, 30).t()[::2]
    strided, packed = compressor.compress(x), compressor.compress(x.contiguous())
    assert torch.equal(compressor.decompress(strided), compressor.decompress(packed))


@every_compressor
def test_rows_do_not_know_each_other(compressor: Compressor) -> None:
    rows = torch.randn(5, compressor.row_width(torch.Size([200])))
    keys = keys_of(compressor, 5)
    together = compressor.compress_rows(rows, torch.float32, keys)
    for i in range(5):
        alone = compressor.compress_rows(
            rows[i : i + 1].clone(), torch.float32, None if keys is None else keys[i : i + 1]
        )
        assert all(torch.equal(a[0], b[i]) for a, b in zip(alone, together, strict=True))


@every_compressor
def test_adding_payloads_is_adding_what_they_decompress_to(compressor: Compressor) -> None:
    rows = torch.randn(2, 5, compressor.row_width(torch.Size([200])))
    keys = keys_of(compressor, 5)
    payloads = [compressor.compress_rows(some, torch.float32, keys) for some in rows]
    total, *others = (compressor.decompress_rows(parts, rows.shape[2], keys) for parts in payloads)
    expected, counts = total + others[0], (total != 0).float() + (others[0] != 0)
    counted = (total != 0).float()
    compressor.add_rows_(total, payloads[1], keys, counts=counted)
    assert torch.equal(total, expected)
    assert torch.equal(counted, counts)
    compressor.add_rows_(total, payloads[0], keys)
    assert not torch.equal(total, expected)


@every_compressor
def test_summed_payloads_decompress_to_the_sum(compressor: Compressor) -> None:
    if compressor.reduction == "gather":
        return
    x, y = torch.randint(-8, 9, (2, 500)).float()  # small integers: adding them rounds in no format
    a, b = compressor.compress(x, seed=3), compressor.compress(y, seed=3)
    summed = type(a)(tuple(p + q for p, q in zip(a.parts, b.parts, strict=True)), a.shape, a.dtype, a.keys)
    expected = compressor.decompress(a) + compressor.decompress(b)
    torch.testing.assert_close(compressor.decompress(summed), expected, rtol=1e-6, atol=0)


@every_compressor
def test_value_object(compressor: Compressor) -> None:
    assert eval(repr(compressor), vars(compression)) == compressor
    copy = pickle.loads(pickle.dumps(compressor))
    assert copy == compressor
    assert hash(copy) == hash(compressor)
    with pytest.raises(AttributeError):
        compressor.k = 3  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("cls", "kwargs", "message"),
    [(type(case.compressor), kwargs, message) for case in COMPRESSORS for kwargs, message in case.errors],
)
def test_constructor_refuses(cls: type[Compressor], kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls(**kwargs)


@every_compressor
def test_integers_are_refused(compressor: Compressor) -> None:
    with pytest.raises(
        TypeError, match=rf"{type(compressor).__name__}: expected a floating-point tensor, got torch.int64"
    ):
        compressor.compress(torch.arange(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("k", "width"), [(1, 64), (32, 4096), (4, 256), (40, 1000), (7, 1008), (500, 65536), (2, 2)])
def test_topk_keeps_the_largest_magnitudes(k: int, width: int, dtype: torch.dtype) -> None:
    x = torch.randn(3, width, dtype=dtype)
    y = through_rows(ChunkTopK(k=k, chunk=width), x)
    assert torch.equal(y.abs().topk(k).values, x.abs().topk(k).values)
    assert torch.equal(y[y != 0], x[y != 0])
    assert (y != 0).sum() == 3 * k


def test_topk_keeps_k_entries_among_ties_and_many_rows() -> None:
    rows = torch.full((300, 4096), -2.0)
    assert ((through_rows(ChunkTopK(), rows) == -2).sum(1) == 32).all()


@pytest.mark.parametrize("numel", [65536, 65537])
def test_topk_indices_reach_the_last_entry(numel: int) -> None:
    x = torch.zeros(numel)
    x[-1] = 3
    assert torch.equal(TopK(ratio=1e-9).decompress(TopK(ratio=1e-9).compress(x)), x)
    _, indices = TopK(ratio=1e-9).compress(x).parts
    assert indices.dtype == (torch.uint8 if numel == 65536 else torch.int32)


@pytest.mark.parametrize(("chunk", "packed"), [(4096, 48), (1024, 40), (256, 32), (128, 28)])
def test_chunk_topk_packs_indices(chunk: int, packed: int) -> None:
    assert ChunkTopK(k=32, chunk=chunk).payload_bytes((chunk,), torch.bfloat16) == 64 + packed


def test_indices_outside_the_row_are_refused() -> None:
    values, indices = ChunkTopK(k=3, chunk=100).compress(torch.randn(100)).parts
    with pytest.raises(ValueError, match=r"ChunkTopK: expected indices in \[0, 100\)"):
        ChunkTopK(k=3, chunk=100).check_parts((values, indices | 127), 100)
    with pytest.raises(ValueError, match=r"TopK: expected indices in \[0, 70000\)"):
        TopK(ratio=1e-9).check_parts((torch.ones(1, 1), torch.tensor([[-1]], dtype=torch.int32)), 70000)
    chain = Chain(ChunkTopK(k=3, chunk=100), Identity())
    with pytest.raises(ValueError, match="expected indices"):
        chain.check_parts((indices | 127, values), 100)


def test_random_k_draws_every_entry_of_a_stratum_alike() -> None:
    rows = torch.ones(8000, 12)
    kept = through_rows(RandomK(k=3, chunk=12, unbiased=False), rows)
    assert (kept.view(8000, 3, 4).sum(2) == 1).all()
    sigma = (8000 * 0.25 * 0.75) ** 0.5
    assert ((kept.sum(0) - 2000).abs() < 4 * sigma).all()


def test_random_k_refuses_rows_that_it_cannot_cut() -> None:
    with pytest.raises(ValueError, match="RandomK: expected rows of a multiple of k=8 entries, got width=12"):
        RandomK(k=8, chunk=64).layout(12, torch.float32)


def test_chain_composes() -> None:
    random_k, identity = RandomK(k=8, chunk=64), Identity()
    assert Chain(random_k, identity).reduction == "sum"
    assert Chain(random_k, identity).randomness == "shared"
    assert Chain(ChunkTopK(), identity).reduction == "gather"
    assert Chain(ChunkTopK(), identity).randomness == "none"
    assert not Chain(ChunkTopK(), ScaledSign()).preserves_zero
    assert Chain(ChunkTopK(k=16, chunk=64), ChunkTopK(k=4, chunk=16)).contraction(640) == 1 / 16
    assert Chain(random_k, RandomK(k=2, chunk=8)).omega(640) == 31
    assert Chain(TopK(ratio=0.5), ChunkTopK(k=1, chunk=8)).contraction(64) is None  # rows of 32 values, constants of 8


def test_chained_random_draws_are_independent() -> None:
    chain = Chain(RandomK(k=8, chunk=64), RandomK(k=1, chunk=8))
    kept = through_rows(chain, torch.ones(6400, 64)) != 0
    assert (kept.sum(1) == 1).all()
    assert ((kept.sum(0) - 100).abs() < 5 * 10).all()


def test_chain_needs_compressors() -> None:
    with pytest.raises(TypeError, match="Chain: expected second to be a Compressor, got 3"):
        Chain(ChunkTopK(), 3)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_computation_is_at_least_float32(dtype: torch.dtype) -> None:
    assert compute_dtype(dtype) == dtype
    assert compute_dtype(torch.bfloat16) == compute_dtype(torch.float16) == torch.float32
