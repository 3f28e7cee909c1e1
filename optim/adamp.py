"""`AdamP`: Adam that does not inflate the norm of scale-invariant weights."""

from collections.abc import Mapping
from typing import Any, Unpack, final

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from gradwire.optim.base import Optimizer
from gradwire.optim.checks import check_betas, check_lr, check_range
from gradwire.optim.kernels import Scalars
from gradwire.optim.layout import Dims
from gradwire.optim.options import Options
from gradwire.optim.projection import by_rows, decay_and_project_, thresholds
from gradwire.optim.shards import Shards


@final
class AdamP(Optimizer):
    """Adam whose update is projected onto the tangent space of weights that a normalisation makes scale-invariant.

        m <- beta1 m + (1 - beta1) g,    v <- beta2 v + (1 - beta2) g^2
        u  = m / (sqrt(v / (1 - beta2^t)) + eps)
        if w is scale-invariant:  u <- u - w <w, u> / (|w| + eps)^2,  rho = wd_ratio,  else rho = 1
        w <- (1 - lr weight_decay rho) w - lr / (1 - beta1^t) u

    Momentum makes such weights grow and so shrinks their effective step; the projection takes out the growth. A weight
    of two or more dimensions counts as scale-invariant if `max |cos(g, w)| < delta / sqrt(n)` over its rows (dimension
    0, n entries each), or else over the whole tensor; vectors and scalars never do.

    Args:
        params: Tensors, `(name, tensor)` pairs or groups of them.
        lr: Step size, >= 0; a number or a 0-d tensor.
        betas: Decay rates of both moments, each in [0, 1).
        eps: >= 0; added to the denominator and to norms, and the least norm in the cosine.
        weight_decay: Decoupled, multiplied by lr, >= 0.
        delta: Threshold of the test, >= 0; 0 turns the projection off.
        wd_ratio: Share of the decay that scale-invariant weights get, >= 0.
        nesterov: Use `beta1 m + (1 - beta1) g` in place of m in u.
        options: How it runs: `foreach`, `fused`, `maximize` and more, see `Options`.

    Shapes:
        Any, also empty and 0-d, in any memory layout.

    Cost:
        8 bytes of state per parameter. Fused, two passes over memory: one for moments and row sums, one for weights.

    State:
        step: 0-d float32, per parameter. exp_avg, exp_avg_sq: m and v, in float32 or wider.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
        >>> optimizer = AdamP([weight], lr=0.1)
        >>> weight.grad = torch.tensor([[-4.0, 3.0]])  # orthogonal to the weight, so the step is, too
        >>> optimizer.step()
        >>> weight.data - torch.tensor([[3.0, 4.0]])
        tensor([[ 0.1120, -0.0840]])

    Reference:
        Heo, Chun, Oh, Han, Yun, Kim, Uh, Ha. AdamP: Slowing Down the Slowdown for Momentum Optimizers on
        Scale-invariant Weights. ICLR 2021. arXiv:2006.08217. Algorithm 2.

    Differences from the paper: as in the authors' code, Adam's bias correction, the test by rows before the test of the
    whole tensor, and `wd_ratio`. So a weight whose gradient is zero counts as scale-invariant.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        nesterov: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "delta": delta,
            "wd_ratio": wd_ratio,
            "nesterov": nesterov,
        }
        super().__init__(params, defaults, options)

    def check_group(self, group: Mapping[str, Any]) -> None:
        """Check the ranges given above."""
        check_lr("AdamP", group["lr"])
        check_betas("AdamP", group["betas"])
        for name in ("eps", "weight_decay", "delta", "wd_ratio"):
            check_range("AdamP", name, group[name])

    def init_state(self, param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """Both moments start at zero."""
        return {"exp_avg": self.zeros_like(param, group), "exp_avg_sq": self.zeros_like(param, group)}

    def dims(self, shape: torch.Size, group: Mapping[str, Any]) -> Dims:
        """A matrix of rows, or a vector."""
        return by_rows(shape)

    def scalars(self, step: Tensor, sizes: Tensor, group: Mapping[str, Any]) -> Scalars:
        """Bias corrections, folded into the step size and the denominator; complements of the betas exactly."""
        beta1, beta2 = group["betas"]
        return {
            "one_minus_beta1": 1 - beta1,
            "beta2": beta2,
            "one_minus_beta2": 1 - beta2,
            "inverse_root_correction": (1 - beta2**step) ** -0.5,
            "step_size": group["lr"] / (1 - beta1**step),
            "decay": group["lr"] * group["weight_decay"],
            "eps": torch.full_like(step, group["eps"]),
            "wd_ratio": group["wd_ratio"],
            "nesterov": group["nesterov"],
            **thresholds(sizes, group["delta"]),
        }

    @staticmethod
    def update_(
        params: list[Tensor], grads: list[Tensor], state: dict[str, list[Tensor]], scalars: Scalars, shards: Shards
    ) -> list[Tensor]:
        """One step of the equations above."""
        exp_avgs, exp_avg_sqs = state["exp_avg"], state["exp_avg_sq"]
        torch._foreach_lerp_(exp_avgs, grads, scalars["one_minus_beta1"])
        torch._foreach_mul_(exp_avg_sqs, scalars["beta2"])
        torch._foreach_addcmul_(exp_avg_sqs, torch._foreach_mul(grads, scalars["one_minus_beta2"]), grads)

        denominators = torch._foreach_sqrt(exp_avg_sqs)
        torch._foreach_mul_(denominators, scalars["inverse_root_correction"])
        torch._foreach_add_(denominators, scalars["eps"])
        nesterov = scalars["nesterov"]
        updates = torch._foreach_lerp(exp_avgs, grads, scalars["one_minus_beta1"]) if nesterov else exp_avgs
        updates = torch._foreach_div(updates, denominators)

        once = decay_and_project_(params, list(updates), grads, scalars, shards)
        torch._foreach_mul_(updates, scalars["step_size"])
        torch._foreach_sub_(params, updates)
        return once
