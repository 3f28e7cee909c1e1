"""`Players`: the parameters of a game by group, and the operator whose zero is its solution."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from gradwire.compression.base import compute_dtype

Closure = Callable[[], Any]
"""Evaluates the loss and returns it."""

Prox = Callable[[Tensor, Any], object]
"""Makes a tensor its proximal point for a step size, in place."""


@dataclass(frozen=True)
class _Player:
    group: Mapping[str, Any]
    prox: Prox | None
    own: slice


@final
class Players:
    """Lists with one tensor per parameter that takes part, in one order, and what is done to them group by group.

    The operator of a game is each player's gradient of what it minimises: of a loss the gradient, or with
    `maximize=True` the gradient with its sign changed.

    Args:
        who: The optimizer, for messages.
        groups: Its parameter groups.
        proxes: The proximal operator of each group, if any.
        takes_part: Which parameters do.
        workers: Simulated workers, whose operators are stacked; 1 if the process is one worker.
    """

    def __init__(
        self,
        who: str,
        groups: Sequence[Mapping[str, Any]],
        proxes: Sequence[Prox | None],
        takes_part: Callable[[Tensor], bool],
        workers: int,
    ) -> None:
        self._who, self._workers = who, workers
        self.names: list[str] = []
        self.params: list[Tensor] = []
        self._players: list[_Player] = []
        numbers = map(str, itertools.count())
        for group, prox in zip(groups, proxes, strict=True):
            first = len(self.params)
            numbered = list(itertools.islice(numbers, len(group["params"])))
            for name, p in zip(group.get("param_names", numbered), group["params"], strict=True):
                if takes_part(p):
                    self.names.append(name)
                    self.params.append(p)
            self._players.append(_Player(group, prox, slice(first, len(self.params))))

    def times_lr(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """New tensors: each times its group's step size."""
        return [x for player in self._players for x in _scaled(tensors[player.own], player.group["lr"])]

    def near(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The proximal points: new tensors where there is a proximal operator, else the same ones."""
        near = list(tensors)
        for player in self._players:
            if player.prox is not None:
                near[player.own] = [x.clone() for x in tensors[player.own]]
                for x in near[player.own]:
                    player.prox(x, player.group["lr"])
        return near

    def unknown(self) -> list[Tensor]:
        """NaN in place of operators."""
        return [
            torch.full(self._shape(p), torch.nan, dtype=compute_dtype(p.dtype), device=p.device) for p in self.params
        ]

    def operator(self, closure: Closure) -> tuple[Any, list[Tensor]]:
        """The loss, and this rank's operator (or every worker's), where parameters are now, in float32 or wider.

        Raises:
            RuntimeError: A gradient is sparse.
            ValueError: The closure returns something else than one loss for each simulated worker.
        """
        for p in self.params:
            p.grad = None
        with torch.enable_grad():
            loss = closure()
            if self._workers > 1:
                grads = self._each_worker(loss)
            else:
                if isinstance(loss, Tensor) and loss.requires_grad and all(p.grad is None for p in self.params):
                    loss.backward()  # type: ignore[no-untyped-call]
                grads = [p.grad for p in self.params]
        found = []
        for p, grad in zip(self.params, grads, strict=True):
            p.grad = None
            if grad is not None and grad.layout != torch.strided:
                raise RuntimeError(
                    f"{self._who}: expected dense gradients, got {grad.layout} for a parameter of shape "
                    f"{tuple(p.shape)}. Use sparse=False in its layer."
                )
            own = torch.zeros(self._shape(p), dtype=compute_dtype(p.dtype), device=p.device)
            found.append(own if grad is None else own.copy_(grad))
        for player in self._players:
            if player.group["maximize"] and player.own.start < player.own.stop:
                torch._foreach_neg_(found[player.own])
        return loss.detach() if isinstance(loss, Tensor) else loss, found

    def _each_worker(self, losses: Any) -> list[Tensor | None]:
        n = self._workers
        if not isinstance(losses, Tensor) or losses.shape != (n,) or not losses.requires_grad:
            got = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(
                f"{self._who}: expected a closure that returns the losses of {n} workers as a tensor of shape ({n},), "
                f"before any backward, got {got}."
            )
        each = torch.eye(n, dtype=losses.dtype, device=losses.device)
        return list(torch.autograd.grad(losses, self.params, each, is_grads_batched=True, allow_unused=True))

    def _shape(self, param: Tensor) -> tuple[int, ...]:
        return (self._workers, *param.shape) if self._workers > 1 else tuple(param.shape)


def _scaled(tensors: Sequence[Tensor], factor: float | Tensor) -> Sequence[Tensor]:
    return torch._foreach_mul(list(tensors), factor) if tensors else ()
