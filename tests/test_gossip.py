"""`Gossip` and CHOCO-Gossip between real processes, against NumPy and the rates that theory gives."""

import networkx
import numpy as np
import pytest
import torch
import torch.distributed as dist
import toy
from ranks import RankError, run_ranks
from reference import gossip
from torch import Tensor

from gradwire.comm import EF, EF21, AllGather, Communicator, Gossip, Plan, attach, choco_gossip_, choco_stepsize
from gradwire.comm.graph import metropolis_weights, neighbours
from gradwire.compression import ChunkTopK, Compressor, Identity

EVERYTHING = Plan(min_ndim=0, min_numel=0)
RING = [(0, 1), (1, 2), (2, 3), (0, 3)]
STAR = [(0, 1), (0, 2), (0, 3)]
SHAPES = {"matrix": (6, 32), "vector": (64,)}


def _ring() -> networkx.Graph:
    return networkx.cycle_graph(4)


def _gossip(compressor: Compressor, graph: object, feedback: EF21 | None = None) -> Communicator:
    return Communicator(compressor, feedback=feedback, exchange=Gossip(graph), plan=EVERYTHING)


def _start(rank: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    numbers = torch.Generator().manual_seed(rank)
    return [torch.randn(shape, generator=numbers, dtype=dtype) + rank for shape in SHAPES.values()]


def _flat(tensors: list[Tensor]) -> np.ndarray:
    return torch.cat([tensor.flatten() for tensor in tensors]).numpy().copy()


def _stacked(results: list[list[np.ndarray]]) -> np.ndarray:
    """What every rank returned, as `[steps, ranks, numbers]`."""
    return np.stack([np.stack(steps) for steps in results], axis=1)


def _spread(x: np.ndarray) -> np.ndarray:
    """Distance of all ranks' vectors from their mean, for each step."""
    return np.sqrt(((x - x.mean(axis=1, keepdims=True)) ** 2).sum(axis=(1, 2)))


# The graph and its weights.


@pytest.mark.parametrize("edges", [RING, STAR, [*RING, (0, 2)]], ids=["ring", "star", "chord"])
def test_weights_are_those_of_the_paper(edges: list[tuple[int, int]]) -> None:
    weights = metropolis_weights(neighbours(networkx.Graph(edges)))
    np.testing.assert_allclose(weights, gossip.metropolis(edges, 4), rtol=0, atol=1e-15)
    assert (weights == weights.T).all()
    assert (weights.diagonal() > 0).all()


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (networkx.DiGraph([(0, 1)]), r"expected an undirected graph, got a directed one. Use graph.to_undirected\(\)"),
        (networkx.Graph([("a", "b")]), "expected nodes 0, ..., 1, got node 'a'. Use networkx.convert_node_labels"),
        (networkx.Graph([(1, 2)]), "expected nodes 0, ..., 1, got node 2"),
        (networkx.Graph(), "expected a graph of at least one node, got none"),
        ([[0, 1, 0], [1, 0, 0], [0, 0, 0]], "expected a connected graph, got no path from node 0 to node 2"),
        ([[0, 1], [0, 0]], "expected a symmetric adjacency matrix, got an edge from 0 to 1 but none back"),
        ([[0, float("nan")], [1, 0]], "expected a finite adjacency matrix, got NaN or inf"),
        ([[0, 1, 1]], r"expected a networkx.Graph or a square matrix of numbers, got shape \(1, 3\)"),
    ],
)
def test_bad_graphs_are_refused(graph: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"Gossip: {message}"):
        Gossip(graph)


def test_graphs_may_be_matrices_whose_weights_and_loops_mean_nothing() -> None:
    matrix = torch.tensor([[7.0, -2.0, 0.0], [-2.0, 0.0, 0.5], [0.0, 0.5, 0.0]])
    assert repr(Gossip(matrix)) == repr(Gossip(networkx.path_graph(3)))
    assert repr(Gossip(matrix)) != repr(Gossip(networkx.cycle_graph(3)))


# Plain gossip.


def _average(edges: list[tuple[int, int]], steps: int) -> tuple[list[np.ndarray], int, float]:
    communicator = _gossip(Identity(), networkx.Graph(edges))
    x = _start(dist.get_rank())
    history = []
    for _ in range(steps):
        communicator.average_(x, list(SHAPES))
        history.append(_flat(x))
    return history, communicator.stats.payload_bytes, communicator.stats.bytes_sent


def test_average_is_the_product_with_the_weights_and_only_neighbours_are_sent_to() -> None:
    results = run_ranks(4, _average, STAR, 3)
    x = np.stack([_flat(_start(rank)) for rank in range(4)])
    weights = gossip.metropolis(STAR, 4)
    for step, found in enumerate(_stacked([history for history, _, _ in results]), start=1):
        np.testing.assert_allclose(found, np.linalg.matrix_power(weights, step) @ x, rtol=1e-12, atol=1e-12)
    flags = 3 * 4
    payloads = [payload - flags for _, payload, _ in results]
    assert payloads[0] == 3 * payloads[1]  # the middle of the star has three neighbours, its points have one
    assert payloads[1] == payloads[2] == payloads[3] >= 3 * x.shape[1] * 8
    assert [sent for _, _, sent in results] == [payload + 1.5 * flags for payload in payloads]


def test_distance_to_consensus_shrinks_by_the_second_eigenvalue() -> None:
    results = run_ranks(4, _average, STAR, 40)
    spread = _spread(_stacked([history for history, _, _ in results]))
    second = np.sort(np.abs(np.linalg.eigvalsh(gossip.metropolis(STAR, 4))))[-2]
    assert second == pytest.approx(0.75)
    np.testing.assert_allclose(spread[10:] / spread[9:-1], second, rtol=1e-6)


# CHOCO-Gossip.


def _choco(compressor: Compressor, gamma: float, steps: int) -> list[np.ndarray]:
    communicator = _gossip(compressor, _ring(), EF21())
    x = _start(dist.get_rank())
    history = []
    for _ in range(steps):
        choco_gossip_(x, list(SHAPES), communicator, gamma)
        history.append(_flat(x))
    return history


def _top_k(x: np.ndarray) -> np.ndarray:
    rows = x.reshape(-1, 32)
    kept = np.argsort(-np.abs(rows), axis=1)[:, :4]
    sent = np.zeros_like(rows)
    np.put_along_axis(sent, kept, np.take_along_axis(rows, kept, axis=1), axis=1)
    return sent.reshape(x.shape)


TOP_K = ChunkTopK(k=4, chunk=32)


def test_choco_is_the_papers_and_converges_linearly_to_the_mean() -> None:
    gamma, steps = 0.25, 201
    found = _stacked(run_ranks(4, _choco, TOP_K, gamma, steps))
    x = np.stack([_flat(_start(rank)) for rank in range(4)])
    expected, _ = gossip.choco(x, gossip.metropolis(RING, 4), _top_k, gamma, steps)
    np.testing.assert_allclose(found[:100], expected[:100], rtol=0, atol=1e-9)
    np.testing.assert_allclose(found.mean(axis=1), np.broadcast_to(x.mean(axis=0), found[:, 0].shape), atol=1e-9)
    spread = _spread(found)
    factors = spread[50::50] / spread[:-1:50]
    assert ((factors > 2e-4) & (factors < 4e-3)).all()  # as many digits in each fifty steps


def test_choco_at_the_proven_step_size_is_within_its_bound() -> None:
    contraction, steps = 4 / 32, 300
    gamma = choco_stepsize(_ring(), contraction)
    start = np.random.default_rng(0).standard_normal((4, 64))
    x, known = gossip.choco(start, gossip.metropolis(RING, 4), _top_k, gamma, steps)
    distance = _spread(x) ** 2 + ((x - known) ** 2).sum(axis=(1, 2))
    bound = 1 - (2 / 3) ** 2 * contraction / 82
    assert (distance <= distance[0] * bound ** np.arange(steps)).all()


def test_plain_gossip_is_choco_without_loss_and_with_gamma_one() -> None:
    plain = run_ranks(4, _average, RING, 5)
    choco = run_ranks(4, _choco, Identity(), 1.0, 5)
    np.testing.assert_allclose(_stacked(choco), _stacked([history for history, _, _ in plain]), rtol=0, atol=1e-12)


def _choco_with_a_bad_step() -> list[np.ndarray]:
    communicator = _gossip(TOP_K, _ring(), EF21())
    x = _start(dist.get_rank())
    seen = []
    for step in range(4):
        if step == 2 and dist.get_rank() == 0:
            kept, x[0] = x[0], torch.full_like(x[0], torch.inf)
        choco_gossip_(x, list(SHAPES), communicator, 0.25)
        if step == 2 and dist.get_rank() == 0:
            x[0] = kept
        seen.append(_flat(x))
    assert communicator.stats.skipped == 1
    return seen


def test_a_bad_rank_stops_all_ranks_for_a_step_even_those_far_from_it() -> None:
    healthy = _stacked(run_ranks(4, _choco, TOP_K, 0.25, 3))
    results = run_ranks(4, _choco_with_a_bad_step)
    for rank, steps in enumerate(results):
        np.testing.assert_array_equal(steps[2], steps[1])
        np.testing.assert_array_equal(steps[3], healthy[2, rank])


def _resume() -> tuple[str, str]:
    x = _start(dist.get_rank(), torch.float32)
    communicator = _gossip(TOP_K, _ring(), EF21())
    for _ in range(3):
        choco_gossip_(x, list(SHAPES), communicator, 0.25)
    again, state = [tensor.clone() for tensor in x], communicator.state_dict()
    second = _gossip(TOP_K, _ring(), EF21())
    second.load_state_dict(state)
    for _ in range(3):
        choco_gossip_(x, list(SHAPES), communicator, 0.25)
        choco_gossip_(again, list(SHAPES), second, 0.25)
    return toy.digest(x), toy.digest(again)


def test_resume_is_exact() -> None:
    digests = run_ranks(4, _resume)
    assert all(x == again for x, again in digests)
    assert len(set(digests)) == 4  # ranks are on their way to each other, not there


# What is refused.


def _three_nodes() -> None:
    _gossip(Identity(), networkx.path_graph(3)).average_(_start(dist.get_rank()), list(SHAPES))


def test_a_graph_of_another_size_is_refused() -> None:
    with pytest.raises(RankError, match="Gossip: expected a graph of 2 nodes, one for each rank, got 3"):
        run_ranks(2, _three_nodes)


def _other_graphs() -> None:
    edges = RING if dist.get_rank() < 2 else STAR
    _gossip(Identity(), networkx.Graph(edges)).average_(_start(dist.get_rank()), list(SHAPES))


def test_ranks_with_other_graphs_are_told() -> None:
    with pytest.raises(RankError, match=r"ranks differ in exchange: rank 0 has Gossip\(.*\), rank 2 has Gossip"):
        run_ranks(4, _other_graphs)


def test_gradients_of_one_model_are_not_for_gossip() -> None:
    with pytest.raises(ValueError, match="expected an exchange after which ranks agree, got Gossip"):
        attach(torch.nn.Linear(2, 2).named_parameters(), _gossip(Identity(), _ring()))
    with pytest.raises(ValueError, match=r"Gossip\(.*\): expected EF21\(\) or no feedback, got EF"):
        Communicator(TOP_K, feedback=EF(), exchange=Gossip(_ring()))


def test_choco_says_what_it_needs() -> None:
    x = [torch.ones(64)]
    with pytest.raises(ValueError, match=r"expected a communicator with feedback=EF21\(\) and exchange=Gossip"):
        choco_gossip_(x, ["x"], Communicator(TOP_K, feedback=EF21(), exchange=AllGather()), 0.1)
    with pytest.raises(ValueError, match=r"expected 0 < gamma <= 1, got gamma=1\.5"):
        choco_gossip_(x, ["x"], _gossip(TOP_K, _ring(), EF21()), 1.5)
    with pytest.raises(ValueError, match="expected a plan that sends nothing dense, got 'x' dense"):
        choco_gossip_(x, ["x"], Communicator(TOP_K, feedback=EF21(), exchange=Gossip(_ring())), 0.1)
    with pytest.raises(ValueError, match="expected 0 < contraction <= 1, got contraction=0"):
        choco_stepsize(_ring(), 0)
