"""Aggregates by hand and by independent implementations; digits; models outside of a simulation."""

import math
import statistics
from typing import Any

import numpy as np
import pytest
import torch
from aggregating import COUNT, aggregate, assert_near, drawn
from reference import aggregators as rules
from torch import Tensor

from gradwire.federated import (
    TIES,
    Bucketing,
    Bulyan,
    CenteredClipping,
    CoordinateMedian,
    GeometricMedian,
    Krum,
    MultiKrum,
    NormClipping,
    TrimmedMean,
    WeightedMean,
    merge,
)
from gradwire.federated.aggregators import stacks


def row(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


def test_medians_and_trimmed_means_are_those_of_the_standard_library() -> None:
    assert aggregate(CoordinateMedian(), row(1, 2, 3, 4)).item() == 2.5
    assert aggregate(TrimmedMean(0.2), row(1, 2, 3, 4, 100)).item() == 3
    for count in range(1, 12):
        messages = drawn(count, 5, count)[0]
        columns = messages.T.tolist()
        assert_near(aggregate(CoordinateMedian(), messages), list(map(statistics.median, columns)), 1e-15)
        for beta in (0.0, 0.1, 0.25, 0.49):
            cut = math.floor(beta * count)
            expected = [statistics.fmean(sorted(column)[cut : count - cut]) for column in columns]
            assert_near(aggregate(TrimmedMean(beta), messages), expected, 1e-14)


def test_krum_by_hand() -> None:
    points = torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1], [0.5, 0.5], [100, 100], [101, 100]], dtype=torch.float64)
    distances = stacks.sort_rows(stacks.squared_distances(points))
    assert distances[:, :3].sum(1).tolist() == [2.5, 2.5, 2.5, 2.5, 1.5, 39403.5, 39802.0]
    assert aggregate(Krum(2), points).tolist() == [0.5, 0.5]
    assert_near(aggregate(MultiKrum(2, m=3), points), [0.5, 1 / 6], 1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("common", [0.0, 1e3])
@pytest.mark.parametrize("far", [1e4, 1e10])
def test_distances_do_not_lose_digits(
    dtype: torch.dtype, common: float, far: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither to what all messages have in common nor to one that is far off."""
    monkeypatch.setattr(stacks, "_GRAM_ROWS", 4)
    honest = (common + 1e-2 * drawn(9, 50)[0]).to(dtype)
    messages = torch.cat([honest[:4], torch.full((2, 50), far, dtype=dtype), honest[4:]])
    found = stacks.squared_distances(messages)
    exact = (honest.double()[:, None] - honest.double()[None]).square().sum(-1)
    kept = torch.tensor([0, 1, 2, 3, 6, 7, 8, 9, 10])
    near = found[kept][:, kept].fill_diagonal_(0.0)
    assert_near(near, exact, 1e-8 * float(exact.max()))
    assert found.diagonal().isinf().all()


def test_messages_beyond_squares_are_left_out() -> None:
    messages, _ = drawn()
    messages[[2, 5]] = torch.tensor([[1e300], [-1e300]], dtype=torch.float64)
    honest = torch.cat([messages[:2], messages[3:5], messages[6:]])
    for aggregator in (Krum(2), MultiKrum(2), Bulyan(2), CoordinateMedian(), NormClipping(10.0), CenteredClipping()):
        found = aggregate(aggregator, messages)
        assert float((found - honest.mean(0)).norm()) < 2 * float(torch.cdist(honest, honest).max())


def test_geometric_median_by_hand() -> None:
    triangle = torch.tensor([[0, 0], [1, 0], [0.5, 0.75**0.5]], dtype=torch.float64)
    assert_near(aggregate(GeometricMedian(), 2 * triangle), [1, 0.57735], 1e-5)
    with_outlier = torch.tensor([[0, 0], [1, 0], [0, 1], [1000, 1000]], dtype=torch.float64)
    for iterations, expected in ((1, 100.3002), (4, 4.4363), (32, 0.5)):
        assert_near(aggregate(GeometricMedian(iterations), with_outlier), [expected, expected], 1e-4)


def test_geometric_median_is_stationary() -> None:
    """Unit vectors to the messages cancel, weighted."""
    messages, weights = drawn()
    messages[0] = 1e4
    v = aggregate(GeometricMedian(iterations=1000, tolerance=1e-13), messages, weights)
    pull = (messages - v) / (messages - v).norm(dim=1, keepdim=True)
    assert float((weights @ pull).norm()) < 1e-9
    assert float((aggregate(GeometricMedian(), messages, weights) - v).norm()) < 1e-3


@pytest.mark.parametrize(("density", "expected"), [(0.5, [2, 2.5, 0, 0]), (1.0, [2, 2.5, 0.2, 0])])
def test_ties_by_hand(density: float, expected: list[float]) -> None:
    messages = torch.tensor([[3, -2, 0.1, 0], [1, 4, -0.2, 0], [-2, 1, 0.3, 0]], dtype=torch.float64)
    assert_near(aggregate(TIES(density), messages), expected, 1e-15)
    base = torch.ones(4, dtype=torch.float64)
    assert_near(merge(TIES(density), list(base + messages), base=base), 1 + np.array(expected), 1e-15)


def test_ties_without_a_sign() -> None:
    """Sums of zero take the sign of most entries, and are zero if there is no such sign."""
    assert aggregate(TIES(1.0), torch.tensor([[2.0, 1.0], [-2.0, 1.0]])).tolist() == [2, 1]
    assert aggregate(TIES(1.0), torch.tensor([[2.0, -1.0], [-2.0, -1.0]])).tolist() == [-2, -1]
    assert aggregate(TIES(1.0), torch.tensor([[2.0, 1.0], [-2.0, -1.0]])).tolist() == [0, 0]


def test_buckets_are_dealt_anew_in_every_round() -> None:
    messages, _ = drawn()
    aggregator, other = Bucketing(CoordinateMedian(), s=3), Bucketing(CoordinateMedian(), s=3, seed=1)
    found = [aggregate(aggregator, messages) for _ in range(3)]
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])
    assert not torch.equal(aggregate(other, messages), found[0])
    assert_near(aggregate(Bucketing(WeightedMean(), s=COUNT), messages), messages.mean(0))
    alone = aggregate(Bucketing(CoordinateMedian(), s=1), messages)
    assert torch.equal(alone, aggregate(CoordinateMedian(), messages))


def test_bucketing_brings_clients_of_two_kinds_together() -> None:
    """Half of all clients send 0 and half 1, a bit more of the former: Krum passes on a 0, the mean is near 1/2."""
    messages = torch.tensor([[0.0]] * 11 + [[1.0]] * 10)
    assert aggregate(Krum(3), messages).item() == 0
    aggregator = Bucketing(Krum(1), s=4)
    found = [aggregate(aggregator, messages).item() for _ in range(40)]
    assert 0.35 < np.mean(found) < 0.65


# Models outside of a simulation.


def test_merge_takes_state_dicts() -> None:
    models = [torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).double() for _ in range(3)]
    for steps, model in enumerate(models):
        for _ in range(steps + 1):
            model(torch.randn(4, 3, dtype=torch.float64))
    states = [model.state_dict() for model in models]
    merged = merge(WeightedMean(), states, [1.0, 2.0, 5.0])
    for name, value in merged.items():
        parts = torch.stack([state[name] for state in states])
        if value.is_floating_point():
            weights = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64).view(-1, *[1] * value.ndim)
            assert_near(value, (weights * parts).sum(0) / 8, 1e-14)
        else:
            assert value == 3
    assert list(merged) == list(states[0])
    models[0].load_state_dict(merged)
    krum = merge(Krum(0), states)
    assert any(all(torch.equal(krum[n], state[n]) for n in state if n != "1.num_batches_tracked") for state in states)


def test_merge_keeps_shapes_and_dtypes() -> None:
    models = [{"a": torch.full((2, 3), float(i), dtype=torch.bfloat16), "b": torch.tensor(float(i))} for i in range(4)]
    merged = merge(CoordinateMedian(), models)
    assert (merged["a"].dtype, merged["a"].shape, merged["b"].shape) == (torch.bfloat16, (2, 3), ())
    assert merged["a"].unique().tolist() == [1.5]
    assert merge(TrimmedMean(0.25), [torch.full((2, 2), float(i)) for i in range(4)]).tolist() == [[1.5, 1.5]] * 2


@pytest.mark.parametrize(
    ("vectors", "weights", "message"),
    [
        ([], None, "expected at least one vector or state dict, got none"),
        ([torch.ones(2)], [1.0, 2.0], "expected 1 weights, one for each, got 2"),
        ([torch.ones(2), torch.ones(3)], None, r"expected shape of \[2\], got \[3\] in number 1"),
        ([{"a": torch.ones(2)}, {"b": torch.ones(2)}], None, r"expected names \['a'\], got \['b'\] in number 1"),
        ([torch.ones(2), torch.tensor([1.0, float("nan")])], None, "got inf or NaN in number 1. Leave it out"),
        ([{"count": torch.ones(2, dtype=torch.int64)}], None, "expected floating-point entries, got none"),
        ([torch.ones(2)], [torch.ones(3)], r"expected shape of \[2\], got \[3\] in weight 0"),
    ],
)
def test_merge_refuses(vectors: Any, weights: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        merge(WeightedMean(by_entry=True), vectors, weights)


def test_models_of_several_sizes() -> None:
    """By entry, over the clients that have it; where nobody has it the model stays (HeteroFL, FjORD, sparse masks)."""
    base, _ = drawn(1, 8)
    models, weights = drawn(3, 8, 1)
    widths = (2, 6, 6)
    masks = [(torch.arange(8) < width).double() for width in widths]
    trained = [torch.where(mask > 0, model, base[0]) for mask, model in zip(masks, models, strict=True)]
    entries = [mask * weight for mask, weight in zip(masks, weights, strict=True)]
    merged = merge(WeightedMean(by_entry=True), trained, entries, base=base[0])
    assert_near(merged[:2], rules.weighted_mean(models.numpy(), weights.numpy())[:2], 1e-14)
    assert_near(merged[2:6], rules.weighted_mean(models[1:].numpy(), weights[1:].numpy())[2:6], 1e-14)
    assert torch.equal(merged[6:], base[0, 6:])
    alone = merge(WeightedMean(by_entry=True), trained[:2], entries[:2], base=base[0])
    assert_near(alone[2:6], models[1, 2:6], 1e-15)
    full = merge(WeightedMean(by_entry=True), list(models), [torch.full((8,), float(w)) for w in weights])
    assert_near(full, merge(WeightedMean(), list(models), weights.tolist()), 1e-6)
