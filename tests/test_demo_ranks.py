"""`DeMo` between real processes: the published algorithm with n workers, hosts, failures and restarts."""

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import toy
from cases import EXCHANGING
from ranks import RankError, collect, run_ranks, start_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from gradwire.comm import CheckpointError, Plan, checkpoint, keep_local
from gradwire.optim import DeMo

pytestmark = pytest.mark.slow

ALL = Plan(min_ndim=0, min_numel=0)
FORMS = ["2024", "2026", "overlapped"]
SHAPES = [(16, 32), (64,), (8, 4, 2, 2)]  # powers of two: waves of other lengths have zeros, whose sign is rounding
STEPS = 15
every_form = pytest.mark.parametrize("form", FORMS)


def _start(i: int) -> Tensor:
    return torch.randn(SHAPES[i], generator=torch.Generator().manual_seed(i), dtype=torch.float64)


def _gradient(i: int, step: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * i + 10 * step + rank)
    return torch.randn(SHAPES[i], generator=generator, dtype=torch.float64)


def _train_cases() -> list[list[np.ndarray]]:
    """Weights after all steps, of every case."""
    results = []
    for case in EXCHANGING:
        params = [nn.Parameter(_start(i)) for i in range(len(SHAPES))]
        optimizer = DeMo(params, lr=1e-2, **case.kwargs)
        for step in range(STEPS):
            for i, p in enumerate(params):
                p.grad = _gradient(i, step, dist.get_rank())
            optimizer.step()
        results.append([p.detach().numpy() for p in params])
    return results


@pytest.mark.parametrize("n", [1, 2, 4])
def test_equals_the_published_algorithm(n: int) -> None:
    ranks = run_ranks(n, _train_cases)
    for number, case in enumerate(EXCHANGING):
        for i in range(len(SHAPES)):
            grads = [np.stack([_gradient(i, step, rank).numpy() for rank in range(n)]) for step in range(STEPS)]
            expected = case.reference(_start(i).numpy(), grads, [1e-2] * STEPS, **case.kwargs)
            np.testing.assert_allclose(ranks[0][number][i], expected, rtol=1e-10, atol=1e-12)
            assert all(np.array_equal(ranks[0][number][i], other[number][i]) for other in ranks)


# Hosts.


class _Training:
    """The toy model on one host, with DeMo."""

    def __init__(self, form: str, host: str = "loop", seed: int = 0, **options: Any) -> None:
        self.model = toy.model(seed)
        self.host = toy.ddp(self.model) if host == "ddp" else self.model
        if host == "ddp":
            keep_local(self.host)
        named = self.model.named_parameters()
        self.optimizer = DeMo(named, lr=3e-3, form=form, k=256, bucket_mb=0.01, **options)

    def run(self, first: int, last: int, micro_batches: int = 1) -> None:
        for step in range(first, last):
            self.optimizer.zero_grad()
            for i in range(micro_batches):
                (toy.loss(self.host, micro_batches * step + i) / micro_batches).backward()
            self.optimizer.step()
        self.optimizer.synchronize()

    def result(self) -> tuple[str, str, float]:
        loss = toy.evaluate(self.model)
        return toy.digest(self.model.parameters()), toy.state_digest(self.optimizer.communicator), loss


def _hosts(form: str, micro_batches: int) -> list[tuple[str, str, float]]:
    results = []
    for host in ("loop", "ddp"):
        training = _Training(form, host)
        training.run(0, 50, micro_batches)
        results.append(training.result())
    return results


@every_form
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_plain_loop_and_ddp_are_equal_and_learn(form: str, micro_batches: int) -> None:
    """Under DDP with accumulation nothing is said of `no_sync`, and nothing needs to be."""
    ranks = run_ranks(2, _hosts, form, micro_batches)
    before = toy.evaluate(toy.model())
    for loop, ddp in ranks:
        assert loop == ddp
        assert loop[2] < 0.5 * before
    assert ranks[0][0][0] == ranks[1][0][0]  # weights
    assert ranks[0][0][1] != ranks[1][0][1]  # momenta: every rank has its own


def _bytes(values: str) -> tuple[int, int, int]:
    model = nn.Sequential(*(nn.Linear(128, 128) for _ in range(4)))
    optimizer = DeMo(model.named_parameters(), k=32, values=values)
    model(torch.randn(4, 128)).sum().backward()
    optimizer.step()
    stats = optimizer.communicator.stats
    return stats.payload_bytes, stats.uncompressed_bytes, len(optimizer._gradients.buckets)


@pytest.mark.parametrize(("values", "per_coefficient"), [("bf16", 3.5), ("sign", 1.625)])
def test_bytes_counted_are_those_of_the_table(values: str, per_coefficient: float) -> None:
    ((payload, dense, buckets), other) = run_ranks(2, _bytes, values)
    assert (payload, dense, buckets) == other
    coefficients = 4 * 4 * 32  # matrices, tiles of each, k
    assert dense == 4 * 128 * 4  # the biases, in float32
    overhead = payload - dense - coefficients * per_coefficient
    assert 0 <= overhead <= 48  # the flag, and alignment to 16 bytes of at most two parts
    assert buckets == 2  # what is compressed and what is dense: one collective each


def _shards(form: str) -> tuple[bool, float, bool]:
    """2 x 2: sharded inside, exchanged across, against whole replicas that see the mean of each pair's batches."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    replica, _ = divmod(dist.get_rank(), 2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32)).double()
    whole = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32)).double()
    whole.load_state_dict(model.state_dict())
    for module in (model[0], model[2], model):
        fully_shard(module, mesh=mesh["shard"])
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    options: dict[str, Any] = {"lr": 1e-2, "form": form, "k": 16, "chunk": 16, "plan": Plan(min_numel=0)}
    ours = DeMo(model.named_parameters(), group=mesh["replicate"].get_group(), **options)
    theirs = DeMo(whole.named_parameters(), group=groups[dist.get_rank() % 2], **options)
    for step in range(6):
        batches = [
            torch.randn(8, 32, generator=torch.Generator().manual_seed(100 * step + r)).double() for r in range(4)
        ]
        ours.zero_grad()
        theirs.zero_grad()
        model(batches[dist.get_rank()]).square().mean().backward()
        for r in (2 * replica, 2 * replica + 1):
            (whole(batches[r]).square().mean() / 2).backward()
        ours.step()
        theirs.step()
        ours.synchronize()
        theirs.synchronize()
    full = [p.full_tensor() for p in model.parameters()]
    close = all(torch.allclose(a, b, rtol=0, atol=1e-9) for a, b in zip(full, whole.parameters(), strict=True))
    rows = ours.communicator.state_rows()
    held = sum(row.numel() for row in rows.values()) / sum(p.numel() for p in whole.parameters() if p.ndim > 1)
    return close, held, all(isinstance(p, DTensor) for p in model.parameters())


@every_form
def test_shards_are_exchanged_with_their_peers(form: str) -> None:
    for close, held, sharded in run_ranks(4, _shards, form):
        assert close
        assert held == 0.5  # of the momentum's memory, with two shards
        assert sharded


def _refuses_shards(case: str) -> str:
    shape = (2, 1) if case == "replicated" else (2,)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[: len(shape)])
    model = fully_shard(nn.Linear(32, 32), mesh=mesh)
    group = None if case == "group" else dist.group.WORLD
    base = "orthogonalized" if case == "whole" else "sign"
    optimizer = DeMo(model.parameters(), group=group, base=base)
    model(torch.randn(2, 32)).sum().backward()
    try:
        optimizer.step()
    except ValueError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("group", "DeMo: expected the group across which sharded parameters are replicated, got group=None. Give"),
        ("replicated", "DeMo: expected parameters that are only sharded, got placements"),
        ("whole", "DeMo: expected base='sign' or 'identity' on shards, got base='orthogonalized'"),
    ],
)
def test_refuses_shards_that_it_cannot_exchange(case: str, message: str) -> None:
    assert all(said.startswith(message) for said in run_ranks(2, _refuses_shards, case))


# Failures.


def _bad_gradient(form: str) -> tuple[list[str], int, int]:
    training = _Training(form)
    digests = []
    for step in range(5):
        training.optimizer.zero_grad()
        toy.loss(training.model, step).backward()
        if step == 2 and dist.get_rank() == 1:
            next(training.model.parameters()).grad[0, 0] = torch.nan
        training.optimizer.step()
        training.optimizer.synchronize()
        digests.append(toy.digest(training.model.parameters()))
    stats = training.optimizer.communicator.stats
    return digests, stats.steps, stats.skipped


@every_form
def test_inf_on_one_rank_skips_the_step_on_all(form: str) -> None:
    ranks = run_ranks(2, _bad_gradient, form)
    assert toy.all_equal(ranks)
    digests, steps, skipped = ranks[0]
    assert digests[1] == digests[2] != digests[3]
    assert (steps, skipped) == (5, 1)


def _unused_on_one_rank(form: str) -> str:
    training = _Training(form)
    for step in range(4):
        training.optimizer.zero_grad()
        toy.loss(training.model, step).backward()
        if dist.get_rank() == 1:
            for p in list(training.model.parameters())[step:]:
                p.grad = None
        training.optimizer.step()
    training.optimizer.synchronize()
    return toy.digest(training.model.parameters())


@every_form
def test_parameters_unused_on_one_rank_take_part(form: str) -> None:
    assert toy.all_equal(run_ranks(3, _unused_on_one_rank, form))


def _configured_differently() -> None:
    _Training("2024", momentum=0.9 if dist.get_rank() else 0.8).run(0, 1)


def test_ranks_configured_differently_are_told() -> None:
    with pytest.raises(RankError, match=r"ranks differ in feedback: rank 0 has DecoupledMomentum\(decay=0\.8"):
        run_ranks(2, _configured_differently)


# Restarts.


def _saved_by_rank(folder: str, form: str) -> tuple[Any, Any]:
    training = _Training(form)
    training.run(0, 4)
    path = Path(folder) / f"rank{dist.get_rank()}.pt"
    torch.save({"model": training.model.state_dict(), "optimizer": training.optimizer.state_dict()}, path)
    training.run(4, 8)
    resumed = _Training(form, seed=1)
    saved = torch.load(path, weights_only=True)
    resumed.model.load_state_dict(saved["model"])
    resumed.optimizer.load_state_dict(saved["optimizer"])
    resumed.run(4, 8)
    return training.result(), resumed.result()


@every_form
def test_resume_is_exact(form: str, tmp_path: Path) -> None:
    for uninterrupted, resumed in run_ranks(2, _saved_by_rank, str(tmp_path), form):
        assert uninterrupted == resumed


def _through_checkpoint(folder: str, form: str, first: int, save: bool) -> tuple[Any, dict[str, np.ndarray], int]:
    training = _Training(form, seed=first)
    objects = {"model": training.model, "optimizer": training.optimizer}
    if first:
        checkpoint.load(folder, **objects)
    rows = {key: value.numpy().copy() for key, value in training.optimizer.communicator.state_rows().items()}
    training.run(first, first + 4)
    if save:
        checkpoint.save(folder, **objects)
        rows = {key: value.numpy().copy() for key, value in training.optimizer.communicator.state_rows().items()}
        training.run(first + 4, first + 8)
    return training.result(), rows, training.optimizer.communicator.stats.steps


@every_form
def test_a_checkpoint_carries_the_momenta_also_to_another_world_size(form: str, tmp_path: Path) -> None:
    folder = str(tmp_path / "checkpoint")
    before = run_ranks(2, _through_checkpoint, folder, form, 0, True)
    after = run_ranks(2, _through_checkpoint, folder, form, 4, False)
    assert [result for result, _, _ in before] == [result for result, _, _ in after]
    wider = run_ranks(3, _through_checkpoint, folder, form, 4, False)
    assert len({result[0] for result, _, _ in wider}) == 1
    assert all(steps == 8 for _, _, steps in wider)
    for key in before[0][1]:
        mean = (before[0][1][key] + before[1][1][key]) / 2
        for _, rows, _ in wider:
            np.testing.assert_allclose(rows[key], mean, rtol=1e-6, atol=1e-8)


def _until_killed(folder: str, form: str) -> None:
    training = _Training(form)
    training.run(0, 4)
    checkpoint.save(folder, model=training.model, optimizer=training.optimizer)
    training.run(4, 6)
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    training.run(6, 8)


@pytest.mark.parametrize("form", ["2024", "overlapped"])
def test_killed_and_resumed_is_uninterrupted(form: str, tmp_path: Path) -> None:
    killed, other = str(tmp_path / "killed"), str(tmp_path / "other")
    outcomes = collect(start_ranks(2, _until_killed, killed, form))
    assert outcomes[0][0] == "error"
    assert outcomes[1][0] == "died"
    resumed = run_ranks(2, _through_checkpoint, killed, form, 4, False)
    uninterrupted = run_ranks(2, _through_checkpoint, other, form, 0, True)
    assert [result for result, _, _ in resumed] == [result for result, _, _ in uninterrupted]


def _loads_another_ranks_state(folder: str) -> str:
    training = _Training("2024")
    training.run(0, 2)
    path = Path(folder) / f"rank{dist.get_rank()}.pt"
    torch.save(training.optimizer.state_dict(), path)
    dist.barrier()
    try:
        training.optimizer.load_state_dict(torch.load(Path(folder) / "rank0.pt", weights_only=True))
    except CheckpointError as error:
        return str(error)
    return "loaded"


def test_the_state_of_another_rank_is_refused(tmp_path: Path) -> None:
    first, second = run_ranks(2, _loads_another_ranks_state, str(tmp_path))
    assert first == "loaded"
    assert second == "load_state_dict: expected the state of rank 1, got that of another rank."
