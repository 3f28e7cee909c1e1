"""Float64 NumPy references of MKOR and MKOR-H: a whole training run, with factors inverted as matrices.

Nothing here knows the formula of Sherman and Morrison: factors are kept, not their inverses, and inverted every step.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def mkor(
    layers: Sequence[tuple[Array, Array | None]],
    batches: Sequence[tuple[Array, Array]],
    *,
    lr: float,
    momentum: float = 0.0,
    decay: float = 0.95,
    every: int = 1,
    inverse: str = "exact",
    max_norm: float = 10.0,
    zeta: float = 0.9,
    rescale: bool = True,
) -> list[tuple[Array, Array | None]]:
    """Weights `[outputs, inputs]` and biases of a perceptron with tanh between its layers, after one step per batch.

    The loss is the mean square error over all entries; the base is SGD.
    """
    weights = [np.array(w) if b is None else np.column_stack([w, b]) for w, b in layers]
    biased = [b is not None for _, b in layers]
    factors = [[np.eye(w.shape[0]), np.eye(w.shape[1])] for w in weights]
    buffers = [np.zeros_like(w) for w in weights]
    for step, (x, target) in enumerate(batches):
        inputs, output_grads = _backpropagate(weights, biased, x, target)
        for i, (a, g) in enumerate(zip(inputs, output_grads, strict=True)):
            if step % every == 0:
                for side, vector in enumerate((g.sum(0), a.mean(0))):
                    factors[i][side] = _corrected(factors[i][side], vector, decay, inverse, max_norm, zeta)
            gradient = g.T @ a
            left, right = (np.linalg.inv(factor) for factor in factors[i])
            update = left @ gradient @ right
            if rescale:
                update *= np.linalg.norm(gradient) / np.linalg.norm(update)
            buffers[i] = momentum * buffers[i] + update
            weights[i] = weights[i] - lr * buffers[i]
    return [(w[:, :-1], w[:, -1]) if bias else (w, None) for w, bias in zip(weights, biased, strict=True)]


def mkorh(
    losses: Sequence[float],
    *,
    windows: tuple[int, int] = (20, 200),
    check_every: int = 100,
    threshold: float = 0.01,
    patience: int = 3,
    min_steps: int = 500,
) -> int | None:
    """The step after which MKOR-H is its base alone, counted from 1; None if it never is."""
    count = 0
    averages = [losses[0], losses[0]]
    for t, loss in enumerate(losses, 1):
        for i, window in enumerate(windows):
            share = 1 / t if t < window else 1 / window
            averages[i] = (1 - share) * averages[i] + share * loss
        if t % check_every or t < min_steps or t < windows[1]:
            continue
        fast, slow = averages
        per_step = (slow - fast) / (windows[1] - windows[0]) / abs(slow)
        if per_step * check_every < threshold:
            count += 1
        elif per_step * check_every > 2 * threshold:
            count = 0
        if count == patience:
            return t
    return None


def _corrected(factor: Array, vector: Array, decay: float, inverse: str, max_norm: float, zeta: float) -> Array:
    """The factor with a new vector in it."""
    identity = np.eye(len(factor))
    inverted = np.linalg.inv(factor)
    if inverse == "reference":
        return np.linalg.inv(decay * inverted + (1 - decay) * identity) + np.outer(vector, vector)
    if np.abs(inverted).max() > max_norm:
        factor = np.linalg.inv(zeta * inverted + (1 - zeta) * identity)
    return decay * factor + (1 - decay) * np.outer(vector, vector)


def _backpropagate(
    weights: Sequence[Array], biased: Sequence[bool], x: Array, target: Array
) -> tuple[list[Array], list[Array]]:
    """Of every layer the inputs, with ones for the bias, and the gradients of the outputs, per sample."""
    inputs, outputs = [], []
    for i, (w, bias) in enumerate(zip(weights, biased, strict=True)):
        a = x if i == 0 else np.tanh(outputs[-1])
        inputs.append(np.column_stack([a, np.ones(len(a))]) if bias else a)
        outputs.append(inputs[-1] @ w.T)
    grads = [2 * (outputs[-1] - target) / target.size]
    for i in range(len(weights) - 1, 0, -1):
        back = grads[0] @ weights[i][:, : outputs[i - 1].shape[1]]
        grads.insert(0, back * (1 - np.tanh(outputs[i - 1]) ** 2))
    return inputs, grads
