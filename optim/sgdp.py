"""`SGDP`: SGD with momentum that does not inflate the norm of scale-invariant weights."""

from collections.abc import Mapping
from typing import Any, Unpack, final

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from gradwire.optim.base import Optimizer
from gradwire.optim.checks import check_lr, check_range
from gradwire.optim.kernels import Scalars
from gradwire.optim.layout import Dims
from gradwire.optim.options import Options
from gradwire.optim.projection import by_rows, decay_and_project_, thresholds
from gradwire.optim.shards import Shards


@final
class SGDP(Optimizer):
    """SGD with momentum whose update is projected onto the tangent space of scale-invariant weights.

        b <- momentum b + (1 - dampening) g
        u  = b,    or with Nesterov's momentum  u = g + momentum b
        if w is scale-invariant:  u <- u - w <w, u> / (|w| + eps)^2,  rho = wd_ratio,  else rho = 1
        w <- (1 - lr weight_decay rho / (1 - momentum)) w - lr u

    A weight counts as scale-invariant by the test that `AdamP` describes; vectors and scalars never do. The decay is
    divided by 1 - momentum so that weight_decay means what it means to SGD, where momentum multiplies it.

    Args:
        params: Tensors, `(name, tensor)` pairs or groups of them.
        lr: Step size, >= 0; a number or a 0-d tensor.
        momentum: In [0, 1).
        dampening: In [0, 1), in every step.
        weight_decay: Decoupled, multiplied by lr / (1 - momentum), >= 0.
        nesterov: As above.
        eps: >= 0; added to norms in the projection, and the least norm in the test's cosine.
        delta: Threshold of the test, >= 0; 0 turns the projection off.
        wd_ratio: Share of the decay that scale-invariant weights get, >= 0.
        options: How it runs: `foreach`, `fused`, `maximize` and more, see `Options`.

    Shapes:
        Any, also empty and 0-d, in any memory layout.

    Cost:
        4 bytes of state per parameter. Fused, two passes over memory: one for momentum and row sums, one for weights.

    State:
        step: 0-d float32, per parameter. momentum_buffer: b, in float32 or wider. A state of `torch.optim.SGD`, which
        counts no steps, loads as well.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
        >>> optimizer = SGDP([weight], lr=0.1, momentum=0.9)
        >>> for _ in range(2):
        ...     weight.grad = torch.tensor([[-4.0, 3.0]]) / weight.detach().norm()
        ...     optimizer.step()
        >>> weight.data - torch.tensor([[3.0, 4.0]])
        tensor([[ 0.2296, -0.1770]])

    Reference:
        Heo, Chun, Oh, Han, Yun, Kim, Uh, Ha. AdamP: Slowing Down the Slowdown for Momentum Optimizers on
        Scale-invariant Weights. ICLR 2021. arXiv:2006.08217. Algorithm 1.

    Differences from the paper: as in the authors' code, the test by rows before the test of the whole tensor, the decay
    and `wd_ratio`. Unlike there, the projection leaves b alone without Nesterov's momentum, too.

    Differences from `torch.optim.SGD`: dampening holds for the first step, too, and weight_decay is never added to g.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        eps: float = 1e-8,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "eps": eps,
            "delta": delta,
            "wd_ratio": wd_ratio,
        }
        super().__init__(params, defaults, options)

    def check_group(self, group: Mapping[str, Any]) -> None:
        """Check the ranges given above."""
        check_lr("SGDP", group["lr"])
        for name in ("momentum", "dampening"):
            check_range("SGDP", name, group[name], below=1.0)
        for name in ("weight_decay", "eps", "delta", "wd_ratio"):
            check_range("SGDP", name, group[name])

    def init_state(self, param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """The momentum starts at zero."""
        return {"momentum_buffer": self.zeros_like(param, group)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, also one of `torch.optim.SGD`: its momentum goes on, and steps are counted from zero."""
        state = {
            i: {"step": 0.0, **own} if own.keys() == {"momentum_buffer"} else own
            for i, own in state_dict["state"].items()
        }
        super().load_state_dict({**state_dict, "state": state})

    def dims(self, shape: torch.Size, group: Mapping[str, Any]) -> Dims:
        """A matrix of rows, or a vector."""
        return by_rows(shape)

    def scalars(self, step: Tensor, sizes: Tensor, group: Mapping[str, Any]) -> Scalars:
        """The decay in full."""
        lr, momentum = group["lr"], group["momentum"]
        return {
            "lr": lr,
            "momentum": momentum,
            "one_minus_dampening": 1 - group["dampening"],
            "decay": lr * (group["weight_decay"] / (1 - momentum)),
            "eps": torch.full_like(step, group["eps"]),
            "wd_ratio": group["wd_ratio"],
            "nesterov": group["nesterov"],
            **thresholds(sizes, group["delta"]),
        }

    @staticmethod
    def update_(
        params: list[Tensor], grads: list[Tensor], state: dict[str, list[Tensor]], scalars: Scalars, shards: Shards
    ) -> list[Tensor]:
        """One step of the equations above, with `lr u` in place of u, which the projection is linear in."""
        buffers = state["momentum_buffer"]
        torch._foreach_mul_(buffers, scalars["momentum"])
        torch._foreach_add_(buffers, torch._foreach_mul(grads, scalars["one_minus_dampening"]))
        if scalars["nesterov"]:
            updates = torch._foreach_mul(buffers, scalars["momentum"])
            torch._foreach_add_(updates, grads)
            torch._foreach_mul_(updates, scalars["lr"])
        else:
            updates = torch._foreach_mul(buffers, scalars["lr"])

        once = decay_and_project_(params, list(updates), grads, scalars, shards)
        torch._foreach_sub_(params, updates)
        return once
