"""`attach` on FSDP2 without replicas: checkpoints, and what cannot be compressed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import hsdp
import numpy as np
import pytest
import torch
import torch.distributed as dist
import toy
from ranks import run_ranks
from scattering import EXCHANGE, MAKERS, check_equal, flat, in_entries, weights_of
from torch import nn
from torch.distributed.fsdp import fully_shard

from gradwire.comm import Communicator, Warmup, attach, checkpoint
from gradwire.compression import Identity

# Checkpoints.


class _Training:
    def __init__(self, name: str, seed: int = 0) -> None:
        self.model = hsdp.shard(toy.model(seed), flat())
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3)
        self.communicator = MAKERS[name]()
        attach(self.model, self.communicator, optimizer=self.optimizer)

    def objects(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "communicator": self.communicator}

    def result(self) -> tuple[str, str, int]:
        return toy.digest(hsdp.whole(self.model)), toy.state_digest(self.communicator), self.communicator.stats.steps


_SAVED = ["chunk-EF", "chunk-EF-bf16", "dct-EF", "topk-EF", "warmup"]


def _train_through(folder: str) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name in _SAVED:
        training = _Training(name)
        hsdp.train(training.model, training.optimizer, 0, 3)
        checkpoint.save(f"{folder}/{name}", **training.objects())
        results[f"{name} residuals"] = _residuals(training)
        hsdp.train(training.model, training.optimizer, 3, 6)
        results[name] = training.result()
    return results


def _train_on(folder: str) -> dict[str, Any]:
    results = {}
    for name in _SAVED:
        training = _Training(name, seed=9)
        checkpoint.load(f"{folder}/{name}", **training.objects())
        hsdp.train(training.model, training.optimizer, 3, 6)
        results[name] = training.result()
    return results


def _residuals(training: _Training) -> dict[str, np.ndarray]:
    """Whole residuals in entries, by parameter."""
    communicator = training.communicator.then if isinstance(training.communicator, Warmup) else training.communicator
    assert isinstance(communicator, Communicator)
    return in_entries(communicator, training.model, "residual")


def _load_elsewhere(folder: str) -> dict[str, tuple[dict[str, np.ndarray], bool]]:
    results = {}
    for name in _SAVED:
        training = _Training(name, seed=9)
        checkpoint.load(f"{folder}/{name}", **training.objects())
        residuals, before = _residuals(training), toy.evaluate(training.model)
        hsdp.train(training.model, training.optimizer, 3, 20)
        results[name] = residuals, toy.evaluate(training.model) < before
    return results


@pytest.mark.slow
def test_resume_exactly_or_on_other_ranks_from_the_mean(tmp_path: Path) -> None:
    through = run_ranks(2, _train_through, str(tmp_path), timeout_s=100)
    for rank, on in enumerate(run_ranks(2, _train_on, str(tmp_path), timeout_s=100)):
        assert on == {name: through[rank][name] for name in _SAVED}
    assert through[0]["chunk-EF"][1] != through[1]["chunk-EF"][1]
    for on in run_ranks(3, _load_elsewhere, str(tmp_path), timeout_s=100):
        for name, (residuals, falls) in on.items():
            assert falls, name
            assert residuals
            for parameter, residual in residuals.items():
                old = [through[rank][f"{name} residuals"][parameter] for rank in range(2)]
                rounding = 2**-7 * np.abs(residual).max() if name.endswith("bf16") else 1e-6
                np.testing.assert_allclose(residual, np.mean(old, axis=0), rtol=0, atol=rounding)


# What cannot be compressed.


def _in_two_meshes(mesh: Any) -> Any:
    """The weight of the third layer is shared by two of four ranks, all else by four."""
    from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, ShardPlacementResult
    from torch.distributed.tensor import Shard

    other = FSDPMeshInfo(hsdp.mesh()["shard"], shard_mesh_dim=0)
    model = toy.model()
    place = lambda p: ShardPlacementResult(Shard(0), other) if p.ndim > 1 else Shard(0)  # noqa: E731
    fully_shard(model[3], mesh=mesh, shard_placement_fn=place)
    return hsdp.shard(nn.Sequential(*model[:3], _Held(model[3]), *model[4:]), mesh)


class _Held(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)  # type: ignore[no-any-return]


def _left_dense(attached: bool) -> tuple[list[np.ndarray], list[str], int]:
    model, names, skipped = _in_two_meshes(flat()), [], 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if attached:
        communicator = MAKERS["dense"]()
        with pytest.warns(UserWarning, match=r"got several for \['3\.inner'\]"):
            handle = attach(model, communicator, optimizer=optimizer)
        names = handle.dense_modules
    hsdp.train(model, optimizer, 0, 3)
    weights = weights_of(model)
    if attached:  # an inf in a gradient of the dense module on one rank, and nowhere else
        spoil = model[3].inner.weight.register_post_accumulate_grad_hook(
            lambda p: p.grad.to_local().fill_(torch.inf) if dist.get_rank() == 3 else None
        )
        toy.loss(model, 3).backward()
        optimizer.step()
        spoil.remove()
        skipped = communicator.stats.skipped
        check_equal(weights_of(model), weights, atol=0)
    return weights, names, skipped


def test_modules_of_several_groups_stay_dense() -> None:
    dense = run_ranks(4, _left_dense, False)
    for (weights, names, skipped), (expected, _, _) in zip(run_ranks(4, _left_dense, True), dense, strict=True):
        assert (names, skipped) == (["3.inner"], 1)
        check_equal(weights, expected, atol=1e-7)


def _refusals() -> dict[str, str]:
    mesh = flat()
    model = hsdp.shard(toy.model(), mesh)
    two = hsdp.mesh()
    calls: dict[str, Callable[[], Any]] = {
        "other exchange": lambda: attach(model, Communicator(Identity())),
        "no FSDP2": lambda: attach(toy.model().named_parameters(), MAKERS["int8"]()),
        "replicas": lambda: attach(hsdp.shard(toy.model(), two["shard"]), MAKERS["int8"](), replicate=two["replicate"]),
        "native": lambda: attach(hsdp.shard(toy.model(), two), MAKERS["int8"]()),
        "ranks": lambda: attach(hsdp.shard(toy.model(), two["shard"]), MAKERS["int8"]()),
        "by hand": lambda: MAKERS["int8"]().average_([torch.ones(64, 64)], ["w"]),
        "one of two": lambda: Warmup(Communicator(Identity()), MAKERS["int8"](), 1),
        "configuration": lambda: attach(
            hsdp.shard(toy.model(), mesh), Communicator(Identity(), exchange=EXCHANGE, seed=dist.get_rank())
        ),
    }
    messages = {}
    for name, call in calls.items():
        with pytest.raises((TypeError, ValueError, RuntimeError)) as caught:
            call()
        messages[name] = str(caught.value)
    return messages


def test_what_does_not_fit_is_refused_with_a_remedy() -> None:
    (messages, *_) = run_ranks(4, _refusals)
    for name, words in {
        "other exchange": "exchange=ReduceScatter(), to compress FSDP2's own reduce-scatter",
        "no FSDP2": "Use TwoPhase() or AllGather()",
        "replicas": "expected an FSDP2 model alone",
        "native": "pass replicate=mesh['replicate']",
        "ranks": "group=mesh.get_group()",
        "by hand": "attach(fsdp_model, communicator), or TwoPhase()",
        "one of two": "in both communicators or in none",
        "configuration": "ranks differ in seed",
    }.items():
        assert words in messages[name], (name, messages[name])


def _let_go() -> tuple[bool, bool, bool]:
    """An asynchronous call gives work to wait for; after `detach` FSDP2 reduces densely."""
    model = hsdp.shard(toy.model(), flat())
    communicator = MAKERS["int8"]()
    handle = attach(model, communicator)
    toy.loss(model, 0).backward()
    handle.detach()
    state: Any = model[0]._get_fsdp_state()
    reduce = state._fsdp_param_groups[0]._reduce_scatter_comm
    x, out = torch.arange(2.0 * 38 * 61), torch.empty(38 * 61)
    group = dist.group.WORLD
    work = reduce(out, x.clone(), group, dist.ReduceOp.SUM, async_op=True)
    work.wait()
    again = attach(hsdp.shard(toy.model(), flat()), communicator)
    model.zero_grad()
    steps = communicator.stats.steps
    toy.loss(model, 0).backward()
    return (
        torch.equal(out, 2 * x.view(2, -1)[dist.get_rank()]),
        communicator.stats.steps == steps,
        again.residual_bytes == 0,
    )


def test_detach() -> None:
    assert all(all(seen) for seen in run_ranks(2, _let_go))
