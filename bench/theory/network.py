"""`Network`: a small classifier of digits on n workers, each with its own classes and mini-batches."""

from typing import final

import torch
from torch import Tensor
from torch.nn import functional as F

from gradwire.bench.theory.problems import Gradients, classes

_CLASSES = 10


@final
class Network:
    """Fully connected 64-hidden-10 with a rectifier, all weights in one vector; scikit-learn's digits, sorted by label.

    Args:
        workers: Number n.
        batch: Examples per worker and step.
        hidden: Width.
    """

    def __init__(self, workers: int, batch: int, hidden: int) -> None:
        images, self._labels = classes("digits")
        self._images = images / 16
        self._batch = batch
        parts = list(torch.tensor_split(self._labels.argsort(stable=True), workers))
        self._places = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
        self._sizes = torch.tensor([len(part) for part in parts])
        features = self._images.shape[1]
        self._shapes = [(features, hidden), (1, hidden), (hidden, _CLASSES), (1, _CLASSES)]

    @property
    def parameters(self) -> int:
        """Length of the vector."""
        return sum(rows * columns for rows, columns in self._shapes)

    def start(self) -> Tensor:
        """Random weights `[d]`."""
        generator = torch.Generator().manual_seed(0)
        return 0.1 * torch.randn(self.parameters, generator=generator, dtype=self._images.dtype)

    def gradients(self, seed: int = 0) -> Gradients:
        """Of each worker's next mini-batch; the same batches for equal seeds."""
        generator = torch.Generator().manual_seed(seed)
        workers = len(self._sizes)

        def compute(x: Tensor) -> Tensor:
            picked = (torch.rand(workers, self._batch, generator=generator) * self._sizes[:, None]).long()
            places = self._places.gather(1, picked)
            each = x.expand(workers, *x.shape).detach().requires_grad_()
            losses = self._losses(each, self._images[places][:, None], self._labels[places][:, None])
            (found,) = torch.autograd.grad(losses.sum(), each)
            return found

        return compute

    @torch.no_grad()
    def loss(self, x: Tensor) -> Tensor:
        """Mean cross-entropy over all images, for each of the points `[runs, d]`."""
        return self._losses(x, self._images, self._labels)

    def _losses(self, x: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """`x [..., d]`, images `[..., m, 64]` and labels `[..., m]` that broadcast: mean losses `[...]`."""
        sizes = [rows * columns for rows, columns in self._shapes]
        parts = [
            part.reshape(*x.shape[:-1], *shape)
            for part, shape in zip(torch.split(x, sizes, -1), self._shapes, strict=True)
        ]
        scores = torch.relu(images @ parts[0] + parts[1]) @ parts[2] + parts[3]
        labels = labels.expand(scores.shape[:-1])
        losses: Tensor = F.cross_entropy(scores.flatten(0, -2), labels.flatten(), reduction="none")
        return losses.view(labels.shape).mean(dim=-1)
