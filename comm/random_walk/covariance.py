"""What a self-repellent walk and token SGD on it vary by, as theory predicts.

The kernel is linearised around its target mu and the walk's correlated noise is replaced by white noise of the same
long-run covariance. Everything then splits into the chain's modes: with lambda_i, u_i the eigenvalues other than 1 and
the left eigenvectors of P, a mode of x - mu is pulled back by kappa_i = 1 + alpha (1 + lambda_i), driven by noise of
variance q_i = (1 + lambda_i) / (1 - lambda_i), and enters the gradients' mean with -alpha (1 + lambda_i).

Reference:
    Hu, Doshi, Eun. ICLR 2024. arXiv:2401.09665, theorems 3.2 and 3.3. The recursion for finite n is that of the same
    linear model, before the limit.
"""

import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gradwire.comm.random_walk.markov import MarkovChain
from gradwire.comm.random_walk.self_repellent import check, step_size

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Modes:
    """What the chain's own dynamics are made of, without the stationary mode.

    Args:
        eigenvalues: lambda_i < 1, `[n - 1]`.
        vectors: Left eigenvectors u_i of P as columns, `[n, n - 1]`, with sum_i u_i u_i' = diag(mu) - mu mu'.
    """

    eigenvalues: Array
    vectors: Array

    @classmethod
    def of(cls, chain: MarkovChain) -> "Modes":
        """By the symmetric matrix D^1/2 P D^-1/2, D = diag(mu)."""
        root = np.sqrt(chain.target)
        symmetric = root[:, None] * chain.matrix() / root
        values, vectors = np.linalg.eigh((symmetric + symmetric.T) / 2)
        return cls(values[:-1], root[:, None] * vectors[:, :-1])

    @property
    def noise(self) -> Array:
        """q_i, the long-run variance of the base chain's visits along each mode."""
        return (1 + self.eigenvalues) / (1 - self.eigenvalues)

    def pull(self, alpha: ArrayLike) -> Array:
        """How strongly the walk corrects a mode of its measure, alpha (1 + lambda_i)."""
        return np.asarray(alpha) * (1 + self.eigenvalues)


def measure_covariance(chain: MarkovChain, alpha: float, exponent: float) -> Array:
    """The limit of Cov(x_n) / gamma_n: `[nodes, nodes]`.

        V_x = sum_i q_i / (2 alpha (1 + lambda_i) + 2 - 1{exponent = 1}) u_i u_i'

    Args:
        chain: The base chain.
        alpha: Repellence of the walk, >= 0.
        exponent: Decay of gamma, in (0.5, 1].

    Example:
        >>> import networkx
        >>> chain = MarkovChain.metropolis_hastings(networkx.karate_club_graph())
        >>> [round(float(measure_covariance(chain, alpha, 0.9).trace()), 3) for alpha in (0.0, 1.0, 10.0)]
        [4.168, 1.484, 0.22]
    """
    check("measure_covariance", alpha, exponent)
    modes = Modes.of(chain)
    variance = modes.noise / (2 * modes.pull(alpha) + 2 - (exponent == 1))
    return (modes.vectors * variance) @ modes.vectors.T


def iterate_covariance(
    chain: MarkovChain,
    gradients: ArrayLike,
    hessian: ArrayLike,
    alpha: float,
    exponent: float,
    step_exponent: float,
) -> Array:
    """The limit of Cov(theta_n) / beta_n of token SGD with step sizes beta_n = (n + 1)^-step_exponent: `[d, d]`.

    With exponent < step_exponent it falls as 1/alpha^2, with equal ones as 1/alpha, and with exponent > step_exponent
    not at all. The limit is reached slowly; `mean_squared_error` says what to expect at a given n.

    Args:
        chain: The base chain.
        gradients: Of every node's objective at the minimiser of their mean under mu, `[nodes, d]`.
        hessian: Of that mean there, symmetric and positive definite, `[d, d]`; above 1/2 if step_exponent is 1.
        alpha: Repellence of the walk, >= 0.
        exponent: Decay of gamma, in (0.5, 1].
        step_exponent: Decay of the step sizes, in (0.5, 1].
    """
    modes, curvatures, axes, slopes = _setup(chain, gradients, hessian, alpha, exponent, step_exponent)
    pull, noise = modes.pull(alpha)[:, None], modes.noise[:, None]
    products = noise[:, :, None] * slopes[:, :, None] * slopes[:, None, :]
    correction = float(step_exponent == 1)
    if exponent < step_exponent:
        forcing = products / (1 + pull[:, :, None]) ** 2
    elif exponent > step_exponent:
        forcing = products
    else:
        own = noise / (2 * (1 + pull) - correction)
        mixed = slopes * (noise - pull * own) / (1 + pull + curvatures - correction)
        cross = slopes[:, :, None] * mixed[:, None, :]
        forcing = products - pull[:, :, None] * (cross + cross.transpose(0, 2, 1))
    decay = curvatures[:, None] + curvatures - correction
    covariance: Array = axes @ (forcing.sum(axis=0) / decay) @ axes.T
    return covariance


def mean_squared_error(
    chain: MarkovChain,
    gradients: ArrayLike,
    hessian: ArrayLike,
    alpha: ArrayLike,
    exponent: float,
    step_exponent: float,
    steps: int,
) -> Array:
    """E |theta_n - theta*|^2 of token SGD after each of `steps` steps of the linear model, from theta*.

    Where gamma kappa exceeds 1, which it does in the first steps of a strong repellence, it is cut there: the walk's
    measure cannot leave the simplex as the linear model would.

    Args:
        chain: The base chain.
        gradients: Of every node's objective at the minimiser of their mean under mu, `[nodes, d]`.
        hessian: Of that mean there, symmetric and positive definite, `[d, d]`.
        alpha: Repellence of the walk, >= 0; one or several.
        exponent: Decay of gamma, in (0.5, 1].
        step_exponent: Decay of the step sizes, in (0.5, 1].
        steps: How many.

    Returns:
        `[steps]`, or `[*alpha.shape, steps]`.
    """
    alphas = np.asarray(alpha, dtype=np.float64)
    for value in alphas.flat:
        modes, curvatures, _, slopes = _setup(chain, gradients, hessian, float(value), exponent, step_exponent)
    curvatures, axis = np.unique(curvatures, return_inverse=True)
    sizes = np.zeros((len(slopes), len(curvatures)))  # what enters squared, over axes of equal curvature
    np.add.at(sizes.T, axis, slopes.T**2)
    pull, noise = modes.pull(alphas[..., None])[..., None], modes.noise[:, None]
    own, mixed, iterate = (np.zeros(np.broadcast_shapes(pull.shape, sizes.shape)) for _ in range(3))
    errors = np.empty((*alphas.shape, steps))
    for step in range(1, steps + 1):
        gamma, beta = step_size(step, exponent), step_size(step, step_exponent)
        kept, stays = 1 - np.minimum(1.0, gamma * (1 + pull)), 1 - np.minimum(1.0, beta * curvatures)
        follows = beta * pull
        iterate = stays * (stays * iterate - 2 * follows * mixed) + follows**2 * own + beta**2 * noise
        mixed = kept * (stays * mixed - follows * own) + gamma * beta * noise
        own = kept**2 * own + gamma**2 * noise
        errors[..., step - 1] = (iterate * sizes).sum(axis=(-2, -1))
    return errors


def _setup(
    chain: MarkovChain, gradients: ArrayLike, hessian: ArrayLike, alpha: float, exponent: float, step_exponent: float
) -> tuple[Modes, Array, Array, Array]:
    """Modes, the Hessian's eigenvalues and axes, and each mode's slope along each axis, `[n - 1, d]`."""
    check("covariance", alpha, exponent)
    check("covariance", alpha, step_exponent)
    slopes, matrix = np.asarray(gradients, dtype=np.float64), np.atleast_2d(np.asarray(hessian, dtype=np.float64))
    if slopes.ndim != 2 or slopes.shape[0] != chain.nodes or matrix.shape != (slopes.shape[1],) * 2:
        raise ValueError(
            f"covariance: expected gradients of shape ({chain.nodes}, d) and a hessian of (d, d), got {slopes.shape} "
            f"and {matrix.shape}."
        )
    curvatures, axes = np.linalg.eigh(matrix)
    least = 0.5 if step_exponent == 1 else 0.0
    if not curvatures.min() > least:
        raise ValueError(
            f"covariance: expected a hessian with eigenvalues > {least}, got {curvatures.min()}. "
            "Scale the objectives, or let step sizes fall more slowly."
        )
    if alpha > 0 and 2 * exponent - step_exponent < 0.3:
        warnings.warn(
            f"covariance: expected 2 exponent - step_exponent >= 0.3, got {2 * exponent - step_exponent:.2f}: the "
            "kernel's curvature, which this linear model leaves out, may outweigh the variance. Raise exponent.",
            stacklevel=3,
        )
    modes = Modes.of(chain)
    return modes, curvatures, axes, -modes.vectors.T @ slopes @ axes
