"""`MarkovChain`: a reversible random walk on a graph, the base of a self-repellent one."""

from collections.abc import Callable
from typing import Any, final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gradwire.comm.graph import Neighbours, fingerprint, neighbours

Array = NDArray[np.float64]
_ROUNDING = 1e-12  # a smaller probability of staying is an error of rounding


@final
class MarkovChain:
    """A random walk on a connected undirected graph, reversible with respect to its target distribution.

    Made by `metropolis_hastings`, `max_degree` or `simple`, and by `lazy` from another one.

    Args:
        name: How it was made.
        moves: For every node, where a step may lead, in ascending order.
        probabilities: Of these moves; they sum to 1.
        target: The distribution `[n]` that the chain leaves unchanged, up to a factor.

    State:
        None: constant once made. `nodes`, `moves`, `probabilities`, and `target`, which sums to 1.

    Example:
        >>> import networkx
        >>> chain = MarkovChain.metropolis_hastings(networkx.path_graph(3))
        >>> chain.matrix()
        array([[0.5, 0.5, 0. ],
               [0.5, 0. , 0.5],
               [0. , 0.5, 0.5]])

    Reference:
        Hastings. Monte Carlo Sampling Methods Using Markov Chains and Their Applications. Biometrika 1970.
        Boyd, Diaconis, Xiao. Fastest Mixing Markov Chain on a Graph. SIAM Review 2004, section 1.2 (maximum degree).
    """

    def __init__(self, name: str, moves: Neighbours, probabilities: tuple[Array, ...], target: Array) -> None:
        self.name, self.moves, self.probabilities = name, moves, probabilities
        self.target = target / target.sum()
        self.nodes = len(moves)

    @classmethod
    def metropolis_hastings(cls, graph: Any, target: ArrayLike | None = None) -> "MarkovChain":
        """Propose any neighbour alike; accept so that `target` stays unchanged, else stay.

            P_ij = min(1 / d_i, mu_j / (mu_i d_j)) for neighbours

        Args:
            graph: A `networkx.Graph` with nodes 0, ..., n-1, or a symmetric adjacency matrix.
            target: mu, all entries > 0, up to a factor; uniform by default. A node must know no more than its own entry
                and degree and those of its neighbours.
        """
        near = neighbours(graph, "MarkovChain")
        mu = np.ones(len(near)) if target is None else np.asarray(target, dtype=np.float64)
        if mu.shape != (len(near),) or not np.isfinite(mu).all() or not (mu > 0).all():
            raise ValueError(
                f"MarkovChain: expected a target of {len(near)} finite entries > 0, got shape {mu.shape} with least "
                f"entry {mu.min(initial=np.inf)}."
            )
        degree = _degrees(near)

        def moving(node: int, to: NDArray[np.int64]) -> Array:
            accepted: Array = np.minimum(1 / degree[node], mu[to] / (mu[node] * degree[to]))
            return accepted

        return cls("metropolis_hastings", *_with_stay(near, moving), mu)

    @classmethod
    def max_degree(cls, graph: Any) -> "MarkovChain":
        """Go to each neighbour with probability 1 / (greatest degree), else stay; the target is uniform."""
        near = neighbours(graph, "MarkovChain")
        most = _degrees(near).max()

        def moving(node: int, to: NDArray[np.int64]) -> Array:
            return np.full(len(to), 1 / most)

        return cls("max_degree", *_with_stay(near, moving), np.ones(len(near)))

    @classmethod
    def simple(cls, graph: Any) -> "MarkovChain":
        """Go to any neighbour alike; the target is proportional to the degree."""
        near = neighbours(graph, "MarkovChain")
        degree = _degrees(near)

        def moving(node: int, to: NDArray[np.int64]) -> Array:
            return np.full(len(to), 1 / degree[node])

        return cls("simple", *_with_stay(near, moving), degree)

    def lazy(self, stay: float = 0.5) -> "MarkovChain":
        """Stay with this probability, 0 <= stay < 1, before anything else; the target remains."""
        if not 0 <= stay < 1:
            raise ValueError(f"MarkovChain: expected 0 <= stay < 1, got stay={stay}.")

        def moving(node: int, to: NDArray[np.int64]) -> Array:
            elsewhere: Array = self.probabilities[node][self.moves[node] != node]
            return (1 - stay) * elsewhere

        near = tuple(to[to != node] for node, to in enumerate(self.moves))
        moves, probabilities = _with_stay(near, moving)
        return MarkovChain(f"{self.name}.lazy({stay})", moves, probabilities, self.target)

    def matrix(self) -> Array:
        """The transition matrix P, `[n, n]`."""
        matrix = np.zeros((self.nodes, self.nodes))
        for node, (to, probability) in enumerate(zip(self.moves, self.probabilities, strict=True)):
            matrix[node, to] = probability
        return matrix

    def __repr__(self) -> str:
        print_of = fingerprint([*self.moves, *self.probabilities, self.target])
        return f"MarkovChain({self.name}, nodes={self.nodes}, fingerprint={print_of})"


def _degrees(near: Neighbours) -> Array:
    return np.array([max(1, len(to)) for to in near], dtype=np.float64)


def _with_stay(
    near: Neighbours, moving: Callable[[int, NDArray[np.int64]], Array]
) -> tuple[Neighbours, tuple[Array, ...]]:
    """Moves and their probabilities, where a walk stays with what `moving` leaves of 1."""
    moves, probabilities = [], []
    for node, to in enumerate(near):
        probability = moving(node, to)
        stay = 1.0 - probability.sum()
        if stay > _ROUNDING:
            place = np.searchsorted(to, node)
            to, probability = np.insert(to, place, node), np.insert(probability, place, stay)
        moves.append(to)
        probabilities.append(probability)
    return tuple(moves), tuple(probabilities)
