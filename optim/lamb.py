"""`LAMB`: Adam whose step is as long, in every layer, as a share of that layer's weights."""

import math
from collections.abc import Mapping
from typing import Any, Unpack, final

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from gradwire.optim.base import Optimizer
from gradwire.optim.checks import check_betas, check_lr, check_range
from gradwire.optim.kernels import Scalars
from gradwire.optim.options import Options
from gradwire.optim.shards import Shards


@final
class LAMB(Optimizer):
    """Adam whose step has, in every layer, lr times the norm of the layer's weights: for large batches.

        m <- beta1 m + (1 - beta1) g,    v <- beta2 v + (1 - beta2) g^2
        u  = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay w
        w <- w - lr phi(|w|) / |u| u,    phi(z) = min(max(z, low), high)

    A layer is a tensor. Where |w| or |u| is 0, the factor phi(|w|) / |u|, the trust ratio, is 1.

    Args:
        params: Tensors, `(name, tensor)` pairs or groups of them.
        lr: Step size relative to the norm of the weights, >= 0; a number or a 0-d tensor.
        betas: Decay rates of both moments, each in [0, 1).
        eps: >= 0; added to the denominator.
        weight_decay: >= 0; part of u, and so scaled with it. The paper has 0.01.
        bias_correction: Divide both moments by 1 - beta^t.
        norm_bounds: low and high of phi, 0 <= low <= high; 10 as high is common.
        trust_clip: Let no trust ratio exceed 1 ("LAMBC"), so that no layer steps further than Adam would.
        adapt: Without it the trust ratio is 1: for the group of biases and norms, which many leave to Adam.
        options: How it runs: `foreach`, `fused`, `maximize` and more, see `Options`.

    Shapes:
        Any, also empty and 0-d, in any memory layout.

    Cost:
        8 bytes of state per parameter. Two passes over memory, as the norms come before the step. Sharded parameters
        add one collective of two numbers per tensor.

    State:
        step: 0-d float32, per parameter. exp_avg, exp_avg_sq: m and v, in float32 or wider.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = LAMB([weight], lr=0.1)
        >>> weight.grad = torch.tensor([0.2, -7.0])
        >>> optimizer.step()  # by 0.1 |w| = 0.5, along the signs
        >>> weight.data
        tensor([2.6464, 4.3536])

    Reference:
        You, Li, Reddi, Hseu, Kumar, Bhojanapalli, Song, Demmel, Keutzer, Hsieh. Large Batch Optimization for Deep
        Learning: Training BERT in 76 minutes. ICLR 2020. arXiv:1904.00962. Algorithm 2.

    Differences from the paper: none by default; `trust_clip` and `adapt` are options of known implementations. There,
    the trust ratio of a zero norm is 1, too, about which the paper is silent.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        bias_correction: bool = True,
        norm_bounds: tuple[float, float] = (0.0, math.inf),
        trust_clip: bool = False,
        adapt: bool = True,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "norm_bounds": norm_bounds,
            "trust_clip": trust_clip,
            "adapt": adapt,
        }
        super().__init__(params, defaults, options)

    def check_group(self, group: Mapping[str, Any]) -> None:
        """Check the ranges given above."""
        check_lr("LAMB", group["lr"])
        check_betas("LAMB", group["betas"])
        for name in ("eps", "weight_decay"):
            check_range("LAMB", name, group[name])
        bounds = group["norm_bounds"]
        if not isinstance(bounds, tuple | list) or len(bounds) != 2 or not 0.0 <= bounds[0] <= bounds[1]:
            raise ValueError(f"LAMB: expected norm_bounds (low, high) with 0 <= low <= high, got {bounds!r}.")

    def init_state(self, param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """Both moments start at zero."""
        return {"exp_avg": self.zeros_like(param, group), "exp_avg_sq": self.zeros_like(param, group)}

    def scalars(self, step: Tensor, sizes: Tensor, group: Mapping[str, Any]) -> Scalars:
        """Bias corrections, complements of the betas, and what decides the trust ratio."""
        beta1, beta2 = group["betas"]
        one = torch.ones_like(step)
        low, high = group["norm_bounds"]
        return {
            "one_minus_beta1": 1 - beta1,
            "beta2": beta2,
            "one_minus_beta2": 1 - beta2,
            "inverse_correction": 1 / (1 - beta1**step) if group["bias_correction"] else one,
            "inverse_root_correction": (1 - beta2**step) ** -0.5 if group["bias_correction"] else one,
            "eps": one * group["eps"],
            "decay": group["weight_decay"],
            "lr": group["lr"],
            "low": low,
            "high": high,
            "trust_clip": group["trust_clip"],
            "adapt": group["adapt"],
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
        updates = list(torch._foreach_mul(exp_avgs, scalars["inverse_correction"]))
        torch._foreach_div_(updates, denominators)
        torch._foreach_add_(updates, torch._foreach_mul(params, scalars["decay"]))

        ratios = _trust_ratios(params, updates, scalars, shards) if scalars["adapt"] else []
        if ratios:
            torch._foreach_mul_(updates, ratios)
        torch._foreach_mul_(updates, scalars["lr"])
        torch._foreach_sub_(params, updates)
        return ratios


def _trust_ratios(params: list[Tensor], updates: list[Tensor], scalars: Scalars, shards: Shards) -> list[Tensor]:
    """phi(|w|) / |u| of each whole tensor, 0-d."""
    norms = [torch.linalg.vector_norm(x) for pair in zip(params, updates, strict=True) for x in pair]
    squares = shards.sum([norm.square() for norm in norms], dim=0)
    ratios = []
    for w, u in zip(squares[::2], squares[1::2], strict=True):
        ratio = w.sqrt().clamp(scalars["low"], scalars["high"]) / u.sqrt()
        ratio = torch.where((w > 0) & (u > 0), ratio, 1.0)
        ratios.append(ratio.clamp(max=1.0) if scalars["trust_clip"] else ratio)
    return ratios
