"""`DiLoCo` and `LocalSGD` between real processes: the published algorithms, hosts, failures and restarts."""

import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import toy
from outer_loops import METHODS, Training, every_method
from ranks import collect, run_ranks, start_ranks
from reference import diloco as reference
from torch import nn

from gradwire.comm import EF, Communicator, LocalSGD, Plan
from gradwire.compression import BlockQuantize, Chain, ChunkTopK, Identity
from gradwire.optim import DiLoCo

pytestmark = pytest.mark.slow

ALL = Plan(min_ndim=0, min_numel=0)
SHAPES = [(16, 8), (48,), ()]
STEPS = 23
ADAMW = {"kind": "adamw", "lr": 0.05, "decay": 0.1}
every_count = pytest.mark.parametrize("n", [2, 4])


def _start(i: int) -> np.ndarray:
    return np.random.default_rng(i).standard_normal(SHAPES[i])


def _gradient(x: Any, step: int, rank: int) -> Any:
    """Of a quadratic of this rank's own, and a wave that changes with the step."""
    wave = np.cos(np.arange(x.size).reshape(x.shape) * (rank + 2) + step)
    return (rank + 1) / 2 * x - wave


def _sparse() -> Communicator:
    """SparseLoCo's."""
    chain = Chain(ChunkTopK(k=4, chunk=16), BlockQuantize(bits=2))
    return Communicator(chain, feedback=EF(decay=0.9), plan=ALL)


def _whole_runs(method: str, every: int) -> list[list[np.ndarray]]:
    """The last agreed point and this rank's own parameters, of every tensor."""
    params = [nn.Parameter(torch.from_numpy(_start(i).copy())) for i in range(len(SHAPES))]
    optimizer: Any = torch.optim.AdamW(params, lr=0.05, weight_decay=0.1)
    loop: Any = None
    if method == "local_sgd":
        loop = LocalSGD(optimizer, every=every)
    elif method == "diloco":
        optimizer = DiLoCo(optimizer, every=every)
    else:
        optimizer = DiLoCo(optimizer, torch.optim.SGD(params, lr=1.0), every=every, communicator=_sparse())
    for step in range(STEPS):
        for p in params:
            p.grad = torch.as_tensor(_gradient(p.detach().numpy(), step, dist.get_rank()))
        optimizer.step()
    own = [p.detach().numpy().copy() for p in params]
    with (loop or optimizer).returned():
        return [[p.detach().numpy().copy() for p in params], own]


@every_count
@pytest.mark.parametrize("every", [1, 5])
@pytest.mark.parametrize("method", ["diloco", "local_sgd", "sparseloco"])
def test_whole_runs_equal_the_reference(method: str, n: int, every: int) -> None:
    ranks = run_ranks(n, _whole_runs, method, every)
    rtol = 1e-5 if method == "sparseloco" else 1e-9  # scales travel in float32
    for i in range(len(SHAPES)):
        run: dict[str, Any] = {"workers": n, "steps": STEPS, "every": every, "inner": ADAMW}
        if method == "sparseloco":
            send = reference.ChunkTopKTernary(n, k=4, chunk=16, decay=0.9)
            run |= {"outer_lr": 1.0, "momentum": 0.0, "send": send}
        function = reference.local_sgd if method == "local_sgd" else reference.diloco
        agreed, *own = function(_start(i), _gradient, **run)
        for rank in range(n):
            np.testing.assert_allclose(ranks[rank][0][i], agreed, rtol=rtol, atol=rtol)
            np.testing.assert_allclose(ranks[rank][1][i], own[rank], rtol=rtol, atol=rtol)
            assert np.array_equal(ranks[rank][0][i], ranks[0][0][i])
        if every > 1:  # in the middle of a round
            assert not np.array_equal(ranks[0][1][i], ranks[1][1][i])


def _trains(method: str) -> list[Any]:
    results = []
    for host in ("loop", "ddp"):
        training = Training(method, host).run(0, 79, micro_batches=2)
        own = toy.digest(training.model.parameters())
        training.run(79, 80, micro_batches=2)
        results.append([own, training.result(), toy.evaluate(training.model)])
    stats = training.loop.communicator.stats
    return [*results, stats.steps, stats.bytes_sent / stats.dense_bytes]


@pytest.mark.parametrize(("method", "n"), [*((method, 2) for method in METHODS), ("diloco", 4), ("sparseloco", 4)])
def test_trains_alike_in_a_plain_loop_and_under_ddp(method: str, n: int) -> None:
    before = toy.evaluate(toy.model())
    ranks = run_ranks(n, _trains, method)
    for loop, ddp, steps, share in ranks:
        assert loop == ddp
        assert loop[2] < 0.5 * before
        assert steps == 20
        assert share < {"diloco": 1.03, "local_sgd": 1.03, "int8": 0.33, "sparseloco": 0.15 * n}[method]  # with flags
    assert len({loop[1][0] for loop, *_ in ranks}) == 1
    assert len({loop[0] for loop, *_ in ranks}) == n  # a step before, every rank had its own


def _data_parallel(method: str) -> float:
    """Rounds of one step with SGD inside, against the mean of all gradients."""
    model, plain = toy.model(dtype=torch.float64), toy.model(dtype=torch.float64)
    inner: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    if method == "diloco":
        communicator = Communicator(Identity(), feedback=EF())
        outer = torch.optim.SGD(model.parameters(), lr=1.0)
        inner = DiLoCo(inner, outer, every=1, communicator=communicator)
    else:
        LocalSGD(inner, every=1)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for step in range(20):
        inner.zero_grad()
        toy.loss(model, step).backward()
        inner.step()
        optimizer.zero_grad()
        sum(toy.loss(plain, step, rank) / dist.get_world_size() for rank in range(dist.get_world_size())).backward()
        optimizer.step()
    pairs = zip(model.parameters(), plain.parameters(), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


@every_count
@pytest.mark.parametrize("method", ["diloco", "local_sgd"])
def test_rounds_of_one_step_are_data_parallel_sgd(method: str, n: int) -> None:
    assert max(run_ranks(n, _data_parallel, method)) < 1e-13


def _bytes(every: int) -> tuple[int, int, float]:
    model = nn.Sequential(*(nn.Linear(128, 128) for _ in range(4)))
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    chain = Chain(ChunkTopK(k=64), BlockQuantize(bits=2))
    optimizer = DiLoCo(inner, every=every, communicator=Communicator(chain, feedback=EF(decay=0.95)))
    for _ in range(6):
        optimizer.zero_grad()
        model(torch.randn(4, 128)).square().sum().backward()
        optimizer.step()
    stats = optimizer.communicator.stats
    return stats.payload_bytes // stats.steps, stats.uncompressed_bytes // stats.steps, stats.steps


def test_bytes_are_counted_by_round() -> None:
    for every in (2, 3):
        for payload, dense, steps in run_ranks(2, _bytes, every):
            assert steps == 6 // every
            assert dense == 4 * 128 * 4  # the biases
            sent = 4 * 4 * (64 * 12 / 8 + 64 * 2 / 8 + 4)  # matrices, chunks: positions, levels and a scale
            assert 0 <= payload - dense - sent <= 48  # the flag, and alignment


# Starts, buffers, failures.


def _starts_apart(method: str) -> list[str]:
    training = Training(method, seed=dist.get_rank())
    before = toy.digest(training.model.parameters())
    training.run(0, 4)
    return [before, toy.digest(training.model.parameters())]


@pytest.mark.parametrize("method", ["diloco", "local_sgd"])
def test_all_ranks_start_where_rank_0_does(method: str) -> None:
    ranks = run_ranks(3, _starts_apart, method)
    assert len({before for before, _ in ranks}) == 3
    assert len({after for _, after in ranks}) == 1


def _buffers(method: str, averaged: bool, poison: bool) -> tuple[list[list[float]], list[float], int]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    inner: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    buffers = model.named_buffers() if averaged else ()
    if method == "diloco":
        inner = DiLoCo(inner, every=2, buffers=buffers)
    else:
        LocalSGD(inner, every=2, buffers=buffers)
    norm = model[1]
    seen = []
    for step in range(4):
        inner.zero_grad()
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
        model(x).square().sum().backward()
        if poison and step == 3 and dist.get_rank() == 1:
            norm.running_mean[0] = torch.nan
        seen.append(norm.running_mean.tolist())
        inner.step()
    return seen, norm.running_mean.tolist(), int(norm.num_batches_tracked)


@pytest.mark.parametrize("method", ["diloco", "local_sgd"])
def test_buffers_are_averaged_on_request(method: str) -> None:
    (seen, mean, count), (others, other, _) = run_ranks(2, _buffers, method, True, False)
    assert mean == other
    np.testing.assert_allclose(mean, (np.array(seen[3]) + np.array(others[3])) / 2, rtol=1e-6)
    assert count == 4  # integers stay
    (seen, mean, _), (others, other, _) = run_ranks(2, _buffers, method, False, False)
    assert (mean, other) == (seen[3], others[3])
    assert mean != other
    (seen, mean, _), (others, other, _) = run_ranks(2, _buffers, method, True, True)
    assert mean == other
    after_the_first_round = (np.array(seen[1]) + np.array(others[1])) / 2
    np.testing.assert_allclose(mean[0], after_the_first_round[0], rtol=1e-6)
    np.testing.assert_allclose(mean[1:], (np.array(seen[3]) + np.array(others[3]))[1:] / 2, rtol=1e-6)


def _bad_gradient(method: str) -> tuple[list[str], int, int]:
    training = Training(method)
    digests = []
    for step in range(16):
        training.optimizer.zero_grad()
        toy.loss(training.model, step).backward()
        if step == 5 and dist.get_rank() == 1:
            next(training.model.parameters()).grad[0, 0] = torch.nan
        training.optimizer.step()
        if step % 4 == 3:
            digests.append(toy.digest(training.model.parameters()))
    stats = training.loop.communicator.stats
    return digests, stats.steps, stats.skipped


@every_method
def test_nan_on_one_rank_costs_all_one_round(method: str) -> None:
    ranks = run_ranks(2, _bad_gradient, method)
    assert toy.all_equal(ranks)
    (first, second, third, fourth), steps, skipped = ranks[0]
    assert (steps, skipped) == (4, 1)
    assert first == second
    assert len({second, third, fourth}) == 3  # and none more


def _configured_differently(method: str) -> None:
    rank = dist.get_rank()
    training = Training("local_sgd" if method == "local_sgd" else "diloco", every=2 + rank if method != "outer" else 2)
    if method == "outer":
        training.optimizer.outer.param_groups[0]["lr"] = 0.7 + rank
    training.run(0, 1)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("diloco", "DiLoCo: ranks differ in every: rank 0 has 2, rank 1 has 3."),
        ("local_sgd", "LocalSGD: ranks differ in every: rank 0 has 2, rank 1 has 3."),
        ("outer", r"DiLoCo: ranks differ in outer: rank 0 has SGD \[\{'lr': 0.7, .*rank 1 has SGD \[\{'lr': 1.7"),
    ],
)
def test_ranks_configured_differently_are_told(method: str, message: str) -> None:
    for kind, said in collect(start_ranks(2, _configured_differently, method)):
        assert kind == "error"
        assert re.search(message, said)
