"""`OneBitLAMB`: LAMB that freezes variance and trust ratios, and then exchanges its momentum in one bit per entry."""

from collections.abc import Mapping
from typing import Any, Unpack, final

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from gradwire.compression.base import compute_dtype
from gradwire.optim.checks import check_range
from gradwire.optim.kernels import Scalars
from gradwire.optim.one_bit import FrozenVariance, OneBitOptions, follow_squares_, step_along
from gradwire.optim.shards import Shards


@final
class OneBitLAMB(FrozenVariance):
    """LAMB on dense gradients for a while; then ranks exchange momenta in signs, and trust ratios follow the variance.

    In the first `warmup_steps` steps it is LAMB, with g the mean of the gradients g_i over ranks, u as below, and

        m <- beta1 m + (1 - beta1) g,    v <- beta2 v + (1 - beta2) g^2,
        c = min(max(|x| / |u|, low), high),    a <- beta3 a + (1 - beta3) c

    for each layer, which is a tensor; c is 1 where a norm is 0. From then on v and a stay, and with C a compressor with
    error feedback, on each rank and again on the mean:

        m_i = beta1 m + (1 - beta1) g_i,    m' = C(mean of C(m_i)),    h = (m' - beta1 m) / (1 - beta1),    m <- m'
        f <- beta2 f + (1 - beta2) h^2,     q = max((sqrt(v) + eps) / (sqrt(f) + eps)) over the layer
        r <- q within `factor_bounds`, and within r (1 - threshold), r (1 + threshold) of the last r;    c = r a

    where h stands for the gradient, and f begins as v, r as 1. In either phase

        u = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay x,    x <- x - lr c u

    where the second t is that of the last change of v. Entries whose v is zero when it is frozen change by their decay
    alone. What gradients must be, and where, is said at `OneBitAdam`.

    Args:
        params: As for `OneBitAdam`.
        lr: Step size relative to the norm of the weights, >= 0; a number or a 0-d tensor.
        betas: Decay rates of both moments, each in [0, 1).
        eps: >= 0; added to the denominators.
        weight_decay: >= 0; part of u, and so scaled with it.
        warmup_steps: Steps of LAMB, >= 1, as for `OneBitAdam`, and well above 1 / (1 - beta3).
        beta3: Decay rate of the average trust ratio, in [0, 1).
        ratio_bounds: low and high of a trust ratio, 0 <= low <= high.
        factor_bounds: Of r, 0 <= low <= 1 <= high.
        threshold: Largest relative change of r in a step, in [0, 1).
        bias_correction: Divide all averages by 1 - beta^t.
        options: As for `OneBitAdam`.

    Shapes:
        Any but complex.

    Cost:
        20 bytes per parameter, and 4 / n on n ranks for the second residual; LAMB's state is 8. Sends what `OneBitAdam`
        sends. Two passes over memory; sharded parameters add collectives of a few numbers per tensor.

    State:
        step: 0-d float32, per parameter. exp_avg: m; exp_avg_sq: v; fresh_exp_avg_sq: f; trust_ratio, factor: a and r,
        0-d. Averages are divided by 1 - beta^t already, but for m. All are equal on all ranks; residuals are the
        communicator's, as for `OneBitAdam`.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = OneBitLAMB([("weight", weight)], lr=0.1, warmup_steps=1)
        >>> weight.grad = torch.tensor([0.2, -7.0])
        >>> optimizer.step()  # by 0.1 |w| = 0.5, along the signs
        >>> weight.data
        tensor([2.6464, 4.3536])

    Reference:
        Li, Awan, Tang, Rajbhandari, He. 1-bit LAMB: Communication Efficient Large-Scale Large-Batch Training with
        LAMB's Convergence Speed. HiPC 2022. arXiv:2104.06069. Algorithm 1.

    Differences from the paper:
        Written from knowledge of it and of its authors' code, whose defaults these are, not from the printed algorithm;
        that code weighs r by the share of u that is not decay, which is left out here. Bias is corrected, as for
        `OneBitAdam`. The paper brings the momenta of all layers to one size before it compresses them, since it has one
        scale for all; here every 1024 entries have their own. Small tensors are sent whole. A gradient that is not
        finite on any rank makes all ranks skip the step.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        warmup_steps: int = 1000,
        beta3: float = 0.9,
        ratio_bounds: tuple[float, float] = (0.01, 10.0),
        factor_bounds: tuple[float, float] = (0.5, 4.0),
        threshold: float = 0.1,
        bias_correction: bool = True,
        **options: Unpack[OneBitOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "beta3": beta3,
            "ratio_bounds": ratio_bounds,
            "factor_bounds": factor_bounds,
            "threshold": threshold,
            "bias_correction": bias_correction,
        }
        super().__init__(params, defaults, warmup_steps, frozenset(), options)

    def check_group(self, group: Mapping[str, Any]) -> None:
        """Check the ranges given above."""
        super().check_group(group)
        for name in ("beta3", "threshold"):
            check_range("OneBitLAMB", name, group[name], below=1.0)
        for name in ("ratio_bounds", "factor_bounds"):
            bounds = group[name]
            if not isinstance(bounds, tuple | list) or len(bounds) != 2 or not 0.0 <= bounds[0] <= bounds[1]:
                raise ValueError(f"OneBitLAMB: expected {name} (low, high) with 0 <= low <= high, got {bounds!r}.")
        low, high = group["factor_bounds"]
        if not low <= 1 <= high:
            raise ValueError(f"OneBitLAMB: expected factor_bounds around 1, got {(low, high)!r}.")

    def init_state(self, param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """All averages start at zero, the factor at 1."""
        number = torch.zeros((), dtype=compute_dtype(param.dtype), device=param.device)
        return {
            **super().init_state(param, group),
            "fresh_exp_avg_sq": self.zeros_like(param, group),
            "trust_ratio": number,
            "factor": number + 1,
        }

    def scalars(self, step: Tensor, sizes: Tensor, group: Mapping[str, Any]) -> Scalars:
        """Numbers of the moments, and those that decide trust ratios."""
        beta3, one = group["beta3"], torch.ones_like(step)
        return self._moment_scalars(step, group) | {
            "decay": group["weight_decay"],
            "ratio_share": (1 - beta3) / (1 - beta3**step) if group["bias_correction"] else one * (1 - beta3),
            "ratio_low": group["ratio_bounds"][0],
            "ratio_high": group["ratio_bounds"][1],
            "factor_low": group["factor_bounds"][0],
            "factor_high": group["factor_bounds"][1],
            "least_change": 1 - group["threshold"],
            "most_change": 1 + group["threshold"],
        }

    @staticmethod
    def update_(
        params: list[Tensor], grads: list[Tensor], state: dict[str, list[Tensor]], scalars: Scalars, shards: Shards
    ) -> list[Tensor]:
        """One step of the equations above, on the mean gradient or on the momentum."""
        exp_avgs, exp_avg_sqs, fresh = state["exp_avg"], state["exp_avg_sq"], state["fresh_exp_avg_sq"]
        if scalars["frozen"]:
            momenta = torch._foreach_mul(grads, torch._foreach_sign(exp_avg_sqs))  # one bit has no zero
            rebuilt = torch._foreach_sub(momenta, torch._foreach_mul(exp_avgs, scalars["beta1"]))
            torch._foreach_div_(rebuilt, scalars["one_minus_beta1"])
            torch._foreach_copy_(exp_avgs, momenta)
            follow_squares_(fresh, list(rebuilt), scalars["share"])
            ratios = _scaled_ratios(state, scalars, shards)
        else:
            torch._foreach_lerp_(exp_avgs, grads, scalars["one_minus_beta1"])
            follow_squares_(exp_avg_sqs, grads, scalars["share"])
            torch._foreach_copy_(fresh, exp_avg_sqs)
        updates = step_along(exp_avgs, exp_avg_sqs, scalars)
        torch._foreach_add_(updates, torch._foreach_mul(params, scalars["decay"]))
        if not scalars["frozen"]:
            ratios = _trust_ratios(params, updates, scalars, shards)
            differences = torch._foreach_sub(ratios, state["trust_ratio"])
            torch._foreach_mul_(differences, scalars["ratio_share"])
            torch._foreach_add_(state["trust_ratio"], differences)
        torch._foreach_mul_(updates, ratios)
        torch._foreach_mul_(updates, scalars["lr"])
        torch._foreach_sub_(params, updates)
        return ratios


def _trust_ratios(params: list[Tensor], updates: list[Tensor], scalars: Scalars, shards: Shards) -> list[Tensor]:
    """|x| / |u| of each whole tensor within its bounds."""
    norms = [torch.linalg.vector_norm(x) for pair in zip(params, updates, strict=True) for x in pair]
    squares = shards.sum([norm.square() for norm in norms], dim=0)
    ratios = []
    for x, u in zip(squares[::2], squares[1::2], strict=True):
        ratio = (x.sqrt() / u.sqrt()).clamp(scalars["ratio_low"], scalars["ratio_high"])
        ratios.append(torch.where((x > 0) & (u > 0), ratio, 1.0))
    return ratios


def _scaled_ratios(state: dict[str, list[Tensor]], scalars: Scalars, shards: Shards) -> list[Tensor]:
    """The average trust ratio of the warm-up, times by how much the variance has fallen since; moves the factors."""
    frozen = torch._foreach_sqrt(state["exp_avg_sq"])
    known = torch._foreach_sign(frozen)
    fresh = torch._foreach_sqrt(state["fresh_exp_avg_sq"])
    torch._foreach_add_(frozen, scalars["eps"])
    torch._foreach_add_(fresh, scalars["eps"])
    torch._foreach_div_(frozen, fresh)
    torch._foreach_mul_(frozen, known)
    largest = shards.max([x.amax() if x.numel() else x.new_zeros(()) for x in frozen], dim=0)
    factors = []
    for new, last in zip(largest, state["factor"], strict=True):
        bounded = new.clamp(scalars["factor_low"], scalars["factor_high"])
        least, most = last * scalars["least_change"], last * scalars["most_change"]
        factors.append(torch.minimum(torch.maximum(bounded, least), most))
    torch._foreach_copy_(state["factor"], factors)  # compiled by torch 2.13, factor.copy_(...) would do nothing
    return list(torch._foreach_mul(factors, state["trust_ratio"]))
