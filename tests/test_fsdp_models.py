"""`attach` on FSDP2: models of every form, ways to train them, and what is refused."""

import datetime
from collections.abc import Callable
from typing import Any

import hsdp
import numpy as np
import pytest
import torch
import toy
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from gradwire.comm import EF21, Communicator, attach
from gradwire.compression import Identity


class _Branches(nn.Module):
    """Layers of which a step uses some; the first is always used."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(37, 37, dtype=torch.float64) for _ in range(4))
        self.head = nn.Linear(37, 23, dtype=torch.float64)
        self.used: tuple[int, ...] = (0,)

    def forward(self, x: Tensor) -> Tensor:
        for number in self.used:
            x = x + self.layers[number](x).tanh()
        return self.head(x)  # type: ignore[no-any-return]


def _branches(own_mesh: DeviceMesh | None = None) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = _Branches()
    if own_mesh is not None:
        for layer in model.layers:
            fully_shard(layer, mesh=own_mesh)
        fully_shard(model, mesh=own_mesh)
    return model


_DROPPED = [(0, 1, 2, 3), (0, 2), (0, 1, 3), (0, 3, 2), (0,), (0, 1, 2, 3)]  # the fourth in another order


def _drop_layers() -> list[np.ndarray]:
    mesh = hsdp.mesh()
    model = _branches(mesh["shard"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    communicator = hsdp.attached(model, mesh, hsdp.MAKERS["dense"], optimizer=optimizer)
    for step, used in enumerate(_DROPPED):
        optimizer.zero_grad()
        model.used = used
        toy.loss(model, step).backward()
        optimizer.step()
    assert communicator.stats.steps == len(_DROPPED)
    return [p.detach().numpy() for p in hsdp.whole(model)]


def test_unused_modules_take_part_with_zero() -> None:
    """As one process in which the gradient of what a step does not use is zero."""
    one = _branches()
    optimizer = torch.optim.SGD(one.parameters(), lr=0.1, momentum=0.9)
    for step, used in enumerate(_DROPPED):
        optimizer.zero_grad(set_to_none=False)
        one.used = used
        sum(toy.loss(one, step, rank) for rank in range(4)).div(4).backward()  # type: ignore[union-attr]
        optimizer.step()
    for weights in run_ranks(4, _drop_layers):
        for w, expected in zip(weights, one.parameters(), strict=True):
            np.testing.assert_allclose(w, expected.detach().numpy(), rtol=1e-9, atol=1e-12)


def _disagree(agreed: list[tuple[int, ...]], then: list[tuple[int, ...]], timeout_s: float = 30.0) -> str:
    mesh = hsdp.mesh()
    model = _branches(mesh["shard"])
    timeout = datetime.timedelta(seconds=timeout_s)
    hsdp.attached(model, mesh, lambda **o: Communicator(Identity(), timeout=timeout, **o))
    for step, used in enumerate([*agreed, then[mesh["replicate"].get_local_rank()]]):
        model.used = used
        loss = toy.loss(model, step)
        if step == len(agreed):
            with pytest.raises(RuntimeError) as caught:
                loss.backward()
            return str(caught.value)
        loss.backward()
    raise AssertionError


@pytest.mark.parametrize("agreed", [[], [(0, 1, 2, 3), (0, 1), (0, 2)]], ids=["at once", "later"])
def test_replicas_that_run_other_modules_are_told(agreed: list[tuple[int, ...]]) -> None:
    """Also where each has gone that way before: gradients of equal shape would be mixed without notice."""
    for message in run_ranks(4, _disagree, agreed, [(0, 1), (0, 2)]):
        assert "'layers.1' on replica 0 and of 'layers.2' on replica 1" in message


def test_a_replica_that_alone_leaves_the_order_ends_all() -> None:
    """Their collectives do not match, so all wait until the timeout."""
    assert all(run_ranks(4, _disagree, [(0, 1, 2, 3)], [(0, 1, 2, 3), (0, 2)], 3.0))


def _recompute(x: Tensor, module: nn.Module) -> Tensor:
    return torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False)  # type: ignore[no-any-return]


class _Recomputed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return _recompute(x, self.inner)


def _accumulate(way: str) -> tuple[list[np.ndarray], int]:
    """Four batches a step: accumulated without communication, with it, or at once."""
    mesh = hsdp.mesh()
    layers = toy.model(dtype=torch.float64)
    if way == "compiled":
        torch._dynamo.reset()
        for layer in layers:
            layer.compile(backend="aot_eager")
    model: Any = nn.Sequential(*(_Recomputed(layer) if way == "recomputed" else layer for layer in layers))
    model = hsdp.shard(model, mesh["shard"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    communicator = hsdp.attached(model, mesh, hsdp.MAKERS["dense"], optimizer=optimizer)
    for step in range(3):
        optimizer.zero_grad()
        if way not in ("without", "with"):
            torch.stack([toy.loss(model, 4 * step + part) for part in range(4)]).sum().backward()
        else:
            for part in range(4):
                model.set_requires_gradient_sync(way == "with" or part == 3)
                toy.loss(model, 4 * step + part).backward()
        optimizer.step()
    return [p.detach().numpy() for p in hsdp.whole(model)], communicator.stats.steps


@pytest.mark.parametrize("way", ["without", "with", "at once", "recomputed", "compiled"])
def test_accumulated_repeated_and_recomputed(way: str) -> None:
    """A module that runs four times before a backward pass brings four gradients."""
    one = toy.model(dtype=torch.float64)
    optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        for part in range(4):
            sum(toy.loss(one, 4 * step + part, rank) for rank in range(4)).div(4).backward()  # type: ignore[union-attr]
        optimizer.step()
    for weights, counted in run_ranks(4, _accumulate, way):
        assert counted == (3 if way == "without" else 12)
        for w, expected in zip(weights, one.parameters(), strict=True):
            np.testing.assert_allclose(w, expected.detach().numpy(), rtol=1e-9, atol=1e-12)


class _Odd(nn.Module):
    """A frozen weight, a weight sharded by columns, two layers in one group, a weight that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(n, 42, bias=n > 40, dtype=torch.float64) for n in (37, 42))
        self.third = nn.Linear(42, 42, dtype=torch.float64)
        self.head = nn.Linear(42, 23, dtype=torch.float64)
        self.scale = nn.Linear(23, 1, dtype=torch.float64)  # one row: nothing is left for the second shard
        self.third.weight = self.second.weight
        self.head.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(self.third(self.second(self.first(x).tanh()).tanh()).tanh())
        return x + self.scale(x)  # type: ignore[no-any-return]


def _odd() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return _Odd()


def _train_odd() -> tuple[list[np.ndarray], list[str], str]:
    mesh = hsdp.mesh()
    model = _odd()
    fully_shard(model.first, mesh=mesh["shard"], shard_placement_fn=lambda p: Shard(1) if p.shape[1] == 42 else None)
    fully_shard(model.head, mesh=mesh["shard"], shard_placement_fn=lambda p: Shard(1) if p.ndim > 1 else None)
    fully_shard([model.second, model.third], mesh=mesh["shard"])
    fully_shard(model.scale, mesh=mesh["shard"])
    fully_shard(model, mesh=mesh["shard"])
    communicator = hsdp.attached(model, mesh, lambda **o: Communicator(Identity(), feedback=EF21(), plan=hsdp.ALL, **o))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hsdp.train(model, optimizer, 0, 4)
    weights = [p.detach().numpy().copy() for p in hsdp.whole(model)]
    model.head.bias.requires_grad_(True)
    model.head.weight.requires_grad_(False)
    with pytest.raises(RuntimeError, match="Attach after freezing") as caught:
        toy.loss(model, 5).backward()
    return weights, sorted({key.split("/")[1] for key in communicator.state_rows()}), str(caught.value)


def test_odd_models() -> None:
    one = _odd()
    optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
    for step in range(4):
        optimizer.zero_grad()
        sum(toy.loss(one, step, rank) for rank in range(4)).div(4).backward()  # type: ignore[union-attr]
        optimizer.step()
    for weights, names, message in run_ranks(4, _train_odd):
        trained = {name for name, p in one.named_parameters() if p.requires_grad}
        assert names in (sorted(trained), sorted(trained - {"scale.weight", "scale.bias"}))
        assert "module 'head'" in message
        for w, expected in zip(weights, one.parameters(), strict=True):
            np.testing.assert_allclose(w, expected.detach().numpy(), rtol=1e-9, atol=1e-12)


def _let_go() -> tuple[str, str]:
    """After `detach` only shards are averaged; and the communicator may be attached again."""
    mesh = hsdp.mesh()
    model = hsdp.shard(toy.model(), mesh["shard"])
    communicator = hsdp.MAKERS["dense"](group=mesh["replicate"].get_group())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach(model, communicator, replicate=mesh["replicate"], optimizer=optimizer).detach()
    hsdp.train(model, optimizer, 0, 1)
    apart = toy.digest(hsdp.whole(model))
    model = hsdp.shard(toy.model(), mesh["shard"])
    attach(model, communicator, replicate=mesh["replicate"])
    hsdp.train(model, torch.optim.SGD(model.parameters(), lr=0.1), 0, 1)
    return apart, toy.digest(hsdp.whole(model))


def test_detach() -> None:
    apart, together = zip(*run_ranks(4, _let_go), strict=True)
    assert apart[0] == apart[1] != apart[2]
    assert toy.all_equal(together)


# Refusals.


def _in_two_meshes(mesh: DeviceMesh) -> Any:
    from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, ShardPlacementResult

    other = FSDPMeshInfo(init_device_mesh("cpu", (4,)), shard_mesh_dim=0)
    place = lambda p: ShardPlacementResult(Shard(0), other) if p.ndim > 1 else Shard(0)  # noqa: E731
    return fully_shard(nn.Linear(8, 8), mesh=mesh["shard"], shard_placement_fn=place)


def _refusals() -> dict[str, str]:
    mesh, flat = hsdp.mesh(), init_device_mesh("cpu", (4,))
    group = mesh["replicate"].get_group()
    model = hsdp.shard(toy.model(), mesh["shard"])
    alone: Any = fully_shard(toy.model(), mesh=mesh["shard"])
    alone.register_parameter("alone", nn.Parameter(torch.ones(3)))
    nested = toy.model()
    fully_shard(nested[0], mesh=flat)
    calls: dict[str, Callable[[], Any]] = {
        "native": lambda: attach(
            hsdp.shard(toy.model(), mesh), Communicator(Identity(), group=group), replicate=mesh["replicate"]
        ),
        "no replicate": lambda: attach(model, Communicator(Identity(), group=group)),  # type: ignore[call-overload]
        "no model": lambda: attach(  # type: ignore[call-overload]
            toy.model().named_parameters(), Communicator(Identity()), replicate=mesh["replicate"]
        ),
        "all ranks": lambda: attach(model, Communicator(Identity()), replicate=mesh["replicate"]),
        "shards": lambda: attach(model, Communicator(Identity(), group=group), replicate=mesh["shard"]),
        "two dimensions": lambda: attach(model, Communicator(Identity(), group=group), replicate=mesh),
        "alone": lambda: attach(alone, Communicator(Identity(), group=group), replicate=mesh["replicate"]),
        "meshes": lambda: attach(
            fully_shard(nested, mesh=mesh["shard"]),
            Communicator(Identity(), group=group),
            replicate=mesh["replicate"],
        ),
        "groups": lambda: attach(
            _in_two_meshes(mesh), Communicator(Identity(), group=group), replicate=mesh["replicate"]
        ),
        "meta": lambda: attach(
            fully_shard(nn.Linear(8, 8, device="meta"), mesh=mesh["shard"]),
            Communicator(Identity(), group=group),
            replicate=mesh["replicate"],
        ),
        "twice": lambda: hsdp.attached(model, mesh, lambda **o: attached),
        "configuration": lambda: hsdp.attached(
            model, mesh, lambda **o: Communicator(Identity(), seed=mesh["shard"].get_local_rank(), **o)
        ),
    }
    attached = Communicator(Identity(), group=group)
    attach(hsdp.shard(toy.model(), mesh["shard"]), attached, replicate=mesh["replicate"])
    messages = {}
    for name, call in calls.items():
        with pytest.raises((TypeError, ValueError, RuntimeError)) as caught:
            call()
        messages[name] = str(caught.value)
    return messages


def test_what_cannot_be_averaged_is_refused_with_a_remedy() -> None:
    (messages, *_) = run_ranks(4, _refusals)
    for name, words in {
        "native": "mesh=mesh['shard']",
        "no replicate": "expected replicate=mesh['replicate']",
        "no model": "expected replicate=mesh['replicate'] with an FSDP2 model alone",
        "all ranks": "group=mesh['replicate'].get_group()",
        "shards": "the same shard of other replicas",
        "two dimensions": "one dimension",
        "alone": "'alone' on its own",
        "meshes": "one mesh for all modules",
        "groups": "one group of parameters per FSDP2 module, got 2",
        "meta": "meta tensor",
        "twice": "attached to nothing else",
        "configuration": "ranks differ in seed",
    }.items():
        assert words in messages[name], (name, messages[name])
