"""`DiffGrad`: Adam that slows down where the gradient has stopped changing."""

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
class DiffGrad(Optimizer):
    """Adam whose steps are multiplied by a friction between 1/2 and 1 that rises with the gradient's change.

        g <- g + weight_decay w
        m <- beta1 m + (1 - beta1) g,    v <- beta2 v + (1 - beta2) g^2
        xi = 1 / (1 + exp(-|g_previous - g|)),    g_previous = 0 at first
        w <- w - lr sqrt(1 - beta2^t) / (1 - beta1^t) xi m / (sqrt(v) + eps)

    The change is not normalised: with gradients below 0.01 xi is 1/2 to within a percent, and this is Adam with half
    the lr. Scaling, clipping or averaging gradients changes the algorithm.

    Args:
        params: Tensors, `(name, tensor)` pairs or groups of them.
        lr: Step size, >= 0; a number or a 0-d tensor.
        betas: Decay rates of both moments, each in [0, 1).
        eps: >= 0; added to the denominator, before the bias correction.
        weight_decay: >= 0; added to the gradient, hence part of its change. `p.grad` itself is left alone.
        version: 0 as above; 1 without the magnitude, so that xi is between 0 and 1; 2 with
            xi = 9 / (1 + exp(-|g_previous - g| / 2)) - 4, between 1/2 and 5.
        original: Set xi to 1/2 after the first step, whatever the version. The code published first kept a reference to
            `p.grad`, and so compared the gradient with itself wherever gradients stay in one buffer.
        options: How it runs: `foreach`, `fused`, `maximize` and more, see `Options`.

    Shapes:
        Any, also empty and 0-d, in any memory layout.

    Cost:
        12 bytes of state per parameter, 8 with original. Fused, one pass over memory.

    State:
        step: 0-d float32, per parameter. exp_avg, exp_avg_sq: m and v; previous_grad: a copy of g, without original; in
        float32 or wider.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(3))
        >>> optimizer = DiffGrad([weight], lr=0.1)
        >>> weight.grad = torch.tensor([10.0, 1.0, 0.01])  # the change from zero
        >>> optimizer.step()
        >>> weight.data
        tensor([-0.1000, -0.0731, -0.0502])

    Reference:
        Dubey, Chakraborty, Roy, Mukherjee, Singh, Chaudhuri. diffGrad: An Optimization Method for Convolutional Neural
        Networks. IEEE Transactions on Neural Networks and Learning Systems 31, 2020. arXiv:1909.11015.

    Differences from the paper: as in the authors' code, eps is added before the bias correction, and weight_decay. Its
    versions 1 and 2 are from that code's port in Best-Deep-Learning-Optimizers.
    """

    elementwise: ClassVar[bool] = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        version: int = 0,
        original: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "version": version,
            "original": original,
        }
        super().__init__(params, defaults, options)

    def check_group(self, group: Mapping[str, Any]) -> None:
        """Check the ranges given above."""
        check_lr("DiffGrad", group["lr"])
        check_betas("DiffGrad", group["betas"])
        for name in ("eps", "weight_decay"):
            check_range("DiffGrad", name, group[name])
        if group["version"] not in (0, 1, 2):
            raise ValueError(f"DiffGrad: expected version in (0, 1, 2), got version={group['version']!r}.")

    def init_state(self, param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """Both moments and the previous gradient start at zero."""
        names = ["exp_avg", "exp_avg_sq", *([] if group["original"] else ["previous_grad"])]
        return {name: self.zeros_like(param, group) for name in names}

    def scalars(self, step: Tensor, sizes: Tensor, group: Mapping[str, Any]) -> Scalars:
        """Bias corrections, folded into the step size, and what multiple of g the change is without its copy."""
        beta1, beta2 = group["betas"]
        return {
            **({"change": -(step == 1).to(step.dtype)} if group["original"] else {}),
            "one_minus_beta1": 1 - beta1,
            "one_minus_beta2": 1 - beta2,
            "eps": torch.full_like(step, group["eps"]),
            "step_size": group["lr"] * ((1 - beta2**step).sqrt() / (1 - beta1**step)),
            "weight_decay": group["weight_decay"],
            "original": group["original"],
            "signed": group["version"] == 1,
            "stretched": group["version"] == 2,
        }

    @staticmethod
    def update_(
        params: list[Tensor], grads: list[Tensor], state: dict[str, list[Tensor]], scalars: Scalars, shards: Shards
    ) -> None:
        """One step of the equations above."""
        exp_avgs, exp_avg_sqs = state["exp_avg"], state["exp_avg_sq"]
        decayed = torch._foreach_mul(params, scalars["weight_decay"])
        torch._foreach_add_(decayed, grads)
        torch._foreach_lerp_(exp_avgs, decayed, scalars["one_minus_beta1"])
        squares = torch._foreach_mul(decayed, decayed)
        torch._foreach_lerp_(exp_avg_sqs, squares, scalars["one_minus_beta2"])
        denominators = torch._foreach_sqrt(exp_avg_sqs)
        torch._foreach_add_(denominators, scalars["eps"])

        if scalars["original"]:
            frictions = torch._foreach_mul(decayed, scalars["change"])
        else:
            frictions = torch._foreach_sub(state["previous_grad"], decayed)
            torch._foreach_mul_(state["previous_grad"], 0.0)  # a copy has no derivative
            torch._foreach_add_(state["previous_grad"], decayed)
        if not scalars["signed"]:
            torch._foreach_abs_(frictions)
        if scalars["stretched"]:
            torch._foreach_mul_(frictions, 0.5)
        if torch.compiler.is_compiling():  # Inductor would call the other one apart
            frictions = tuple(x.sigmoid() for x in frictions)
        else:
            frictions = torch._foreach_sigmoid(frictions)
        if scalars["stretched"]:
            torch._foreach_mul_(frictions, 9.0)
            torch._foreach_sub_(frictions, 4.0)

        updates = torch._foreach_mul(exp_avgs, scalars["step_size"])
        torch._foreach_mul_(updates, frictions)
        torch._foreach_addcdiv_(params, updates, denominators, value=-1)
