"""`DiLoCo` and `LocalSGD` saved and restored within a round, and on shards under FSDP2."""

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import toy
from outer_loops import Training, every_method
from ranks import collect, run_ranks, start_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from gradwire.comm import Communicator, checkpoint
from gradwire.compression import Identity
from gradwire.optim import DiLoCo

pytestmark = pytest.mark.slow


def _saved_by_rank(folder: str, method: str) -> tuple[Any, Any]:
    training = Training(method).run(0, 6)  # in the middle of the second round
    path = Path(folder) / f"rank{dist.get_rank()}.pt"
    torch.save({name: value.state_dict() for name, value in training.objects.items()}, path)
    training.run(6, 13)
    resumed = Training(method, seed=1)
    for name, saved in torch.load(path, weights_only=True).items():
        resumed.objects[name].load_state_dict(saved)
    resumed.run(6, 13)
    return training.result(), resumed.result()


@every_method
def test_resume_within_a_round_is_exact(method: str, tmp_path: Path) -> None:
    for uninterrupted, resumed in run_ranks(2, _saved_by_rank, str(tmp_path), method):
        assert uninterrupted == resumed


def _through_checkpoint(folder: str, method: str, load: bool, until: int) -> Any:
    training = Training(method, seed=9 if load else 0)
    if load:
        checkpoint.load(folder, **training.objects)
    else:
        training.run(0, 6)
        checkpoint.save(folder, **training.objects)
    own = [p.detach().numpy().copy() for p in training.model.parameters()]
    with training.loop.returned():
        agreed = toy.digest(training.model.parameters())
    state = [s["exp_avg"].numpy().copy() for s in training.loop._rounds._optimizer.state.values()]
    training.run(6, until)
    return training.result(), own, agreed, state, training.loop.communicator.stats.steps


@every_method
def test_a_checkpoint_carries_every_ranks_own_also_to_another_world_size(method: str, tmp_path: Path) -> None:
    folder = str(tmp_path / "checkpoint")
    before = run_ranks(2, _through_checkpoint, folder, method, False, 13)
    after = run_ranks(2, _through_checkpoint, folder, method, True, 13)
    assert [result for result, *_ in before] == [result for result, *_ in after]
    wider = run_ranks(3, _through_checkpoint, folder, method, True, 8)
    assert len({result[0] for result, *_ in wider}) == 1  # the round ends
    for _, own, agreed, state, steps in wider:
        assert steps == 2
        assert agreed == before[0][2]
        for mine, first, second in zip(
            own + state, before[0][1] + before[0][3], before[1][1] + before[1][3], strict=True
        ):
            np.testing.assert_allclose(mine, (first + second) / 2, rtol=1e-6, atol=1e-8)


def _until_killed(folder: str) -> None:
    training = Training("sparseloco").run(0, 6)
    checkpoint.save(folder, **training.objects)
    training.run(6, 7)
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    training.run(7, 13)


def test_killed_and_resumed_is_uninterrupted(tmp_path: Path) -> None:
    killed, other = str(tmp_path / "killed"), str(tmp_path / "other")
    outcomes = collect(start_ranks(2, _until_killed, killed))
    assert [kind for kind, _ in outcomes] == ["error", "died"]
    resumed = run_ranks(2, _through_checkpoint, killed, "sparseloco", True, 13)
    uninterrupted = run_ranks(2, _through_checkpoint, other, "sparseloco", False, 13)
    assert [result for result, *_ in resumed] == [result for result, *_ in uninterrupted]


# Shards.


def _models() -> tuple[nn.Sequential, nn.Sequential]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 65), nn.Tanh(), nn.Linear(65, 32)).double()
    whole = nn.Sequential(nn.Linear(32, 65), nn.Tanh(), nn.Linear(65, 32)).double()
    whole.load_state_dict(model.state_dict())
    return model, whole


def _loop(model: nn.Module, group: Any, every: int = 3) -> DiLoCo:
    inner = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return DiLoCo(inner, every=every, communicator=Communicator(Identity(), group=group))


def _shards(folder: str, poison: bool) -> tuple[bool, bool, int, str]:
    """2 x 2: sharded inside, rounds across, against whole replicas that see the mean of each pair's batches."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    replica, shard = divmod(dist.get_rank(), 2)
    model, whole = _models()
    for module in (model[0], model[2], model):
        fully_shard(module, mesh=mesh["shard"])
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    ours = _loop(model, mesh["replicate"].get_group())
    theirs = _loop(whole, groups[shard])
    for step in range(8):
        batches = [
            torch.randn(8, 32, generator=torch.Generator().manual_seed(100 * step + r)).double() for r in range(4)
        ]
        ours.zero_grad()
        theirs.zero_grad()
        model(batches[dist.get_rank()]).square().mean().backward()
        for r in (2 * replica, 2 * replica + 1):
            (whole(batches[r]).square().mean() / 2).backward()
        if poison and step == 2:  # the last of a round: no later forward carries it to the other shard
            if replica == 1:
                next(whole.parameters()).grad[0, 0] = torch.nan
            if dist.get_rank() == 2:
                next(model.parameters()).grad.to_local()[0, 0] = torch.nan
        ours.step()
        theirs.step()
        if step == 4:
            checkpoint.save(folder, model=model, optimizer=ours)
    again, _ = _models()
    for module in (again[0], again[2], again):
        fully_shard(module, mesh=mesh["shard"])
    resumed = _loop(again, mesh["replicate"].get_group())
    with torch.no_grad():
        for p in again.parameters():
            p.zero_()
    checkpoint.load(folder, model=again, optimizer=resumed)
    for step in range(5, 8):
        resumed.zero_grad()
        batch = torch.randn(8, 32, generator=torch.Generator().manual_seed(100 * step + dist.get_rank())).double()
        again(batch).square().mean().backward()
        resumed.step()
    full = [p.full_tensor() for p in model.parameters()]
    restored = [p.full_tensor() for p in again.parameters()]
    sharded = all(isinstance(p, DTensor) for p in model.parameters())
    close = sharded and all(torch.allclose(a, b, atol=1e-9) for a, b in zip(full, whole.parameters(), strict=True))
    same = all(torch.equal(a, b) for a, b in zip(full, restored, strict=True))
    with ours.returned():
        agreed: list[Tensor] = [p.full_tensor() for p in model.parameters()]
    return close, same, ours.communicator.stats.skipped, toy.digest(agreed)


@pytest.mark.parametrize("poison", [False, True])
def test_shards_are_exchanged_with_their_peers(poison: bool, tmp_path: Path) -> None:
    ranks = run_ranks(4, _shards, str(tmp_path / "checkpoint"), poison)
    for close, same, skipped, _ in ranks:
        assert same
        assert close or poison  # a poisoned whole starts more state anew than a poisoned shard
        assert skipped == int(poison)  # also where the shard itself was finite
    assert len({digest for *_, digest in ranks}) == 1


def _empty_shards() -> tuple[str, int, int]:
    """One row between two ranks."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    torch.manual_seed(0)
    model = fully_shard(nn.Linear(4, 1, bias=False), mesh=mesh["shard"])
    optimizer = _loop(model, mesh["replicate"].get_group(), every=2)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.full((2, 4), 1.0 + dist.get_rank())).square().mean().backward()
        optimizer.step()
    stats = optimizer.communicator.stats
    return toy.digest([model.weight.full_tensor()]), stats.steps, stats.skipped


def test_ranks_whose_shards_are_empty_take_part() -> None:
    ranks = run_ranks(4, _empty_shards)
    assert toy.all_equal(ranks)
    assert ranks[0][1:] == (2, 0)


def _without_group() -> str:
    model = fully_shard(nn.Linear(32, 32), mesh=init_device_mesh("cpu", (2,)))
    try:
        DiLoCo(torch.optim.SGD(model.parameters(), lr=0.1), every=2)
    except ValueError as error:
        return str(error)
    return "accepted"


def test_shards_need_a_group() -> None:
    message = "DiLoCo: expected the group across which sharded parameters are replicated, got group=None."
    assert all(said.startswith(message) for said in run_ranks(2, _without_group))
