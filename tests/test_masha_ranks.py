"""MASHA1 and MASHA2 between real processes: equal to simulated workers, both ways, with failures and restarts."""

import copy
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_masha
import torch
import torch.distributed as dist
import toy
from ranks import RankError, run_ranks
from reference import masha as reference
from test_masha import ALL, START, TOP, TOP_K, Saddle, groups, players, point
from torch import Tensor, nn
from torch.nn import functional as F

from gradwire.comm import Simulated, TwoPhase, checkpoint, keep_local
from gradwire.compression import BlockQuantize, ChunkTopK, Identity, RandomK
from gradwire.optim import MASHA1, MASHA2
from gradwire.optim.masha import MASHA

pytestmark = pytest.mark.slow

QUANTIZED = BlockQuantize(bits=4, block=8, stochastic=True)
METHODS: dict[str, Any] = {
    "random-k": partial(MASHA1, compressor=RandomK(k=2, chunk=8)),
    "quantized": partial(MASHA1, compressor=QUANTIZED),
    "participants": partial(MASHA1, compressor=QUANTIZED, participants=1),
    "top-k": partial(MASHA2, compressor=TOP),
    "top-k-full-batch": partial(MASHA2, compressor=TOP, full_batch=True),
}
STEPS = 40


def _made(name: str, **options: Any) -> tuple[MASHA, nn.Parameter, nn.Parameter]:
    x, y = players()
    return METHODS[name](groups(x, y), 0.1, plan=ALL, **options), x, y


def _run(optimizer: MASHA, x: Tensor, y: Tensor, first: int, last: int, problem: Saddle) -> None:
    rank = dist.get_rank()
    for step in range(first, last):
        optimizer.step(lambda step=step: problem.losses(x, y, step)[rank])


def _problem(name: str) -> Saddle:
    return Saddle(workers=2, noise=0.0 if "full" in name else 0.2)


def _ends() -> dict[str, tuple[Any, int]]:
    ends = {}
    for name in METHODS:
        optimizer, x, y = _made(name)
        _run(optimizer, x, y, 0, STEPS, _problem(name))
        ends[name] = point(x, y), optimizer.communicator.stats.payload_bytes
    return ends


def test_ranks_equal_simulated_workers() -> None:
    first, second = run_ranks(2, _ends)
    for name in METHODS:
        np.testing.assert_array_equal(first[name][0], second[name][0])
        optimizer, x, y = _made(name, exchange=Simulated(2))
        test_masha.run(optimizer, x, y, _problem(name), STEPS)
        np.testing.assert_allclose(first[name][0], point(x, y), rtol=1e-9, atol=1e-11)
        assert not np.allclose(point(x, y), START, atol=0.1)


def _bytes() -> list[int]:
    x, y = players()
    optimizer = MASHA1(groups(x, y), 0.1, compressor=RandomK(k=2, chunk=8), plan=ALL)
    found = []
    for _ in range(STEPS):
        before = optimizer.communicator.stats.payload_bytes
        optimizer.step(lambda: x @ y)
        found.append(optimizer.communicator.stats.payload_bytes - before)
    return found


def test_bytes_include_the_dense_ones() -> None:
    found, other = run_ranks(2, _bytes)
    assert found == other
    moved = [True] + [reference.coin(0, step, 0.75) for step in range(1, STEPS)]
    compressed = min(found)
    assert 32 * 8 / 4 <= compressed < 32 * 8 / 4 + 64
    dense = found[0] - compressed
    assert dense >= 32 * 8
    assert found == [compressed + dense if move else compressed for move in moved]


# Compressed both ways.


def _both_ways(steps: int) -> list[tuple[Any, Any]]:
    problem = Saddle(workers=2, mu=0.3)
    results = []
    second = ChunkTopK(k=3, chunk=8)
    for cls, options in (
        (MASHA2, {"compressor": TOP, "second": second}),
        (MASHA2, {"compressor": TOP, "exchange": TwoPhase(second=second)}),
        (MASHA1, {"compressor": QUANTIZED, "second": QUANTIZED}),
        (MASHA1, {"compressor": QUANTIZED, "second": Identity(width=8)}),
    ):
        x, y = players()
        optimizer = cls(groups(x, y), 0.1, plan=ALL, **options)
        _run(optimizer, x, y, 0, steps, problem)
        results.append((point(x, y), optimizer.communicator.stats.bytes_sent))
    return results


def test_compresses_both_ways() -> None:
    """The server's compressor and residual are those of the published algorithm, and unbiased ones are unbiased."""
    steps = 300
    ranks = run_ranks(2, _both_ways, steps)
    for own, other in zip(*ranks, strict=True):
        np.testing.assert_array_equal(own[0], other[0])
    (residual, _), (given, _), (unbiased, bytes_sent), (_, more_bytes) = ranks[0]
    problem = Saddle(workers=2, mu=0.3)
    moves = [reference.coin(0, step, 0.75) for step in range(1, steps + 1)]
    top_3 = test_masha.per_player(lambda rows: test_masha.sparsifiers.top_k(rows, k=3))
    expected = reference.masha2(START, problem.operator, problem.operator, 0.1, 0.75, moves, TOP_K, top_3)
    np.testing.assert_allclose(residual, expected[-1], rtol=1e-8, atol=1e-10)
    np.testing.assert_array_equal(residual, given)
    assert np.abs(residual - problem.solution()).max() < 0.05
    assert np.abs(unbiased - problem.solution()).max() < 0.05
    assert bytes_sent < more_bytes


# Failures and restarts.


def _one_is_not_finite(name: str) -> tuple[Any, ...]:
    problem = Saddle(workers=2, mu=0.5)
    optimizer, x, y = _made(name)
    rank, ends = dist.get_rank(), []
    for step in range(60):
        before = point(x, y)
        factor = torch.inf if step in (0, 5, 20) and rank == 1 else 1.0
        optimizer.step(lambda factor=factor: problem.losses(x, y, None)[rank] * factor)
        if step in (0, 5, 20):
            ends.append(bool(np.array_equal(point(x, y), before)))
    return *ends, optimizer.communicator.stats.skipped, point(x, y)


@pytest.mark.parametrize("name", METHODS)
def test_all_ranks_skip_what_is_not_finite_on_one(name: str) -> None:
    first, second = run_ranks(2, _one_is_not_finite, name)
    assert first[:4] == second[:4] == (True, True, True, 3)
    np.testing.assert_array_equal(first[4], second[4])
    solution = Saddle(workers=2, mu=0.5).solution()
    assert np.abs(first[4] - solution).max() < 0.3 * np.abs(START - solution).max()


class _Game(nn.Module):
    """Both players in one module, for checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        self.x, self.y = players()


def _restarted(name: str, folder: str) -> list[bool]:
    problem, equal = _problem(name), []
    whole = _Game()
    optimizer = METHODS[name](groups(whole.x, whole.y), 0.1, plan=ALL)
    _run(optimizer, whole.x, whole.y, 0, 23, problem)
    state, weights = copy.deepcopy((optimizer.state_dict(), whole.state_dict()))
    checkpoint.save(folder, model=whole, optimizer=optimizer)
    _run(optimizer, whole.x, whole.y, 23, STEPS, problem)
    for way in ("state_dict", "checkpoint"):
        game = _Game()
        resumed = METHODS[name](groups(game.x, game.y), 0.1, plan=ALL)
        if way == "state_dict":
            game.load_state_dict(weights)
            resumed.load_state_dict(state)
        else:
            checkpoint.load(folder, model=game, optimizer=resumed)
        _run(resumed, game.x, game.y, 23, STEPS, problem)
        equal.append(bool(np.array_equal(point(game.x, game.y), point(whole.x, whole.y))))
        equal.append(toy.state_digest(resumed.communicator) == toy.state_digest(optimizer.communicator))
    return equal


@pytest.mark.parametrize("name", ["random-k", "top-k", "top-k-full-batch"])
def test_resumes_bit_for_bit(name: str, tmp_path: Path) -> None:
    assert run_ranks(2, _restarted, name, str(tmp_path)) == [[True] * 4] * 2


def _different(option: str) -> None:
    values = {"tau": (0.5, 0.75), "full_batch": (False, True), "seed": (0, 1)}[option]
    x = nn.Parameter(torch.ones(8))
    optimizer = MASHA1([x], 0.1, **{option: values[dist.get_rank()]})
    optimizer.step(lambda: x.square().sum())


@pytest.mark.parametrize("option", ["tau", "full_batch", "seed"])
def test_ranks_with_different_settings_say_so(option: str) -> None:
    with pytest.raises(RankError, match=rf"rank 0 error:[\s\S]*ranks differ[\s\S]*rank 1 error:[\s\S]*{option}"):
        run_ranks(2, _different, option)


# Adversarial training.


def _images(rank: int) -> tuple[Tensor, Tensor]:
    """Two classes: four strong features, and sixty weak ones that a small shift turns around."""
    generator = torch.Generator().manual_seed(rank)
    labels = (torch.rand(200, generator=generator) < 0.5).double() * 2 - 1
    x = torch.randn(200, 64, generator=generator, dtype=torch.float64)
    x[:, :4] += 1.0 * labels[:, None]
    x[:, 4:] += 0.25 * labels[:, None]
    return x, labels


EPS = 0.4


def _worst(weight: Tensor, bias: Tensor, x: Tensor, labels: Tensor) -> float:
    """Loss under the worst shift of each class with entries of at most EPS; of a linear model it is known."""
    margins = labels * (x @ weight + bias) - EPS * weight.abs().sum()
    return F.softplus(-margins).mean().item()


def _into_the_box(shifts: Tensor, lr: float) -> None:
    shifts.clamp_(-EPS, EPS)


def _adversarial(host: str) -> tuple[float, float, float, Any]:
    x, labels = _images(dist.get_rank())
    results = []
    for attacked in (False, True):
        model = nn.Linear(64, 1).double()
        nn.init.zeros_(model.weight)
        nn.init.zeros_(model.bias)
        module = model
        if host == "ddp":
            module = toy.ddp(model)
            keep_local(module)
        shifts = nn.Parameter(torch.zeros(2, 64, dtype=torch.float64))  # one for each class, shared by all ranks
        adversary = {"params": [("shifts", shifts)], "maximize": True, "lr": 2.0, "prox": _into_the_box}
        optimizer = MASHA1([{"params": model.named_parameters()}, adversary], 0.2, compressor=QUANTIZED, plan=ALL)

        def loss(rows: slice, attacked: bool = attacked, module: Any = module, shifts: Tensor = shifts) -> Tensor:
            moved = x[rows] + shifts[(labels[rows] > 0).long()] * attacked
            value = F.softplus(-labels[rows] * module(moved)[:, 0]).mean()
            value.backward()
            return value

        for step in range(150):
            rows = slice(50 * (step % 4), 50 * (step % 4) + 50)
            optimizer.step(partial(loss, rows), full_closure=partial(loss, slice(None)))
        results.append(_worst(model.weight[0].detach(), model.bias.detach(), *_images(99)))
    ends = [p.detach().numpy() for p in (*model.parameters(), shifts)]
    return results[0], results[1], shifts.abs().max().item(), ends


@pytest.mark.parametrize("host", ["loop", "ddp"])
def test_adversarial_training_on_two_ranks(host: str) -> None:
    """Against shifts that ranks share, by mini-batches; on data that no rank has, and unlike plain training, robust."""
    first, second = run_ranks(2, _adversarial, host)
    plain, robust, largest, ends = first
    assert math.log(2) < plain  # worse than a guess
    assert robust < 0.8 * math.log(2)
    assert 0.99 * EPS < largest <= EPS
    assert all(np.array_equal(a, b) for a, b in zip(ends, second[3], strict=True))
