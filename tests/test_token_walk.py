"""`TokenWalk` between real processes: the same walk and, to the bit, the same model as in one process."""

import itertools
from pathlib import Path
from typing import Any

import networkx
import numpy as np
import pytest
import torch
import torch.distributed as dist
import toy
from ranks import RankError, run_ranks
from torch import Tensor, nn

from gradwire.comm import ConfigurationError, checkpoint
from gradwire.comm.random_walk import MarkovChain, SelfRepellentWalk, TokenWalk

GRAPHS = {
    "path of 3": networkx.path_graph(3),
    "ring of 4": networkx.cycle_graph(4),
    "star of 4": networkx.star_graph(3),
}
STEPS = 30
BYTES = 2 * 6965 * 4  # parameters and momentum


def _walk(graph: networkx.Graph, **options: Any) -> SelfRepellentWalk:
    return SelfRepellentWalk(graph, **{"alpha": 5.0, "seed": 7, "start": 1, **options})


def _model(seed: int) -> tuple[nn.Module, torch.optim.Optimizer, list[Tensor]]:
    """A model, its optimizer, and what travels: parameters and momentum buffers, there before the first step."""
    model = toy.model(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    momentum = [torch.zeros_like(p) for p in model.parameters()]
    for p, buffer in zip(model.parameters(), momentum, strict=True):
        optimizer.state[p]["momentum_buffer"] = buffer
    return model, optimizer, [*model.parameters(), *momentum]


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, rank: int) -> None:
    optimizer.zero_grad()
    toy.loss(model, step, rank).backward()
    optimizer.step()


def _alone(name: str) -> tuple[list[int], str]:
    walk = _walk(GRAPHS[name])
    model, optimizer, tensors = _model(walk.node)
    path = [walk.node]
    for step in range(STEPS):
        _step(model, optimizer, step, walk.node)
        path.append(walk.step())
    return path, toy.digest(tensors)


def _in_one_process(name: str) -> tuple[list[int], str]:
    """In a process like the others, since the number of threads changes the last bits."""
    return run_ranks(1, _alone, name)[0]


def _travel(name: str) -> tuple[list[int], str, float, list[bool]]:
    rank = dist.get_rank()
    model, optimizer, tensors = _model(seed=rank)
    token = TokenWalk(tensors, _walk(GRAPHS[name]))
    path, here = [token.holder], [token.here]
    for step in range(STEPS):
        if token.here:
            _step(model, optimizer, step, rank)
        token.move()
        path.append(token.holder)
        here.append(token.here)
    sent = token.bytes_sent
    token.share()
    digest = toy.digest(tensors)
    token.close()
    return path, digest, sent, here


@pytest.mark.parametrize("name", GRAPHS)
def test_token_sgd_is_that_of_one_process_to_the_bit(name: str) -> None:
    results = run_ranks(len(GRAPHS[name]), _travel, name)
    path, digest = _in_one_process(name)
    for rank, (found, shared, sent, here) in enumerate(results):
        assert found == path
        assert shared == digest
        assert here == [node == rank for node in path]
        departures = sum(a == rank != b for a, b in itertools.pairwise(path))
        assert departures * BYTES <= sent <= departures * (BYTES + 16 * 15)  # 16 tensors start at multiples of 16
    if name != "ring of 4":
        assert any(a == b for a, b in itertools.pairwise(path))  # staying put is among what was tried


def _dtypes() -> list[tuple[str, list]]:
    rank = dist.get_rank()
    values = torch.arange(6.0).view(2, 3) + 10 * rank
    kinds = (torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float64, torch.int16, torch.int64, torch.uint8)
    tensors = [values.to(dtype) for dtype in kinds]
    tensors += [values.t().clone().t(), torch.tensor(float(rank)), torch.empty(0), torch.tensor([rank == 0])]
    token = TokenWalk(tensors, SelfRepellentWalk(networkx.path_graph(2), start=0))
    while token.holder == 0:
        token.move()
    return [(str(tensor.dtype), tensor.double().tolist()) for tensor in tensors]


def test_any_dtype_and_layout_travels() -> None:
    first, second = run_ranks(2, _dtypes)
    assert second == first
    assert first[0] == ("torch.float8_e4m3fn", [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]])


def _resume(folder: str) -> list[str]:
    rank, graph = dist.get_rank(), GRAPHS["ring of 4"]
    model, optimizer, tensors = _model(seed=rank)
    token = TokenWalk(tensors, _walk(graph))
    for step in range(STEPS):
        if step == STEPS // 2:
            token.share()
            checkpoint.save(folder, token=token, model=model, momentum=dict(enumerate_names(tensors)))
        if token.here:
            _step(model, optimizer, step, rank)
        token.move()
    token.share()

    second, optimizer, others = _model(seed=100 + rank)
    again = TokenWalk(others, _walk(graph))
    checkpoint.load(folder, token=again, model=second, momentum=dict(enumerate_names(others)))
    for step in range(STEPS // 2, STEPS):
        if again.here:
            _step(second, optimizer, step, rank)
        again.move()
    again.share()
    return [toy.digest(tensors), toy.digest(others)]


def enumerate_names(tensors: list[Tensor]) -> list[tuple[str, Tensor]]:
    """The momentum buffers by name."""
    return [(f"buffer{place}", tensor) for place, tensor in enumerate(tensors[len(tensors) // 2 :])]


def test_resume_is_exact(tmp_path: Path) -> None:
    _, digest = _in_one_process("ring of 4")
    assert run_ranks(4, _resume, str(tmp_path / "saved")) == [[digest, digest]] * 4


# What is refused.


def _differ(kind: str) -> str:
    rank = dist.get_rank()
    tensors = [torch.zeros(3 if kind == "shape" and rank == 1 else 2)] * (2 if kind == "number" and rank == 1 else 1)
    walk = SelfRepellentWalk(networkx.path_graph(2), alpha=float(rank) if kind == "alpha" else 5.0)
    if kind == "steps" and rank == 1:
        walk.step()
    with pytest.raises(ConfigurationError) as error:
        TokenWalk(tensors, walk)
    return str(error.value)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("shape", "TokenWalk: ranks differ: rank 0 has (2,) torch.float32, rank 1 has (3,) torch.float32."),
        ("number", "TokenWalk: ranks differ: rank 0 has 1 tensors, rank 1 has 2 tensors."),
        ("alpha", "alpha=0.0, exponent=0.8, seed=0) at node 0 after 0 steps, rank 1 has"),
        ("steps", "at node 0 after 0 steps, rank 1 has"),
    ],
)
def test_ranks_that_differ_are_told(kind: str, message: str) -> None:
    first, second = run_ranks(2, _differ, kind)
    assert message in first
    assert first == second


def _three_nodes() -> None:
    TokenWalk([torch.zeros(2)], SelfRepellentWalk(networkx.path_graph(3)))


def test_a_graph_of_another_size_is_refused() -> None:
    with pytest.raises(RankError, match="TokenWalk: expected a graph of 2 nodes, one for each rank, got 3"):
        run_ranks(2, _three_nodes)


def test_nothing_to_carry_is_refused() -> None:
    with pytest.raises(ValueError, match="TokenWalk: expected at least one tensor to carry, got none"):
        TokenWalk([], SelfRepellentWalk(networkx.empty_graph(1)))


def test_the_callers_walk_stays_where_it_is() -> None:
    walk = SelfRepellentWalk(MarkovChain.metropolis_hastings(networkx.empty_graph(1)))
    token = TokenWalk([torch.zeros(1)], walk)
    token.move()
    token.share()
    assert (walk.steps, token.walk.steps, token.bytes_sent) == (0, 1, 0)
    assert np.array_equal(token.walk.visits, [1])


def _gone() -> str:
    token = TokenWalk([torch.zeros(4)], SelfRepellentWalk(networkx.path_graph(2), start=1))
    if dist.get_rank() == 1:
        token.close()  # as a rank does that ends early
        return ""
    assert token.holder == 1
    with pytest.raises(RuntimeError) as error:
        token.move()
    return str(error.value)


def test_a_rank_that_is_gone_ends_the_waiting() -> None:
    first, _ = run_ranks(2, _gone, timeout_s=20)
    assert first
