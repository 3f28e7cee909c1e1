"""`SelfRepellentWalk`: a walk that avoids where it has been."""

import math
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray

from gradwire.comm.errors import CheckpointError
from gradwire.comm.random_walk.markov import MarkovChain
from gradwire.comm.random_walk.uniforms import Uniforms

Array = NDArray[np.float64]


@final
class SelfRepellentWalk:
    """A random walk on a graph whose moves are weighted down where it has been more often than its target says.

        K_ij[x] = P_ij (x_j / mu_j)^-alpha / sum_k P_ik (x_k / mu_k)^-alpha,   j ~ K_i[x_n]
        x_{n+1} = x_n + gamma_{n+1} (delta_j - x_n),   gamma_n = (n + 1)^-exponent,   x_0 = mu

    P is the base chain and mu its target; x is the measure of past visits. alpha = 0 is the base chain itself. Token
    SGD steps along the gradient of each node visited: its variance falls as 1/alpha^2 if its step sizes fall faster
    than gamma (`iterate_covariance`), and a moderate alpha does better than independent draws of nodes.

    Args:
        chain: The base chain, or a graph: its Metropolis-Hastings chain with uniform target.
        alpha: Repellence, >= 0. 5 to 10 serve well.
        exponent: Decay of gamma, in (0.5, 1]. Step sizes n^-b of an optimizer should fall faster, exponent < b, but
            not by far: with 2 exponent - b < 0.3 the bias of a strong repellence outweighs what it gains.
        seed: Seed of the walk; steps are a function of it and their number.
        start: The node where the walk is at first.

    Cost:
        O(degree) time a step; 16 bytes a node. Only ratios of x matter, so x_n is kept as s_n u_n: a step changes one
        number s and one entry of u. Both are logarithms, because s and the powers of x leave the range of float64.

    State:
        `node`; `steps`; `visits`, how often a step led to each node; `measure`, x.

    Example:
        >>> import networkx
        >>> walk = SelfRepellentWalk(networkx.cycle_graph(4), alpha=10.0)
        >>> [walk.step() for _ in range(8)]
        [1, 0, 3, 2, 1, 0, 3, 2]

    Reference:
        Hu, Doshi, Eun. Accelerating Distributed Stochastic Optimization via Self-Repellent Random Walks. ICLR 2024.
        arXiv:2401.09665, algorithm 1. Doshi, Hu, Eun. Self-Repellent Random Walks on General Graphs. ICML 2023.
        arXiv:2305.05097.

    Differences from the paper: none in the walk; the paper leaves x_0 open.
    """

    def __init__(
        self, chain: MarkovChain | Any, alpha: float = 5.0, exponent: float = 0.8, seed: int = 0, start: int = 0
    ) -> None:
        self.chain = chain if isinstance(chain, MarkovChain) else MarkovChain.metropolis_hastings(chain)
        check("SelfRepellentWalk", alpha, exponent)
        if not (isinstance(start, int) and 0 <= start < self.chain.nodes):
            raise ValueError(f"SelfRepellentWalk: expected 0 <= start < {self.chain.nodes}, got start={start!r}.")
        self.alpha, self.exponent, self.seed = float(alpha), float(exponent), seed
        self.node, self.steps = start, 0
        self.visits = np.zeros(self.chain.nodes, dtype=np.int64)
        self._log_target = np.log(self.chain.target)
        self._log_probabilities = [np.log(probabilities) for probabilities in self.chain.probabilities]
        self._log_scale = 0.0  # of s
        self._log_visited = self._log_target.copy()  # of u
        self._uniforms = Uniforms([seed])

    def step(self) -> int:
        """Go on by one step; returns the node that it leads to, which may be the same."""
        cumulative = np.cumsum(self._weights(self.node))
        draw = self._uniforms.at(self.steps)[0] * cumulative[-1]
        self.node = int(self.chain.moves[self.node][np.searchsorted(cumulative, draw, side="right")])
        self.steps += 1
        gamma = step_size(self.steps, self.exponent)
        self._log_scale += math.log1p(-gamma)
        gain = math.log(gamma) - self._log_scale
        self._log_visited[self.node] = np.logaddexp(self._log_visited[self.node], gain)
        self.visits[self.node] += 1
        return self.node

    def probabilities(self, node: int | None = None) -> Array:
        """Where a step from `node` (by default from here) would lead now: `[nodes]`, sums to 1."""
        node = self.node if node is None else node
        weights = self._weights(node)
        result = np.zeros(self.chain.nodes)
        result[self.chain.moves[node]] = weights / weights.sum()
        return result

    @property
    def measure(self) -> Array:
        """x, the weighted measure of past visits: `[nodes]`, sums to 1."""
        measure: Array = np.exp(self._log_visited + self._log_scale)
        return measure

    def state_dict(self) -> dict[str, Any]:
        """What it takes to go on exactly as this walk would."""
        return {
            "config": repr(self),
            "node": self.node,
            "steps": self.steps,
            "visits": torch.tensor(self.visits),
            "log_scale": self._log_scale,
            "log_visited": torch.tensor(self._log_visited),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            CheckpointError: the saved walk was configured in another way; names both.
        """
        if state_dict["config"] != repr(self):
            raise CheckpointError(
                f"load_state_dict: expected {self!r} as configured now, got {state_dict['config']} in the checkpoint."
            )
        self.node, self.steps = state_dict["node"], state_dict["steps"]
        self._log_scale = state_dict["log_scale"]
        self.visits = state_dict["visits"].numpy().copy()
        self._log_visited = state_dict["log_visited"].numpy().copy()

    def __repr__(self) -> str:
        return f"SelfRepellentWalk({self.chain!r}, alpha={self.alpha}, exponent={self.exponent}, seed={self.seed})"

    def _weights(self, node: int) -> Array:
        """Probabilities of the moves from `node`, up to a factor."""
        moves = self.chain.moves[node]
        logits = self._log_probabilities[node] + -self.alpha * (self._log_visited[moves] - self._log_target[moves])
        weights: Array = np.exp(logits - logits.max())
        return weights


def step_size(step: int, exponent: float) -> float:
    """gamma_n of step n >= 1, and of an optimizer whose step sizes decay likewise."""
    return float((step + 1) ** -exponent)


def check(who: str, alpha: float, exponent: float) -> None:
    """Raise ValueError unless alpha and the exponent are in their ranges."""
    if not (math.isfinite(alpha) and alpha >= 0):
        raise ValueError(f"{who}: expected a finite alpha >= 0, got alpha={alpha}.")
    if not 0.5 < exponent <= 1:
        raise ValueError(f"{who}: expected 0.5 < exponent <= 1, got exponent={exponent}.")
