"""`attach` on FSDP2 without replicas: feedback that tracks gradients, whose mean each rank keeps for its shard."""

from pathlib import Path
from typing import Any

import hsdp
import numpy as np
import pytest
import torch
import torch.distributed as dist
import toy
from ranks import run_ranks
from scattering import EXCHANGE, PLAN, check_equal, flat, in_entries, weights_of
from torch import nn
from torch.distributed.fsdp import fully_shard

from gradwire.comm import (
    DIANA,
    EF21,
    EF21SGDM,
    EF21W,
    MARINA,
    AllGather,
    Communicator,
    EControl,
    ErrorFeedback,
    Exchange,
    NoFeedback,
    attach,
    checkpoint,
)
from gradwire.compression import QSGD, Compressor, DCTTopK, RandomK, ScaledSign

STEPS = 6
START = EF21(dense_start=True)
DCT = DCTTopK(k=16, chunk=16)


def _products() -> dict[str, tuple[Compressor, ErrorFeedback, int | None]]:
    """Compressor, feedback, participants."""
    smoothness = tuple(1.0 + rank for rank in range(dist.get_world_size()))
    return {
        "EF21": (hsdp.CHUNK, EF21(), None),
        "EF21, start": (hsdp.CHUNK, START, None),
        "EF21, basis": (DCT, EF21(), None),
        "EF21, basis, start": (DCT, START, None),
        "EF21, padding": (ScaledSign(), EF21(), None),
        "EF21-PP": (hsdp.CHUNK, START, 1),
        "EF21W": (ScaledSign(), EF21W(smoothness, dense_start=True), None),
        "EF21SGDM": (hsdp.CHUNK, EF21SGDM(eta=0.5, dense_start=True), None),
        "EControl": (hsdp.CHUNK, EControl(dense_start=True), None),
        "DIANA": (QSGD(levels=7), DIANA(), None),
        "DIANA, shared": (RandomK(k=64, chunk=256), DIANA(), None),
        "MARINA": (QSGD(levels=7), MARINA(probability=0.3), None),
        "none, some": (hsdp.CHUNK, NoFeedback(), 1),
    }


def _communicator(name: str, exchange: Exchange) -> Communicator:
    compressor, feedback, participants = _products()[name]
    return Communicator(compressor, feedback=feedback, exchange=exchange, plan=PLAN, participants=participants, seed=5)


def _sharded(communicator: Communicator, seed: int = 0) -> tuple[Any, torch.optim.Optimizer]:
    model = hsdp.shard(toy.model(seed, dtype=torch.float64), flat())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    attach(model, communicator, optimizer=optimizer)
    return model, optimizer


def _whole(communicator: Communicator) -> list[np.ndarray]:
    """The same training with whole parameters and the whole mean on every rank, of gradients cut like the shards."""
    model, size = toy.model(dtype=torch.float64), dist.get_world_size()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(STEPS):
        optimizer.zero_grad()
        toy.loss(model, step).backward()
        shards = {
            f"{name}[{owner}/{size}]": shard.clone()
            for name, p in model.named_parameters()
            if p.grad is not None
            for owner, shard in enumerate(p.grad.chunk(size))
        }
        communicator.average_(list(shards.values()), list(shards))
        for name, p in model.named_parameters():
            p.grad = torch.cat([shards[f"{name}[{owner}/{size}]"] for owner in range(len(p.chunk(size)))])
        optimizer.step()
    return [p.detach().numpy() for p in model.parameters()]


def _train() -> dict[str, tuple[list[np.ndarray], list[np.ndarray], list[dict[str, np.ndarray]], int, set[str]]]:
    results = {}
    for name in _products():
        communicator = _communicator(name, EXCHANGE)
        model, optimizer = _sharded(communicator)
        hsdp.train(model, optimizer, 0, STEPS)
        assert communicator.stats.skipped == 0
        state = [in_entries(communicator, model, state) for state in ("local", "mean")]
        owned = {key.partition("[")[2].partition("/")[0] for key in communicator.state_rows() if key[:4] == "mean"}
        whole = _whole(_communicator(name, AllGather()))
        results[name] = weights_of(model), whole, state, communicator.stats.uncompressed_bytes, owned
    return results


@pytest.mark.parametrize("world_size", [2, 4])
def test_equals_the_mean_on_every_rank(world_size: int) -> None:
    ranks = run_ranks(world_size, _train, timeout_s=100)
    for name, (weights, whole, _, uncompressed, _) in ranks[0].items():
        check_equal(weights, whole)
        for other in ranks[1:]:
            check_equal(other[name][0], weights, atol=0)
        if name in ("EF21, start", "EF21-PP"):  # the gradients of three matrices, and the padding of rows
            assert 1 < (uncompressed - ranks[0]["EF21"][3]) / (8 * 6709) < 1.3
    for rank, results in enumerate(ranks):
        assert all(owned == {str(rank)} for *_, owned in results.values() if owned)
    for name in ("EF21", "EF21, basis", "EF21, padding", "EF21-PP", "EF21SGDM", "EControl"):
        own = [result[name][2] for result in ranks]
        for parameter in own[0][1]:  # H is the mean of all h_i, in every shard
            tracked = np.mean([local[parameter] for local, _ in own], axis=0)
            assert np.abs(tracked).max() > 1e-4
            np.testing.assert_allclose(sum(mean[parameter] for _, mean in own), tracked, rtol=0, atol=1e-12)


def _falls() -> dict[str, tuple[str, float, float]]:
    results = {}
    for name in ("EF21", "EF21, basis", "EControl"):
        model, optimizer = _sharded(_communicator(name, EXCHANGE))
        before = toy.evaluate(model)
        hsdp.train(model, optimizer, 0, 30)
        results[name] = toy.digest(hsdp.whole(model)), before, toy.evaluate(model)
    return results


@pytest.mark.parametrize("world_size", [2, 4])
def test_trains(world_size: int) -> None:
    ranks = run_ranks(world_size, _falls)
    for name, (_, before, after) in ranks[0].items():
        assert toy.all_equal(result[name] for result in ranks), name
        assert after < 0.75 * before, name


# Checkpoints.


_SAVED = ["EF21", "EF21, basis, start", "EF21SGDM"]


class _Training:
    def __init__(self, name: str, seed: int = 0) -> None:
        self.communicator = _communicator(name, EXCHANGE)
        self.model, self.optimizer = _sharded(self.communicator, seed)

    def objects(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "communicator": self.communicator}

    def digests(self) -> tuple[str, str]:
        return toy.digest(hsdp.whole(self.model)), toy.state_digest(self.communicator)

    def tracked(self) -> list[dict[str, np.ndarray]]:
        return [in_entries(self.communicator, self.model, state) for state in ("local", "mean")]


def _save_and_resume(folder: str) -> dict[str, tuple[list[dict[str, np.ndarray]], bool]]:
    results = {}
    for name in _SAVED:
        through = _Training(name)
        hsdp.train(through.model, through.optimizer, 0, 3)
        checkpoint.save(f"{folder}/{name}", **through.objects())
        tracked = through.tracked()
        resumed = _Training(name, seed=9)
        checkpoint.load(f"{folder}/{name}", **resumed.objects())
        for training in (through, resumed):
            hsdp.train(training.model, training.optimizer, 3, 6)
        results[name] = tracked, through.digests() == resumed.digests()
    return results


def _load(folder: str) -> dict[str, tuple[list[dict[str, np.ndarray]], bool]]:
    results = {}
    for name in _SAVED:
        training = _Training(name, seed=9)
        checkpoint.load(f"{folder}/{name}", **training.objects())
        tracked, before = training.tracked(), toy.evaluate(training.model)
        hsdp.train(training.model, training.optimizer, 3, 15)
        results[name] = tracked, toy.evaluate(training.model) < before
    return results


@pytest.mark.parametrize(("old", "new"), [(4, 2), (2, 3)])
def test_resume_exactly_or_on_other_ranks_from_the_mean(old: int, new: int, tmp_path: Path) -> None:
    saved = run_ranks(old, _save_and_resume, str(tmp_path))
    loaded = run_ranks(new, _load, str(tmp_path))
    for name in _SAVED:
        assert all(result[name][1] for result in (*saved, *loaded)), name
        (before, after) = ([result[name][0] for result in ranks] for ranks in (saved, loaded))
        for parameter in before[0][1]:
            tracked = np.mean([local[parameter] for local, _ in before], axis=0)
            for local, _ in after:
                np.testing.assert_allclose(local[parameter], tracked, rtol=0, atol=1e-12)
            mean = sum(mean[parameter] for _, mean in after)
            np.testing.assert_allclose(mean, sum(mean[parameter] for _, mean in before), rtol=0, atol=1e-12)
            np.testing.assert_allclose(mean, tracked, rtol=0, atol=1e-12)


# Non-finite gradients.


def _non_finite(name: str, at: int) -> list[tuple[str, str, int]]:
    """Rank 1 meets an inf in the first row of a matrix, which belongs to rank 0."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = nn.Linear(64, 64, bias=False, dtype=torch.float64)
    x = torch.randn(8, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(dist.get_rank()))
    fully_shard(model, mesh=flat())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    communicator = _communicator(name, EXCHANGE)
    attach(model, communicator, optimizer=optimizer)
    seen = [(toy.digest(hsdp.whole(model)), toy.state_digest(communicator), 0)]
    for step in range(4):
        optimizer.zero_grad()
        y = model(x)
        loss = y.square().mean()
        (y[0, 0] * torch.inf if step == at and dist.get_rank() == 1 else loss).backward()
        optimizer.step()
        seen.append((toy.digest(hsdp.whole(model)), toy.state_digest(communicator), communicator.stats.skipped))
    return seen


@pytest.mark.parametrize(("name", "at"), [("EF21", 2), ("EF21, start", 0), ("EF21-PP", 2), ("MARINA", 0)])
def test_inf_on_one_rank_skips_everywhere(name: str, at: int) -> None:
    ranks = run_ranks(2, _non_finite, name, at)
    for seen in ranks:
        weights, states, skipped = zip(*seen, strict=True)
        assert skipped == tuple(int(step > at) for step in range(5))
        assert (weights[at + 1], states[at + 1]) == (weights[at], states[at])
        assert len(set(weights)) == len(set(states)) == 4
    assert toy.all_equal([weights for weights, _, _ in seen] for seen in ranks)
