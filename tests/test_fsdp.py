"""`attach` on FSDP2: shards inside, averaging across, on 2 shards x 2 replicas."""

from pathlib import Path
from typing import Any

import hsdp
import numpy as np
import pytest
import torch
import torch.distributed as dist
import toy
from cases import OPTIMIZERS
from optimizing import make
from ranks import run_ranks
from torch.distributed.fsdp import MixedPrecisionPolicy

from gradwire.comm import CheckpointError, checkpoint
from gradwire.optim import DeMo

FIRST_OF_CLASS = list({case.cls: case for case in reversed(OPTIMIZERS)}.values())


# Lossless.


def _lossless(dtype: torch.dtype, policy: MixedPrecisionPolicy) -> tuple[list[np.ndarray], dict[str, list[np.ndarray]]]:
    """Weights after ten steps of native HSDP, and of each lossless communicator."""
    mesh, results = hsdp.mesh(), {}
    for name in (None, "dense", "dense-two-phase"):
        model = hsdp.shard(toy.model(dtype=dtype), mesh if name is None else mesh["shard"], mp_policy=policy)
        if name is not None:
            hsdp.attached(model, mesh, hsdp.MAKERS[name])
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        hsdp.train(model, optimizer, 0, 10)
        results[name or ""] = [p.detach().numpy() for p in hsdp.whole(model)]
    return results.pop(""), results


def test_lossless_equals_native_hsdp_and_one_process() -> None:
    one = toy.model(dtype=torch.float64)
    optimizer = torch.optim.AdamW(one.parameters(), lr=3e-3)
    for step in range(10):
        optimizer.zero_grad()
        (sum(toy.loss(one, step, rank) for rank in range(4)) / 4).backward()  # type: ignore[union-attr]
        optimizer.step()
    for native, ours in run_ranks(4, _lossless, torch.float64, MixedPrecisionPolicy()):
        for weights in (native, *ours.values()):
            for w, expected in zip(weights, one.parameters(), strict=True):
                np.testing.assert_allclose(w, expected.detach().numpy(), rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_lossless_equals_native_hsdp_in_float32_and_mixed_precision() -> None:
    for policy in (
        MixedPrecisionPolicy(),
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
    ):
        for native, ours in run_ranks(4, _lossless, torch.float32, policy):
            for weights in ours.values():
                for w, expected in zip(weights, native, strict=True):
                    np.testing.assert_allclose(w, expected, rtol=0, atol=3e-5)


# Compressed.


def _compressed(names: list[str]) -> dict[str, tuple[str, str, float, float, float, int]]:
    results = {}
    for name in names:
        mesh = hsdp.mesh()
        model = hsdp.shard(toy.model(), mesh["shard"])
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        communicator = hsdp.attached(model, mesh, hsdp.MAKERS[name], optimizer=optimizer)
        before = toy.evaluate(model)
        hsdp.train(model, optimizer, 0, 30)
        kept = sum(rows.numel() for rows in communicator.state_rows().values())
        results[name] = (
            toy.digest(p.to_local() for p in model.parameters()),
            toy.digest(hsdp.whole(model)),
            before,
            toy.evaluate(model),
            communicator.stats.compression_rate,
            kept,
        )
    return results


@pytest.mark.slow
def test_compressed_trains_and_replicas_stay_equal_to_the_bit() -> None:
    names = ["chunk-EF21", "int8-two-phase", "int8-EF-two-phase", "powersgd", "warmup"]
    ranks = run_ranks(4, _compressed, names, timeout_s=100)
    for name in names:
        shards = [result[name][0] for result in ranks]
        assert shards[:2] == shards[2:]
        assert shards[0] != shards[1]
        assert toy.all_equal(result[name][1] for result in ranks)
        _, _, before, after, rate, _ = ranks[0][name]
        assert after < 0.7 * before, name
        assert rate > 2, name
    whole = sum(p.numel() for p in toy.model().parameters() if p.ndim > 1)
    kept = ranks[0]["chunk-EF21"][5] + ranks[1]["chunk-EF21"][5]
    assert 2 * whole <= kept <= 2 * whole + 6 * 2 * 256, "EF21 keeps two numbers an entry, and each shard its own"


# Optimizers.


def _optimizers(numbers: list[int]) -> dict[str, tuple[float, float, str]]:
    results = {}
    for case in (FIRST_OF_CLASS[number] for number in numbers):
        mesh = hsdp.mesh()
        model = hsdp.shard(toy.model(), mesh["shard"])
        optimizer = make(case, model.parameters(), lr=3e-3)
        hsdp.attached(model, mesh, hsdp.MAKERS["chunk-EF21"], optimizer=optimizer)
        before = toy.evaluate(model)
        hsdp.train(model, optimizer, 0, 12)
        results[case.cls.__name__] = before, toy.evaluate(model), toy.digest(hsdp.whole(model))
    return results


@pytest.mark.slow
def test_optimizers_train_on_it() -> None:
    ranks = run_ranks(4, _optimizers, list(range(len(FIRST_OF_CLASS))), timeout_s=100)
    for name, (before, after, _) in ranks[0].items():
        assert after < before, name
        assert toy.all_equal(result[name][2] for result in ranks), name


# Non-finite gradients.


def _non_finite(scaled: bool, accumulated: bool) -> list[tuple[str, str, int]]:
    """Rank 3 meets an inf in step 2: in the last of two backward passes, or in the first."""
    mesh = hsdp.mesh()
    model = hsdp.shard(toy.model(), mesh["shard"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if scaled else None
    communicator = hsdp.attached(model, mesh, hsdp.MAKERS["chunk-EF21"], optimizer=optimizer, scaler=scaler)
    seen = []
    for step in range(5):
        optimizer.zero_grad()
        for part in range(2 if accumulated else 1):
            loss = toy.loss(model, 2 * step + part)
            if step == 2 and part == 0 and dist.get_rank() == 3:
                loss = loss * torch.inf
            (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        seen.append((toy.digest(hsdp.whole(model)), toy.state_digest(communicator), communicator.stats.skipped))
    if scaler is not None:
        assert scaler.get_scale() == 2.0**9
    return seen


@pytest.mark.parametrize(("scaled", "accumulated"), [(False, False), (True, False), (False, True), (True, True)])
def test_inf_on_one_rank_skips_everywhere(scaled: bool, accumulated: bool) -> None:
    ranks = run_ranks(4, _non_finite, scaled, accumulated)
    for seen in ranks:
        weights, states, skipped = zip(*seen, strict=True)
        assert skipped == (0, 0, 1, 1, 1)
        assert weights[2] == weights[1]
        assert len(set(weights)) == 4
        assert accumulated or states[2] == states[1]
    assert toy.all_equal([weights for weights, _, _ in seen] for seen in ranks)


# Checkpoints.


class _Training:
    def __init__(self, name: str, seed: int = 0, replicas: int = 2) -> None:
        mesh = hsdp.mesh(replicas)
        self.model = hsdp.shard(toy.model(seed), mesh["shard"])
        if name == "demo":  # it exchanges by itself
            group = mesh["replicate"].get_group()
            self.optimizer: Any = DeMo(self.model.named_parameters(), lr=3e-3, plan=hsdp.ALL, group=group)
            self.communicator: Any = self.optimizer.communicator
            return
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3)
        self.communicator = hsdp.attached(self.model, mesh, hsdp.MAKERS[name], optimizer=self.optimizer)

    def objects(self) -> dict[str, Any]:
        objects = {"model": self.model, "optimizer": self.optimizer}
        return objects if isinstance(self.optimizer, DeMo) else objects | {"communicator": self.communicator}

    def result(self) -> tuple[str, str, int]:
        return toy.digest(hsdp.whole(self.model)), toy.state_digest(self.communicator), self.communicator.stats.steps


_SAVED = ["chunk-EF21", "int8-EF-two-phase", "powersgd", "warmup", "demo"]


def _train_through(folder: str) -> dict[str, tuple[str, str, int]]:
    results = {}
    for name in _SAVED:
        training = _Training(name)
        hsdp.train(training.model, training.optimizer, 0, 3)
        checkpoint.save(f"{folder}/{name}", **training.objects())
        hsdp.train(training.model, training.optimizer, 3, 6)
        results[name] = training.result()
    return results


def _train_on(folder: str) -> dict[str, tuple[str, str, int]]:
    results = {}
    for name in _SAVED:
        training = _Training(name, seed=9)
        checkpoint.load(f"{folder}/{name}", **training.objects())
        hsdp.train(training.model, training.optimizer, 3, 6)
        results[name] = training.result()
    return results


@pytest.mark.slow
def test_resume_equals_the_uninterrupted_run_bit_for_bit(tmp_path: Path) -> None:
    through = run_ranks(4, _train_through, str(tmp_path), timeout_s=100)
    on = run_ranks(4, _train_on, str(tmp_path), timeout_s=100)
    for rank in range(4):
        assert on[rank] == through[rank]
    for name in _SAVED:  # a state that all ranks shared could be lost without notice
        assert len({result[name][1] for result in through}) == 4


def _load_mean(folder: str) -> tuple[dict[str, np.ndarray], bool]:
    """One replica in two shards, from two replicas in two shards; and its weights fall from there."""
    training = _Training("chunk-EF21", seed=9, replicas=1)
    checkpoint.load(f"{folder}/chunk-EF21", **training.objects())
    rows = {key: value.numpy().copy() for key, value in training.communicator.state_rows().items()}
    before = toy.evaluate(training.model)
    hsdp.train(training.model, training.optimizer, 3, 20)
    return rows, toy.evaluate(training.model) < before


def _save_rows(folder: str) -> dict[str, np.ndarray]:
    training = _Training("chunk-EF21")
    hsdp.train(training.model, training.optimizer, 0, 3)
    checkpoint.save(f"{folder}/chunk-EF21", **training.objects())
    return {key: value.numpy() for key, value in training.communicator.state_rows().items()}


def _load_into_other_shards(folder: str) -> str:
    training = _Training("chunk-EF21", replicas=2)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(f"{folder}/chunk-EF21", communicator=training.communicator)
    return str(caught.value)


@pytest.mark.slow
def test_fewer_replicas_start_from_the_mean_of_their_shard(tmp_path: Path) -> None:
    saved = run_ranks(4, _save_rows, str(tmp_path))
    for shard, (rows, falls) in enumerate(run_ranks(2, _load_mean, str(tmp_path))):
        assert falls
        assert rows
        for key, value in rows.items():
            mean = (saved[shard][key].astype(np.float64) + saved[shard + 2][key]) / 2
            np.testing.assert_allclose(value, mean, rtol=1e-6, atol=1e-9)
    for message in run_ranks(2, _load_into_other_shards, str(tmp_path)):
        assert "expected the state of 1 shards, got that of 2" in message
