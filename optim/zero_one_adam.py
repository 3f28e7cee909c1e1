"""`ZeroOneAdam`: Adam that seldom updates its variance, sends its momentum in one bit, and ever less often."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Unpack, final

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from gradwire.comm.averager import Averager
from gradwire.compression.base import compute_dtype
from gradwire.optim.exchange import ExchangedGradients
from gradwire.optim.kernels import Scalars
from gradwire.optim.one_bit import ExchangeOptions, OneBit, OneBitOptions, check_count, follow_squares_
from gradwire.optim.shards import Shards

_DENSE = "gradient of "


@final
class ZeroOneAdam(OneBit):
    """Adam whose variance follows the mean gradient ever more seldom, while ranks exchange accumulated steps in signs.

    Steps t = 0, 1, ... are of three kinds, with g_i the gradient on rank i, g its mean, and C a compressor with error
    feedback, on each rank and again on the mean:

        dense:  m <- beta1 m + (1 - beta1) g,    v <- beta2 v + (1 - beta2) g^2,    x <- x - lr m / (sqrt(v) + eps)
        local:  m_i <- beta1 m_i + (1 - beta1) g_i,    u_i <- u_i + lr m_i,    x_i <- x_i - lr m_i / (sqrt(v) + eps)
        one bit: m_i and u_i as in a local step;    u = C(mean of C(u_i)),    m_i <- u / (sum of lr since t'),
                 x_i <- x_t' - u / (sqrt(v) + eps),    u_i <- 0

    where t' is the last step that was not local, after which ranks are equal. Moments are divided by 1 - beta^k where
    they are used, with k the number of their updates, and lr in u_i and its sum with it. Weights decay by
    lr weight_decay in every step.

    Dense are the steps 0, ..., kappa - 1, then kappa steps at a distance of 2, of 4 and so on, as long as they are
    below `warmup_steps`. All others below it send one bit. From there on v stays and the interval between exchanges is
    min(2^j, max_interval) after j times `double_every` steps. Between exchanges nothing is communicated: parameters
    differ from rank to rank until the next one, or until `synchronize`. Entries whose v is zero do not move.

    What gradients must be, and where, is said at `OneBitAdam`.

    Args:
        params: As for `OneBitAdam`.
        lr: Step size, >= 0; a number or a 0-d tensor.
        betas: Decay rates of both moments, each in [0, 1).
        eps: >= 0; added to the denominator.
        weight_decay: Decoupled, multiplied by lr, >= 0.
        warmup_steps: Steps in which the variance may change and all ranks exchange, >= 1; usually those in which the
            learning rate rises. Skipped steps count.
        kappa: Updates of the variance at each distance, >= 1.
        double_every: Steps until the interval doubles, >= 1; usually those in which the learning rate halves.
        max_interval: Most steps from one exchange to the next, >= 1.
        bias_correction: Divide both moments by 1 - beta^k.
        options: As for `OneBitAdam`.

    Shapes:
        Any but complex.

    Cost:
        24 bytes per parameter, and 4 / n on n ranks for the second residual; Adam's state is 8. Sends what `OneBitAdam`
        sends in its two phases, and nothing in local steps.

    State:
        step: 0-d float32, per parameter. exp_avg: m_i; exp_avg_sq: v, divided by variance_weight, 0-d, already;
        accumulated, start: u_i and x_t'; accumulated_lr, 0-d: the sum of lr. Different on every rank between exchanges;
        `state_dict` synchronizes, so that what is saved is equal on all ranks but for the communicator's residuals.
        Every rank must save its own `state_dict`, or use `gradwire.comm.checkpoint`.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = ZeroOneAdam([("weight", weight)], lr=0.1, warmup_steps=1)
        >>> for gradient in ([1.0, -2.0], [1.0, -2.0]):
        ...     weight.grad = torch.tensor(gradient)
        ...     optimizer.step()
        >>> weight.data
        tensor([-0.2000,  0.2000])

    Reference:
        Lu, Li, Zhang, De Sa, He. Maximizing Communication Efficiency for Large-scale Training via 0/1 Adam. ICLR 2023.
        arXiv:2202.06009. Algorithm 1, and the policies of its experiments.

    Differences from the paper:
        Written from knowledge of it and of its authors' code, not from the printed algorithm. There, v changes after it
        is used, and so is zero at first, and a dense step also sends one bit; here and in that code its gradient is all
        it sends. Bias is corrected, eps is outside the root, and rows of 1024 entries have scales of their own. A
        gradient that is not finite makes all ranks skip a step with an exchange; in a local step, of which other ranks
        know nothing, all of its rank's gradients count as zero.
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
        kappa: int = 16,
        double_every: int = 32768,
        max_interval: int = 16,
        bias_correction: bool = True,
        **options: Unpack[OneBitOptions],
    ) -> None:
        policy = {
            "warmup_steps": warmup_steps,
            "kappa": kappa,
            "double_every": double_every,
            "max_interval": max_interval,
        }
        for name, value in policy.items():
            check_count("ZeroOneAdam", name, value)
        self.warmup_steps, self.kappa, self.double_every, self.max_interval = policy.values()
        self._kind = "dense"
        self._apart = torch.zeros((), dtype=torch.bool)  # whether ranks may differ
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
        }
        super().__init__(params, defaults, frozenset(policy), options)
        self.communicator.owner = {name: str(value) for name, value in policy.items()}  # who waits for whom, and when

    def kind(self, t: int) -> str:
        """What happens in step t, counted from 0: "dense", "one bit" or "local"."""
        if t < self.warmup_steps:
            level = (t // self.kappa + 1).bit_length() - 1
            return "one bit" if (t - self.kappa * (2**level - 1)) % 2**level else "dense"
        doublings, place = divmod(t - self.warmup_steps, self.double_every)
        interval = min(2 ** min(doublings, 62), self.max_interval)
        return "local" if (place + 1) % interval and place + 1 < self.double_every else "one bit"

    def _communicator(self, options: ExchangeOptions) -> Averager:
        return self._one_bit(options, replace(self._plan, dense=(*self._plan.dense, f"{_DENSE}*")))

    def _exchange(self, gradients: ExchangedGradients) -> Tensor | None:
        """Average gradients, or accumulated steps, or nothing."""
        self._kind = self.kind(self.communicator.steps_done)
        if self._kind == "dense":
            self._check_plan(gradients)
            gradients.average(_DENSE)
            return self.communicator.found_inf
        for group, members in self._members(gradients):
            momenta, buffers = self._moments(members, "exp_avg"), [gradients.buffers[p] for p in members]
            if self._kind == "local":
                continue
            beta1, sign = group["betas"][0], -1 if group["maximize"] else 1
            torch._foreach_mul_(buffers, 1 - beta1)
            torch._foreach_add_(buffers, momenta, alpha=sign * beta1)
            steps = torch.stack([self.state[p]["step"] for p in members]).double() + 1
            torch._foreach_mul_(buffers, list(self._rates(steps, group).to(buffers[0].dtype).unbind()))
            torch._foreach_add_(buffers, self._moments(members, "accumulated"), alpha=sign)
        if self._kind == "one bit":
            gradients.average()
            self._apart = self._apart & (self.communicator.found_inf != 0)
            return self.communicator.found_inf
        self.communicator.average_([], [])
        self._apart = torch.ones((), dtype=torch.bool, device=next(iter(gradients.buffers.values())).device)
        held = [x for x in gradients.buffers.values() if x.numel()]
        if held:
            largest = torch.stack([norm.float() for norm in torch._foreach_norm(held, torch.inf)])
            bad = ~largest.isfinite().all()
            for x in held:
                x.masked_fill_(bad, 0.0)
        return None

    @torch.no_grad()
    def synchronize(self) -> None:
        """Exchange what ranks have accumulated, if anything; parameters and state are then equal on all ranks.

        All ranks must call it. Call it before an evaluation and when training ends; `state_dict` does so by itself. It
        counts as a step of the schedule, not of the parameters, and waits for the device.
        """
        if not self._apart:
            return
        gradients = self._prepared()
        for group, members in self._members(gradients):
            buffers = [gradients.buffers[p] for p in members]
            torch._foreach_copy_(buffers, self._moments(members, "accumulated"))
            if group["maximize"]:
                torch._foreach_neg_(buffers)
        steps = {p: self.state[p]["step"].clone() for p in gradients.buffers}
        gradients.average()
        self._kind = "closing"
        self._update(self.communicator.found_inf)
        for p, step in steps.items():
            self.state[p]["step"].copy_(step)
        self._apart = torch.zeros((), dtype=torch.bool)

    def state_dict(self) -> dict[str, Any]:
        """Synchronize, and give the whole state of this rank, with that of the communicator; all ranks must call it."""
        self.synchronize()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` of the same rank gave; raises as that of `OneBitAdam`."""
        super().load_state_dict(state_dict)
        self._apart = torch.zeros((), dtype=torch.bool)

    def _check_plan(self, gradients: ExchangedGradients) -> None:
        """Raise ValueError if the plan would compress what the variance is made of."""
        plan = getattr(self.communicator, "plan", self._plan)
        for name, p in self._active.items() if plan.compress else ():
            if plan.why_dense(_DENSE + name, gradients.buffers[p].shape) is None:
                raise ValueError(
                    f"ZeroOneAdam: expected patterns in the plan's compress that match parameters alone, got "
                    f"{plan.compress!r}, which also match {_DENSE + name!r}. Let them begin with a name, or give "
                    "Plan(min_ndim=0, min_numel=0)."
                )

    # The update.

    def init_state(self, param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """All zeros."""
        dtype = compute_dtype(param.dtype)
        number = torch.zeros((), dtype=dtype, device=param.device)
        return {
            **super().init_state(param, group),
            "variance_weight": number,
            "accumulated": self.zeros_like(param, group),
            "accumulated_lr": number.clone(),
            "start": torch.zeros_like(param, dtype=dtype),  # what all ranks return to, so never rounded
        }

    def _rates(self, step: Tensor, group: Mapping[str, Any]) -> Tensor:
        """Step sizes of the momentum, with its bias corrected: `[n]` float64."""
        rates: Tensor = torch.ones_like(step) * group["lr"]
        return rates / (1 - group["betas"][0] ** step) if group["bias_correction"] else rates

    def scalars(self, step: Tensor, sizes: Tensor, group: Mapping[str, Any]) -> Scalars:
        """The kind of step, and numbers of both moments and of the step."""
        beta1, beta2 = group["betas"]
        closing = self._kind == "closing"
        lr = 0.0 if closing else group["lr"]
        return {
            "dense": self._kind == "dense",
            "local": self._kind == "local",
            "one_minus_beta1": 1 - beta1,
            "one_minus_beta2": 1 - beta2,
            "weight_decays_by": beta2 if group["bias_correction"] else 0.0,
            "weight_grows_by": 1 - beta2 if group["bias_correction"] else 1.0,
            "rate": torch.zeros_like(step) if closing else self._rates(step, group),
            "eps": torch.ones_like(step) * group["eps"],
            "decay": lr * group["weight_decay"],
            "decays": group["weight_decay"] != 0,
        }

    @staticmethod
    def update_(
        params: list[Tensor], grads: list[Tensor], state: dict[str, list[Tensor]], scalars: Scalars, shards: Shards
    ) -> None:
        """One step of its kind, on the mean gradient, on this rank's gradient, or on the mean of accumulated steps."""
        exp_avgs, exp_avg_sqs, totals = state["exp_avg"], state["exp_avg_sq"], state["accumulated_lr"]
        if scalars["dense"]:
            weights = state["variance_weight"]
            torch._foreach_mul_(weights, scalars["weight_decays_by"])
            torch._foreach_add_(weights, scalars["weight_grows_by"])
            shares = torch._foreach_reciprocal(weights)
            torch._foreach_mul_(shares, scalars["one_minus_beta2"])
            torch._foreach_lerp_(exp_avgs, grads, scalars["one_minus_beta1"])
            follow_squares_(exp_avg_sqs, grads, shares)
            moves = torch._foreach_mul(exp_avgs, scalars["rate"])
        elif scalars["local"]:
            starts = [torch.where(n > 0, x0, x) for n, x0, x in zip(totals, state["start"], params, strict=True)]
            if scalars["decays"]:
                torch._foreach_sub_(starts, torch._foreach_mul(starts, scalars["decay"]))
            torch._foreach_copy_(state["start"], starts)
            torch._foreach_lerp_(exp_avgs, grads, scalars["one_minus_beta1"])
            moves = torch._foreach_mul(exp_avgs, torch._foreach_sign(exp_avg_sqs))
            torch._foreach_mul_(moves, scalars["rate"])
            torch._foreach_add_(state["accumulated"], moves)
            torch._foreach_add_(totals, scalars["rate"])
        else:
            starts = [torch.where(n > 0, x0, x) for n, x0, x in zip(totals, state["start"], params, strict=True)]
            torch._foreach_copy_(params, starts)
            moves = torch._foreach_mul(grads, torch._foreach_sign(exp_avg_sqs))
            sums = torch._foreach_add(totals, scalars["rate"])
            momenta = [torch.where(n > 0, move / n, 0.0) for n, move in zip(sums, moves, strict=True)]
            torch._foreach_copy_(exp_avgs, momenta)
            torch._foreach_zero_(state["accumulated"])
            torch._foreach_zero_(totals)
        if scalars["decays"]:
            torch._foreach_sub_(params, torch._foreach_mul(params, scalars["decay"]))
        denominators = torch._foreach_sqrt(exp_avg_sqs)
        torch._foreach_add_(denominators, scalars["eps"])
        torch._foreach_div_(moves, denominators)
        torch._foreach_sub_(params, moves)
