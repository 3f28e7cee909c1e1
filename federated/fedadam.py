"""`FedAdam`: Adam as a server's optimizer, as published."""

from typing import Unpack, final

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from gradwire.federated.adaptive_server import AdaptiveServer, adapted_step_
from gradwire.optim.kernels import Scalars
from gradwire.optim.options import Options
from gradwire.optim.shards import Shards


@final
class FedAdam(AdaptiveServer):
    """Adam without bias correction, whose second moment starts at tau^2.

        m <- beta1 m + (1 - beta1) g,  v <- beta2 v + (1 - beta2) g^2,  x <- x - lr m / (sqrt(v) + tau)

    g is the pseudo-gradient. tau says from which size on coordinates are normalised: below it a step is lr m / tau.

    Args:
        params: Tensors, `(name, tensor)` pairs or groups of them.
        lr: Step size, >= 0; a number or a 0-d tensor.
        betas: Decay rates of both moments, each in [0, 1).
        tau: Degree of adaptivity, > 0.
        options: How it runs: `foreach`, `fused`, `maximize` and more, see `gradwire.optim.Options`.

    Shapes:
        Any, also empty and 0-d, in any memory layout.

    Cost:
        8 bytes of state per parameter.

    State:
        step: 0-d float32, per parameter. exp_avg, exp_avg_sq: m and v, in float32 or wider.

    Example:
        >>> x = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = FedAdam([x], lr=0.1)
        >>> x.grad = torch.tensor([0.1, -0.2])
        >>> optimizer.step()
        >>> x.data
        tensor([-0.0905,  0.0951])

    Reference:
        Reddi, Charles, Zaheer, Garrett, Rush, Konečný, Kumar, McMahan. Adaptive Federated Optimization. ICLR 2021.
        arXiv:2003.00295, algorithm 2.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.1,
        betas: tuple[float, float] = (0.9, 0.99),
        tau: float = 1e-3,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "tau": tau}, options)

    @staticmethod
    def update_(
        params: list[Tensor], grads: list[Tensor], state: dict[str, list[Tensor]], scalars: Scalars, shards: Shards
    ) -> None:
        """One step of the equations above."""
        torch._foreach_lerp_(state["exp_avg"], grads, scalars["one_minus_beta1"])
        torch._foreach_lerp_(state["exp_avg_sq"], torch._foreach_mul(grads, grads), scalars["one_minus_beta2"])
        adapted_step_(params, state, scalars)
