"""`FedAdam`: Adam as a server's optimizer, as published."""

from collections.abc import Mapping
from typing import Any, ClassVar, Unpack, final

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from gradwire.optim.base import Optimizer
from gradwire.optim.checks import check_betas, check_lr, check_range
from gradwire.optim.kernels import Scalars
from gradwire.optim.options import Options
from gradwire.optim.shards import Shards


@final
class FedAdam(Optimizer):
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

    elementwise: ClassVar[bool] = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.1,
        betas: tuple[float, float] = (0.9, 0.99),
        tau: float = 1e-3,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "tau": tau}, options)

    def check_group(self, group: Mapping[str, Any]) -> None:
        """Check the ranges given above."""
        check_lr("FedAdam", group["lr"])
        check_betas("FedAdam", group["betas"])
        check_tau("FedAdam", group)

    def init_state(self, param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """The first moment starts at zero, the second at tau^2."""
        zeros = self.zeros_like(param, group)
        return {"exp_avg": zeros, "exp_avg_sq": full_like(zeros, group["tau"] ** 2)}

    def scalars(self, step: Tensor, sizes: Tensor, group: Mapping[str, Any]) -> Scalars:
        """Nothing depends on the step."""
        beta1, beta2 = group["betas"]
        return {
            "one_minus_beta1": 1 - beta1,
            "one_minus_beta2": 1 - beta2,
            "tau": torch.full_like(step, group["tau"]),
            "lr": group["lr"],
        }

    @staticmethod
    def update_(
        params: list[Tensor], grads: list[Tensor], state: dict[str, list[Tensor]], scalars: Scalars, shards: Shards
    ) -> None:
        """One step of the equations above."""
        torch._foreach_lerp_(state["exp_avg"], grads, scalars["one_minus_beta1"])
        torch._foreach_lerp_(state["exp_avg_sq"], torch._foreach_mul(grads, grads), scalars["one_minus_beta2"])
        adapted_step_(params, state, scalars)


def check_tau(who: str, group: Mapping[str, Any]) -> None:
    """Raise ValueError unless tau > 0, and its square can be told from zero in the dtype that v is kept in."""
    check_range(who, "tau", group["tau"])
    info = torch.finfo(group["state_dtype"] or torch.float32)
    if not group["tau"] ** 2 >= (least := info.tiny * info.eps):
        raise ValueError(f"{who}: expected tau >= {least**0.5:.1e}, got tau={group['tau']!r}.")


def full_like(x: Tensor, value: float) -> Tensor:
    """A tensor of one value, in both parts if it is complex: a complex parameter behaves as its `view_as_real`."""
    return torch.full_like(x, complex(value, value) if x.is_complex() else value)


def adapted_step_(params: list[Tensor], state: dict[str, list[Tensor]], scalars: Scalars) -> None:
    """The step x <- x - lr m / (sqrt(v) + tau), in place."""
    denominators = torch._foreach_sqrt(state["exp_avg_sq"])
    torch._foreach_add_(denominators, scalars["tau"])
    updates = torch._foreach_div(state["exp_avg"], denominators)
    torch._foreach_mul_(updates, scalars["lr"])
    torch._foreach_sub_(params, updates)
