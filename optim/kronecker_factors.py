"""Inverse Kronecker factors of many layers: updated by rank one, applied to gradients, stacked by size."""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from gradwire.compression.base import compute_dtype
from gradwire.optim.kernels import CHUNK
from gradwire.optim.kronecker_layers import Layer


@dataclass(frozen=True)
class Rule:
    """How a vector enters an inverse factor: (decay S^-1 + weight v v^T)^-1, where S = keep F + (1 - keep) I.

    Args:
        decay: Of what the factor holds so far, 0 < decay <= 1.
        weight: Of the new vector's square, >= 0.
        keep: Share of F where it is mixed with the identity, 0 < keep <= 1.
        above: It is mixed where its largest entry exceeds this; 0 for always.
    """

    decay: float
    weight: float
    keep: float
    above: float


def sherman_morrison_(inverses: Tensor, vectors: Tensor, rule: Rule) -> None:
    """Let a vector enter each inverse factor, in place.

        u = S v,    F <- (S - weight u u^T / (decay + weight v^T u)) / decay

    A vector that is zero or not finite changes nothing. One so long that v^T u > eps^(-1/2), 3000 in float32, enters as
    a shorter one: rounding could leave the factor indefinite otherwise. Where v^T u < 0 it is, and the vector is left
    out until mixing has mended it.

    Args:
        inverses: `[n, d, d]`, symmetric and positive definite, so that the largest entry is on the diagonal.
        vectors: `[n, d]`.
        rule: The numbers above.
    """
    wide = inverses.to(compute_dtype(inverses.dtype))
    v = vectors.to(wide.dtype)
    new = torch.isfinite(v).all(1) & (v != 0).any(1)
    v = torch.where(new[:, None], v, 0)
    diagonal = wide.diagonal(dim1=-2, dim2=-1)
    mixed = diagonal.amax(1) > rule.above
    keep = torch.where(mixed, torch.full_like(v[:, 0], rule.keep), 1.0)

    u = keep[:, None] * torch.bmm(v[:, None, :], wide).squeeze(1) + (1 - keep)[:, None] * v
    product = (v * u).sum(1)
    new &= torch.isfinite(product)
    # As if v were so much shorter that no correction takes more digits than there are.
    shorter = (product.clamp(max=_most(wide.dtype)) / product).where(product > 0, 0.0)
    product = product * shorter
    # With the root on both sides the factor stays symmetric to the bit.
    root = (shorter * rule.weight / (rule.decay * (rule.decay + rule.weight * product))).sqrt()
    u = torch.where(new[:, None], u * root[:, None], 0)
    wide *= torch.where(new, keep / rule.decay, 1.0)[:, None, None]
    diagonal += torch.where(new, (1 - keep) / rule.decay, 0.0)[:, None]
    wide.addcmul_(u[:, :, None], u[:, None, :], value=-1)
    if wide is not inverses:
        inverses.copy_(wide)


def _most(dtype: torch.dtype) -> float:
    """Of v^T u, which says how much a correction shrinks the factor along v: half of the digits."""
    return 1 / math.sqrt(torch.finfo(dtype).eps)


@final
class Factors:
    """The inverse factors of all layers, identities at first.

    Factors of one size are one tensor `[n, d, d]`, in which those of equally shaped layers stand side by side: a step
    takes a few kernels per size and per shape, however many layers there are.

    Args:
        layers: On one device.
        dtype: Of the factors; None for float32, or float64 if a layer has it.
    """

    def __init__(self, layers: Sequence[Layer], dtype: torch.dtype | None) -> None:
        devices = {layer.weight.device for layer in layers}
        if len(devices) > 1:
            raise ValueError(f"MKOR: expected all layers on one device, got {', '.join(sorted(map(str, devices)))}.")
        self.device = layers[0].weight.device
        self.compute = torch.float64 if any(layer.dtype == torch.float64 for layer in layers) else torch.float32
        shapes: dict[tuple[int, int, bool], list[Layer]] = defaultdict(list)
        for layer in layers:
            shapes[layer.outputs, layer.inputs, layer.bias is not None].append(layer)
        self._shapes = list(shapes.values())
        self._members: dict[int, list[tuple[Layer, str]]] = defaultdict(list)
        place: dict[tuple[Layer, str], tuple[int, int]] = {}
        for alike in self._shapes:
            for side in ("outputs", "inputs"):
                for layer in alike:
                    size: int = getattr(layer, side)
                    place[layer, side] = size, len(self._members[size])
                    self._members[size].append((layer, side))
        self._stacks = {
            size: torch.eye(size, dtype=dtype or self.compute, device=self.device).repeat(len(members), 1, 1)
            for size, members in self._members.items()
        }
        self.numel = sum(size * len(members) for size, members in self._members.items())
        self._factor = {key: self._stacks[size][i] for key, (size, i) in place.items()}
        self._place = place

    @property
    def nbytes(self) -> int:
        """Memory of all factors."""
        return sum(stack.nbytes for stack in self._stacks.values())

    def of(self, layer: Layer) -> dict[str, Tensor]:
        """Both factors of a layer, in place: `[outputs, outputs]` and `[inputs, inputs]`."""
        return {"output_inverse": self._factor[layer, "outputs"], "input_inverse": self._factor[layer, "inputs"]}

    def vectors(self, scale: Tensor | float) -> Tensor:
        """The statistics of all layers in one vector `[numel]`, gradients divided by `scale`."""
        parts: list[Tensor] = []
        for members in self._members.values():
            for layer, side in members:
                parts += layer.input_parts() if side == "inputs" else [layer.output_sum() / scale]
        return torch.cat([part.to(self.compute) for part in parts])

    def update_(self, vectors: Tensor, rule: Rule) -> None:
        """Let the vectors, as `vectors` arranges them, enter their factors."""
        sizes = [stack.shape[0] * stack.shape[1] for stack in self._stacks.values()]
        for stack, run in zip(self._stacks.values(), torch.split(vectors, sizes), strict=True):
            sherman_morrison_(stack, run.view(stack.shape[:2]), rule)

    def precondition_(self, *, rescale: bool) -> None:
        """Replace the gradient G of every layer that has one by L^-1 G R^-1, if `rescale` with the norm of G."""
        for alike in self._shapes:
            for layers in _chunks([layer for layer in alike if layer.weight.grad is not None]):
                grads = self._grads(layers)
                left, right = (self._inverses(layers, side) for side in ("outputs", "inputs"))
                updates = torch.bmm(torch.bmm(left, grads.to(left.dtype)), right).to(self.compute)
                if rescale:
                    norms = [torch.linalg.vector_norm(x, dim=(1, 2)) for x in (grads, updates)]
                    updates *= torch.where(norms[1] > 0, norms[0] / norms[1], 1.0)[:, None, None]
                self._write(layers, updates)

    def _grads(self, layers: Sequence[Layer]) -> Tensor:
        """`[n, outputs, inputs]`."""
        first = layers[0]
        grads = torch.empty((len(layers), first.outputs, first.inputs), dtype=self.compute, device=self.device)
        self._columns(layers, grads, write=False)
        return grads

    def _write(self, layers: Sequence[Layer], updates: Tensor) -> None:
        self._columns(layers, updates, write=True)

    def _columns(self, layers: Sequence[Layer], matrices: Tensor, *, write: bool) -> None:
        """Copy the gradients of weights and biases into these matrices, or back."""
        pairs: list[tuple[Tensor, Tensor]] = []
        for layer, matrix in zip(layers, matrices.unbind(), strict=True):
            assert layer.weight.grad is not None
            weight = matrix if layer.bias is None else matrix[:, :-1]
            pairs.append((torch.unflatten(weight, 1, layer.weight.shape[1:]), layer.weight.grad))
            if layer.bias is not None and layer.bias.grad is not None:
                pairs.append((matrix[:, -1], layer.bias.grad))
            elif layer.bias is not None and not write:
                matrix[:, -1].zero_()
        ours, theirs = [list(xs) for xs in zip(*pairs, strict=True)]
        torch._foreach_copy_(*((theirs, ours) if write else (ours, theirs)))

    def _inverses(self, layers: Sequence[Layer], side: str) -> Tensor:
        """`[n, d, d]`, a view where the layers stand side by side."""
        size, first = self._place[layers[0], side]
        last = self._place[layers[-1], side][1] + 1
        if last - first == len(layers):
            found = self._stacks[size][first:last]
        else:
            found = torch.stack([self._factor[layer, side] for layer in layers])
        return found.to(self.compute) if found.dtype == torch.float16 else found  # it has not the range for gradients


def _chunks(layers: Sequence[Layer]) -> Iterator[Sequence[Layer]]:
    """Of so many layers at once that copies of their gradients stay small."""
    step = max(1, CHUNK // (layers[0].outputs * layers[0].inputs)) if layers else 1
    for first in range(0, len(layers), step):
        yield layers[first : first + step]
