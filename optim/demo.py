"""`DeMo`: momentum that stays where it is, and an exchange of its largest DCT coefficients."""

import datetime
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Unpack, final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import ParamsT

from gradwire.comm import AllGather, CheckpointError, Communicator, DecoupledMomentum, Plan
from gradwire.comm.beside import Beside
from gradwire.compression import DCTTopK
from gradwire.compression.orthonormal import Transform
from gradwire.optim.base import Optimizer
from gradwire.optim.base_maps import BaseMap, map_
from gradwire.optim.checks import check_lr, check_range
from gradwire.optim.exchange import ExchangedGradients, check_shards, obeying
from gradwire.optim.kernels import Scalars
from gradwire.optim.layout import local
from gradwire.optim.look_ahead import LookAhead
from gradwire.optim.options import Options
from gradwire.optim.shards import Shards

Form = Literal["2024", "2026", "overlapped"]

_FORMS: dict[str, dict[str, Any]] = {
    "2024": {"momentum": 0.999, "alpha": 1.0, "base": "sign", "values": "bf16"},
    "2026": {"momentum": 0.995, "alpha": 0.2, "base": "sign", "values": "bf16"},
    "overlapped": {"momentum": 0.995, "alpha": 1.0, "base": "sign", "values": "sign"},
}

_log = logging.getLogger("gradwire")


@final
class DeMo(Optimizer):
    """Each rank keeps a momentum of its own gradients and sends the largest DCT coefficients of it, once per step.

        m_i <- momentum m_i + w g_i
        s_i = top_k(DCT(m_i)),  m_i <- m_i - alpha IDCT(s_i)
        u = IDCT(merge of all s_i);  x <- (1 - lr weight_decay) x - lr base(u)

    Gradients must be local when `step` is called: nobody else averages them. In a plain loop that is so; under
    `DistributedDataParallel` register `gradwire.comm.keep_local(ddp)`; under FSDP2 shard with `mesh["shard"]` alone and
    give `group=mesh["replicate"].get_group()`, so that each rank exchanges its shard with its peers. On one rank there
    is nothing to exchange, and what is left is a momentum method that drops most of its momentum's spectrum.

    Forms:
        "2024": w = lr, so that the schedule weighs the past; merged over the contributors of each coefficient; sign.
        "2026": w = 1 - momentum; merged over all ranks; 0 < alpha <= 1.
        "overlapped": as 2024, but the exchange of a step runs beside the next forward and backward pass, and its result
            is applied one step late. Meanwhile parameters stand at x - lr base(momentum m_i + lr g_i), a look-ahead of
            each rank's own, at which the next gradient is taken; values are signs. `synchronize` ends that.

    Args:
        params: Tensors, `(name, tensor)` pairs or groups of them: on every rank the same, in the same order. Those that
            require no gradient are left out; those without one take part with zero.
        lr: Step size, >= 0; a number or a 0-d tensor.
        form: Sets what is None below, and the rest as above.
        k, ratio, chunk, transform, values: Of `DCTTopK`: what is kept of each tile and how it is sent. bf16, and sign
            in the overlapped form, unless given; signs need base "sign" or "orthogonalized".
        momentum: Decay, 0 <= momentum < 1: 0.999, 0.995 and 0.995 in the three forms.
        alpha: Share of what was sent that is taken out, 0 <= alpha <= 1: 1, 0.2 and 1.
        base: "sign"; "identity" (form "2026" only, since the others have lr in the momentum); or "orthogonalized", the
            nearest orthonormal matrix, for what is compressed (the sign for the rest). "sign" by default.
        weight_decay: Decoupled, multiplied by lr, >= 0.
        plan: What is sent dense, by default vectors and tensors under 1024 entries: their momentum is sent whole.
        group: The ranks that exchange; all by default.
        bucket_mb: Size of a bucket in MiB, > 0; each is one collective.
        seed: Of the communicator.
        timeout: How long a collective waits for other ranks.
        options: How it runs: `foreach`, `fused` and more, see `Options`; `differentiable` is not possible.

    Shapes:
        Any but complex; tensors of more than two dimensions are the matrix of the first against the rest.

    Cost:
        8 bytes per parameter, 12 in the overlapped form; AdamW's state is 8. Two transforms of 4 chunk operations an
        entry. Sends (n - 1) payloads per step: at k = 32 and bf16, 0.027 bytes per parameter and rank.

    State:
        step: 0-d float32, per parameter. momentum_buffer, only of what is sent dense in the form of 2026 or with
        alpha < 1: equal on all ranks. The momenta of what is compressed are the communicator's, different on every
        rank: every rank must save its own `state_dict`, or use `gradwire.comm.checkpoint`.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2, 2))
        >>> optimizer = DeMo([("weight", weight)], lr=0.5, k=4096, plan=Plan(min_numel=0))
        >>> weight.grad = torch.tensor([[1.0, -2.0], [3.0, -4.0]])
        >>> optimizer.step()
        >>> weight.data
        tensor([[-0.5000,  0.5000],
                [-0.5000,  0.5000]])

    Reference:
        B. Peng, J. Quesnelle, D. P. Kingma, "DeMo: Decoupled Momentum Optimization", 2024, arXiv:2411.19870,
        algorithm 1, and its second version of 2026; the overlapped form is that of the DisTrO runs.

    Differences from the paper:
        One byte buffer per bucket where the paper's code sends two tensors per parameter, with 64-bit positions. Small
        tensors are sent whole. A gradient that is not finite on any rank makes all ranks skip the step. Gradient
        clipping can only be each rank's own, before `step`; so may be the scale of a `GradScaler`, by which gradients
        are divided first. The overlapped form keeps the parameters it returns to, so that replicas stay equal to the
        bit, where its originals add and subtract the look-ahead.
    """

    elementwise = True
    supports_complex = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        form: Form = "2024",
        k: int | None = None,
        ratio: float | None = None,
        chunk: int = 64,
        transform: Transform = "dct",
        values: Literal["fp32", "bf16", "int8", "sign"] | None = None,
        momentum: float | None = None,
        alpha: float | None = None,
        base: BaseMap | None = None,
        weight_decay: float = 0.0,
        plan: Plan | None = None,
        group: dist.ProcessGroup | None = None,
        bucket_mb: float = 25.0,
        seed: int = 0,
        timeout: datetime.timedelta | None = None,
        **options: Unpack[Options],
    ) -> None:
        if form not in _FORMS:
            raise ValueError(f"DeMo: expected form in {tuple(_FORMS)}, got form={form!r}.")
        given = {"momentum": momentum, "alpha": alpha, "base": base, "values": values}
        chosen = {**_FORMS[form], **{name: value for name, value in given.items() if value is not None}}
        check_range("DeMo", "momentum", chosen["momentum"], below=1.0)
        self.form, self.base = form, chosen["base"]
        if self.base not in ("sign", "identity", "orthogonalized"):
            raise ValueError(f"DeMo: expected base 'sign', 'identity' or 'orthogonalized', got base={self.base!r}.")
        if self.base == "identity" and (form != "2026" or chosen["values"] == "sign"):
            raise ValueError(
                f"DeMo: expected form='2026' and values with a size for base='identity', got form={form!r} and "
                f"values={chosen['values']!r}. Use base='sign'."
            )
        if bucket_mb <= 0:
            raise ValueError(f"DeMo: expected bucket_mb > 0, got bucket_mb={bucket_mb}.")
        self.communicator = Communicator(
            DCTTopK(k=k, ratio=ratio, chunk=chunk, transform=transform, values=chosen["values"]),
            feedback=DecoupledMomentum(chosen["momentum"], chosen["alpha"], ema=form == "2026"),
            exchange=AllGather(merge="mean" if form == "2026" else "contributors"),
            plan=plan,
            group=group,
            seed=seed,
            timeout=timeout,
        )
        self._group_given = group is not None
        self._bucket_bytes = int(bucket_mb * 2**20)
        self._active: dict[str, Tensor] = {}
        self._gradients: ExchangedGradients | None = None
        self._look_ahead = LookAhead()
        self._beside: Beside | None = None
        self._pending: torch.futures.Future[Tensor] | None = None
        self._applying = self._warned = self._loaded = False
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay}, options)

    # The update, on what the exchange gave in place of gradients.

    def check_group(self, group: Mapping[str, Any]) -> None:
        """Check the ranges given above; and that a group overrides nothing that is common to all."""
        check_lr("DeMo", group["lr"])
        check_range("DeMo", "weight_decay", group["weight_decay"])
        common = {"form", "k", "ratio", "chunk", "transform", "values", "momentum", "alpha", "base"} & group.keys()
        if common:
            raise ValueError(
                f"DeMo: expected {min(common)!r} for all groups together, got it in one. Use two optimizers."
            )
        if group["differentiable"]:
            raise ValueError("DeMo: expected differentiable=False, got True: an exchange has no derivative.")

    def init_state(self, param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """The momentum of what is sent dense, where a part of it stays."""
        return self.init_state_like(param, group, param)

    def init_state_like(self, param: Tensor, group: Mapping[str, Any], like: Tensor) -> dict[str, Tensor]:
        """The same of a stand-in."""
        dense = self._gradients is not None and like in self._gradients.dense
        return {"momentum_buffer": self.zeros_like(param, group)} if dense and self._remembers else {}

    def scalars(self, step: Tensor, sizes: Tensor, group: Mapping[str, Any]) -> Scalars:
        """The step size and the feedback's numbers."""
        return {
            "lr": group["lr"],
            "decay": group["lr"] * group["weight_decay"],
            "decays": group["weight_decay"] != 0,
            "sign": self.base == "sign",
            "identity": self.base == "identity",
            "momentum": self._feedback.decay,
            "weight": self._feedback.weight,
            "stays": 1 - self._feedback.alpha,
        }

    @staticmethod
    def update_(
        params: list[Tensor], grads: list[Tensor], state: dict[str, list[Tensor]], scalars: Scalars, shards: Shards
    ) -> None:
        """Decay, and step along the base map of the update; a dense momentum is that of its mean over ranks."""
        dense = state.get("momentum_buffer")
        if dense is not None:
            torch._foreach_mul_(dense, scalars["momentum"])
            torch._foreach_add_(dense, torch._foreach_mul(grads, scalars["weight"]))
            updates = torch._foreach_mul(dense, 1.0)
            torch._foreach_mul_(dense, scalars["stays"])
        else:
            updates = torch._foreach_mul(grads, 1.0)
        if scalars["sign"] or (dense is not None and not scalars["identity"]):
            torch._foreach_sign_(updates)
        torch._foreach_mul_(updates, scalars["lr"])
        if scalars["decays"]:
            torch._foreach_sub_(params, torch._foreach_mul(params, scalars["decay"]))
        torch._foreach_sub_(params, updates)

    # A step.

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Exchange the momentum's largest parts and update every parameter; all ranks must call it.

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
        self._finish()
        if not gradients.buckets:
            return loss
        scale = getattr(self, "grad_scale", None)
        for group in self.param_groups:
            factor = 1.0 if self.form == "2026" else group["lr"]
            if scale is not None:
                factor = factor / local(scale).reshape(())
            gradients.take([p for p in group["params"] if p.requires_grad], factor)
        if self.form != "overlapped":
            gradients.average()
            self._apply()
            return loss
        self._look_ahead.go(self._steps_ahead())
        any_buffer = gradients.buffers[gradients.buckets[0][1][0]]
        self._beside = self._beside or Beside(any_buffer.device)
        self._pending = self._beside.submit(gradients.average, any_buffer)
        return loss

    def synchronize(self) -> None:
        """Overlapped form: wait for the exchange in flight, leave the look-ahead and apply its result.

        Parameters are then equal on all ranks, and the next step starts from there. All ranks must call it. Call it
        before the model is saved; `state_dict` does so by itself.
        """
        self._finish()

    def wait(self) -> None:
        """Overlapped form: wait for the exchange in flight, whose result the next step applies."""
        if self._pending is not None:
            self._pending.wait()

    @contextmanager
    def returned(self) -> Iterator[None]:
        """Overlapped form: inside, parameters are those of all ranks; afterwards they look ahead again.

        For an evaluation that leaves training as it is. They lack the result of the exchange in flight, which has ended
        then.
        """
        self.wait()
        self._look_ahead.swap()
        try:
            yield
        finally:
            self._look_ahead.swap()

    def _prepared(self) -> ExchangedGradients:
        """Buffers for the parameters that require a gradient now."""
        active = {str(self._place(p)[1]): p for g in self.param_groups for p in g["params"] if p.requires_grad}
        if self._gradients is None or active.keys() != self._active.keys():
            self._finish()
            check_shards("DeMo", active.values(), group_given=self._group_given)
            if self.base == "orthogonalized" and any(isinstance(p, DTensor) for p in active.values()):
                raise ValueError("DeMo: expected base='sign' or 'identity' on shards, got base='orthogonalized'.")
            self._active = active
            plan = self.communicator.plan
            self._gradients = ExchangedGradients(active, self.communicator, plan, self._bucket_bytes, "DeMo")
            if self.communicator.connect().size == 1 and not self._warned:
                self._warned = True
                _log.warning("DeMo: there is one rank, so nothing is exchanged: it saves communication, not steps.")
            if self._loaded and self._steps_taken() > self.communicator.stats.steps:
                raise CheckpointError(
                    "DeMo: expected the momenta of every rank with the loaded state, got none. Save and load the whole "
                    "state_dict() of every rank, or use gradwire.comm.checkpoint."
                )
        return self._gradients

    def _apply(self) -> None:
        """Step along what the exchange gave, unless a gradient was not finite on some rank."""
        assert self._gradients is not None
        found_inf = self.communicator.found_inf
        if found_inf is not None and found_inf.device.type == "cpu" and found_inf.item():
            _log.warning("DeMo: a gradient is not finite on some rank: the step is skipped on all ranks.")
        if self.base == "orthogonalized":  # a dense momentum comes before its sign
            map_(self.base, self._gradients.buffers, self._gradients.dense, rest=not self._remembers)
        self._applying = True
        try:
            with obeying(self, found_inf):
                super().step()
        finally:
            self._applying = False

    @torch.no_grad()
    def _finish(self) -> None:
        """Wait for the exchange in flight, if any, bring parameters back from the look-ahead and apply its result."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        pending.wait()
        self._look_ahead.back()
        self._apply()

    def _steps_ahead(self) -> dict[Tensor, Tensor]:
        """A step along this rank's own momentum, as it is before anything is sent."""
        assert self._gradients is not None
        buffers, feedback = self._gradients.buffers, self._feedback
        ahead = {p: torch.zeros_like(buffer) for p, buffer in buffers.items()}
        self._gradients.read_state("momentum_buffer", ahead)
        torch._foreach_mul_(list(ahead.values()), feedback.decay)
        torch._foreach_add_(list(ahead.values()), list(buffers.values()), alpha=feedback.weight)
        map_(self.base, ahead, self._gradients.dense, rest=True)
        for group in self.param_groups:
            if steps := [ahead[p] for p in group["params"] if p in ahead]:
                torch._foreach_mul_(steps, group["lr"] if group["maximize"] else -group["lr"])
        return ahead

    def gradients(self, params: Sequence[Tensor]) -> list[Tensor | None]:
        """What the exchange gave in place of gradients."""
        if self._gradients is None or not self._applying:
            raise RuntimeError(
                "DeMo: expected step(), got a step of single parameters; the exchange needs all of them."
            )
        return [self._gradients.buffers.get(p) for p in params]

    @property
    def _feedback(self) -> DecoupledMomentum:
        assert isinstance(self.communicator.feedback, DecoupledMomentum)
        return self.communicator.feedback

    @property
    def _remembers(self) -> bool:
        """Whether what is sent dense, and so whole, needs a momentum."""
        return self._feedback.alpha < 1 or self._feedback.ema

    def _steps_taken(self) -> float:
        return max((float(local(state["step"])) for state in self.state.values() if "step" in state), default=0.0)

    # State.

    def state_dict(self) -> dict[str, Any]:
        """The whole state of this rank, with that of the communicator; all ranks must call it, and keep their own.

        In the overlapped form it synchronizes.
        """
        self._finish()
        return {**super().state_dict(), "communicator": self.communicator.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` of the same rank gave.

        Raises:
            CheckpointError: It is another rank's, of another world size, or of other hyper-parameters. A state without
                the communicator's part is accepted, but the next step raises unless `gradwire.comm.checkpoint` has
                brought that.
        """
        self._finish()
        self._prepared()
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "communicator"})
        if "communicator" in state_dict:
            self.communicator.load_state_dict(state_dict["communicator"])
        self._loaded = True
        self._gradients = None
