"""`Server`: the model, its optimizer, and the vectors that an algorithm keeps beside them."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, final

import torch
from torch import Tensor, nn

from gradwire.federated.algorithm import Algorithm

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
"""Makes a server's optimizer from parameters."""


@final
class Server:
    """What the server holds: x, its optimizer and the algorithm's vectors.

    Args:
        algorithm: What it keeps beside the model.
        vector: x at first, `[numel]`.
        parameters: Names and shapes of the model's trainable parameters, in the order of the vector.
        lr: Of plain steps x <- x - lr pseudo_gradient, > 0.
        optimizer: Makes another optimizer, fed with the pseudo-gradient, from the parameters of the server's copy of
            the model; any of `torch.optim` or `gradwire.optim`, `FedAdam`, ….
        sizes: Further vectors of state, by name, and their entries.

    State:
        `vector`; `state`, the algorithm's vectors by name; those of the optimizer.

    Example:
        >>> from gradwire.federated import FedAvg
        >>> server = Server(FedAvg(), torch.tensor([1.0, 2.0]), {"w": torch.Size([2])})
        >>> server.step(torch.tensor([0.5, 0.0]))
        >>> server.vector
        tensor([0.5000, 2.0000])
    """

    def __init__(
        self,
        algorithm: Algorithm,
        vector: Tensor,
        parameters: Mapping[str, torch.Size],
        *,
        lr: float = 1.0,
        optimizer: OptimizerFactory | None = None,
        sizes: Mapping[str, int] | None = None,
    ) -> None:
        if not lr > 0:
            raise ValueError(f"Server: expected lr > 0, got lr={lr}.")
        self.vector = vector.detach().clone()
        self.lr = lr
        self.state = {name: torch.zeros_like(self.vector) for name in algorithm.server_state}
        for name, size in (sizes or {}).items():
            self.state[name] = self.vector.new_zeros(size)
        self._gradient = torch.zeros_like(self.vector)
        self.optimizer: torch.optim.Optimizer | None = None
        if optimizer is not None:
            counts = [shape.numel() for shape in parameters.values()]
            vectors = (torch.split(self.vector, counts), torch.split(self._gradient, counts))
            made = []
            for value, grad, shape in zip(*vectors, parameters.values(), strict=True):
                parameter = nn.Parameter(torch.empty(0, dtype=value.dtype, device=value.device))
                parameter.data = value.view(shape)
                parameter.grad = grad.view(shape)
                made.append(parameter)
            self.optimizer = optimizer(made)

    def step(self, pseudo_gradient: Tensor) -> None:
        """Move x."""
        if self.optimizer is None:
            self.vector.sub_(pseudo_gradient, alpha=self.lr)
        else:
            self._gradient.copy_(pseudo_gradient)
            self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """Everything, as tensors and plain values."""
        optimizer = None if self.optimizer is None else self.optimizer.state_dict()
        return {"vector": self.vector, "state": self.state, "optimizer": optimizer}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        if saved["state"].keys() != self.state.keys():
            raise ValueError(f"Server: expected state of {sorted(self.state)}, got {sorted(saved['state'])}.")
        self.vector.copy_(saved["vector"])
        for name, value in saved["state"].items():
            self.state[name].copy_(value)
        if self.optimizer is not None:
            self.optimizer.load_state_dict(saved["optimizer"])
