"""1-bit optimizers between real processes: the published algorithms with n workers, hosts, failures and restarts."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import toy
from cases import ONE_BIT, OptimizerCase
from ranks import RankError, run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from gradwire.comm import CheckpointError, Plan, checkpoint, keep_local
from gradwire.compression import ScaledSign
from gradwire.optim import ZeroOneAdam

pytestmark = pytest.mark.slow

SHAPES = [(16, 32), (50,), (8, 4, 2, 2)]
STEPS = 16  # the last one is an exchange in every case
FIRST = list({case.cls: case for case in reversed(ONE_BIT)}.values())  # one case of each class
_LOCAL = next(i for i, case in enumerate(FIRST) if case.cls is ZeroOneAdam)
every_class = pytest.mark.parametrize("number", range(len(FIRST)), ids=[case.cls.__name__ for case in FIRST])


def _start(i: int) -> Tensor:
    return torch.randn(SHAPES[i], generator=torch.Generator().manual_seed(i), dtype=torch.float64)


def _gradient(i: int, step: int, rank: int) -> Tensor:
    same = torch.randn(SHAPES[i], generator=torch.Generator().manual_seed(i), dtype=torch.float64)
    noise = torch.randn(SHAPES[i], generator=torch.Generator().manual_seed(1000 * i + 10 * step + rank + 1))
    return same + noise.double()


def _make(case: OptimizerCase, params: Any, **options: Any) -> Any:
    return case.cls(params, **{"lr": 1e-2, **case.kwargs, **options})


def _settle(optimizer: Any) -> None:
    """End as all ranks do, where they may differ."""
    if isinstance(optimizer, ZeroOneAdam):
        optimizer.synchronize()


def _train_cases() -> list[list[np.ndarray]]:
    """Weights after all steps, of every case."""
    results = []
    for case in ONE_BIT:
        params = [nn.Parameter(_start(i)) for i in range(len(SHAPES))]
        optimizer = _make(case, params, bucket_mb=0.005)
        for step in range(STEPS):
            for i, p in enumerate(params):
                p.grad = _gradient(i, step, dist.get_rank())
            optimizer.step()
        results.append([p.detach().numpy() for p in params])
    return results


@pytest.mark.parametrize("n", [2, 3])
def test_equals_the_published_algorithm(n: int) -> None:
    ranks = run_ranks(n, _train_cases)
    for number, case in enumerate(ONE_BIT):
        for i in range(len(SHAPES)):
            grads = [np.stack([_gradient(i, step, rank).numpy() for rank in range(n)]) for step in range(STEPS)]
            expected = case.reference(_start(i).numpy(), grads, [1e-2] * STEPS, **case.kwargs)
            # Scales are float32: where a mean falls between two of them, either may be sent.
            np.testing.assert_allclose(ranks[0][number][i], expected, rtol=1e-6, atol=1e-7)
            assert all(np.array_equal(ranks[0][number][i], other[number][i]) for other in ranks)


# Hosts.


class _Training:
    """The toy model on one host."""

    def __init__(self, number: int, host: str = "loop", seed: int = 0, **options: Any) -> None:
        self.model = toy.model(seed)
        self.host = toy.ddp(self.model) if host == "ddp" else self.model
        if host == "ddp":
            keep_local(self.host)
        chosen = {"lr": 3e-3, "warmup_steps": 4, "compressor": ScaledSign(width=256), "plan": None, "bucket_mb": 0.01}
        self.optimizer = _make(FIRST[number], self.model.named_parameters(), **{**chosen, **options})

    def run(self, first: int, last: int, micro_batches: int = 1) -> None:
        for step in range(first, last):
            self.optimizer.zero_grad()
            for i in range(micro_batches):
                (toy.loss(self.host, micro_batches * step + i) / micro_batches).backward()
            self.optimizer.step()
        _settle(self.optimizer)

    def result(self) -> tuple[str, str, float]:
        loss = toy.evaluate(self.model)
        return toy.digest(self.model.parameters()), toy.state_digest(self.optimizer.communicator), loss


def _hosts(number: int, micro_batches: int) -> list[tuple[str, str, float]]:
    results = []
    for host in ("loop", "ddp"):
        training = _Training(number, host, warmup_steps=20, lr=1e-2, betas=(0.9, 0.95))
        training.run(0, 100, micro_batches)
        results.append(training.result())
    return results


@every_class
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_plain_loop_and_ddp_are_equal_and_learn(number: int, micro_batches: int) -> None:
    ranks = run_ranks(2, _hosts, number, micro_batches)
    before = toy.evaluate(toy.model())
    for loop, ddp in ranks:
        assert loop == ddp
        assert loop[2] < 0.5 * before
    assert ranks[0][0][0] == ranks[1][0][0]  # weights
    assert ranks[0][0][1] != ranks[1][0][1]  # residuals: every rank has its own


def _bytes(number: int) -> tuple[int, int]:
    model = nn.Linear(256, 256, bias=False)
    optimizer = _make(FIRST[number], model.named_parameters(), warmup_steps=1, plan=None, compressor=None)
    sent = []
    for _ in range(2):
        model(torch.randn(4, 256)).sum().backward()
        before = optimizer.communicator.stats.bytes_sent
        optimizer.step()
        sent.append(int(optimizer.communicator.stats.bytes_sent - before))
    return sent[0], sent[1]


@every_class
def test_bytes_are_those_of_one_bit(number: int) -> None:
    first, second = run_ranks(2, _bytes, number)
    assert first == second
    numel = 256 * 256
    assert 0 <= first[0] - 4 * numel <= 64  # dense: 2 (n - 1) / n of 4 bytes
    assert 0 <= first[1] - (numel // 8 + 4 * numel // 1024) <= 128  # half of a bit and a scale, twice; flags


def _shards(number: int) -> tuple[bool, float, bool]:
    """2 x 2: sharded inside, exchanged across, against whole replicas that see the mean of each pair's batches."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    replica, _ = divmod(dist.get_rank(), 2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 33)).double()
    whole = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 33)).double()
    whole.load_state_dict(model.state_dict())
    for module in (model[0], model[2], model):
        fully_shard(module, mesh=mesh["shard"])
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    options: dict[str, Any] = {"warmup_steps": 3, "compressor": ScaledSign(width=32), "plan": Plan(min_numel=0)}
    ours = _make(FIRST[number], model.named_parameters(), group=mesh["replicate"].get_group(), **options)
    theirs = _make(FIRST[number], whole.named_parameters(), group=groups[dist.get_rank() % 2], **options)
    for step in range(8):
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
    _settle(ours)
    _settle(theirs)
    full = [p.full_tensor() for p in model.parameters()]
    close = all(torch.allclose(a, b, rtol=0, atol=1e-9) for a, b in zip(full, whole.parameters(), strict=True))
    rows = ours.communicator.state_rows()
    held = sum(row.numel() for key, row in rows.items() if "second" not in key)
    return close, held / sum(p.numel() for p in whole.parameters() if p.ndim > 1), isinstance(full[0], Tensor)


@every_class
def test_shards_are_exchanged_with_their_peers(number: int) -> None:
    ranks = run_ranks(4, _shards, number)
    assert all(close for close, _, _ in ranks)
    assert {round(held, 2) for _, held, _ in ranks} <= {0.5, 0.51, 0.49}  # residuals, with two shards; 33 = 17 + 16


def _refuses_shards(number: int) -> str:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("replicate",))
    model = fully_shard(nn.Linear(32, 32), mesh=mesh)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    optimizer = _make(FIRST[number], model.parameters())
    model(torch.randn(2, 32)).sum().backward()
    try:
        optimizer.step()
    except ValueError as error:
        return str(error)
    return "accepted"


def test_refuses_shards_without_a_group() -> None:
    who = FIRST[0].cls.__name__
    assert all(said.startswith(f"{who}: expected the group across") for said in run_ranks(2, _refuses_shards, 0))


# Failures.


def _bad_gradient(number: int) -> tuple[list[str], int, int]:
    training = _Training(number)
    digests = []
    for step in range(8):
        training.optimizer.zero_grad()
        toy.loss(training.model, step).backward()
        if step in (2, 6) and dist.get_rank() == 1:
            next(training.model.parameters()).grad[0, 0] = torch.nan
        training.optimizer.step()
        digests.append(toy.digest(training.model.parameters()))
    stats = training.optimizer.communicator.stats
    return digests, stats.steps, stats.skipped


@every_class
def test_inf_on_one_rank_skips_the_step_on_all(number: int) -> None:
    ranks = run_ranks(2, _bad_gradient, number)
    assert toy.all_equal(ranks)
    digests, steps, skipped = ranks[0]
    assert [i for i in range(1, 8) if digests[i] == digests[i - 1]] == [2, 6]  # in the warm-up, and after it
    assert (steps, skipped) == (8, 2)


def _unused_on_one_rank(number: int) -> str:
    training = _Training(number)
    for step in range(8):
        training.optimizer.zero_grad()
        toy.loss(training.model, step).backward()
        if dist.get_rank() == 1:
            for p in list(training.model.parameters())[step:]:
                p.grad = None
        training.optimizer.step()
    return toy.digest(training.model.parameters())


@every_class
def test_parameters_unused_on_one_rank_take_part(number: int) -> None:
    assert toy.all_equal(run_ranks(3, _unused_on_one_rank, number))


def _configured_differently(number: int) -> None:
    _Training(number, warmup_steps=3 + dist.get_rank()).run(0, 1)


@every_class
def test_ranks_configured_differently_are_told(number: int) -> None:
    with pytest.raises(RankError, match="ranks differ in warmup_steps: rank 0 has 3, rank 1 has 4"):
        run_ranks(2, _configured_differently, number)


# Local steps.


def _local_steps() -> tuple[list[tuple[str, float]], str, str]:
    training = _Training(_LOCAL, warmup_steps=2, double_every=2, max_interval=4)
    seen = []
    for step in range(14):
        training.optimizer.zero_grad()
        toy.loss(training.model, step).backward()
        if step == 6 and dist.get_rank() == 1:
            next(training.model.parameters()).grad[0, 0] = torch.inf
        before = training.optimizer.communicator.stats.bytes_sent
        training.optimizer.step()
        sent = training.optimizer.communicator.stats.bytes_sent - before
        seen.append((toy.digest(training.model.parameters()), sent))
    apart = toy.digest(training.model.parameters())
    training.optimizer.synchronize()
    return seen, apart, toy.digest(training.model.parameters())


def test_local_steps_send_nothing_and_ranks_meet_again() -> None:
    """Also where a gradient was not finite on one rank, which the others cannot know."""
    (seen, apart, end), (others, others_apart, others_end) = run_ranks(2, _local_steps)
    case = FIRST[_LOCAL]
    made = case.cls([nn.Parameter(torch.ones(2))], warmup_steps=2, kappa=2, double_every=2, max_interval=4)
    kinds = [made.kind(step) for step in range(14)]
    assert kinds == ["dense"] * 2 + ["one bit"] * 2 + ["local", "one bit"] * 5
    assert [sent == 0 for _, sent in seen] == [kind == "local" for kind in kinds]
    assert [mine == other for (mine, _), (other, _) in zip(seen, others, strict=True)] == [k != "local" for k in kinds]
    assert apart == others_apart == end == others_end  # the last one was an exchange


def _saved_between_exchanges(folder: str) -> tuple[str, str, str]:
    training = _Training(_LOCAL, warmup_steps=2, double_every=4, max_interval=4)
    training.optimizer.zero_grad()
    for step in range(12):  # the last two are local
        training.optimizer.zero_grad()
        toy.loss(training.model, step).backward()
        training.optimizer.step()
    apart = toy.digest(training.model.parameters())
    checkpoint.save(folder, model=training.model, optimizer=training.optimizer)
    saved = toy.digest(training.model.parameters())
    training.run(12, 20)
    resumed = _Training(_LOCAL, seed=1, warmup_steps=2, double_every=4, max_interval=4)
    checkpoint.load(folder, model=resumed.model, optimizer=resumed.optimizer)
    resumed.run(12, 20)
    assert resumed.result() == training.result()
    return apart, saved, toy.digest(training.model.parameters())


def test_saving_brings_ranks_together(tmp_path: Path) -> None:
    (apart, saved, end), (other_apart, other_saved, other_end) = run_ranks(2, _saved_between_exchanges, str(tmp_path))
    assert apart != other_apart
    assert saved == other_saved
    assert end == other_end


# Restarts.


def _saved_by_rank(folder: str, number: int, at: int) -> tuple[Any, Any]:
    training = _Training(number)
    training.run(0, at)
    path = Path(folder) / f"rank{dist.get_rank()}.pt"
    torch.save({"model": training.model.state_dict(), "optimizer": training.optimizer.state_dict()}, path)
    training.run(at, at + 5)
    resumed = _Training(number, seed=1)
    saved = torch.load(path, weights_only=True)
    resumed.model.load_state_dict(saved["model"])
    resumed.optimizer.load_state_dict(saved["optimizer"])
    resumed.run(at, at + 5)
    return training.result(), resumed.result()


@every_class
@pytest.mark.parametrize("at", [2, 9], ids=["in the warm-up", "after it"])
def test_resume_is_exact(number: int, at: int, tmp_path: Path) -> None:
    for uninterrupted, resumed in run_ranks(2, _saved_by_rank, str(tmp_path), number, at):
        assert uninterrupted == resumed


def _residuals(optimizer: Any) -> dict[str, np.ndarray]:
    """Of each parameter, whatever rows the ranks cut it into."""
    found: dict[str, list[tuple[int, np.ndarray]]] = {}
    for key, value in optimizer.communicator.state_rows().items():
        name, _, rows = key.rpartition("/")
        if name.partition("/")[0].rpartition(".")[2] == "residual":
            found.setdefault(name, []).append((int(rows.partition(":")[0]), value.flatten(0, 1).numpy().copy()))
    return {name: np.concatenate([part for _, part in sorted(parts)]) for name, parts in found.items()}


def _through_checkpoint(folder: str, number: int, first: int, save: bool) -> tuple[Any, dict[str, np.ndarray], int]:
    training = _Training(number, seed=first)
    objects = {"model": training.model, "optimizer": training.optimizer}
    if first:
        checkpoint.load(folder, **objects)
    rows = _residuals(training.optimizer)
    training.run(first, first + 8)
    if save:
        checkpoint.save(folder, **objects)
        rows = _residuals(training.optimizer)
        training.run(first + 8, first + 16)
    return training.result(), rows, training.optimizer.communicator.stats.steps


@every_class
def test_a_checkpoint_carries_the_residuals_also_to_another_world_size(number: int, tmp_path: Path) -> None:
    folder = str(tmp_path / "checkpoint")
    before = run_ranks(2, _through_checkpoint, folder, number, 0, True)
    after = run_ranks(2, _through_checkpoint, folder, number, 8, False)
    assert [result for result, _, _ in before] == [result for result, _, _ in after]
    wider = run_ranks(3, _through_checkpoint, folder, number, 8, False)
    assert len({result[0] for result, _, _ in wider}) == 1
    assert all(steps == 16 for _, _, steps in wider)
    assert any(rows.any() for rows in before[0][1].values())
    for key in before[0][1]:
        mean = (before[0][1][key] + before[1][1][key]) / 2
        for _, rows, _ in wider:
            np.testing.assert_allclose(rows[key], mean, rtol=1e-6, atol=1e-8)


def _loads_another_ranks_state(folder: str) -> str:
    training = _Training(0)
    training.run(0, 6)
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
