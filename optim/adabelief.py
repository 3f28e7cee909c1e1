"""`AdaBelief`: Adam whose steps are large where gradients are as expected."""

from collections.abc import Mapping
from typing import Any, ClassVar, Unpack, final

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from gradwire.optim.base import Optimizer
from gradwire.optim.checks import check_betas, check_eps_in_state, check_lr, check_range
from gradwire.optim.kernels import Scalars
from gradwire.optim.options import Options
from gradwire.optim.shards import Shards


@final
class AdaBelief(Optimizer):
    """Adam with the gradient's deviation from its average in place of its square.

        w <- (1 - lr weight_decay) w
        m <- beta1 m + (1 - beta1) g,    s <- beta2 s + (1 - beta2) (g - m)^2 + eps
        w <- w - lr / (1 - beta1^t) m / (sqrt(s / (1 - beta2^t)) + eps)

    and with `rectify`, from the step on where the variance of 1 / sqrt(s) is tractable,

        rho_max = 2 / (1 - beta2) - 1,    rho = rho_max - 2 t beta2^t / (1 - beta2^t) >= 5
        r = sqrt((rho - 4) (rho - 2) rho_max / ((rho_max - 4) (rho_max - 2) rho))
        w <- w - lr r sqrt(1 - beta2^t) / (1 - beta1^t) m / (sqrt(s) + eps)

    and before it `w <- w - lr / (1 - beta1^t) m`. The eps in s adds up to eps / (1 - beta2) and bounds the steps: along
    a constant gradient the deviation vanishes and they grow, with the default to 67 lr within 3000 steps.

    Args:
        params: Tensors, `(name, tensor)` pairs or groups of them.
        lr: Step size, >= 0; a number or a 0-d tensor.
        betas: Decay rates of m and s, each in [0, 1).
        eps: >= 0; added to s, which keeps it, and to the denominator.
        weight_decay: >= 0; decoupled, multiplied by lr.
        amsgrad: Divide by the largest s so far. Has no effect on rectified steps.
        weight_decouple: Whether weight decay is decoupled; else `weight_decay w` is added to g.
        fixed_decay: Decay by weight_decay alone, not by lr weight_decay, wherever lr is not 0.
        rectify: As above.
        degenerated_to_sgd: With `rectify`, whether the first steps follow m; else they only gather m and s.
        options: How it runs: `foreach`, `fused`, `maximize` and more, see `Options`.

    Shapes:
        Any, also empty and 0-d, in any memory layout.

    Cost:
        8 bytes of state per parameter, 12 with amsgrad. Fused, one pass over memory.

    State:
        step: 0-d float32, per parameter. exp_avg, exp_avg_var: m and s; max_exp_avg_var with amsgrad; in float32 or
        wider. A `state_dtype` in which eps would vanish is refused.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = AdaBelief([weight], lr=0.1, rectify=False)
        >>> for step in range(20):
        ...     weight.grad = torch.tensor([1.0, 1.0 + 2 * (-1) ** step])  # as expected, or not
        ...     optimizer.step()
        >>> weight.data
        tensor([-3.3171, -1.1150])

    Reference:
        Zhuang, Tang, Ding, Tatikonda, Dvornek, Papademetris, Duncan. AdaBelief Optimizer: Adapting Stepsizes by the
        Belief in Observed Gradients. NeurIPS 2020. arXiv:2010.07468. Algorithm 2. `rectify`: Liu, Jiang, He, Chen, Liu,
        Gao, Han. On the Variance of the Adaptive Learning Rate and Beyond. ICLR 2020. arXiv:1908.03265.

    Differences from the paper: as in the authors' code since 0.1.0, rectification and decoupled decay by default,
    eps 1e-16, and steps that follow m until rho is 5. The authors' experiments took eps=1e-8 and rectify=False for
    images, with weight_decouple=False on CIFAR.

    Differences from the authors' code: `fixed_decay` pauses where lr is 0, so that such a step leaves weights alone.
    """

    elementwise: ClassVar[bool] = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-16,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        weight_decouple: bool = True,
        fixed_decay: bool = False,
        rectify: bool = True,
        degenerated_to_sgd: bool = True,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "weight_decouple": weight_decouple,
            "fixed_decay": fixed_decay,
            "rectify": rectify,
            "degenerated_to_sgd": degenerated_to_sgd,
        }
        super().__init__(params, defaults, options)

    def check_group(self, group: Mapping[str, Any]) -> None:
        """Check the ranges given above."""
        check_lr("AdaBelief", group["lr"])
        check_betas("AdaBelief", group["betas"])
        for name in ("eps", "weight_decay"):
            check_range("AdaBelief", name, group[name])
        check_eps_in_state("AdaBelief", group)
        if group["fixed_decay"] and not group["weight_decouple"]:
            raise ValueError("AdaBelief: expected weight_decouple with fixed_decay, got weight_decouple=False.")

    def init_state(self, param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """Both moments start at zero."""
        names = ["exp_avg", "exp_avg_var", *(["max_exp_avg_var"] if group["amsgrad"] else [])]
        return {name: self.zeros_like(param, group) for name in names}

    def scalars(self, step: Tensor, sizes: Tensor, group: Mapping[str, Any]) -> Scalars:
        """Every kind of step as one: `step_size m / (root_scale sqrt(s) + offset)`."""
        beta1, beta2 = group["betas"]
        lr, eps, decay = group["lr"], group["eps"], group["weight_decay"]
        if group["fixed_decay"]:
            decay = decay * (lr > 0)
        elif group["weight_decouple"]:
            decay = decay * lr
        root_scale, offset = (1 - beta2**step) ** -0.5, torch.full_like(step, eps)
        factor = torch.ones_like(step)
        if group["rectify"]:
            rectified, factor = _rectification(step, beta2)
            root_scale = torch.where(rectified, root_scale, 0.0)
            offset = torch.where(rectified, eps * root_scale, 1.0)
            factor = torch.where(rectified, factor, 1.0 if group["degenerated_to_sgd"] else 0.0)
        return {
            "one_minus_beta1": 1 - beta1,
            "one_minus_beta2": 1 - beta2,
            "eps": torch.full_like(step, eps),
            "decay": decay,
            "root_scale": root_scale,
            "offset": offset,
            "step_size": lr * (factor / (1 - beta1**step)),
            "weight_decouple": group["weight_decouple"],
            "amsgrad": group["amsgrad"],
            "rectify": group["rectify"],
        }

    @staticmethod
    def update_(
        params: list[Tensor], grads: list[Tensor], state: dict[str, list[Tensor]], scalars: Scalars, shards: Shards
    ) -> None:
        """One step of the equations above."""
        exp_avgs, exp_avg_vars = state["exp_avg"], state["exp_avg_var"]
        if scalars["weight_decouple"]:
            torch._foreach_mul_(params, 1 - scalars["decay"])
        else:
            decayed = torch._foreach_mul(params, scalars["decay"])
            torch._foreach_add_(decayed, grads)
            grads = list(decayed)
        torch._foreach_lerp_(exp_avgs, grads, scalars["one_minus_beta1"])
        deviations = torch._foreach_sub(grads, exp_avgs)
        torch._foreach_mul_(deviations, deviations)
        torch._foreach_lerp_(exp_avg_vars, deviations, scalars["one_minus_beta2"])
        torch._foreach_add_(exp_avg_vars, scalars["eps"])
        if scalars["amsgrad"]:
            torch._foreach_maximum_(state["max_exp_avg_var"], exp_avg_vars)
            if not scalars["rectify"]:
                exp_avg_vars = state["max_exp_avg_var"]

        denominators = torch._foreach_sqrt(exp_avg_vars)
        torch._foreach_mul_(denominators, scalars["root_scale"])
        torch._foreach_add_(denominators, scalars["offset"])
        updates = torch._foreach_mul(exp_avgs, scalars["step_size"])
        torch._foreach_addcdiv_(params, updates, denominators, value=-1)


def _rectification(step: Tensor, beta2: float) -> tuple[Tensor, Tensor]:
    """Whether each step is rectified, and its r."""
    power = beta2**step
    rho_max = 2 / (1 - beta2) - 1
    rho = rho_max - 2 * step * power / (1 - power)
    rectified = rho >= 5
    rho = torch.where(rectified, rho, 5.0)
    squared = (rho - 4) * (rho - 2) * rho_max / ((rho_max - 4) * (rho_max - 2) * rho) if rho_max > 5 else rho
    return rectified, squared.sqrt()
