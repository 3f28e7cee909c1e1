"""`FlatModel`: one resident model whose trainable parameters lie in one vector."""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn


@final
class FlatModel:
    """A module whose trainable parameters are views of `vector`.

    Every client of a simulation is trained in the same module: copying its start into `vector` makes the module that
    client's model. What an algorithm keeps (control variates, residuals, momenta) are vectors of the same length, in
    the space of trainable parameters only; buffers never enter it.

    Args:
        module: Its trainable parameters are laid in one vector, in the order of `named_parameters()`; parameters that
            are shared by two layers lie there once. The module stays usable as before.

    Shapes:
        `vector`: `[numel]`, of the parameters' dtype and device; `values`: its parts, shaped like the parameters.

    Cost:
        The parameters' own memory. Gradients are what backward passes make, and go with `clear_grad`.

    Raises:
        ValueError: no parameter is trainable, or they differ in dtype or device.
        TypeError: a trainable parameter is not real floating-point.

    Example:
        >>> model = FlatModel(nn.Linear(2, 1))
        >>> model.vector.copy_(torch.tensor([1.0, 2.0, 3.0]))
        tensor([1., 2., 3.])
        >>> model.module(torch.ones(1, 2)).item()
        6.0
    """

    def __init__(self, module: nn.Module) -> None:
        named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
        if not named:
            raise ValueError("FlatModel: expected a module with trainable parameters, got none.")
        first = named[0][1]
        for name, parameter in named:
            if not parameter.is_floating_point():
                raise TypeError(f"FlatModel: expected real floating-point parameters, got {parameter.dtype} in {name}.")
            if (parameter.dtype, parameter.device) != (first.dtype, first.device):
                raise ValueError(
                    f"FlatModel: expected trainable parameters of one dtype and device, got {first.dtype} on "
                    f"{first.device} and {parameter.dtype} on {parameter.device} ({name}). Convert the module first."
                )
        self.module = module
        self.names = [name for name, _ in named]
        self.parameters = [parameter for _, parameter in named]
        self._shapes = [parameter.shape for parameter in self.parameters]
        self._sizes = [parameter.numel() for parameter in self.parameters]
        self.vector = torch.cat([parameter.detach().reshape(-1) for parameter in self.parameters])
        self.values = self.views(self.vector)
        self.point_at(self.values)
        self.clear_grad()

    @property
    def numel(self) -> int:
        """Trainable parameters."""
        return self.vector.numel()

    def views(self, vector: Tensor) -> list[Tensor]:
        """The parts of a vector `[numel]`, shaped like the parameters."""
        parts: Sequence[Tensor] = torch.split(vector, self._sizes)
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]

    def point_at(self, values: Sequence[Tensor]) -> None:
        """Let the parameters be views of another vector; `values` is where they belong."""
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.data = value

    def clear_grad(self) -> None:
        """Forget the parameters' gradients, so that the next backward pass need not add to them."""
        for parameter in self.parameters:
            parameter.grad = None

    def add_grad(self, parts: list[Tensor], alpha: float = 1.0) -> None:
        """Add alpha times the parameters' gradients to the views of a vector; what has no gradient adds nothing."""
        grads = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        if len(grads) < len(self.parameters):
            parts = [part for part, parameter in zip(parts, self.parameters, strict=True) if parameter.grad is not None]
        if grads:
            torch._foreach_add_(parts, grads, alpha=alpha)
