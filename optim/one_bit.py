"""`OneBit`: Adam's relatives that exchange their momentum in one bit per entry, once their variance holds still."""

import datetime
import logging
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypedDict, final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import ParamsT

from gradwire.comm import EF, CheckpointError, Communicator, Plan, TwoPhase, Warmup
from gradwire.comm.averager import Averager
from gradwire.compression import Identity, ScaledSign
from gradwire.compression.base import Compressor
from gradwire.optim.base import Optimizer
from gradwire.optim.checks import check_betas, check_lr, check_range
from gradwire.optim.exchange import ExchangedGradients, check_shards, obeying
from gradwire.optim.kernels import Scalars
from gradwire.optim.layout import local
from gradwire.optim.options import Options

_log = logging.getLogger("gradwire")


class ExchangeOptions(TypedDict, total=False):
    """How these optimizers exchange.

    Args:
        compressor: What is sent of the momentum in both phases of the exchange; `ScaledSign()` by default.
        plan: What is sent dense, by default vectors and tensors under 1024 entries.
        group: The ranks that exchange; all by default.
        bucket_mb: Size of a bucket in MiB, > 0.
        seed: Of the communicator.
        timeout: How long a collective waits for other ranks.
    """

    compressor: Compressor | None
    plan: Plan | None
    group: dist.ProcessGroup | None
    bucket_mb: float
    seed: int
    timeout: datetime.timedelta | None


class OneBitOptions(ExchangeOptions, Options, total=False):
    """How these optimizers exchange and run."""


class OneBit(Optimizer):
    """A step of all parameters on all ranks: take local gradients, exchange something, update; or skip it everywhere.

    Args:
        params: As for `Optimizer`.
        defaults: The algorithm's hyper-parameters, with lr, betas, eps and weight_decay.
        common: Names of those that belong to all groups together.
        options: As for `OneBitOptions`.
    """

    supports_complex = False

    communicator: Averager
    """What brings the ranks together; its state is part of the optimizer's."""

    def __init__(
        self, params: ParamsT, defaults: dict[str, Any], common: frozenset[str], options: OneBitOptions
    ) -> None:
        self._who = type(self).__name__
        rest: Any = dict(options)
        exchange: Any = {name: rest.pop(name) for name in _EXCHANGE & rest.keys()}
        bucket_mb = exchange.get("bucket_mb", 25.0)
        if not bucket_mb > 0:
            raise ValueError(f"{self._who}: expected bucket_mb > 0, got bucket_mb={bucket_mb}.")
        self._common = common | _EXCHANGE
        self._bucket_bytes = int(bucket_mb * 2**20)
        self._plan = exchange.get("plan") or Plan()
        self._group_given = exchange.get("group") is not None
        self._active: dict[str, Tensor] = {}
        self._gradients: ExchangedGradients | None = None
        self._applying = self._warned = self._loaded = False
        self.communicator = self._communicator(exchange)
        super().__init__(params, defaults, rest)

    # What a subclass implements.

    @abstractmethod
    def _communicator(self, options: ExchangeOptions) -> Averager:
        """What exchanges."""

    @abstractmethod
    def _exchange(self, gradients: ExchangedGradients) -> Tensor | None:
        """Put what `update_` takes in place of the local gradients; one step of the communicator.

        Returns:
            What `found_inf` is to be for the update.
        """

    # For subclasses.

    @final
    def _one_bit(self, options: ExchangeOptions, plan: Plan) -> Communicator:
        """Compressed on the way to the mean and back, with error feedback in both directions."""
        return Communicator(
            options.get("compressor") or ScaledSign(),
            feedback=EF(),
            exchange=TwoPhase(),
            plan=plan,
            group=options.get("group"),
            seed=options.get("seed", 0),
            timeout=options.get("timeout"),
        )

    @final
    def _members(self, gradients: ExchangedGradients) -> Iterator[tuple[dict[str, Any], list[Tensor]]]:
        """The groups, each with those of its parameters that take part."""
        for group in self.param_groups:
            if members := [p for p in group["params"] if p in gradients.buffers]:
                yield group, members

    @final
    def _moments(self, members: Sequence[Tensor], name: str) -> list[Tensor]:
        """A state tensor of these parameters, in the dtype of what is exchanged."""
        assert self._gradients is not None
        late = [p for p in members if name not in self.state[p]]
        if late:
            raise RuntimeError(
                f"{self._who}: expected every parameter to require a gradient during the warm-up, got "
                f"{self._place(late[0])[1]} at step {self.communicator.steps_done}. Its variance is not known."
            )
        return [local(self.state[p][name]).to(self._gradients.buffers[p].dtype) for p in members]

    def check_group(self, group: Mapping[str, Any]) -> None:
        """Check ranges; and that a group overrides nothing that is common to all."""
        check_lr(self._who, group["lr"])
        check_betas(self._who, group["betas"])
        for name in ("eps", "weight_decay"):
            check_range(self._who, name, group[name])
        if common := self._common & group.keys():
            raise ValueError(
                f"{self._who}: expected {min(common)!r} for all groups together, got it in one. Use two optimizers."
            )
        if group["differentiable"]:
            raise ValueError(f"{self._who}: expected differentiable=False, got True: an exchange has no derivative.")

    def init_state(self, param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """Both moments start at zero."""
        return {"exp_avg": self.zeros_like(param, group), "exp_avg_sq": self.zeros_like(param, group)}

    # A step.

    @final
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Exchange and update every parameter; all ranks must call it.

        Args:
            closure: Evaluates the model again and returns the loss; called first, with gradients enabled.

        Returns:
            The closure's loss, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = self._prepared()
        if not gradients.buckets:
            return loss
        scale = getattr(self, "grad_scale", None)
        factor: Tensor | float = 1.0 if scale is None else 1.0 / local(scale).reshape(())
        for _, members in self._members(gradients):
            gradients.take(members, factor)
        self._update(self._exchange(gradients))
        return loss

    @final
    def _prepared(self) -> ExchangedGradients:
        """Buffers for the parameters that require a gradient now."""
        active = {str(self._place(p)[1]): p for g in self.param_groups for p in g["params"] if p.requires_grad}
        if self._gradients is None or active.keys() != self._active.keys():
            check_shards(self._who, active.values(), group_given=self._group_given)
            self._active = active
            self._gradients = ExchangedGradients(active, self.communicator, self._plan, self._bucket_bytes, self._who)
            if self.communicator.connect().size == 1 and not self._warned:
                self._warned = True
                _log.warning("%s: there is one rank: compression saves nothing.", self._who)
            if self._loaded and self._steps_taken() > self.communicator.steps_done:
                raise CheckpointError(
                    f"{self._who}: expected the residuals of every rank with the loaded state, got none. Save and load "
                    "the whole state_dict() of every rank, or use gradwire.comm.checkpoint."
                )
        return self._gradients

    @final
    def _update(self, found_inf: Tensor | None) -> None:
        """Run the update on what the exchange gave, unless a gradient was not finite."""
        if found_inf is not None and found_inf.device.type == "cpu" and found_inf.item():
            _log.warning("%s: a gradient is not finite on some rank: the step is skipped.", self._who)
        self._applying = True
        try:
            with obeying(self, found_inf):
                super().step()
        finally:
            self._applying = False

    @final
    def gradients(self, params: Sequence[Tensor]) -> list[Tensor | None]:
        """What the exchange gave in place of gradients."""
        if self._gradients is None or not self._applying:
            raise RuntimeError(
                f"{self._who}: expected step(), got a step of single parameters; the exchange needs all of them."
            )
        return [self._gradients.buffers.get(p) for p in params]

    @final
    def _steps_taken(self) -> float:
        return max((float(local(state["step"])) for state in self.state.values() if "step" in state), default=0.0)

    # State.

    def state_dict(self) -> dict[str, Any]:
        """The whole state of this rank, with that of the communicator; all ranks must call it, and keep their own."""
        return {**super().state_dict(), "communicator": self.communicator.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` of the same rank gave.

        Raises:
            CheckpointError: It is another rank's, of another world size, or of other hyper-parameters. A state without
                the communicator's part is accepted, but the next step raises unless `gradwire.comm.checkpoint` has
                brought that.
        """
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "communicator"})
        if "communicator" in state_dict:
            self.communicator.load_state_dict(state_dict["communicator"])
        self._loaded = True
        self._gradients = None


class FrozenVariance(OneBit):
    """Dense gradients for `warmup_steps` steps; from then on, momenta in one bit, while the variance stays.

    Args:
        params: As for `OneBit`.
        defaults: As for `OneBit`.
        warmup_steps: Steps with dense gradients, >= 1.
        common: As for `OneBit`.
        options: As for `OneBit`.
    """

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        warmup_steps: int,
        common: frozenset[str],
        options: OneBitOptions,
    ) -> None:
        check_count(type(self).__name__, "warmup_steps", warmup_steps)
        self.warmup_steps = warmup_steps
        self._frozen = False
        super().__init__(params, defaults, common | {"warmup_steps"}, options)

    @final
    def _communicator(self, options: ExchangeOptions) -> Averager:
        then = self._one_bit(options, self._plan)
        first = Communicator(
            Identity(), plan=Plan(dense=("*",)), group=then.group, seed=then.seed, timeout=then.timeout
        )
        return Warmup(first, then, self.warmup_steps)

    @final
    def _exchange(self, gradients: ExchangedGradients) -> Tensor | None:
        """Average gradients, or the momenta that each rank's gradient would make of the common one."""
        self._frozen = self.communicator.steps_done >= self.warmup_steps
        if self._frozen:
            for group, members in self._members(gradients):
                beta1 = group["betas"][0]
                buffers = [gradients.buffers[p] for p in members]
                torch._foreach_mul_(buffers, 1 - beta1)
                sign = -1 if group["maximize"] else 1  # the momentum is that of what is descended along
                torch._foreach_add_(buffers, self._moments(members, "exp_avg"), alpha=sign * beta1)
        gradients.average()
        return self.communicator.found_inf

    @final
    def _moment_scalars(self, step: Tensor, group: Mapping[str, Any]) -> Scalars:
        """Numbers of both moments and of the step."""
        beta1, beta2 = group["betas"]
        one, correct = torch.ones_like(step), group["bias_correction"]
        return {
            "frozen": self._frozen,
            "beta1": beta1,
            "one_minus_beta1": 1 - beta1,
            "share": (1 - beta2) / (1 - beta2**step) if correct else one * (1 - beta2),
            "inverse_correction": 1 / (1 - beta1**step) if correct else one,
            "eps": one * group["eps"],
            "lr": group["lr"],
        }


def check_count(who: str, name: str, value: object) -> None:
    """Raise ValueError unless `value` is an integer >= 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{who}: expected an integer {name} >= 1, got {name}={value!r}.")


def follow_squares_(averages: list[Tensor], grads: list[Tensor], share: Any) -> None:
    """Move averages towards the squares of gradients by a share of the way, in place.

    With shares (1 - beta2) / (1 - beta2^t) they are the variance with its bias corrected.
    """
    differences = torch._foreach_mul(grads, grads)
    torch._foreach_sub_(differences, averages)
    torch._foreach_mul_(differences, share)
    torch._foreach_add_(averages, differences)


def step_along(exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], scalars: Scalars) -> list[Tensor]:
    """The momentum over the root of the variance."""
    denominators = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_add_(denominators, scalars["eps"])
    updates = list(torch._foreach_mul(exp_avgs, scalars["inverse_correction"]))
    torch._foreach_div_(updates, denominators)
    return updates


_EXCHANGE = frozenset(ExchangeOptions.__annotations__)
