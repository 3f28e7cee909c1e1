"""Checkpoints between real processes: resume is exact, other world sizes keep the mean, and damage is named."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import toy
from cases import COMMUNICATORS, CommunicatorCase
from ranks import run_ranks
from torch.distributed.checkpoint.api import CheckpointException

from gradwire.comm import EF, AllGather, Averager, CheckpointError, Communicator, Hierarchical, attach, checkpoint
from gradwire.compression import ChunkTopK

BY_NAME = {case.name: case for case in COMMUNICATORS}
Rows = dict[str, np.ndarray]


class _Training:
    """A model, an optimizer and a communicator on one host, from weights that depend on `seed`."""

    def __init__(self, case: CommunicatorCase, host: str, seed: int = 0) -> None:
        self.model = toy.model(seed)
        self.communicator = case.make(seed=3)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3)
        self.host = toy.ddp(self.model) if host == "ddp" else self.model
        if host == "ddp":
            attach(self.host, self.communicator, optimizer=self.optimizer)
        else:
            named = self.model.named_parameters()
            attach(named, self.communicator, optimizer=self.optimizer, bucket_mb=toy.BUCKET_MB)

    def run(self, first: int, last: int) -> None:
        for step in range(first, last):
            self.optimizer.zero_grad()
            toy.loss(self.host, step).backward()
            self.optimizer.step()

    def objects(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "communicator": self.communicator}

    def result(self) -> tuple[str, str, int]:
        steps = self.communicator.stats.steps
        return toy.digest(self.model.parameters()), toy.state_digest(self.communicator), steps


# The same world size.


def _train_through(folder: str, names: list[str], host: str) -> dict[str, tuple[str, str, int]]:
    results = {}
    for name in names:
        training = _Training(BY_NAME[name], host)
        training.run(0, 3)
        checkpoint.save(f"{folder}/{host}-{name}", **training.objects())
        training.run(3, 6)
        results[name] = training.result()
    return results


def _train_on(folder: str, names: list[str], host: str) -> dict[str, tuple[str, str, int]]:
    """Fresh processes that start from other weights, so that what is not restored shows."""
    results = {}
    for name in names:
        training = _Training(BY_NAME[name], host, seed=9)
        checkpoint.load(f"{folder}/{host}-{name}", **training.objects())
        training.run(3, 6)
        results[name] = training.result()
    return results


_FAMILIES = ["chunk-EF", "sign-EF21-two-phase-int8", "powersgd", "warmup-chunk-EF", "random-k-EF"]


@pytest.mark.slow
@pytest.mark.parametrize(("host", "names"), [("ddp", list(BY_NAME)), ("loop", _FAMILIES)])
def test_resume_equals_the_uninterrupted_run_bit_for_bit(host: str, names: list[str], tmp_path: Path) -> None:
    through = run_ranks(2, _train_through, str(tmp_path), names, host, timeout_s=100)
    on = run_ranks(2, _train_on, str(tmp_path), names, host, timeout_s=100)
    for rank in range(2):
        for name in names:
            assert (name, on[rank][name]) == (name, through[rank][name])
            assert on[rank][name][2] == 6
    assert {name: result[0] for name, result in on[0].items()} == {name: result[0] for name, result in on[1].items()}


# Another world size.


def _rows(communicator: Averager) -> Rows:
    return {key: value.numpy() for key, value in communicator.state_rows().items()}


def _save_rows(folder: str, names: list[str]) -> dict[str, Rows]:
    results = {}
    for name in names:
        training = _Training(BY_NAME[name], "ddp")
        training.run(0, 3)
        checkpoint.save(f"{folder}/{name}", **training.objects())
        results[name] = _rows(training.communicator)
    return results


def _load_rows(folder: str, names: list[str], host: str) -> dict[str, tuple[Rows, str, int]]:
    results = {}
    for name in names:
        training = _Training(BY_NAME[name], host, seed=9)
        checkpoint.load(f"{folder}/{name}", **training.objects())
        rows = {key: value.copy() for key, value in _rows(training.communicator).items()}
        training.run(3, 5)
        results[name] = rows, *training.result()[::2]
    return results


def _mean_by_row(ranks: list[Rows]) -> dict[str, np.ndarray]:
    """Per `state/parameter`: every row's mean over the ranks that hold it."""
    held: dict[str, dict[int, list[np.ndarray]]] = {}
    for rows in ranks:
        for key, value in rows.items():
            name, _, span = key.rpartition("/")
            first = int(span.split(":")[0])
            for offset, row in enumerate(value[0]):
                held.setdefault(name, {}).setdefault(first + offset, []).append(row.astype(np.float64))
    return {
        name: np.stack([np.mean(by_row[row], axis=0) for row in range(len(by_row))]) for name, by_row in held.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after", "names"),
    [
        (2, 1, _FAMILIES),
        (2, 3, _FAMILIES),
        (4, 2, ["chunk-EF-hierarchical", "int4-EF-hierarchical-two-phase", "chunk-EF-two-phase-int8", "topk-EF21"]),
    ],
)
def test_another_world_size_keeps_the_mean(before: int, after: int, names: list[str], tmp_path: Path) -> None:
    saved = run_ranks(before, _save_rows, str(tmp_path), names)
    for host in ("ddp", "loop"):
        loaded = run_ranks(after, _load_rows, str(tmp_path), names, host)
        for name in names:
            expected = _mean_by_row([rank[name] for rank in saved])
            assert expected
            assert any(np.abs(rows).max() > 0 for rows in expected.values())
            got = _mean_by_row([rank[name][0] for rank in loaded])
            assert got.keys() == expected.keys()
            for key, rows in expected.items():
                tolerance = 1e-6 * max(np.abs(rows).max(), 1e-30)
                np.testing.assert_allclose(got[key], rows, rtol=0, atol=tolerance, err_msg=f"{name} {key}")
            for key in [key for key in got if key.startswith("local/")]:  # EF21's invariant
                parameter = key.removeprefix("local/")
                known = got[f"mean/{parameter}"] + got.get(f"second_residual/{parameter}", 0.0)
                np.testing.assert_allclose(got[key], known, rtol=0, atol=1e-6 * np.abs(known).max())
            assert toy.all_equal(rank[name][1] for rank in loaded), name
            assert {rank[name][2] for rank in loaded} == {5}


# torch.distributed.checkpoint by itself.


def _direct_save(folder: str, name: str) -> tuple[str, str, int]:
    training = _Training(BY_NAME[name], "loop")
    training.run(0, 3)
    dcp.save({"communicator": training.communicator}, checkpoint_id=folder)
    return training.result()


def _direct_load(folder: str, name: str) -> tuple[str, str, int]:
    training = _Training(BY_NAME[name], "loop")
    dcp.load({"communicator": training.communicator}, checkpoint_id=folder)
    return training.result()


def _direct_load_elsewhere(folder: str, error: type[BaseException], message: str) -> None:
    training = _Training(BY_NAME["chunk-EF"], "loop")
    with pytest.raises(error, match=message):
        dcp.load({"communicator": training.communicator}, checkpoint_id=folder)
    assert training.communicator.stats.steps == 0


def _load_the_state_of_another_rank() -> None:
    training = _Training(BY_NAME["sign-EF-two-phase"], "loop")
    own = training.communicator.state_dict()
    other = {
        "head": own["head"],
        "rows": {key.replace("rank", "rank1", 1): value for key, value in own["rows"].items()},
    }
    with pytest.raises(CheckpointError, match=rf"state of rank {dist.get_rank()}, got that of another rank"):
        training.communicator.load_state_dict(other)


@pytest.mark.parametrize("name", ["chunk-EF", "sign-EF-two-phase", "powersgd", "warmup-chunk-EF"])
def test_a_communicator_is_a_stateful_of_torch(name: str, tmp_path: Path) -> None:
    saved = run_ranks(2, _direct_save, str(tmp_path), name)
    loaded = run_ranks(2, _direct_load, str(tmp_path), name)
    assert [(state, steps) for _, state, steps in loaded] == [(state, steps) for _, state, steps in saved]


def test_a_stateful_of_another_world_size_or_rank_is_refused(tmp_path: Path) -> None:
    """In a larger world torch itself misses the other ranks' entries."""
    run_ranks(2, _direct_save, str(tmp_path), "chunk-EF")
    ours = r"world of 1, got 2\. Use gradwire\.comm\.checkpoint\.load"
    run_ranks(1, _direct_load_elsewhere, str(tmp_path), CheckpointError, ours)
    run_ranks(3, _direct_load_elsewhere, str(tmp_path), CheckpointException, r"Missing key .*rank2/residual")
    run_ranks(2, _load_the_state_of_another_rank)


# Damage and other configurations.


def _load_expecting(folder: str, error: str, k: int) -> None:
    communicator = Communicator(ChunkTopK(k=k, chunk=256), feedback=EF())
    with pytest.raises(CheckpointError, match=error):
        checkpoint.load(folder, communicator=communicator)
    assert communicator.stats.steps == 0
    assert not communicator.state_rows()


def _load_other_families(folder: str) -> None:
    expected = {
        r"expected communicator=PowerSGD .*, got communicator=Communicator": BY_NAME["powersgd"].make(),
        r"expected feedback=EF21\(dense_start=False\) .*, got feedback=EF\(decay=1\.0\)": BY_NAME["chunk-EF21"].make(),
        r"expected exchange=Hierarchical.*, got exchange=AllGather\(\)": Communicator(
            ChunkTopK(k=8, chunk=256), feedback=EF(), exchange=Hierarchical(2, AllGather())
        ),
    }
    for message, communicator in expected.items():
        with pytest.raises(CheckpointError, match=message):
            checkpoint.load(folder, communicator=communicator)


def test_what_is_missing_or_differs_is_named(tmp_path: Path) -> None:
    run_ranks(2, _save_rows, str(tmp_path), ["chunk-EF"])
    folder = tmp_path / "chunk-EF"
    text = (
        r"expected compressor=ChunkTopK\(k=4, chunk=256.*\) as configured now, got compressor=ChunkTopK\(k=8, chunk=256"
    )
    run_ranks(2, _load_expecting, str(folder), text, 4)
    run_ranks(2, _load_other_families, str(folder))

    of_rank_1 = sorted(file.name for file in folder.iterdir() if file.name.startswith("__1_"))
    assert of_rank_1, "every rank writes its own file"
    cut = tmp_path / "cut"
    shutil.copytree(folder, cut)
    (cut / of_rank_1[0]).unlink()
    for world_size in (1, 2):
        run_ranks(world_size, _load_expecting, str(cut), rf"missing {re.escape(of_rank_1[0])}", 8)

    unfinished = tmp_path / "unfinished"
    shutil.copytree(folder, unfinished)
    (unfinished / ".metadata").unlink()
    run_ranks(2, _load_expecting, str(unfinished), r"expected a finished checkpoint in .*unfinished", 8)
