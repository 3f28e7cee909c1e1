"""`StackedTrainer`: trains several clients at once, as one batched model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Literal, final

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from gradwire.federated.flat_model import FlatModel
from gradwire.federated.local_training import LocalTraining, Loss

Vectorize = Literal["auto"] | bool
"""Whether a cohort's clients are trained at once: never, always, or where it is exact and faster."""

STACK = 128
"""Clients that are trained at once, at most."""
_CALL, _SHARE = 9.0, 0.25
"""Cost of a call for n clients at once, `_CALL + _SHARE n`, in steps of one client (`StackedTrainer.pays`)."""
_ALONE = 10
"""Groups below this many clients go one after the other, which is faster."""
_MAX_NUMEL = {"cpu": 10_000, "cuda": 1_000_000}
"""Of models in stacks by default."""
_MIN_GAIN = 1.2
"""Expected gain in speed above which clients are trained at once."""

Batch = tuple[Tensor, ...]


@final
@dataclass(frozen=True)
class Trained:
    """What a client ended at.

    Args:
        vector: y `[numel]`.
        steps: Batches that it trained on.
        loss: Mean over them.
        total_gradient: Sum of their (clipped) gradients, `[numel]`, if asked for.
    """

    vector: Tensor
    steps: int
    loss: float
    total_gradient: Tensor | None


@final
class StackedTrainer:
    """Carries out a `LocalTraining` for several clients at once: `LocalTrainer` on stacked vectors.

        [clients, numel] --vmap(grad(loss))--> gradients [clients, numel] --> the same steps of SGD, on all rows

    Every client sees the batches that it would see alone, and nothing is padded: clients whose batches have equally
    many examples are taken together, by `torch.func`, and the few that have no company go through the module itself.
    Clients are ordered by their work, so that those that have finished are the last rows and drop out of the stack.
    Results are those of `LocalTrainer` up to rounding.

    Args:
        model: Whose module is trained; its own vector is left alone.
        loss: Of the module and a batch. Neither may draw random numbers, change buffers, or branch on values.
        training: What a client does; SGD, not another optimizer.

    Cost:
        Per client of a stack its model and gradient, and a vector each for momentum, correction and sum of gradients
        where there is one.

    Example:
        >>> model = FlatModel(nn.Linear(1, 1, bias=False))
        >>> trainer = StackedTrainer(model, lambda module, x: module(x).mean(), LocalTraining(lr=0.5))
        >>> batches = [iter([(torch.ones(2, 1),)]), iter([(torch.full((2, 1), 3.0),)])]
        >>> [client.vector for client in trainer.run(torch.zeros(1), batches, [1, 1], [2, 2], 0.5)]
        [tensor([-0.5000]), tensor([-1.5000])]

    Differences from `LocalTrainer`:
        Rounding; and memory for all clients of a stack.
    """

    def __init__(self, model: FlatModel, loss: Loss, training: LocalTraining) -> None:
        self.model, self.training = model, training
        self._loss = _LossOf(model.module, loss)
        self._names = ["module." + name for name in model.names]
        self._shapes = [parameter.shape for parameter in model.parameters]
        kind = "cpu" if model.vector.device.type == "cpu" else "cuda"
        has_kernels = any(hasattr(part, "kernel_size") for part in model.module.modules())
        self.too_large = model.numel > _MAX_NUMEL[kind] or (kind == "cpu" and has_kernels)
        self._gradients = vmap(grad_and_value(self._loss_at), randomness="error")

    def _loss_at(self, values: list[Tensor], batch: Batch) -> Tensor:
        result: Tensor = functional_call(self._loss, dict(zip(self._names, values, strict=True)), batch)
        return result

    def why_impossible(self, batch: Batch) -> str | None:
        """What stands against training so, found by trying it on a batch; None if nothing does."""
        model, training = self.model, self.training
        if training.optimizer is not None:
            return "LocalTraining has an optimizer of its own"
        if any(True for _ in model.module.buffers()):
            return "the module has buffers, which training may change"
        values = [value.expand(2, *value.shape) for value in model.values]
        try:
            grads, losses = self._gradients(values, tuple(tensor.expand(2, *tensor.shape) for tensor in batch))
        except Exception as error:
            return f"torch.func fails: {error}"
        alone, loss = self._alone(model.values, batch)
        exact = 1e3 * torch.finfo(loss.dtype).eps
        for one, two in zip([loss, *alone], [losses, *grads], strict=True):
            if float((two - one).abs().max()) > exact * max(1.0, float(one.abs().max())):
                return "torch.func finds another gradient"
        return None

    def pays(self, steps: Sequence[int], examples: Sequence[int]) -> bool:
        """Whether these clients are trained faster at once than one after the other: small models, many clients.

        A stack saves the overhead of calls, which is paid once for all its clients, though about ten times as high; it
        costs that their models do not stay in the cache. Measured on a CPU with one thread, MLPs, batches of 10, for
        10, 16, 32 and 100 clients of equal size: 982 parameters 0.9, 1.4, 2.5 and 4.6 times as fast as one after the
        other, 7,960 parameters 0.9, 1.2, 1.9 and 2.0, 59,635 parameters 0.7, 0.8, 1.2 and 1.2, or half of that on a
        busy machine. Convolutions gain nothing there. For accelerators the limits are estimates.
        """
        if self.too_large or len(steps) < _ALONE:
            return False
        return expected_gain(steps, examples, self.training.batch_size) >= _MIN_GAIN

    def run(
        self,
        start: Tensor,
        batches: Sequence[Iterator[Batch]],
        steps: Sequence[int],
        examples: Sequence[int],
        lr: float,
        *,
        corrections: Sequence[Tensor | None] | None = None,
        proximal: float = 0.0,
        sums_gradients: bool = False,
    ) -> list[Trained]:
        """Train from `start`.

        Args:
            start: x `[numel]`.
            batches: Of every client.
            steps: How many there are, of every client.
            examples: Of every client; only decides who goes with whom.
            lr: Learning rate.
            corrections: Added to every gradient of a client, `[numel]`; for all clients or for none.
            proximal: Of the pull towards x, >= 0.
            sums_gradients: Whether to sum up gradients.
        """
        training, count = self.training, len(batches)
        order = sorted(range(count), key=lambda client: (steps[client], examples[client]), reverse=True)
        sources, left = [batches[client] for client in order], [steps[client] for client in order]
        y = start.expand(count, -1).clone()
        values = self._views(y)
        given = [corrections[client] for client in order] if corrections is not None else []
        correction = torch.stack([c for c in given if c is not None]) if given and given[0] is not None else None
        losses = torch.zeros(count, dtype=y.dtype, device=y.device)
        plain = training.plain and training.max_norm is None and not proximal and correction is None
        plain = plain and not sums_gradients
        gradient = torch.empty_like(y[:0] if plain else y)
        momentum = torch.zeros_like(y if training.momentum else y[:0])
        total = torch.zeros_like(y if sums_gradients else y[:0])
        parts = self._views(gradient)
        for step in range(max(left, default=0)):
            active = sum(there > step for there in left)
            for rows, grads, loss in self._groups(values, [next(source) for source in sources[:active]]):
                losses[rows] += loss
                if plain:
                    torch._foreach_add_([value[rows] for value in values], grads, alpha=-lr)
                else:
                    torch._foreach_copy_([part[rows] for part in parts], grads)
            if plain:
                continue
            g, moved = gradient[:active], y[:active]
            if training.max_norm is not None:
                norms = torch.linalg.vector_norm(g, dim=1, keepdim=True)
                g.mul_((training.max_norm / (norms + 1e-6)).clamp_(max=1.0))
            if sums_gradients:
                total[:active] += g
            if training.weight_decay:
                g.add_(moved, alpha=training.weight_decay)
            if proximal:
                g.add_(moved - start, alpha=proximal)
            if correction is not None:
                g += correction[:active]
            if training.momentum:
                g = momentum[:active].mul_(training.momentum).add_(g)
            moved.add_(g, alpha=-lr)
        means = [loss / max(1, k) for loss, k in zip(losses.tolist(), left, strict=True)]
        return [
            Trained(y[row], left[row], means[row], total[row] if sums_gradients else None)
            for row, _ in sorted(enumerate(order), key=itemgetter(1))
        ]

    def _groups(self, values: list[Tensor], batches: list[Batch]) -> Iterator[tuple[slice, list[Tensor], Tensor]]:
        """Gradients and losses of rows whose batches have equally many examples, one such group after the other."""
        first = 0
        for _, group in groupby(batches, key=lambda batch: [tensor.shape for tensor in batch]):
            same = list(group)
            if len(same) < _ALONE:
                for row, batch in enumerate(same, first):
                    yield (slice(row, row + 1), *self._alone([value[row] for value in values], batch))
            else:
                rows = slice(first, first + len(same))
                batch = tuple([torch.stack(tensors) for tensors in zip(*same, strict=True)])
                yield (rows, *self._gradients([value[rows] for value in values], batch))
            first += len(same)

    def _alone(self, values: list[Tensor], batch: Batch) -> tuple[list[Tensor], Tensor]:
        """Gradient and loss of one client, in the module itself, whose parameters are its row meanwhile."""
        model = self.model
        model.point_at(values)
        try:
            loss = self._loss(*batch)
            grads = torch.autograd.grad(loss, model.parameters, allow_unused=True, materialize_grads=True)
        finally:
            model.point_at(model.values)
        return [grad[None] for grad in grads], loss.detach()

    def _views(self, stacked: Tensor) -> list[Tensor]:
        """The parts of `[clients, numel]`: `[clients, *shape]`."""
        sizes = [shape.numel() for shape in self._shapes]
        parts: Sequence[Tensor] = torch.split(stacked, sizes, dim=1)
        return [part.view(len(part), *shape) for part, shape in zip(parts, self._shapes, strict=True)]


def expected_gain(steps: Sequence[int], examples: Sequence[int], batch_size: int | None) -> float:
    """How many times faster clients with so many steps and examples are trained at once, for a small model.

    Example:
        >>> expected_gain([5] * 100, [20] * 100, batch_size=4)
        2.9411764705882355
        >>> expected_gain([1] * 100, list(range(1, 101)), batch_size=None)  # no two batches are of one size
        1.0
    """
    sizes = []
    for count, there in sorted(zip(steps, examples, strict=True), reverse=True):
        if not count or not there:
            continue
        size = there if batch_size is None else min(batch_size, there)
        epoch = -(-there // size)
        last = there - (epoch - 1) * size
        sizes.append([last if step % epoch == epoch - 1 else size for step in range(count)])
    cost = 0.0
    for step in range(max(steps, default=0)):
        for _, same in groupby(row[step] for row in sizes if len(row) > step):
            clients = len(list(same))
            cost += clients if clients < _ALONE else _CALL + _SHARE * clients
    return sum(map(len, sizes)) / cost if cost else 1.0


class _LossOf(nn.Module):
    """The loss as a module, so that `functional_call` can put other parameters in its place."""

    def __init__(self, module: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.module, self._loss = module, loss

    def forward(self, *batch: Tensor) -> Tensor:
        return self._loss(self.module, *batch)
