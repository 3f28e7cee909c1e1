"""Every aggregator against its NumPy reference, and what it declares: weights, sums, order, what it withstands."""

import io
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from aggregating import COUNT, aggregate, assert_near, drawn
from cases import AGGREGATORS, AggregatorCase
from hypothesis import given
from hypothesis import strategies as st
from naming import plain
from reference import aggregators as rules
from torch import Tensor

from gradwire.federated import (
    TIES,
    Aggregator,
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
)
from gradwire.federated.aggregators import stacks

every_case = pytest.mark.parametrize("case", AGGREGATORS, ids=lambda case: repr(case.aggregator))


def fresh(case: AggregatorCase) -> Aggregator:
    return deepcopy(case.aggregator)


@every_case
@pytest.mark.parametrize("d", [1, 9, 40])
@pytest.mark.parametrize("block", [1 << 18, 30], ids=["whole", "blocks"])
def test_equals_the_reference(case: AggregatorCase, d: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacks, "_BLOCK_ENTRIES", block)
    for seed in range(4):
        messages, weights = drawn(COUNT, d, seed)
        assert_near(aggregate(fresh(case), messages, weights), case.reference(messages.numpy(), weights.numpy()))


@pytest.mark.parametrize(
    ("case", "kwargs", "message"), [(case, *error) for case in AGGREGATORS for error in case.errors], ids=plain
)
def test_refuses(case: AggregatorCase, kwargs: dict[str, Any], message: str) -> None:
    fields = case.aggregator.__dataclass_fields__  # type: ignore[attr-defined]
    given = {name: getattr(case.aggregator, name) for name, field in fields.items() if field.init}
    with pytest.raises(ValueError, match=message):
        type(case.aggregator)(**{**given, **kwargs})


@every_case
def test_rounds_do_not_mix(case: AggregatorCase) -> None:
    """But for what is declared as state; a result can be asked for twice."""
    aggregator, (first, weights), (second, _) = fresh(case), drawn(seed=1), drawn(seed=2)
    kept = aggregate(aggregator, first, weights)
    copy = kept.clone()
    other = fresh(case)
    other.load_state_dict(aggregator.state_dict())
    found = aggregate(aggregator, second, weights)
    assert torch.equal(aggregator.result(), found)
    assert torch.equal(kept, copy)
    assert torch.equal(aggregate(other, second, weights), found)
    if not aggregator.state_dict():
        assert torch.equal(aggregate(fresh(case), second, weights), found)


@every_case
def test_state_survives_a_checkpoint(case: AggregatorCase) -> None:
    whole, resumed = fresh(case), fresh(case)
    results = [aggregate(whole, *drawn(seed=seed)) for seed in range(5)]
    for seed in range(3):
        aggregate(resumed, *drawn(seed=seed))
    file = io.BytesIO()
    torch.save(resumed.state_dict(), file)
    file.seek(0)
    resumed = fresh(case)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert all(torch.equal(aggregate(resumed, *drawn(seed=seed)), results[seed]) for seed in (3, 4))
    with pytest.raises(ValueError, match=r"expected .*state"):
        fresh(case).load_state_dict({"momentum": 1})


@every_case
def test_order_of_messages_does_not_matter(case: AggregatorCase) -> None:
    messages, weights = drawn()
    order = torch.randperm(COUNT)
    forwards = aggregate(fresh(case), messages, weights)
    shuffled = aggregate(fresh(case), messages[order], weights[order])
    if case.unordered:
        assert_near(shuffled, forwards, 1e-14 if case.aggregator.linear else 1e-11)
    else:
        assert not torch.equal(shuffled, forwards)


@every_case
def test_weights_count_as_declared(case: AggregatorCase) -> None:
    messages, weights = drawn()
    plain = aggregate(fresh(case), messages)
    assert torch.equal(aggregate(fresh(case), messages, weights), plain) == (not case.aggregator.weighs)
    if case.aggregator.weighs and case.aggregator.fewest == 1:
        counts = torch.arange(COUNT) % 3 + 1
        repeated = messages.repeat_interleave(counts, 0)
        assert_near(aggregate(fresh(case), messages, counts), aggregate(fresh(case), repeated), 1e-11)
        assert_near(aggregate(fresh(case), messages, 1e3 * weights), aggregate(fresh(case), messages, weights))


@every_case
def test_linear_ones_follow_from_sums_over_processes(case: AggregatorCase) -> None:
    whole, parts = fresh(case), [fresh(case), fresh(case)]
    messages, weights = drawn()
    if not whole.linear:
        with pytest.raises(AssertionError, match="is not linear"):
            _ = whole.sums
        return
    expected = aggregate(whole, messages, weights)
    for part, chosen in zip(parts, (slice(0, 4), slice(4, None)), strict=True):
        part.reset(messages.shape[1], messages.dtype, messages.device)
        for message, weight in zip(messages[chosen], weights[chosen].tolist(), strict=True):
            part.add(message, weight)
    parts[0].sums.add_(parts[1].sums)
    assert_near(parts[0].result(), expected, 1e-14)


@every_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_keeps_dtype_and_messages(case: AggregatorCase, dtype: torch.dtype) -> None:
    messages, weights = drawn()
    given = messages.to(dtype)
    copy = given.clone()
    found = aggregate(fresh(case), given, weights)
    assert (found.dtype, found.device, found.shape) == (dtype, given.device, given[0].shape)
    assert torch.equal(given, copy)
    exact = case.reference(given.double().numpy(), weights.numpy())
    assert_near(found.double(), exact, max(1e-12, 8 * torch.finfo(dtype).eps))


@every_case
def test_equal_messages_are_the_result(case: AggregatorCase) -> None:
    aggregator = fresh(case)
    if isinstance(aggregator, TIES):
        aggregator = TIES(density=1.0)
    message = 0.1 * drawn()[0][:1]
    _, weights = drawn()
    assert_near(aggregate(aggregator, message.expand(COUNT, -1), weights), message[0], 1e-14)


@every_case
def test_moves_and_scales_with_messages(case: AggregatorCase) -> None:
    (messages, weights), shift = drawn(), drawn(seed=9)[0][0]
    plain = aggregate(fresh(case), messages, weights)
    moved = aggregate(fresh(case), messages + shift, weights)
    assert case.translates == bool((moved - plain - shift).abs().max() < 1e-6)
    scaled = aggregate(fresh(case), 4 * messages, weights)
    assert case.scales == bool((scaled - 4 * plain).abs().max() < 1e-6)
    assert_near(aggregate(fresh(case), -messages, weights), -plain, 1e-10)


ATTACKS: dict[str, Callable[[Tensor, np.random.Generator], Tensor]] = {
    "far": lambda honest, rng: torch.full_like(honest[0], 10.0 ** rng.uniform(0, 12)),
    "opposite": lambda honest, rng: -(10.0 ** rng.uniform(-1, 6)) * honest.mean(0),
    "noise": lambda honest, rng: 10.0 ** rng.uniform(-1, 9) * torch.tensor(rng.normal(size=honest.shape[1])),
    "a little": lambda honest, rng: honest.mean(0) - rng.uniform(0.2, 3.0) * honest.std(0),
    "copy": lambda honest, rng: honest[rng.integers(len(honest))],
    "one coordinate": lambda honest, rng: (
        honest.mean(0) + 10.0 ** rng.uniform(0, 6) * torch.eye(honest.shape[1], dtype=honest.dtype)[0]
    ),
}


robust = pytest.mark.parametrize(
    "case", [case for case in AGGREGATORS if case.radius is not None], ids=lambda case: repr(case.aggregator)
)


@robust
@given(
    seed=st.integers(0, 1 << 30),
    kinds=st.lists(st.sampled_from(sorted(ATTACKS)), min_size=1, max_size=3),
    together=st.booleans(),
    offset=st.sampled_from([0.0, 1.0, 1e3]),
)
def test_withstands_what_it_says(
    case: AggregatorCase, seed: int, kinds: list[str], together: bool, offset: float
) -> None:
    assert case.radius is not None
    aggregator, rng = fresh(case), np.random.default_rng(seed)
    count = aggregator.tolerates(COUNT)
    assert count > 0
    honest = offset + drawn(COUNT - count, 6, seed)[0]
    bad = [ATTACKS[kinds[i % len(kinds)]](honest, rng) for i in range(count)]
    messages = torch.cat([honest, torch.stack([bad[0]] * count if together else bad)])
    messages = messages[torch.tensor(rng.permutation(COUNT))]
    found = aggregate(aggregator, messages)
    diameter = float(torch.cdist(honest, honest).max())
    if isinstance(aggregator, CoordinateMedian | TrimmedMean):
        assert bool(((honest.amin(0) <= found) & (found <= honest.amax(0))).all())
    elif isinstance(aggregator, Bulyan):
        spread = honest.amax(0) - honest.amin(0)
        assert bool(((found - honest.mean(0)).abs() <= 2 * spread).all())
    else:
        assert float((found - honest.mean(0)).norm()) <= case.radius * diameter


@robust
def test_what_it_says_is_about_all_it_withstands(case: AggregatorCase) -> None:
    """More than half of all messages, or more than the bound where there is one, can carry it off."""
    aggregator = fresh(case)
    messages, _ = drawn()
    messages[: 4 if isinstance(aggregator, TrimmedMean) else 6] = 1e9
    assert float(aggregate(aggregator, messages).norm()) > 1e7


def test_means_withstand_nothing() -> None:
    messages, weights = drawn()
    messages[3] = 1e9
    for aggregator in (WeightedMean(), WeightedMean(by_entry=True), TIES(density=1.0)):
        assert aggregator.tolerates(COUNT) == 0
        assert float(aggregate(aggregator, messages, weights).norm()) > 1e7


@pytest.mark.parametrize("then", [WeightedMean(), CoordinateMedian()])
def test_clipping_bounds_what_anyone_can_do(then: Aggregator) -> None:
    messages, _ = drawn()
    aggregator = NormClipping(0.5, then)
    messages[:2] = 1e30
    honest = aggregate(deepcopy(aggregator), messages[2:])
    limit = 0.5 + 1e-12 if isinstance(then, CoordinateMedian) else 2 * 0.5 * 2 / COUNT + 1e-12
    assert float((aggregate(aggregator, messages) - honest).norm()) <= limit
    assert aggregator.tolerates(COUNT) == 5
    clipping = CenteredClipping(tau=0.25, iterations=2)
    previous = torch.zeros(9, dtype=torch.float64)
    for seed in range(4):
        messages, _ = drawn(seed=seed)
        messages[:5] = -1e30
        found = aggregate(clipping, messages)
        assert float((found - previous).norm()) <= 0.5 + 1e-12
        previous = found


def test_centered_clipping_starts_at_the_previous_result() -> None:
    aggregator, v = CenteredClipping(tau=1.5, iterations=2), None
    for seed in range(5):
        messages, weights = drawn(seed=seed)
        v = rules.centered_clipping(messages.numpy(), weights.numpy(), 1.5, 2, v)
        assert_near(aggregate(aggregator, messages, weights), v)


@pytest.mark.parametrize(
    ("aggregator", "count", "message"),
    [
        (WeightedMean(), 0, "WeightedMean: expected a positive sum of weights, got 0"),
        (
            CoordinateMedian(),
            0,
            r"CoordinateMedian: expected at least 1 message in a round, got 0\. Take a larger",
        ),
        (TrimmedMean(0.4), 0, "TrimmedMean: expected at least 1 message in a round"),
        (GeometricMedian(), 0, "GeometricMedian: expected at least 1 message"),
        (Krum(2), 6, r"Krum: expected at least 2 byzantine \+ 3 = 7 messages in a round, got 6.*or byzantine <= 1\."),
        (Krum(0), 2, r"= 3 messages in a round, got 2\. Take a larger cohort\."),
        (MultiKrum(2), 6, "MultiKrum: expected at least 2 byzantine"),
        (MultiKrum(1, m=6), 6, "expected m <= 5, messages of a round less byzantine, got m=6"),
        (Bulyan(1), 6, r"Bulyan: expected at least 4 byzantine \+ 3 = 7 messages.*or byzantine <= 0\."),
        (Bucketing(Krum(1), s=2), 8, "Bucketing: expected at least 9 messages in a round, for 5 buckets of 2, got 8"),
        (NormClipping(1.0, Krum(1)), 4, "Krum: expected at least"),
    ],
    ids=str,
)
def test_too_few_messages(aggregator: Aggregator, count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        aggregate(aggregator, drawn()[0][:count])
    if count:
        with pytest.raises(ValueError, match="expected"):
            aggregator.check(count)
        aggregator.check(COUNT)
        assert aggregate(aggregator, drawn()[0]).isfinite().all()


def test_weights_by_entry_only_where_they_mean_something() -> None:
    ones = torch.ones(9, dtype=torch.float64)
    for case in AGGREGATORS:
        aggregator = fresh(case)
        aggregator.reset(9, torch.float64, torch.device("cpu"))
        if isinstance(aggregator, WeightedMean) and aggregator.by_entry:
            aggregator.add(ones, ones)
        else:
            with pytest.raises(ValueError, match="expected one weight"):
                aggregator.add(ones, ones)
    with pytest.raises(ValueError, match="expected a positive sum of weights, got 0"):
        aggregate(GeometricMedian(), drawn()[0], torch.zeros(COUNT))
