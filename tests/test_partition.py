"""Partitions: every row dealt once, class mixes with the moments of the Dirichlet distribution, and the file."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gradwire.federated import Clients, partition
from gradwire.federated.partition import Partition

LABELS = torch.arange(1200) * 7 % 10  # 120 of each of ten classes

DISJOINT: dict[str, Callable[[int], Partition]] = {
    "iid": lambda seed: partition.iid(1200, 12, seed=seed),
    "dirichlet": lambda seed: partition.dirichlet(LABELS, 12, 0.3, seed=seed),
    "balanced": lambda seed: partition.dirichlet(LABELS, 12, 0.1, min_size=20, balanced=True, seed=seed),
    "dirichlet_clients": lambda seed: partition.dirichlet_clients(LABELS, 12, 0.3, seed=seed),
    "shards": lambda seed: partition.shards(LABELS, 12, 2, seed=seed),
}


def mixes(parts: Partition, labels: torch.Tensor = LABELS) -> np.ndarray[Any, Any]:
    """Share of every class at every client."""
    counts = np.array([np.bincount(labels[rows].numpy(), minlength=10) for rows in parts], np.float64)
    return counts / np.maximum(counts.sum(1, keepdims=True), 1)


@pytest.mark.parametrize("name", DISJOINT)
def test_every_row_belongs_to_one_client(name: str) -> None:
    parts = DISJOINT[name](0)
    assert len(parts) == 12
    assert all(torch.equal(rows, rows.sort().values) for rows in parts)
    assert sorted(torch.cat(parts).tolist()) == list(range(1200))
    assert sum(Clients((LABELS,), parts).num_examples) == 1200


@pytest.mark.parametrize("name", DISJOINT)
def test_the_seed_decides(name: str) -> None:
    first, again, other = (DISJOINT[name](seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_labels_may_be_arrays_lists_and_any_integers() -> None:
    expected = partition.dirichlet(LABELS, 5, 0.5, seed=3)
    for labels in (LABELS.numpy(), LABELS.tolist(), (LABELS * 1000 - 7).to(torch.int32)):
        found = partition.dirichlet(labels, 5, 0.5, seed=3)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_sizes() -> None:
    assert sorted({len(rows) for rows in partition.iid(1205, 12)}) == [100, 101]
    assert {len(rows) for rows in partition.dirichlet_clients(LABELS, 7, 0.1)} == {1200 // 7}
    assert {len(rows) for rows in partition.shards(LABELS, 12, 5)} == {100}
    assert {len(rows) for rows in partition.dirichlet_clients(LABELS, 3, 0.1, num_examples=5000, replace=True)} == {
        5000
    }
    uneven = [len(rows) for rows in partition.dirichlet(LABELS, 12, 0.1, min_size=10)]
    assert min(uneven) >= 10
    assert max(uneven) > 2 * min(uneven)


@pytest.mark.parametrize("alpha", [0.3, 2.0])
def test_class_wise_shares_have_the_moments_of_the_dirichlet(alpha: float) -> None:
    # A client's share of a class is Beta(alpha, (n - 1) alpha): mean 1/n, variance (n - 1) / (n^2 (n alpha + 1)).
    clients, labels = 4, torch.arange(20000) % 10
    shares = np.concatenate(
        [
            np.array([np.bincount(labels[rows].numpy(), minlength=10) for rows in parts]).T / 2000
            for parts in (partition.dirichlet(labels, clients, alpha, min_size=0, seed=seed) for seed in range(60))
        ]
    )
    expected = (clients - 1) / (clients**2 * (clients * alpha + 1))
    assert shares.sum(1) == pytest.approx(1.0)
    assert shares.mean(0) == pytest.approx(np.full(clients, 1 / clients), abs=0.03)
    assert shares.var(0).mean() == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("replace", [True, False])
@pytest.mark.parametrize("alpha", [1.0, 8.0])
def test_client_wise_mixes_have_the_moments_of_the_dirichlet(alpha: float, replace: bool) -> None:
    # Of Dir(alpha p): mean p, variance s p (1 - p), s = 1 / (alpha + 1); a sample of k rows adds (1 - s) p (1 - p) / k.
    labels = torch.cat([torch.zeros(60000), torch.ones(20000)]).long()  # so many that no class is used up
    p, size = 0.75, 40
    shares = np.array(
        [
            (labels[rows] == 0).double().mean().item()
            for rows in partition.dirichlet_clients(labels, 1000, alpha, num_examples=size, replace=replace, seed=5)
        ]
    )
    spread = 1 / (alpha + 1)
    assert shares.mean() == pytest.approx(p, abs=0.03)
    assert shares.var() == pytest.approx(p * (1 - p) * (spread + (1 - spread) / size), rel=0.12)


def test_limits_of_alpha() -> None:
    equal = partition.dirichlet(LABELS, 12, math.inf)
    assert mixes(equal) == pytest.approx(np.full((12, 10), 0.1))
    one_class = mixes(partition.dirichlet_clients(LABELS, 50, 0, num_examples=20, replace=True))
    assert (one_class.max(1) == 1).all()
    assert len(set(one_class.argmax(1))) > 5
    sampled = mixes(partition.dirichlet_clients(LABELS, 3, math.inf, num_examples=30000, replace=True))
    assert sampled == pytest.approx(np.full((3, 10), 0.1), abs=0.02)


def test_a_small_alpha_means_few_classes() -> None:
    largest = {
        alpha: mixes(partition.dirichlet(LABELS, 20, alpha, min_size=0)).max(1).mean() for alpha in (0.05, 0.5, 100)
    }
    assert largest[0.05] > 1.3 * largest[0.5] > 1.6 * largest[100]


def test_replacement_repeats_rows_and_its_absence_does_not() -> None:
    with_repeats = partition.dirichlet_clients(LABELS, 12, 0.2, replace=True)
    assert any(len(rows.unique()) < len(rows) for rows in with_repeats)
    none = torch.cat(partition.dirichlet_clients(LABELS, 12, 0.2, num_examples=50))
    assert len(none.unique()) == len(none) == 600


def test_balanced_keeps_clients_near_the_mean() -> None:
    free = partition.dirichlet(LABELS, 12, 0.1, min_size=0, seed=4)
    capped = partition.dirichlet(LABELS, 12, 0.1, min_size=0, balanced=True, seed=4)
    assert max(map(len, capped)) < max(map(len, free))
    assert max(map(len, capped)) < 1200 / 12 + 120  # what a client had before its last class, and that class


def test_shards_hold_few_classes() -> None:
    classes = [len(LABELS[rows].unique()) for rows in partition.shards(LABELS, 60, 2)]
    assert set(classes) == {1, 2}  # 120 shards of ten, none across a border of classes
    assert {len(rows) for rows in partition.shards(LABELS, 60, 2)} == {20}


def test_by_id_follows_the_owners() -> None:
    owners = ["mia", "ann", "mia", "zoe", "ann", "mia"]
    found = partition.by_id(owners)
    assert [rows.tolist() for rows in found] == [[1, 4], [0, 2, 5], [3]]
    numbers = partition.by_id(torch.tensor([7, -1, 7]))
    assert [rows.tolist() for rows in numbers] == [[1], [0, 2]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: partition.iid(3, 4), r"iid: expected clients <= 3, .* got clients=4"),
        (lambda: partition.iid(3, 0), r"iid: expected clients >= 1, got clients=0"),
        (lambda: partition.dirichlet(LABELS, 12, 0), r"dirichlet: expected alpha > 0, got alpha=0"),
        (lambda: partition.dirichlet(LABELS, 12, math.nan), r"dirichlet: expected alpha > 0, got alpha=nan"),
        (lambda: partition.dirichlet(LABELS, 12, 1, min_size=101), r"expected 0 <= min_size <= 100, .* min_size=101"),
        (lambda: partition.dirichlet(LABELS, 12, 0.01, min_size=90), r"got at most \d+ in 1000 draws. Lower min_size"),
        (lambda: partition.dirichlet(LABELS.float(), 3, 1), r"class of every row as an integer, .* dtype float32"),
        (lambda: partition.dirichlet(torch.zeros(3, 2).long(), 3, 1), r"integer, got an array of shape \[3, 2\]"),
        (lambda: partition.dirichlet([], 3, 1), r"expected the class of every row"),
        (lambda: partition.dirichlet_clients(LABELS, 12, -1), r"expected alpha >= 0, got alpha=-1"),
        (lambda: partition.dirichlet_clients(LABELS, 12, 1, num_examples=101), r"num_examples <= 100, as every row"),
        (
            lambda: partition.dirichlet_clients(LABELS, 12, 1, num_examples=0, replace=True),
            r"expected 1 <= num_examples,",
        ),
        (lambda: partition.shards(LABELS, 12, 0), r"expected shards_per_client >= 1, got 0"),
        (lambda: partition.shards(LABELS, 601, 2), r"shards: expected clients <= 600"),
        (lambda: partition.by_id([]), r"by_id: expected one id for every row"),
        (lambda: partition.by_id([1, None]), r"by_id: expected ids that are all numbers or all strings"),
    ],
)
def test_mistakes_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# The file.


def test_a_file_gives_the_same_partition(tmp_path: Path) -> None:
    parts = partition.dirichlet(LABELS, 12, 0.3)
    path = tmp_path / "partition.json"
    partition.save(path, parts, num_examples=1200, made_by="dirichlet(0.3)")
    found = partition.load(path, num_examples=1200)
    assert all(torch.equal(a, b) and b.dtype == torch.int64 for a, b in zip(parts, found, strict=True))
    assert json.loads(path.read_text())["made_by"] == "dirichlet(0.3)"
    assert [entry.name for entry in tmp_path.iterdir()] == ["partition.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: "[1, 2", r"expected a partition as save\(\) writes it"),
        (lambda content: "[1, 2]", r"got other content"),
        (lambda content: content | {"format": "gradwire partition 0"}, r"got other content"),
        (lambda content: content | {"num_examples": "10"}, r"expected num_examples, a number, .* got '10'"),
        (lambda content: content | {"num_examples": 11}, r"expected a partition of 10 examples, got one of 11"),
        (lambda content: content | {"clients": []}, r"expected a list of row numbers for every client"),
        (lambda content: content | {"clients": [[0], 3]}, r"expected a list of row numbers for every client"),
        (lambda content: content | {"clients": [[0], [10]]}, r"row numbers from 0 to 9, got 10 for client 1"),
        (lambda content: content | {"clients": [[0.5]]}, r"row numbers from 0 to 9, got 0.5 for client 0"),
        (lambda content: content | {"clients": [[True]]}, r"row numbers from 0 to 9, got True for client 0"),
        (lambda content: content | {"clients": [[0, 1], [2]]}, r"expected the digest \w+ in .*, got '\w+'"),
        (lambda content: content | {"digest": None}, r"expected the digest \w+ in .*, got None"),
    ],
)
def test_a_changed_file_is_refused(change: Callable[[Any], Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "partition.json"
    partition.save(path, partition.iid(10, 3), num_examples=10)
    changed = change(json.loads(path.read_text()))
    path.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    with pytest.raises(ValueError, match=message):
        partition.load(path, num_examples=10)


def test_rows_that_do_not_exist_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"save: expected row numbers from 0 to 2, got 3 for client 0"):
        partition.save(tmp_path / "partition.json", [torch.tensor([0, 3])], num_examples=3)
    assert not list(tmp_path.iterdir())
