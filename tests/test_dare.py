"""`DARE` and `DAREx`: every entry is sent with the probability that is declared, whatever the slots, on each rank."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from gradwire.comm import EF, Communicator, Plan, Simulated
from gradwire.compression import DARE, BlockQuantize, Chain, Compressor, DAREx, RandomK, Scaled, counter_rng
from gradwire.compression.dare import _gap_table, capacity_and_share, kept_positions


def positions(rows: int, width: int, drop: float, seed: int = 0) -> Tensor:
    found: Tensor = kept_positions(counter_rng.row_keys(seed, rows), width, drop)
    return found


def binomial(width: int, keep: Fraction) -> list[Fraction]:
    return [math.comb(width, j) * keep**j * (1 - keep) ** (width - j) for j in range(width + 1)]


@pytest.mark.parametrize(("width", "drop"), [(2, 0.5), (12, 0.75), (64, 0.875), (200, 0.0), (100, 0.99), (50, 0.01)])
def test_share_is_exact(width: int, drop: float) -> None:
    slots, share = capacity_and_share(width, drop)
    chances = binomial(width, 1 - Fraction(drop))
    exact = sum(min(j, slots) * chance for j, chance in enumerate(chances)) / width
    assert share == pytest.approx(float(exact), rel=1e-12)
    assert share <= 1 - drop
    assert 1 <= slots <= width


def test_slots_hardly_bind() -> None:
    for drop in (0.5, 0.9, 0.99):
        slots, share = capacity_and_share(4096, drop)
        mean, deviation = 4096 * (1 - drop), math.sqrt(4096 * (1 - drop) * drop)
        assert slots == math.ceil(mean + deviation)
        assert 0.985 * (1 - drop) < share < 1 - drop


@pytest.mark.parametrize(("width", "drop"), [(12, 0.75), (5, 0.5), (3, 0.9)])
def test_every_entry_is_sent_alike_although_slots_run_out(width: int, drop: float) -> None:
    count = 40_000
    found = positions(count, width, drop)
    slots, share = capacity_and_share(width, drop)
    full = (found >= 0).all(1).double().mean()
    more_than_slots = sum(float(chance) for chance in binomial(width, 1 - Fraction(drop))[slots + 1 :])
    assert full > more_than_slots > 0.002  # so that some entries found no slot
    sent = torch.bincount(found[found >= 0], minlength=width)
    assert ((sent - count * share).abs() < 4.5 * math.sqrt(count * share * (1 - share))).all()


def test_the_number_sent_is_binomial_up_to_the_slots() -> None:
    count, width, drop = 40_000, 40, 0.8
    slots, _ = capacity_and_share(width, drop)
    chances = [float(chance) for chance in binomial(width, 1 - Fraction(drop))]
    expected = torch.tensor([*chances[:slots], sum(chances[slots:])], dtype=torch.float64)
    found = torch.bincount((positions(count, width, drop) >= 0).sum(1), minlength=slots + 1) / count
    assert ((found - expected).abs() < 4.5 * (expected * (1 - expected) / count).sqrt() + 1e-9).all()


def test_positions_of_a_row_are_distinct() -> None:
    for row in positions(200, 300, 0.6):
        used = row[row >= 0]
        assert used.unique().numel() == used.numel()
        assert used.max() < 300


def test_pairs_are_drawn_independently() -> None:
    """E m_0 m_j is the square of the share, up to what the slots bind."""
    count, width, drop = 40_000, 16, 0.5
    found = positions(count, width, drop)
    sent = torch.zeros(count, width + 1).scatter_(1, found.where(found >= 0, width), 1)[:, :width].double()
    slots, _ = capacity_and_share(width, drop)
    pairs = [min(j, slots) * (min(j, slots) - 1) * float(c) for j, c in enumerate(binomial(width, Fraction(1, 2)))]
    together = sent.T @ sent / count
    off_diagonal = (together.sum() - together.trace()) / width / (width - 1)
    assert float(off_diagonal) == pytest.approx(sum(pairs) / width / (width - 1), rel=0.01)


def test_gaps_are_geometric_to_32_bits() -> None:
    table = _gap_table(50, 0.9, torch.device("cpu")).tolist()
    for j, value in enumerate(table, start=1):
        assert value == pytest.approx(2**32 * (1 - 0.9**j), abs=1.5)
    assert _gap_table(3, 0.0, torch.device("cpu")).tolist() == [2**32] * 3


def test_nothing_dropped_is_lossless() -> None:
    x = torch.randn(500)
    for compressor in (DARE(drop=0.0, chunk=64), DAREx(drop=0.0, chunk=64)):
        assert torch.equal(compressor.decompress(compressor.compress(x)), x)
        assert (compressor.omega(500), compressor.contraction(500)) == (0.0, 1.0)


@pytest.mark.parametrize("compressor", [DARE(drop=0.8, chunk=50), DAREx(drop=0.8, rescale=1.75, chunk=50)], ids=repr)
def test_the_mean_square_error_is_the_declared_one(compressor: DARE | DAREx) -> None:
    """Not only bounded by it: omega and contraction are exact."""
    x = torch.randn(50)
    rows, keys = x.repeat(40_000, 1), counter_rng.row_keys(1, 40_000)
    y = compressor.decompress_rows(compressor.compress_rows(rows, torch.float32, keys), 50)
    error = (y - rows).double().square().sum(1) / x.double().square().sum()
    omega, delta = compressor.omega(50), compressor.contraction(50)
    declared = omega if omega is not None else 1 - delta if delta is not None else math.nan
    assert abs(float(error.mean()) - declared) < 4 * float(error.std()) / 200


def test_errors_of_ranks_average_out() -> None:
    """With n ranks DARE's error is omega / n; that of RandomK, which draws alike everywhere, stays omega."""

    def error(compressor: Compressor, ranks: int) -> float:
        communicator = Communicator(compressor, exchange=Simulated(ranks), plan=Plan(min_ndim=0, min_numel=0))
        x = torch.ones(ranks, 200, 64)
        communicator.average_([x], ["w"])
        return float((x[0] - 1).square().mean())

    dare, random_k = DARE(drop=0.875, chunk=64), RandomK(k=8, chunk=64)
    assert error(dare, 16) == pytest.approx(dare.omega(64) / 16, rel=0.1)
    assert error(random_k, 16) == pytest.approx(random_k.omega(64), rel=1e-5)


def test_constants() -> None:
    share = capacity_and_share(64, 0.75)[1]
    assert DARE(drop=0.75, chunk=64).contraction(64) is None
    assert Scaled(DARE(drop=0.75, chunk=64)).contraction(64) == pytest.approx(share)
    assert DARE(drop=0.25, chunk=64).contraction(64) == pytest.approx(2 - 1 / capacity_and_share(64, 0.25)[1])
    assert DAREx(drop=0.75, chunk=64).contraction(64) == share
    assert DAREx(drop=0.75, rescale=1.5, chunk=64).contraction(64) == pytest.approx(0.75 * share)
    assert DAREx(drop=0.75, rescale=2.0, chunk=64).contraction(64) is None
    assert DAREx(drop=0.75, rescale=4.0, chunk=64).contraction(64) is None
    assert DAREx(drop=0.75, chunk=64).omega(64) is None


def test_chained() -> None:
    int8 = BlockQuantize(bits=8, block=64)
    assert Chain(DAREx(drop=0.75, rescale=1.5, chunk=64), int8).contraction(64) is None  # the error is rescaled, too
    first = DAREx(drop=0.75, chunk=64)
    slots = first.layout(64, torch.float32)[0].columns
    assert Chain(first, int8).contraction(64) == first.contraction(64) * int8.contraction(slots)
    dare = DARE(drop=0.75, chunk=64)
    stochastic = BlockQuantize(bits=8, block=64, stochastic=True)
    chain = Chain(dare, stochastic)
    assert chain.randomness == "private"
    assert 1 + chain.omega(64) == pytest.approx((1 + dare.omega(64)) * (1 + stochastic.omega(slots)))
    x = torch.randn(640)
    direct, chained = (c.decompress(c.compress(x, seed=3)) for c in (dare, chain))
    assert torch.equal(direct != 0, chained != 0)
    assert (direct - chained).abs().max() < direct.abs().max() / 64


def test_what_stands_in_unused_slots_is_not_read() -> None:
    compressor = DARE(drop=0.9, chunk=64)
    payload = compressor.compress(torch.randn(640))
    expected = compressor.decompress(payload)
    values, key = payload.parts
    values[positions(10, 64, 0.9) < 0] = torch.nan
    total = torch.zeros(10, 64)
    compressor.add_rows_(total, (values, key))
    assert torch.equal(compressor.decompress(payload), expected)
    assert torch.equal(total.flatten(), expected)


@pytest.mark.parametrize("key", [-1, 1 << 62])
def test_forged_keys_are_refused(key: int) -> None:
    for compressor in (DARE(chunk=64), DAREx(chunk=64)):
        values, keys = compressor.compress(torch.randn(64)).parts
        compressor.check_parts((values, keys), 64)
        with pytest.raises(
            ValueError, match=rf"{type(compressor).__name__}: expected keys in \[0, 2\^62\), got others"
        ):
            compressor.check_parts((values, torch.full_like(keys, key)), 64)


def test_tuned_takes_the_best_and_of_equals_the_first() -> None:
    assert DAREx.tuned(lambda darex: -abs(darex.rescale - 3), drop=0.75, rescales=(1, 2.5, 4)).rescale == 2.5
    assert DAREx.tuned(lambda darex: 0.0, drop=0.75, rescales=(2, 1, 4)).rescale == 2
    seen: list[DAREx] = []

    def score(darex: DAREx) -> float:
        seen.append(darex)
        return darex.rescale

    assert DAREx.tuned(score, drop=0.9, chunk=32).rescale == pytest.approx(10)
    assert len(seen) == 9
    assert {(darex.drop, darex.chunk) for darex in seen} == {(0.9, 32)}
    ratios = [after.rescale / before.rescale for before, after in itertools.pairwise(seen)]
    assert ratios == pytest.approx([10**0.125] * 8)
    assert DAREx.tuned(lambda darex: 0.0, drop=0.0).rescale == 1.0


def test_tuned_finds_the_least_square_rescale_of_a_mean() -> None:
    """The mean of n ranks is closest to x at s = 1 / (pi + (1 - pi) / n), between 1 and DARE's 1 / pi."""
    x, ranks = torch.randn(64), 4

    def score(darex: DAREx) -> float:
        rows, keys = x.repeat(4000 * ranks, 1), counter_rng.row_keys(5, 4000 * ranks)
        y = darex.decompress_rows(darex.compress_rows(rows, torch.float32, keys), 64)
        return -float((y.view(4000, ranks, 64).mean(1) - x).square().sum())

    share = capacity_and_share(64, 0.75)[1]
    best = 1 / (share + (1 - share) / ranks)
    rescales = [best * factor for factor in (0.5, 0.7, 0.85, 1, 1.15, 1.3)]
    assert DAREx.tuned(score, drop=0.75, chunk=64, rescales=rescales).rescale == best


def test_tuned_refuses_what_it_cannot_compare() -> None:
    with pytest.raises(ValueError, match=r"DAREx\.tuned: expected at least one of rescales, got none"):
        DAREx.tuned(lambda darex: 0.0, rescales=())
    with pytest.raises(ValueError, match=r"DAREx\.tuned: expected numbers from score, got \[nan\]"):
        DAREx.tuned(lambda darex: math.nan, rescales=(1.0,))


def test_the_operator_tells_a_compiler_what_it_returns() -> None:
    torch.library.opcheck(
        kept_positions, (counter_rng.row_keys(0, 3), 20, 0.5), test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # Inductor's own
def test_compiled_equals_eager_at_any_number_of_rows(caplog: pytest.LogCaptureFixture) -> None:
    """Rows differ from call to call, which makes sizes symbols to the compiler; it neither warns nor logs an error."""
    options = {"feedback": EF(), "exchange": Simulated(2), "plan": Plan(min_ndim=0, min_numel=0)}
    for compressor in (DAREx(drop=0.9, chunk=256), DAREx(drop=0.9, chunk=512)):
        fused, eager = (Communicator(compressor, fused=fused, **options) for fused in (True, False))
        for i, numel in enumerate((1000, 5000, 77)):
            grads = torch.randn(2, numel)
            ours, theirs = grads.clone(), grads.clone()
            fused.average_([ours], [f"x{i}"])
            eager.average_([theirs], [f"x{i}"])
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == []
