"""Float64 NumPy reference of DeMo for n workers, one tensor, with the momentum in the tensor's own basis."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def dct(x: Array, inverse: bool = False) -> Array:
    """Orthonormal DCT-II along the last dimension, by the FFT of the even extension; its inverse from the matrix."""
    n = x.shape[-1]
    spectrum = np.fft.fft(np.concatenate([x, x[..., ::-1]], axis=-1))[..., :n]
    scale = np.where(np.arange(n) == 0, math.sqrt(1 / n), math.sqrt(2 / n))
    if not inverse:
        return np.real(np.exp(-0.5j * np.pi * np.arange(n) / n) * spectrum) / 2 * scale
    return x @ dct(np.eye(n)).T


def tiles(shape: tuple[int, ...], chunk: int) -> tuple[tuple[int, int], list[tuple[slice, slice]], tuple[int, int]]:
    """The matrix that a tensor is, the blocks that it is cut into, and the size of a block with its padding."""
    lines, columns = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))
    if len(shape) > 1:
        height = math.ceil(lines / math.ceil(lines / chunk))
        width = math.ceil(columns / math.ceil(columns / chunk))
    else:
        pieces = math.ceil(columns / chunk)
        rows = math.ceil(pieces / chunk)
        height = math.ceil(pieces / rows)
        width = math.ceil(columns / (rows * height))
        lines, columns = math.ceil(columns / width), width
    blocks = [
        (slice(top, top + height), slice(left, left + width))
        for top in range(0, lines, height)
        for left in range(0, columns, width)
    ]
    return (lines, columns), blocks, (height, width)


def cut(x: Array, chunk: int) -> list[Array]:
    """The blocks of a tensor, padded with zeros."""
    (lines, columns), blocks, size = tiles(x.shape, chunk)
    matrix = np.zeros(lines * columns)
    matrix[: x.size] = x.ravel()
    found = []
    for where in blocks:
        part = matrix.reshape(lines, columns)[where]
        found.append(np.zeros(size))
        found[-1][: part.shape[0], : part.shape[1]] = part
    return found


def largest(block: Array, k: int, chunk: int) -> Array:
    """All but the largest coefficients set to zero; of a small block the same share is kept."""
    kept = block.copy()
    kept.ravel()[np.argsort(-np.abs(block), axis=None)[math.ceil(k * block.size / chunk**2) :]] = 0
    return kept


def change_basis(block: Array, both: bool, inverse: bool = False) -> Array:
    """Along lines, and for matrices along columns, too."""
    block = dct(block, inverse)
    return dct(block.T, inverse).T if both else block


def join(found: Sequence[Array], shape: tuple[int, ...], chunk: int) -> Array:
    """The tensor of these blocks, without the padding."""
    (lines, columns), blocks, _ = tiles(shape, chunk)
    matrix = np.zeros((lines, columns))
    for block, where in zip(found, blocks, strict=True):
        part = matrix[where]
        part[:] = block[: part.shape[0], : part.shape[1]]
    return matrix.ravel()[: math.prod(shape)].reshape(shape)


def demo(
    weight: Array,
    grads: Sequence[Any],
    lrs: Sequence[float],
    *,
    k: int = 32,
    chunk: int = 64,
    form: str = "2024",
    momentum: float = 0.999,
    alpha: float = 1.0,
    base: str = "sign",
    weight_decay: float = 0.0,
    transform: str = "dct",
    values: str = "fp32",
    **_: Any,
) -> Array:
    """Weights after all steps.

    Args:
        weight: Where all workers start.
        grads: For every step, the gradients of all workers `[n, *shape]`, or of one worker.
        lrs: For every step, the learning rate.
    """
    weight = weight.astype(np.float64)
    grads = [np.asarray(step, dtype=np.float64).reshape(-1, *weight.shape) for step in grads]
    both = weight.ndim > 1
    delta = [cut(np.zeros(weight.shape), chunk) for _ in grads[0]]  # of every worker, in its own basis

    def spectrum(block: Array, inverse: bool = False) -> Array:
        return change_basis(block, both, inverse) if transform == "dct" else block

    for step, lr in zip(grads, lrs, strict=True):
        weight = (1 - lr * weight_decay) * weight
        merged = [np.zeros_like(block) for block in delta[0]]
        senders = [np.zeros_like(block) for block in delta[0]]
        for worker, g in zip(delta, step, strict=True):
            gained = lr * g if form == "2024" else (1 - momentum) * g
            for b, block in enumerate(cut(gained, chunk)):
                worker[b] = momentum * worker[b] + block
                sent = largest(spectrum(worker[b]), k, chunk)
                worker[b] = worker[b] - alpha * spectrum(sent, inverse=True)
                merged[b] += np.sign(sent) if values == "sign" else sent
                senders[b] += sent != 0
        for total, count in zip(merged, senders, strict=True):
            total /= np.maximum(count, 1) if form == "2024" else len(step)
        update = join([spectrum(total, inverse=True) for total in merged], weight.shape, chunk)
        if base == "orthogonalized":
            u, _, vt = np.linalg.svd(update.reshape(len(update), -1), full_matrices=False)
            update = (u @ vt).reshape(update.shape)
        weight = weight - lr * (np.sign(update) if base == "sign" else update)
    return weight
