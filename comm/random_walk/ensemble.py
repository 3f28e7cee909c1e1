"""`WalkEnsemble`: many independent self-repellent walks, one batch."""

import math
from collections.abc import Sequence
from typing import Any, final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gradwire.comm.random_walk.markov import MarkovChain
from gradwire.comm.random_walk.self_repellent import check, step_size
from gradwire.comm.random_walk.uniforms import Uniforms

Array = NDArray[np.float64]


@final
class WalkEnsemble:
    """Independent walks on one graph, each with its own seed and alpha, as rows of one matrix.

    Row r makes the very steps of `SelfRepellentWalk(chain, alpha[r], exponent, seeds[r], start)`.

    Args:
        chain: The base chain, or a graph: its Metropolis-Hastings chain with uniform target.
        alpha: Repellence, >= 0: one for all, or one per walk.
        exponent: Decay of gamma, in (0.5, 1].
        seeds: One per walk. Equal seeds with different alphas draw the same numbers, which makes their difference
            less noisy.
        start: Where all walks are at first.

    Cost:
        O(walks x greatest degree) time a step; 16 bytes a node and walk.

    State:
        `node` [walks]; `steps`; `measure` [walks, nodes].

    Example:
        >>> import networkx
        >>> walks = WalkEnsemble(networkx.cycle_graph(4), alpha=10.0, seeds=range(3))
        >>> [walks.step()[0].item() for _ in range(8)]
        [1, 0, 3, 2, 1, 0, 3, 2]

    Reference:
        As `SelfRepellentWalk`.
    """

    def __init__(
        self,
        chain: MarkovChain | Any,
        alpha: ArrayLike = 5.0,
        exponent: float = 0.8,
        seeds: Sequence[int] = (0,),
        start: int = 0,
    ) -> None:
        self.chain = chain = chain if isinstance(chain, MarkovChain) else MarkovChain.metropolis_hastings(chain)
        walks, most = len(seeds), max(map(len, chain.moves))
        self._alpha: Array = np.broadcast_to(np.asarray(alpha, dtype=np.float64), (walks,))
        for value in np.unique(self._alpha):
            check("WalkEnsemble", float(value), exponent)
        self.exponent, self.steps = exponent, 0
        self.node = np.full(walks, start)
        self._moves = np.zeros((chain.nodes, most), dtype=np.int64)  # padded with moves of no probability
        self._log_probabilities = np.full((chain.nodes, most), -np.inf)
        for node, (moves, probabilities) in enumerate(zip(chain.moves, chain.probabilities, strict=True)):
            self._moves[node, : len(moves)] = moves
            self._log_probabilities[node, : len(moves)] = np.log(probabilities)
        self._log_target = np.log(chain.target)
        self._log_scale = 0.0
        self._log_visited = np.tile(self._log_target, (walks, 1))
        self._repulsion = np.zeros((walks, chain.nodes))  # -alpha log(u / mu)
        self._walk = np.arange(walks)
        self._uniforms = Uniforms(seeds)

    def step(self) -> NDArray[np.int64]:
        """Every walk goes on by one step; returns the nodes that they lead to, `[walks]`."""
        walk = self._walk
        moves = self._moves[self.node]
        logits = self._repulsion.take(moves + (walk * self.chain.nodes)[:, None])
        logits += self._log_probabilities[self.node]
        logits -= logits.max(axis=1, keepdims=True)
        cumulative = np.cumsum(np.exp(logits, out=logits), axis=1, out=logits)
        draws = self._uniforms.at(self.steps) * cumulative[:, -1]
        self.node = moves[walk, (cumulative <= draws[:, None]).sum(axis=1)]
        self.steps += 1
        gamma = step_size(self.steps, self.exponent)
        self._log_scale += math.log1p(-gamma)
        visited = np.logaddexp(self._log_visited[walk, self.node], math.log(gamma) - self._log_scale)
        self._log_visited[walk, self.node] = visited
        self._repulsion[walk, self.node] = -self._alpha * (visited - self._log_target[self.node])
        return self.node

    @property
    def measure(self) -> Array:
        """Of past visits of every walk, x: `[walks, nodes]`; rows sum to 1."""
        return np.exp(self._log_visited + self._log_scale)
