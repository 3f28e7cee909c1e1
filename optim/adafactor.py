"""`Adafactor`: second moments in sublinear memory, relative step sizes and clipped updates."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Unpack, final

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from gradwire.compression.base import compute_dtype
from gradwire.optim.base import Optimizer
from gradwire.optim.checks import check_lr, check_range
from gradwire.optim.factored import FactoredDims, factored_order, row_column_sums, zeros_reduced
from gradwire.optim.kernels import Scalars
from gradwire.optim.layout import Dims
from gradwire.optim.options import Options
from gradwire.optim.shards import Shards


@final
class Adafactor(Optimizer):
    """Adam's second moment of a matrix as a product of row and column means, with steps relative to the weight's size.

        b = 1 - t^beta2_decay,    rho = min(lr, 1 / sqrt(t)),    alpha = max(eps2, RMS(w)) rho
        R <- b R + (1 - b) mean of rows(g^2 + eps1),    C <- b C + (1 - b) mean of columns(g^2 + eps1)
        V = R C^T / mean(R)    for matrices, else    V <- b V + (1 - b) (g^2 + eps1)
        u = g / sqrt(V),    u <- u / max(1, RMS(u) / d)
        w <- (1 - lr weight_decay) w - alpha u

    A matrix of n by m numbers needs a state of n + m. Tensors of more dimensions are stacks of matrices. The defaults
    are the paper's recommended form; lr takes the place of its constant 0.01 and so may follow a scheduler.

    Args:
        params: Tensors, `(name, tensor)` pairs or groups of them; complex ones are refused.
        lr: Largest relative step size, or the step size itself without `relative_step`, >= 0; a number or a 0-d tensor.
        beta2_decay: Exponent, <= 0, by which the second moment's window grows.
        eps: `(eps1, eps2)`, each >= 0: added to the squared gradient; least RMS of a weight. As eps1, None is 1e-30.
        d: Largest RMS of an update, > 0; None does not clip.
        weight_decay: Decoupled, multiplied by lr, >= 0.
        beta1: Decay rate of a first moment of `alpha u`, in [0, 1), which is then subtracted in its place; None for
            none, and no state.
        beta2_cap: Largest b, in [0, 1); None does not bound it.
        step_offset: Steps, >= 0, that b does not count: where fine-tuning began.
        relative_step: Whether rho is bounded by 1 / sqrt(t); else it is lr.
        warmup_init: Bound rho by 1e-6 t, too; needs `relative_step`.
        scale_parameter: Whether alpha has the factor max(eps2, RMS(w)).
        min_dim_size_to_factor: Least size, >= 0, of both factored dimensions; smaller tensors keep all of V.
        factored_dims: Which dimensions are rows and columns: the `"last"` two, or the `"largest"` two.
        decay: Multiply weight_decay by `"lr"`, or by alpha: `"effective"`.
        options: How it runs: `foreach`, `fused`, `maximize` and more, see `Options`.

    Shapes:
        Any, also empty and 0-d, in any memory layout.

    Cost:
        `4 (n + m)` bytes of state for a matrix, 4 per number for vectors and for `beta1`. Three passes over gradients:
        row and column sums, RMS(u), update; two over weights.

    State:
        step: 0-d float32, per parameter. row_var, col_var: R `[..., n, 1]` and C `[..., 1, m]`, or variance: V; exp_avg
        if beta1 is a number; all in float32 or wider.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0], [4.0, 3.0]]))
        >>> optimizer = Adafactor([weight])
        >>> weight.grad = torch.tensor([[1e-3, -1.0], [1e-5, -1e-2]])  # a column times a row
        >>> optimizer.step()
        >>> weight.data - torch.tensor([[3.0, 4.0], [4.0, 3.0]])  # 1% of RMS(w), all alike
        tensor([[-0.0354,  0.0354],
                [-0.0354,  0.0354]])

    Reference:
        Shazeer, Stern. Adafactor: Adaptive Learning Rates with Sublinear Memory Cost. ICML 2018. arXiv:1804.04235.
        Algorithms 4 and 5, section 9. `beta2_cap`: Zhai, Kolesnikov, Houlsby, Beyer. Scaling Vision Transformers. CVPR
        2022. arXiv:2106.04560.

    Differences from the paper: means in place of sums, which is the same. A `beta1` averages steps of all sizes, as in
    the authors' code.

    In place of other implementations: of `torch.optim.Adafactor`, with the same arguments. There eps1 is a floor of the
    root of V and as high as the weight's rounding, so that smaller gradients give smaller steps, in bfloat16 nearly
    all; here it is the paper's, in any dtype. Of `transformers.Adafactor`, with `decay="effective"`: lr=None is
    lr=1e-2, an lr of one's own goes with `relative_step=False`, `clip_threshold` is d and `decay_rate` beta2_decay. Of
    `optax.adafactor`: likewise, with `factored_dims="largest", min_dim_size_to_factor=128`.
    """

    supports_complex: ClassVar[bool] = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (1e-30, 1e-3),
        d: float | None = 1.0,
        weight_decay: float = 0.0,
        *,
        beta1: float | None = None,
        beta2_cap: float | None = None,
        step_offset: int = 0,
        relative_step: bool = True,
        warmup_init: bool = False,
        scale_parameter: bool = True,
        min_dim_size_to_factor: int = 0,
        factored_dims: FactoredDims = "last",
        decay: Literal["lr", "effective"] = "lr",
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "beta2_decay": beta2_decay,
            "eps": eps,
            "d": d,
            "weight_decay": weight_decay,
            "beta1": beta1,
            "beta2_cap": beta2_cap,
            "step_offset": step_offset,
            "relative_step": relative_step,
            "warmup_init": warmup_init,
            "scale_parameter": scale_parameter,
            "min_dim_size_to_factor": min_dim_size_to_factor,
            "factored_dims": factored_dims,
            "decay": decay,
        }
        super().__init__(params, defaults, options)

    def check_group(self, group: Mapping[str, Any]) -> None:
        """Check the ranges given above."""
        check_lr("Adafactor", group["lr"])
        eps, d = group["eps"], group["d"]
        if not isinstance(eps, tuple | list) or len(eps) != 2:
            raise ValueError(f"Adafactor: expected a pair eps, got eps={eps!r}.")
        check_range("Adafactor", "eps[0]", 0.0 if eps[0] is None else eps[0])
        check_range("Adafactor", "eps[1]", eps[1])
        check_range("Adafactor", "weight_decay", group["weight_decay"])
        if not isinstance(group["beta2_decay"], float | int) or not -float("inf") < group["beta2_decay"] <= 0:
            raise ValueError(f"Adafactor: expected beta2_decay <= 0, got beta2_decay={group['beta2_decay']!r}.")
        if d is not None and not (isinstance(d, float | int) and 0 < d < float("inf")):
            raise ValueError(f"Adafactor: expected d > 0 or None, got d={d!r}.")
        for name in ("beta1", "beta2_cap"):
            check_range("Adafactor", name, 0.0 if group[name] is None else group[name], below=1.0)
        for name in ("step_offset", "min_dim_size_to_factor"):
            check_range("Adafactor", name, group[name])
        if group["warmup_init"] and not group["relative_step"]:
            raise ValueError("Adafactor: expected relative_step with warmup_init, got relative_step=False.")
        for name, values in (("factored_dims", ("last", "largest")), ("decay", ("lr", "effective"))):
            if group[name] not in values:
                raise ValueError(f"Adafactor: expected {name} in {values}, got {name}={group[name]!r}.")

    def init_state(self, param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """All moments start at zero; the second needs no bias correction, as b is 0 in the first step."""
        order = _order(param.shape, group)
        if order is None:
            state = {"variance": self.zeros_like(param, group)}
        else:
            dtype, last = group["state_dtype"] or compute_dtype(param.dtype), param.ndim - 1
            state = {
                "row_var": zeros_reduced(param, order, last, dtype),
                "col_var": zeros_reduced(param, order, last - 1, dtype),
            }
        if group["beta1"] is not None:
            state["exp_avg"] = self.zeros_like(param, group)
        return state

    def dims(self, shape: torch.Size, group: Mapping[str, Any]) -> Dims:
        """Rows and columns last where they are factored, else a vector."""
        order = _order(shape, group)
        return super().dims(shape, group) if order is None else tuple((d,) for d in order)

    def scalars(self, step: Tensor, sizes: Tensor, group: Mapping[str, Any]) -> Scalars:
        """Decay rates and relative step sizes of this step, and what turns sums into means."""
        one_minus_beta2 = (step - group["step_offset"]).clamp(min=1.0) ** group["beta2_decay"]
        if group["beta2_cap"] is not None:
            one_minus_beta2 = one_minus_beta2.clamp(min=1 - group["beta2_cap"])
        rho = torch.zeros_like(step) + group["lr"]
        if group["relative_step"]:
            rho = torch.minimum(rho, step.rsqrt())
        if group["warmup_init"]:
            rho = torch.minimum(rho, 1e-6 * step)
        eps1, eps2 = group["eps"]
        sizes = sizes.clamp(min=1.0)
        numel = sizes.prod(1)
        factored = {"rows": sizes[:, -2], "columns": sizes[:, -1]} if sizes.shape[1] > 1 else {}
        return {
            **factored,
            "one_minus_beta1": 1 - (group["beta1"] or 0.0),
            "beta2": 1 - one_minus_beta2,
            "one_minus_beta2": one_minus_beta2,
            "rho": rho,
            "eps1": 1e-30 if eps1 is None else eps1,
            "eps2_squared": torch.full_like(step, eps2**2),
            "numel": numel,
            "numel_d_squared": numel * (group["d"] or 1.0) ** 2,
            "weight_decay": group["weight_decay"],
            "decay": group["lr"] * group["weight_decay"],
            "effective": group["decay"] == "effective",
            "clip": group["d"] is not None,
            "scale_parameter": group["scale_parameter"],
        }

    @staticmethod
    def update_(
        params: list[Tensor], grads: list[Tensor], state: dict[str, list[Tensor]], scalars: Scalars, shards: Shards
    ) -> list[Tensor]:
        """One step of the equations above; scales of rows and columns wait until they meet a weight."""
        dims = range(params[0].ndim)
        squares = _sums_of_squares(params) if scalars["scale_parameter"] else []
        if "row_var" in state:
            row_scales, column_scales, squares = _factors(grads, state, squares, scalars, shards)
            updates = torch._foreach_mul(grads, column_scales)
        else:
            row_scales = column_scales = ()
            _average_(state["variance"], list(torch._foreach_mul(grads, grads)), scalars)
            updates = torch._foreach_rsqrt(state["variance"])
            torch._foreach_mul_(updates, grads)

        if scalars["scale_parameter"]:
            for dim in dims[:-2] if row_scales else dims:
                squares = shards.sum(squares, dim)
            torch._foreach_div_(squares, scalars["numel"])
            torch._foreach_clamp_min_(squares, scalars["eps2_squared"])
            alphas = torch._foreach_sqrt(squares)
        else:
            alphas = tuple(param.new_ones(()) for param in params)
        torch._foreach_mul_(alphas, scalars["rho"])

        keep = 1 - scalars["decay"]
        if scalars["effective"]:
            keep = torch._foreach_mul(alphas, scalars["weight_decay"])
            torch._foreach_neg_(keep)
            torch._foreach_add_(keep, 1.0)
        torch._foreach_mul_(params, keep)

        if scalars["clip"]:
            squares = _sums_of_squares(updates, row_scales)
            for dim in dims:
                squares = shards.sum(squares, dim)
            torch._foreach_div_(squares, scalars["numel_d_squared"])
            torch._foreach_clamp_min_(squares, 1.0)
            torch._foreach_sqrt_(squares)
            alphas = torch._foreach_div(alphas, squares)
        scales = torch._foreach_mul(row_scales, alphas) if row_scales else alphas
        if "exp_avg" in state:
            torch._foreach_mul_(updates, scales)
            torch._foreach_lerp_(state["exp_avg"], updates, scalars["one_minus_beta1"])
            torch._foreach_sub_(params, state["exp_avg"])
        else:
            torch._foreach_addcmul_(params, updates, scales, value=-1)
        return [*row_scales, *column_scales, *scales]


def _order(shape: torch.Size, group: Mapping[str, Any]) -> tuple[int, ...] | None:
    return factored_order(shape, group["factored_dims"], group["min_dim_size_to_factor"])


def _factors(
    grads: list[Tensor], state: dict[str, list[Tensor]], totals: list[Tensor], scalars: Scalars, shards: Shards
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], list[Tensor]]:
    """Update R and C; returns 1 / sqrt(R / mean(R)), 1 / sqrt(C), and totals summed over rows and columns as well."""
    n, last = len(grads), grads[0].ndim - 1
    by_row, by_column = row_column_sums(grads)
    parts = shards.sum([*by_row, *totals], last)
    by_row, totals = parts[:n], parts[n:]
    torch._foreach_div_(by_row, scalars["columns"])
    _average_(state["row_var"], by_row, scalars)

    means = [row_var.sum(-2, keepdim=True) for row_var in state["row_var"]]
    parts = shards.sum([*by_column, *means, *totals], last - 1)
    by_column, means, totals = parts[:n], parts[n : 2 * n], parts[2 * n :]
    torch._foreach_div_(by_column, scalars["rows"])
    _average_(state["col_var"], by_column, scalars)

    torch._foreach_div_(means, scalars["rows"])
    row_scales = torch._foreach_div(state["row_var"], means)
    torch._foreach_rsqrt_(row_scales)
    return tuple(row_scales), tuple(torch._foreach_rsqrt(state["col_var"])), totals


def _average_(averages: list[Tensor], squares: list[Tensor], scalars: Scalars) -> None:
    """`b x + (1 - b) (squares + eps1)`; squares are overwritten."""
    torch._foreach_add_(squares, scalars["eps1"])
    torch._foreach_mul_(squares, scalars["one_minus_beta2"])
    torch._foreach_mul_(averages, scalars["beta2"])
    torch._foreach_add_(averages, squares)


def _sums_of_squares(tensors: Sequence[Tensor], row_scales: Sequence[Tensor] = ()) -> list[Tensor]:
    """Of all entries, or of rows times their scales; by rows, as one long sum in float32 is inexact."""
    norms = [torch.linalg.vector_norm(x, dim=-1, keepdim=x.ndim > 1) for x in tensors]
    if row_scales:
        norms = list(torch._foreach_mul(norms, list(row_scales)))
    norms = [torch.linalg.vector_norm(x) if x.ndim > 1 else x for x in norms]
    return list(torch._foreach_mul(norms, norms))
