"""Sharded parameters between real processes: n ranks do what one does, also in sums over whole rows and tensors."""

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from cases import OPTIMIZERS
from optimizing import make
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from gradwire.optim import compiled

pytestmark = pytest.mark.slow

SHAPES = [(5, 6), (7, 4), (3, 5), (9,), (1, 8), (6, 3, 2, 2)]  # on 4 ranks some shards are short, others empty
FIRST_OF_CLASS = list({case.cls: case for case in reversed(OPTIMIZERS)}.values())


def _gradient(p: Tensor, step: int) -> Tensor:
    """Every other one orthogonal to the rows of a matrix."""
    g = torch.randn_like(p)
    if p.ndim > 1 and step % 2 == 0:
        w, rows = p.flatten(1), g.flatten(1)
        g = (rows - w * ((w * rows).sum(1, keepdim=True) / (w * w).sum(1, keepdim=True))).view(p.shape)
    return g


def _deviation(case: Any, mesh_shape: tuple[int, ...], placements: tuple[Placement, ...], **options: Any) -> float:
    """Largest difference, relative to the way gone, between sharded parameters and whole ones after six steps."""
    torch.manual_seed(1)
    dtype = torch.float32 if options.get("fused") else torch.float64
    mesh = init_device_mesh("cpu", mesh_shape)
    fit = [shape for shape in SHAPES if all(p.is_replicate() or p.dim < len(shape) for p in placements)]
    whole = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in fit]
    sharded = [nn.Parameter(distribute_tensor(p.detach(), mesh, placements)) for p in whole]
    start = [p.detach().clone() for p in whole]
    ours, reference = make(case, sharded, **options), make(case, whole)
    for step in range(6):
        for p, q in zip(sharded, whole, strict=True):
            q.grad = _gradient(q.detach(), step)
            p.grad = distribute_tensor(q.grad, mesh, placements)
        ours.step()
        reference.step()
    differences = [
        (p.full_tensor() - q).abs().max() / (q - s).abs().max() for p, q, s in zip(sharded, whole, start, strict=True)
    ]
    return max(x.item() for x in differences)


def _all_cases(numbers: list[int], mesh_shape: tuple[int, ...], placements: tuple[Placement, ...]) -> list[float]:
    modes = (False, True, None) if dist.get_world_size() == 2 else (None,)
    ways = [(number, foreach) for number in numbers for foreach in modes]
    return [_deviation(OPTIMIZERS[number], mesh_shape, placements, foreach=foreach) for number, foreach in ways]


@pytest.mark.parametrize(
    ("mesh", "placements"),
    [
        ((2,), (Shard(0),)),
        ((2,), (Shard(1),)),
        ((2,), (Replicate(),)),
        ((4,), (Shard(0),)),
        ((2, 2), (Replicate(), Shard(0))),
        ((2, 2), (Shard(0), Shard(1))),
        ((2, 2), (Shard(1), Shard(2))),
    ],
    ids=str,
)
def test_equals_one_process(mesh: tuple[int, ...], placements: tuple[Placement, ...]) -> None:
    world_size = torch.Size(mesh).numel()
    numbers = list(range(len(OPTIMIZERS)))
    for deviations in run_ranks(world_size, _all_cases, numbers, mesh, placements, timeout_s=110):
        assert max(deviations) < 1e-11


def _fused(numbers: list[int], world_size: int) -> list[float]:
    warnings.simplefilter("ignore", DeprecationWarning)
    compiled._PACKS = {True: 2, False: 2}
    return [_deviation(FIRST_OF_CLASS[i], (world_size,), (Shard(0),), fused=True) for i in numbers]


@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", ["AdamP", "Adafactor"])
def test_fused_equals_one_process(name: str) -> None:
    """Sums over shards inside a compiled update; a rank whose shard is empty or one row runs the loop."""
    numbers = [i for i, case in enumerate(FIRST_OF_CLASS) if case.cls.__name__ == name]
    for deviations in run_ranks(2, _fused, numbers, 2, timeout_s=380):
        assert max(deviations) < 1e-4


def _model(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10), nn.LayerNorm(10), nn.Linear(10, 7), nn.Linear(7, 3, bias=False))
    return model.to(dtype)


def _backward(model: nn.Module, step: int, *, ranks: int = 1, rank: int = 0) -> None:
    generator = torch.Generator().manual_seed(step)
    batch = torch.randn(8, 12, generator=generator, dtype=torch.float64)
    mine = batch.chunk(ranks)[rank]
    model(mine).square().mean().backward()


def _whole(x: Any) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def _fsdp(folder: str, save: bool) -> dict[str, list[Any]]:
    """Three steps on a fully sharded model, saved, and two more; or the two alone, from the checkpoint."""
    results = {}
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for case in FIRST_OF_CLASS:
        model = _model(torch.float64)
        for layer in model:
            fully_shard(layer)
        fully_shard(model)
        optimizer = make(case, model.parameters(), weight_decay=0.1)
        path = str(Path(folder) / case.cls.__name__)
        if save:
            for step in range(3):
                _backward(model, step, ranks=ranks, rank=rank)
                optimizer.step()
                optimizer.zero_grad()
            m, o = get_state_dict(model, optimizer)
            dcp.save({"model": m, "optimizer": o}, checkpoint_id=path)
        else:
            m, o = get_state_dict(model, optimizer)
            state = {"model": m, "optimizer": o}
            dcp.load(state, checkpoint_id=path)
            set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        for step in range(3, 5):
            _backward(model, step, ranks=ranks, rank=rank)
            optimizer.step()
            optimizer.zero_grad()
        full = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
        states = {f"{n}.{k}": x.numpy() for n, s in full["state"].items() for k, x in s.items()}
        results[case.cls.__name__] = ([_whole(p).detach().numpy() for p in model.parameters()], states)
    return results


def test_fsdp2_trains_saves_and_resumes_on_another_world_size(tmp_path: Path) -> None:
    on_4 = run_ranks(4, _fsdp, str(tmp_path), True, timeout_s=110)
    on_2 = run_ranks(2, _fsdp, str(tmp_path), False, timeout_s=110)
    for case in FIRST_OF_CLASS:
        model = _model(torch.float64)
        optimizer = make(case, model.named_parameters(), weight_decay=0.1)
        for step in range(5):
            _backward(model, step)
            optimizer.step()
            optimizer.zero_grad()
        for results in (*on_4, *on_2):
            params, _ = results[case.cls.__name__]
            for p, q in zip(params, model.parameters(), strict=True):
                np.testing.assert_allclose(p, q.detach().numpy(), rtol=1e-9, atol=1e-11)
        for name, x in on_4[0][case.cls.__name__][1].items():
            np.testing.assert_allclose(on_2[0][case.cls.__name__][1][name], x, rtol=1e-9, atol=1e-11)


def _load_into_fresh() -> float:
    """`set_optimizer_state_dict` steps a fresh optimizer with lr = 0; nothing may move."""
    worst = 0.0
    for case in FIRST_OF_CLASS:
        model = _model(torch.float32)
        fully_shard(model)
        before = copy.deepcopy([_whole(p).detach() for p in model.parameters()])
        optimizer = make(case, model.parameters(), weight_decay=0.1)
        get_optimizer_state_dict(model, optimizer)
        worst = max(
            worst, *[(_whole(p) - q).abs().max().item() for p, q in zip(model.parameters(), before, strict=True)]
        )
    return worst


def test_a_checkpoint_of_a_fresh_optimizer_moves_nothing() -> None:
    assert run_ranks(2, _load_into_fresh) == [0.0, 0.0]


def _partial() -> str:
    mesh = init_device_mesh("cpu", (2,))
    from torch.distributed.tensor import Partial

    p = nn.Parameter(DTensor.from_local(torch.ones(3, 3), mesh, [Partial()]))
    optimizer = make(FIRST_OF_CLASS[0], [p])
    p.grad = DTensor.from_local(torch.ones(3, 3), mesh, [Partial()])
    try:
        optimizer.step()
    except ValueError as error:
        return str(error)
    return ""


def test_partial_parameters_are_refused() -> None:
    for message in run_ranks(2, _partial):
        assert "expected a sharded or replicated parameter" in message
