"""`AdaptiveServer`: what `FedAdam`, `FedYogi` and `FedAdagrad` have in common."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from gradwire.optim.base import Optimizer
from gradwire.optim.checks import check_betas, check_lr, check_range
from gradwire.optim.kernels import Scalars


class AdaptiveServer(Optimizer):
    """An optimizer with two moments and no bias correction, whose second moment starts at tau^2.

        m <- beta1 m + (1 - beta1) g,  v <- (of g^2),  x <- x - lr m / (sqrt(v) + tau)

    A subclass gives `update_`.

    Reference:
        Reddi, Charles, Zaheer, Garrett, Rush, Konečný, Kumar, McMahan. Adaptive Federated Optimization. ICLR 2021.
        arXiv:2003.00295, algorithm 2.
    """

    elementwise: ClassVar[bool] = True

    def check_group(self, group: Mapping[str, Any]) -> None:
        """Check lr, decay rates and tau, whose square must differ from zero in the dtype that v is kept in."""
        name = type(self).__name__
        check_lr(name, group["lr"])
        if "betas" in group:
            check_betas(name, group["betas"])
        else:
            check_range(name, "beta1", group["beta1"], below=1.0)
        check_range(name, "tau", group["tau"])
        info = torch.finfo(group["state_dtype"] or torch.float32)
        if not group["tau"] ** 2 >= (least := info.tiny * info.eps):
            raise ValueError(f"{name}: expected tau >= {least**0.5:.1e}, got tau={group['tau']!r}.")

    def init_state(self, param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """The first moment starts at zero, the second at tau^2, in both parts of a complex number."""
        zeros, start = self.zeros_like(param, group), group["tau"] ** 2
        return {
            "exp_avg": zeros,
            "exp_avg_sq": torch.full_like(zeros, complex(start, start) if zeros.is_complex() else start),
        }

    def scalars(self, step: Tensor, sizes: Tensor, group: Mapping[str, Any]) -> Scalars:
        """Nothing depends on the step."""
        beta1, beta2 = group["betas"] if "betas" in group else (group["beta1"], 0.0)
        return {
            "one_minus_beta1": 1 - beta1,
            "one_minus_beta2": 1 - beta2,
            "tau": torch.full_like(step, group["tau"]),
            "lr": group["lr"],
        }


def adapted_step_(params: list[Tensor], state: dict[str, list[Tensor]], scalars: Scalars) -> None:
    """The step x <- x - lr m / (sqrt(v) + tau), in place."""
    denominators = torch._foreach_sqrt(state["exp_avg_sq"])
    torch._foreach_add_(denominators, scalars["tau"])
    updates = torch._foreach_div(state["exp_avg"], denominators)
    torch._foreach_mul_(updates, scalars["lr"])
    torch._foreach_sub_(params, updates)
