"""Graphs: who may speak to whom, as each node's neighbours."""

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Neighbours = tuple[NDArray[np.int64], ...]
"""For every node its neighbours in ascending order, itself not among them."""


def neighbours(graph: Any, who: str = "graph") -> Neighbours:
    """The neighbours of every node of a connected undirected graph.

    Args:
        graph: A `networkx.Graph` with nodes 0, ..., n-1, or a symmetric adjacency matrix `[n, n]` in which anything but
            zero is an edge. Weights of edges and self-loops mean nothing.
        who: Who asks, for messages.

    Raises:
        ValueError: not such a graph; says where.

    Example:
        >>> import networkx
        >>> [near.tolist() for near in neighbours(networkx.path_graph(3))]
        [[1], [0, 2], [1]]
    """
    found = _of_networkx(graph, who) if hasattr(graph, "is_directed") else _of_matrix(graph, who)
    if not found:
        raise ValueError(f"{who}: expected a graph of at least one node, got none.")
    unreached = np.ones(len(found), dtype=bool)
    unreached[0] = False
    waiting = [0]
    while waiting:
        near = found[waiting.pop()]
        new = near[unreached[near]]
        unreached[new] = False
        waiting += new.tolist()
    if unreached.any():
        lonely = int(np.flatnonzero(unreached)[0])
        raise ValueError(f"{who}: expected a connected graph, got no path from node 0 to node {lonely}. Add edges.")
    return found


def describe(near: Neighbours) -> str:
    """Size and fingerprint: equal texts mean equal graphs."""
    edges = sum(map(len, near)) // 2
    return f"nodes={len(near)}, edges={edges}, fingerprint={fingerprint(near)}"


def fingerprint(arrays: Sequence[NDArray[Any]]) -> str:
    """Eight hexadecimal digits that depend on every bit of the arrays."""
    crc = 0
    for array in arrays:
        crc = zlib.crc32(array.tobytes(), zlib.crc32(str(array.shape).encode(), crc))
    return f"{crc:08x}"


def metropolis_weights(near: Neighbours) -> NDArray[np.float64]:
    """Symmetric weights of neighbours whose rows and columns sum to 1: `[n, n]`.

        W_ij = 1 / (1 + max(d_i, d_j)) for neighbours,  W_ii = 1 - sum_{j != i} W_ij > 0

    Reference:
        Xiao, Boyd, Kim. Distributed Average Consensus with Least-Mean-Square Deviation. JPDC 2007, section 2.
    """
    degree = np.array([len(nodes) for nodes in near])
    weights = np.zeros((len(near), len(near)))
    for node, nodes in enumerate(near):
        weights[node, nodes] = 1.0 / (1 + np.maximum(degree[node], degree[nodes]))
    np.fill_diagonal(weights, 1.0 - weights.sum(axis=1))
    return weights


def _of_networkx(graph: Any, who: str) -> Neighbours:
    if graph.is_directed():
        raise ValueError(f"{who}: expected an undirected graph, got a directed one. Use graph.to_undirected().")
    labels = set(graph.nodes)
    if labels != set(range(len(labels))):
        wrong = next(label for label in graph.nodes if label not in range(len(labels)))
        raise ValueError(
            f"{who}: expected nodes 0, ..., {len(labels) - 1}, got node {wrong!r}. "
            "Use networkx.convert_node_labels_to_integers(graph)."
        )
    return tuple(np.array(sorted(set(graph.adj[node]) - {node}), dtype=np.int64) for node in range(len(labels)))


def _of_matrix(graph: Any, who: str) -> Neighbours:
    matrix = np.asarray(graph)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.dtype.kind not in "biuf":
        raise ValueError(
            f"{who}: expected a networkx.Graph or a square matrix of numbers, got shape {matrix.shape} of "
            f"{matrix.dtype}."
        )
    if not np.isfinite(matrix).all():
        raise ValueError(f"{who}: expected a finite adjacency matrix, got NaN or inf.")
    edges = matrix != 0
    if (edges != edges.T).any():
        i, j = np.argwhere(edges & ~edges.T)[0]
        raise ValueError(f"{who}: expected a symmetric adjacency matrix, got an edge from {i} to {j} but none back.")
    np.fill_diagonal(edges, False)
    return tuple(np.flatnonzero(row) for row in edges)
