"""`OneBitAdam`: Adam that freezes its variance, and then exchanges its momentum in one bit per entry."""

from collections.abc import Mapping
from typing import Any, Unpack, final

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from gradwire.optim.kernels import Scalars
from gradwire.optim.one_bit import FrozenVariance, OneBitOptions, follow_squares_, step_along
from gradwire.optim.shards import Shards


@final
class OneBitAdam(FrozenVariance):
    """Adam on dense gradients for a while; then its variance stays, and ranks exchange their momenta in signs.

    In the first `warmup_steps` steps, with g the mean of the gradients g_i over ranks:

        m <- beta1 m + (1 - beta1) g,    v <- beta2 v + (1 - beta2) g^2

    From then on v stays, and with C a compressor with error feedback, on each rank and again on the mean:

        m_i = beta1 m + (1 - beta1) g_i,    m <- C(mean of C(m_i))

    and in either phase

        x <- (1 - lr weight_decay) x - lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)

    where the second t is that of the last change of v. Entries whose v is zero when it is frozen never move again.

    Gradients must be local when `step` is called: nobody else averages them. In a plain loop that is so; under
    `DistributedDataParallel` register `gradwire.comm.keep_local(ddp)`; under FSDP2 shard with `mesh["shard"]` alone and
    give `group=mesh["replicate"].get_group()`, so that each rank exchanges its shard with its peers.

    Args:
        params: Tensors, `(name, tensor)` pairs or groups of them: on every rank the same, in the same order. Those that
            require no gradient are left out; those without one take part with zero.
        lr: Step size, >= 0; a number or a 0-d tensor.
        betas: Decay rates of both moments, each in [0, 1).
        eps: >= 0; added to the denominator.
        weight_decay: Decoupled, multiplied by lr, >= 0.
        warmup_steps: Steps of Adam, >= 1: the paper takes 15 to 25 percent of all, at least those in which the
            learning rate rises and 1 / (1 - betas[1]). Skipped steps count.
        bias_correction: Divide both moments by 1 - beta^t.
        options: How it exchanges (`compressor`, `plan`, `group`, `bucket_mb`, `seed`, `timeout`: see
            `ExchangeOptions`), and how it runs (`foreach`, `fused` and more: see `Options`; `differentiable` is not
            possible).

    Shapes:
        Any but complex.

    Cost:
        16 bytes per parameter, and 4 / n on n ranks for the second residual; Adam's state is 8. Sends 2 (n - 1) / n
        times 4 bytes per parameter and step in the warm-up, and 1/8 byte and a scale per 1024 entries afterwards.

    State:
        step: 0-d float32, per parameter. exp_avg: m; exp_avg_sq: v, divided by 1 - beta2^t already. Both are equal on
        all ranks; residuals are the communicator's, different on every rank: every rank must save its own `state_dict`,
        or use `gradwire.comm.checkpoint`.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = OneBitAdam([("weight", weight)], lr=0.1, warmup_steps=1)
        >>> for gradient in ([1.0, -2.0], [1.0, -2.0]):
        ...     weight.grad = torch.tensor(gradient)
        ...     optimizer.step()
        >>> weight.data
        tensor([-0.2000,  0.2000])

    Reference:
        Tang, Gan, Awan, Rajbhandari, Li, Lian, Liu, Zhang, He. 1-bit Adam: Communication Efficient Large-Scale Training
        with Adam's Convergence Speed. ICML 2021. arXiv:2102.02888. Algorithm 1.

    Differences from the paper:
        Written from knowledge of it, not from the printed algorithm. It has no bias correction, which matters after a
        short warm-up: v is too small then, for good. One scale per row of 1024 entries, not one for all; small
        tensors are sent whole. Momenta of entries without a variance are zero, since one bit has no zero. A gradient
        that is not finite on any rank makes all ranks skip the step. Gradient clipping can only be each rank's own.
    """

    elementwise = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        warmup_steps: int = 1000,
        bias_correction: bool = True,
        **options: Unpack[OneBitOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
        }
        super().__init__(params, defaults, warmup_steps, frozenset(), options)

    def scalars(self, step: Tensor, sizes: Tensor, group: Mapping[str, Any]) -> Scalars:
        """Numbers of both moments, and decay."""
        decay = {"decay": group["lr"] * group["weight_decay"], "decays": group["weight_decay"] != 0}
        return self._moment_scalars(step, group) | decay

    @staticmethod
    def update_(
        params: list[Tensor], grads: list[Tensor], state: dict[str, list[Tensor]], scalars: Scalars, shards: Shards
    ) -> None:
        """One step of the equations above, on the mean gradient or on the momentum."""
        exp_avgs, exp_avg_sqs = state["exp_avg"], state["exp_avg_sq"]
        if scalars["frozen"]:
            torch._foreach_copy_(exp_avgs, grads)
            torch._foreach_mul_(exp_avgs, torch._foreach_sign(exp_avg_sqs))
        else:
            torch._foreach_lerp_(exp_avgs, grads, scalars["one_minus_beta1"])
            follow_squares_(exp_avg_sqs, grads, scalars["share"])
        updates = step_along(exp_avgs, exp_avg_sqs, scalars)
        torch._foreach_mul_(updates, scalars["lr"])
        if scalars["decays"]:
            torch._foreach_sub_(params, torch._foreach_mul(params, scalars["decay"]))
        torch._foreach_sub_(params, updates)
