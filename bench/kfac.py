"""`KFAC`: full Kronecker factors, inverted every step: what MKOR's rank-one corrections are measured against."""

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor, nn


@final
class KFAC:
    """Precondition linear layers by the damped inverses of both Kronecker factors of the empirical Fisher matrix.

        A <- decay A + (1 - decay) E[a a^T],    G <- decay G + (1 - decay) E[g g^T]
        U  = (G + sqrt(damping) / pi I)^-1 dW (A + pi sqrt(damping) I)^-1,    pi^2 = (tr A / inputs) / (tr G / outputs)
        U <- U min(1, sqrt(kl_clip / sum_layers lr^2 <U, dW>))

    a are a layer's inputs, with 1 for a bias, and g the gradients of its outputs for each row alone, so times their
    number, since the loss is a mean over rows. The first step's factors are those of its batch. Written apart from
    `gradwire.optim.MKOR`, for one process.

    Args:
        model: Its `torch.nn.Linear` layers are preconditioned, each used once in a forward pass.
        base: Steps then.
        damping: > 0.
        decay: Weight of the past, in [0, 1).
        kl_clip: Bound on the change of the model's outputs, > 0.

    Reference:
        Martens, Grosse. Optimizing Neural Networks with Kronecker-factored Approximate Curvature. ICML 2015.
        arXiv:1503.05671. Sections 4.2, 5 and 6.3; damping, decay and clip as kfac-pytorch has them by default.
    """

    def __init__(
        self,
        model: nn.Module,
        base: torch.optim.Optimizer,
        *,
        damping: float = 1e-3,
        decay: float = 0.95,
        kl_clip: float = 1e-3,
    ) -> None:
        self.base, self._damping, self._decay, self._kl_clip = base, damping, decay, kl_clip
        self._layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
        self._seen: dict[nn.Module, list[Tensor]] = {}
        self._factors: dict[nn.Module, list[Tensor]] = {}
        for layer in self._layers:
            layer.register_forward_hook(self._watch)

    def zero_grad(self) -> None:
        """Drop all gradients."""
        self.base.zero_grad()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """Update the factors, precondition, and let the base step."""
        assert closure is None
        updates: list[tuple[nn.Linear, Tensor]] = []
        product: Tensor | float = 0.0
        for layer in self._layers:
            grad = layer.weight.grad
            assert grad is not None
            if layer.bias is not None:
                assert layer.bias.grad is not None
                grad = torch.cat([grad, layer.bias.grad[:, None]], 1)
            update = self._preconditioned(grad, *self._updated_factors(layer))
            updates.append((layer, update))
            product = product + (update * grad).sum()
        lr = float(self.base.param_groups[0]["lr"])
        clip = torch.as_tensor(self._kl_clip / (lr**2 * product)).sqrt().clamp(max=1.0)
        for layer, update in updates:
            layer.weight.grad = clip * update[:, : layer.in_features]
            if layer.bias is not None:
                layer.bias.grad = clip * update[:, -1]
        self.base.step()

    def _watch(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if not output.requires_grad:
            return
        a = args[0].detach().flatten(0, -2)
        if module.bias is not None:
            a = torch.cat([a, a.new_ones(len(a), 1)], 1)

        def arrived(grad: Tensor) -> None:
            g = grad.detach().flatten(0, -2) * len(a)
            self._seen[module] = [a.T @ a / len(a), g.T @ g / len(a)]

        output.register_hook(arrived)  # type: ignore[no-untyped-call]

    def _updated_factors(self, layer: nn.Module) -> list[Tensor]:
        new = self._seen.pop(layer)
        factors = self._factors.setdefault(layer, new)
        for factor, seen in zip(factors, new, strict=True):
            factor.lerp_(seen, 1 - self._decay)
        return factors

    def _preconditioned(self, grad: Tensor, a: Tensor, g: Tensor) -> Tensor:
        pi = (a.trace() / len(a) / (g.trace() / len(g)).clamp(min=1e-30)).sqrt().clamp(1e-6, 1e6)
        root = self._damping**0.5
        half = torch.cholesky_solve(grad, _root(g, root / pi))
        update: Tensor = torch.cholesky_solve(half.T, _root(a, root * pi)).T
        return update


def _root(matrix: Tensor, shift: Tensor) -> Tensor:
    """The Cholesky factor of a damped matrix."""
    factor: Tensor = torch.linalg.cholesky(matrix + shift * torch.eye(len(matrix), dtype=matrix.dtype))
    return factor
