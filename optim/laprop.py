"""`LaProp`: momentum of gradients that are already normalised."""

from collections.abc import Mapping
from typing import Any, ClassVar, Unpack, final

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from gradwire.compression.base import compute_dtype
from gradwire.optim.base import Optimizer
from gradwire.optim.checks import check_betas, check_eps_in_state, check_lr, check_range
from gradwire.optim.kernels import Scalars
from gradwire.optim.options import Options
from gradwire.optim.shards import Shards

_LEAST_SHARE = 1e-6
"""Of v, that is left of it after centering: what float32 can tell from zero."""


@final
class LaProp(Optimizer):
    """Adam with the order of momentum and normalisation exchanged, so that no pair of betas lets it diverge.

        w <- (1 - lr weight_decay) w
        v <- beta2 v + (1 - beta2) g^2
        m <- beta1 m + (1 - beta1) lr g / (sqrt(v / (1 - beta2^t)) + eps)
        a <- beta1 a + (1 - beta1) lr
        w <- w - lr / a m

    While lr is constant, `lr / a` is the bias correction 1 / (1 - beta1^t). While it changes, m / a averages normalised
    gradients with the lr they came with.

    Args:
        params: Tensors, `(name, tensor)` pairs or groups of them.
        lr: Step size, >= 0; a number or a 0-d tensor.
        betas: Decay rates of m and v, each in [0, 1).
        eps: >= 0; added to the denominator.
        weight_decay: >= 0; decoupled, multiplied by lr.
        amsgrad: Divide by the largest v so far.
        centered: Subtract the square of an average of g with beta2 from v, of which a millionth is left at least.
        steps_before_using_centered: Steps >= 0 that average only; amsgrad's maximum, too, then begins after them.
        fixed_decay: Decay by weight_decay alone, not by lr weight_decay, wherever lr is not 0.
        paper_momentum: Leave lr out of m and a: momentum as in the paper, which forgets with which lr it came.
        options: How it runs: `foreach`, `fused`, `maximize` and more, see `Options`.

    Shapes:
        Any, also empty and 0-d, in any memory layout.

    Cost:
        8 bytes of state per parameter, 4 more with amsgrad and 4 with centered. Fused, one pass over memory.

    State:
        step: 0-d float32, per parameter. exp_avg, exp_avg_sq: m and v; max_exp_avg_sq with amsgrad; grad_avg with
        centered; in float32 or wider. exp_avg_lr: a, one number. A `state_dtype` in which eps, or what centering
        leaves, would vanish is refused.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = LaProp([weight], lr=0.1)
        >>> weight.grad = torch.tensor([1.0, -1e-9])
        >>> optimizer.step()
        >>> weight.data
        tensor([-0.1000,  0.1000])

    Reference:
        Ziyin, Wang, Ueda. LaProp: Separating Momentum and Adaptivity in Adam. 2020. arXiv:2002.04839.

    Differences from the paper: lr within m, as in the authors' code; see `paper_momentum`.

    Differences from the authors' code: decay comes before the step, not after it, and is multiplied by lr but with
    `fixed_decay`. A step with lr = 0 leaves weights alone, which is the limit of small lr; there it takes all of m.
    Without the millionth, a constant gradient makes the centered form divide by zero.
    """

    elementwise: ClassVar[bool] = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 4e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-15,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        centered: bool = False,
        steps_before_using_centered: int = 10,
        fixed_decay: bool = False,
        paper_momentum: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "centered": centered,
            "steps_before_using_centered": steps_before_using_centered,
            "fixed_decay": fixed_decay,
            "paper_momentum": paper_momentum,
        }
        super().__init__(params, defaults, options)

    def check_group(self, group: Mapping[str, Any]) -> None:
        """Check the ranges given above."""
        check_lr("LaProp", group["lr"])
        check_betas("LaProp", group["betas"])
        for name in ("eps", "weight_decay", "steps_before_using_centered"):
            check_range("LaProp", name, group[name])
        check_eps_in_state("LaProp", group)
        dtype = group["state_dtype"]
        if group["centered"] and dtype is not None and torch.finfo(dtype).eps > _LEAST_SHARE:
            raise ValueError(
                f"LaProp: expected a state_dtype that holds a difference of {_LEAST_SHARE:g} with centered, "
                f"got state_dtype={dtype}. Use torch.float32."
            )

    def init_state(self, param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """All averages start at zero."""
        names = ["exp_avg", "exp_avg_sq"]
        names += ["max_exp_avg_sq"] if group["amsgrad"] else []
        names += ["grad_avg"] if group["centered"] else []
        state = {name: self.zeros_like(param, group) for name in names}
        shape = () if param.ndim else (1,)  # never the parameter's, which may be complex
        dtype = compute_dtype(param.dtype).to_real()
        return {**state, "exp_avg_lr": torch.zeros(shape, dtype=dtype, device=param.device)}

    def scalars(self, step: Tensor, sizes: Tensor, group: Mapping[str, Any]) -> Scalars:
        """Bias correction of v, the share of a new gradient in m, and whether v is centered already, 0 or 1."""
        beta1, beta2 = group["betas"]
        lr, decay = group["lr"], group["weight_decay"]
        centering = {}
        if group["centered"]:
            centering["centering"] = (step > group["steps_before_using_centered"]).to(step.dtype)
        return {
            **centering,
            "beta1": beta1,
            "one_minus_beta2": 1 - beta2,
            "inverse_root_correction": (1 - beta2**step) ** -0.5,
            "eps": torch.full_like(step, group["eps"]),
            "lr": lr,
            "share": torch.ones_like(step) * ((1 - beta1) * (1.0 if group["paper_momentum"] else lr)),
            "decay": decay * ((lr > 0) if group["fixed_decay"] else lr),
            "amsgrad": group["amsgrad"],
            "centered": group["centered"],
        }

    @staticmethod
    def update_(
        params: list[Tensor], grads: list[Tensor], state: dict[str, list[Tensor]], scalars: Scalars, shards: Shards
    ) -> None:
        """One step of the equations above."""
        exp_avgs, exp_avg_sqs, exp_avg_lrs = state["exp_avg"], state["exp_avg_sq"], state["exp_avg_lr"]
        torch._foreach_mul_(params, 1 - scalars["decay"])
        squares = torch._foreach_mul(grads, grads)
        torch._foreach_lerp_(exp_avg_sqs, squares, scalars["one_minus_beta2"])
        if scalars["centered"]:
            exp_avg_sqs = _center(exp_avg_sqs, grads, state["grad_avg"], scalars)
        if scalars["amsgrad"]:
            maxima = state["max_exp_avg_sq"]
            counted = torch._foreach_mul(exp_avg_sqs, scalars["centering"]) if scalars["centered"] else exp_avg_sqs
            torch._foreach_maximum_(maxima, counted)
            exp_avg_sqs = list(torch._foreach_maximum(maxima, exp_avg_sqs))

        denominators = torch._foreach_sqrt(exp_avg_sqs)
        torch._foreach_mul_(denominators, scalars["inverse_root_correction"])
        torch._foreach_add_(denominators, scalars["eps"])
        torch._foreach_mul_(exp_avgs, scalars["beta1"])
        torch._foreach_addcdiv_(exp_avgs, torch._foreach_mul(grads, scalars["share"]), denominators)

        torch._foreach_mul_(exp_avg_lrs, scalars["beta1"])
        torch._foreach_add_(exp_avg_lrs, scalars["share"])
        step_sizes = torch._foreach_clamp_min(exp_avg_lrs, torch.finfo(torch.float32).tiny)  # 0 until lr is not
        torch._foreach_reciprocal_(step_sizes)
        torch._foreach_mul_(step_sizes, scalars["lr"])
        torch._foreach_addcmul_(params, exp_avgs, step_sizes, value=-1)


def _center(exp_avg_sqs: list[Tensor], grads: list[Tensor], grad_avgs: list[Tensor], scalars: Scalars) -> list[Tensor]:
    """Averages of squares without the squares of averages."""
    torch._foreach_lerp_(grad_avgs, grads, scalars["one_minus_beta2"])
    squares = torch._foreach_mul(grad_avgs, grad_avgs)
    torch._foreach_mul_(squares, scalars["centering"])
    centered = torch._foreach_sub(exp_avg_sqs, squares)
    torch._foreach_maximum_(centered, torch._foreach_mul(exp_avg_sqs, _LEAST_SHARE))
    return list(centered)
