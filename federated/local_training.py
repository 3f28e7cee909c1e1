"""`LocalTraining`: what a client does between two messages."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.autograd import Variable

from gradwire.federated.flat_model import FlatModel

_run_backward = Variable._execution_engine.run_backward

Loss = Callable[..., Tensor]
"""`loss(module, *batch)`: the mean loss of a batch, 0-d."""


@final
@dataclass(frozen=True)
class LocalTraining:
    """Steps of SGD from the server's model, on one client's examples.

        g <- gradient of the batch, clipped;  g <- g + correction + proximal (y - x) + weight_decay y
        m <- momentum m + g;  y <- y - lr m

    The correction is the algorithm's (control variates), x the model that the server sent. The momentum starts at zero
    in every round, as in almost all published experiments.

    Args:
        lr: Learning rate, > 0: a number, or a function of the round, counted from 0.
        epochs: Passes over a client's examples, >= 1; unless `steps` is given.
        steps: Batches in place of epochs, >= 1: a number, or a function of (round, client) for clients that do not all
            get equally far.
        batch_size: Examples in a batch, >= 1; None for all of the client's.
        momentum: 0 <= momentum < 1.
        weight_decay: >= 0. It pulls towards zero; `FedProx` pulls towards x.
        max_norm: Clip the norm of a batch's gradient to it, > 0; before the correction, so that control variates stay
            gradients.
        shuffle: In every epoch, by (seed, round, client); otherwise in the order of the rows.
        optimizer: Another local optimizer in place of SGD: a function that makes a `torch.optim.Optimizer` from
            parameters. Its state starts anew in every round; `momentum` and `weight_decay` must be 0, and `lr` is set
            in every round.

    Cost:
        A forward and backward pass per batch, and one pass over the parameters for each term that is there.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> LocalTraining(lr=0.1, steps=10, batch_size=32).momentum
        0.0
    """

    lr: float | Callable[[int], float]
    epochs: int = 1
    steps: int | Callable[[int, int], int] | None = None
    batch_size: int | None = 32
    momentum: float = 0.0
    weight_decay: float = 0.0
    max_norm: float | None = None
    shuffle: bool = True
    optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer] | None = None

    def __post_init__(self) -> None:
        positive: list[tuple[str, Any]] = [
            ("lr", self.lr),
            ("epochs", self.epochs),
            ("steps", self.steps),
            ("batch_size", self.batch_size),
            ("max_norm", self.max_norm),
        ]
        for name, value in positive:
            if value is not None and not callable(value) and not value > 0:
                raise ValueError(f"LocalTraining: expected {name} > 0, got {name}={value}.")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"LocalTraining: expected 0 <= momentum < 1, got momentum={self.momentum}.")
        if not self.weight_decay >= 0:
            raise ValueError(f"LocalTraining: expected weight_decay >= 0, got weight_decay={self.weight_decay}.")
        if self.optimizer is not None and (self.momentum or self.weight_decay):
            raise ValueError(
                "LocalTraining: expected momentum=0 and weight_decay=0 beside an optimizer, got "
                f"momentum={self.momentum}, weight_decay={self.weight_decay}. Set them in the optimizer."
            )

    @property
    def plain(self) -> bool:
        """Whether x - y is lr times the sum of corrected gradients: SGD, without momentum and weight decay."""
        return self.optimizer is None and not self.momentum and not self.weight_decay

    def lr_at(self, round: int) -> float:
        """The learning rate of a round."""
        return self.lr(round) if callable(self.lr) else self.lr

    def steps_of(self, round: int, client: int) -> int | None:
        """How many batches a client does in a round; None for whole epochs."""
        return self.steps(round, client) if callable(self.steps) else self.steps

    def steps_for(self, num_examples: int, round: int, client: int) -> int:
        """The same as a number, for a client with so many examples."""
        steps = self.steps_of(round, client)
        if num_examples == 0:
            return 0
        return steps if steps is not None else self.epochs * -(-num_examples // (self.batch_size or num_examples))


@final
class LocalTrainer:
    """Carries out a `LocalTraining` in a resident model.

    Args:
        model: Where clients are trained.
        loss: Of the module and a batch.
        training: What a client does.
    """

    def __init__(self, model: FlatModel, loss: Loss, training: LocalTraining) -> None:
        self.model, self.loss, self.training = model, loss, training
        self._optimizer = None if training.optimizer is None else training.optimizer(model.parameters)
        self._momentum = torch.zeros_like(model.vector) if training.momentum else None
        self._directions = [] if self._momentum is None else model.views(self._momentum)
        self._one = torch.ones((), dtype=model.vector.dtype, device=model.vector.device)

    def run(
        self,
        start: Tensor,
        batches: Iterable[tuple[Tensor, ...]],
        lr: float,
        *,
        correction: Tensor | None = None,
        proximal: float = 0.0,
        total_gradient: Tensor | None = None,
    ) -> tuple[int, float]:
        """Train from `start`; the model's vector holds the result.

        Args:
            start: x `[numel]`.
            batches: What to train on.
            lr: Learning rate.
            correction: Added to every gradient, `[numel]`.
            proximal: Of the pull towards x, >= 0.
            total_gradient: If given, the sum of all (clipped) gradients of batches is put here, `[numel]`.

        Returns:
            Number of steps, and the mean loss over batches (zero without a batch).
        """
        model, optimizer, momentum = self.model, self._optimizer, self._momentum
        y = model.vector.copy_(start)
        if momentum is not None:
            momentum.zero_()
        if optimizer is not None:
            optimizer.state.clear()
            for group in optimizer.param_groups:
                group["lr"] = lr
        total = None if total_gradient is None else model.views(total_gradient.zero_())
        has_terms = correction is not None or proximal or self.training.weight_decay or momentum is not None
        losses = []
        for batch in batches:
            losses.append(self._backward(batch))
            if total is not None:
                model.add_grad(total)
            if has_terms:
                self._add_terms(start, lr, correction, proximal)
            if optimizer is not None:
                optimizer.step()
            elif momentum is None:
                model.add_grad(model.values, -lr)
            else:
                model.add_grad(self._directions)
                y.add_(momentum, alpha=-lr)
        model.clear_grad()
        return len(losses), _mean(losses)

    def gradient_at(self, start: Tensor, batches: Iterable[tuple[Tensor, ...]], out: Tensor) -> None:
        """Put the gradient of the mean loss of all examples in `batches` at `start` into `out`.

        The model's vector holds `start` afterwards. Gradients are clipped as in training, batch by batch.
        """
        model, count = self.model, 0
        model.vector.copy_(start)
        parts = model.views(out.zero_())
        for batch in batches:
            self._backward(batch)
            model.add_grad(parts, batch[0].shape[0])
            count += batch[0].shape[0]
        model.clear_grad()
        out.div_(max(1, count))

    def _backward(self, batch: tuple[Tensor, ...]) -> Tensor:
        """Leave the (clipped) gradient of a batch in the parameters, and return its loss."""
        for parameter in self.model.parameters:
            parameter.grad = None  # otherwise the backward pass adds, which takes another pass over it
        loss = self.loss(self.model.module, *batch)
        if loss.ndim or loss.dtype != self._one.dtype:
            loss.backward()  # type: ignore[no-untyped-call]
        else:  # the same without `Tensor.backward`'s checks, which take as long as a small model's backward pass
            _run_backward((loss,), (self._one,), False, False, (), allow_unreachable=True, accumulate_grad=True)
        if self.training.max_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters, self.training.max_norm)
        return loss.detach()

    def _add_terms(self, start: Tensor, lr: float, correction: Tensor | None, proximal: float) -> None:
        """Add all terms but the gradient to what it will be added to.

        That is the momentum, or, without it, the parameters themselves; or the gradients that an optimizer takes.
        """
        model, training, y = self.model, self.training, self.model.vector
        if self._optimizer is not None:
            to, scale = torch.zeros_like(y), 1.0
        elif self._momentum is not None:
            to, scale = self._momentum.mul_(training.momentum), 1.0
        else:
            to, scale = y, -lr
        pull = y - start if proximal else None
        if training.weight_decay:
            to.add_(y, alpha=scale * training.weight_decay)
        if pull is not None:
            to.add_(pull, alpha=scale * proximal)
        if correction is not None:
            to.add_(correction, alpha=scale)
        if self._optimizer is not None:
            model.add_grad(parts := model.views(to))
            for parameter, part in zip(model.parameters, parts, strict=True):
                parameter.grad = part


def _mean(losses: list[Tensor]) -> float:
    """Mean of 0-d tensors, with one synchronisation on an accelerator."""
    if not losses:
        return 0.0
    on_host = losses[0].device.type == "cpu"
    values = [loss.item() for loss in losses] if on_host else torch.stack(losses).tolist()
    return sum(values) / len(values)
