"""`MASHA`: what both compressed methods for variational inequalities share: points, coin, exchange and state."""

import itertools
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import ParamsT

from gradwire.comm import (
    AllReduce,
    CheckpointError,
    Communicator,
    ConfigurationError,
    ErrorFeedback,
    Exchange,
    Simulated,
    TwoPhase,
)
from gradwire.comm.averager import poisoned
from gradwire.compression import Compressor, Identity, counter_rng
from gradwire.compression.base import compute_dtype
from gradwire.optim.checks import check_lr, check_range
from gradwire.optim.players import Closure, Players, Prox

_STATE = ("step", "snapshot", "snapshot_operator")
_BUCKET_BYTES = 25 * 2**20
_log = logging.getLogger("gradwire")


class MASHA(torch.optim.Optimizer, ABC):
    """Extragradient steps whose second half is compressed, around a snapshot w at which the operator is known densely.

    Args:
        params: Tensors, `(name, tensor)` pairs or groups of them; `lr`, `maximize` and `prox` may differ by group.
        lr: Step size.
        compressor: What workers send of differences of operators.
        feedback: How what they do not send is remembered.
        second: What compresses the mean on its way back, through `TwoPhase`.
        exchange: How payloads become their mean.
        tau: Probability that w stays, or None for what `kept` gives.
        full_batch: Whether closures evaluate the same data in all steps.
        prox: Proximal operator of every group that brings none.
        communication: Further arguments of the `Communicator`.
    """

    scales_first: ClassVar[bool]
    """Whether differences are multiplied by lr before they are compressed, and so what is remembered of them."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        compressor: Compressor,
        feedback: ErrorFeedback,
        *,
        second: Compressor | None,
        exchange: Exchange | None,
        tau: float | None,
        full_batch: bool,
        prox: Prox | None = None,
        **communication: Any,
    ) -> None:
        who = type(self).__name__
        if tau is not None:
            check_range(who, "tau", tau, below=1.0)
        if second is not None:
            if exchange is not None:
                raise ValueError(f"{who}: expected second or exchange, got both. Give TwoPhase(second=...) alone.")
            exchange = TwoPhase(second=second)
        if exchange is not None and (exchange.merge != "mean" or not exchange.consensus):
            raise ValueError(f"{who}: expected the mean, the same on all ranks, got {exchange!r}. Use AllGather().")
        back = exchange.second or compressor if exchange is not None and exchange.compresses_twice else compressor
        for each in (compressor, back):
            self.kept(each, 1 << 20)
        self.communicator = Communicator(compressor, feedback=feedback, exchange=exchange, **communication)
        workers, plan = self.communicator.workers, self.communicator.plan
        whole = Simulated(workers) if workers > 1 else AllReduce()
        self._dense = Communicator(Identity(), exchange=whole, plan=plan, group=self.communicator.group)
        self._prox, self._proxes = prox, list[Prox | None]()  # not in groups, which state_dict saves
        self.full_batch, self._local = full_batch, list[Tensor]()
        self._connected = self._loaded = False
        super().__init__(params, {"lr": lr, "maximize": False})
        if not self._players.params:
            raise ValueError(f"{who}: expected at least one parameter that requires a gradient, got none.")
        named = zip(self._players.names, self._players.params, strict=True)
        kept = [self.kept(compressor, p.numel()) for name, p in named if plan.why_dense(name, p.shape) is None]
        self.tau = tau if tau is not None else 1.0 - min(kept, default=1.0)

    @classmethod
    @abstractmethod
    def kept(cls, compressor: Compressor, numel: int) -> float:
        """What the theory takes for the share that a compressor keeps, in (0, 1]; so often w moves by default.

        Raises:
            ValueError: The method does not converge with this compressor; the message says what to change.
        """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; it takes part from the next step on, which takes the snapshot anew.

        Raises:
            ValueError: A hyper-parameter is out of its range, or a parameter is not real or not whole.
        """
        who, prox = type(self).__name__, self._prox
        if isinstance(param_group, dict):
            param_group = {**self.defaults, "prox": prox, **param_group}
            prox = param_group.pop("prox")
            check_lr(who, param_group["lr"])
            if prox is not None and self.scales_first:
                raise ValueError(f"{who}: expected no prox, since its feedback has no room for one. Use MASHA1.")
            if prox is not None and not callable(prox):
                raise ValueError(f"{who}: expected a function (tensor, lr) that changes tensor, got prox={prox!r}.")
        super().add_param_group(param_group)
        params = self.param_groups[-1]["params"]
        for p in params:
            if not p.is_floating_point() or isinstance(p, DTensor):
                self.param_groups.pop()
                kind = "DTensor" if isinstance(p, DTensor) else p.dtype
                raise ValueError(f"{who}: expected whole tensors of real numbers, got {kind} of {tuple(p.shape)}.")
        for p in params:
            if p.requires_grad:
                operator = torch.zeros_like(p, dtype=compute_dtype(p.dtype))
                self.state[p] = dict(zip(_STATE, (torch.zeros(()), p.detach().clone(), operator), strict=True))
        self._proxes.append(prox)
        self._arrange()

    def _arrange(self) -> None:
        who, workers = type(self).__name__, self.communicator.workers
        self._players = Players(who, self.param_groups, self._proxes, self.state.__contains__, workers)
        self._local = []

    # A step.

    @torch.no_grad()
    def step(self, closure: Closure | None = None, full_closure: Closure | None = None) -> Any:
        """Evaluate, exchange, and update every parameter; all ranks must call it.

        Args:
            closure: Evaluates this rank's loss on one batch, the same one each time that it is called within this step,
                and returns it; called at z' and, unless the operator there is at hand, at w. It may call `backward`
                itself, as torch's closures do. With `Simulated(n)` it returns the n workers' losses.
            full_closure: The same on all of this rank's data; called where w moves. By default `closure`.

        Returns:
            What the first call returned: the loss at z if w moves there, else at z'.

        Raises:
            ValueError: There is no closure, or a full one although all are.
        """
        if closure is None:
            raise ValueError(f"{type(self).__name__}: expected a closure that evaluates the loss, got None.")
        if full_closure is not None and self.full_batch:
            raise ValueError(f"{type(self).__name__}: expected no full_closure with full_batch=True, got one.")
        self._begin()
        z = [p.clone() for p in self._players.params]
        try:
            return self._step(z, closure, full_closure)
        except BaseException:
            torch._foreach_copy_(self._players.params, z)
            raise

    def _step(self, z: list[Tensor], closure: Closure, full_closure: Closure | None) -> Any:
        players, params, w = self._players, self._players.params, self._of_state("snapshot")
        steps = {int(step) for step in self._of_state("step")}
        started, at_w, result, lost, sure = 0 not in steps, self._local, None, None, True
        if not started or self._coin(max(steps)):
            result, at_z, lost = self._move(z, full_closure or closure)
            sure = lost.device.type == "cpu" or not started or (self.full_batch and not at_w)
            if self.full_batch and at_w:
                _take(at_w, at_z, lost)
            elif full_closure is None:
                at_w = at_z
        left_out = lost is not None and sure and bool(lost)

        half = torch._foreach_lerp(_wide(z), _wide(w), 1.0 - self.tau)
        torch._foreach_sub_(half, players.times_lr(self._of_state("snapshot_operator")))
        if left_out:  # nothing finite is known at w; the exchange then skips the step on all ranks
            difference = players.unknown()
        else:
            torch._foreach_copy_(params, players.near(half))
            loss, difference = players.operator(closure)
            result = loss if result is None else result
            if not at_w:
                torch._foreach_copy_(params, w)
                at_w = players.operator(closure)[1]
            self._local = at_w if self.full_batch else []
            torch._foreach_sub_(difference, at_w)
            if lost is not None and not sure:  # the device decides
                torch._foreach_mul_(difference, poisoned(1.0, lost != 0))
        if self.scales_first:
            difference = players.times_lr(difference)
        bad = self._average(self.communicator, difference)
        change = self._first_worker(difference)
        torch._foreach_sub_(half, change if self.scales_first else players.times_lr(change))

        torch._foreach_copy_(params, z)
        _take(params, players.near(half), bad)
        if bad.device.type == "cpu" and bool(bad):
            _log.warning("%s: a gradient is not finite on some rank: the step is skipped on all.", type(self).__name__)
        if started or not left_out:
            torch._foreach_add_(self._of_state("step"), 1.0)
        return result

    def _move(self, z: list[Tensor], closure: Closure) -> tuple[Any, list[Tensor], Tensor]:
        """Let w be z; returns the loss and this rank's operator there, and 1 if it was not finite on some rank."""
        loss, local = self._players.operator(closure)
        mean = [x.clone() for x in local]
        bad = self._average(self._dense, mean)
        _take(self._of_state("snapshot"), z, bad)
        _take(self._of_state("snapshot_operator"), self._first_worker(mean), bad)
        return loss, local, bad

    def _average(self, communicator: Communicator, tensors: list[Tensor]) -> Tensor:
        """Average in place, in buckets; returns 1 if anything was not finite on any rank, else 0."""
        first, size, names = 0, 0, self._players.names
        for i, x in enumerate(tensors, start=1):
            size += x.numel() * x.element_size()
            if size >= _BUCKET_BYTES or i == len(tensors):
                communicator.average_(tensors[first:i], names[first:i], last=i == len(tensors))
                first, size = i, 0
        assert communicator.found_inf is not None
        return communicator.found_inf

    def _first_worker(self, tensors: list[Tensor]) -> list[Tensor]:
        return [x[0] for x in tensors] if self.communicator.workers > 1 else tensors

    def _coin(self, step: int) -> bool:
        """Whether w moves to the point that this step has reached: the same on every rank, from seed and step alone."""
        return counter_rng.fold(self.communicator.seed, "snapshot", step) < (1.0 - self.tau) * 2.0**62

    def _begin(self) -> None:
        """Compare settings over ranks, once; and that what was loaded is whole."""
        who = type(self).__name__
        if not self._connected:
            ranks = self.communicator.connect()
            self._dense.join(ranks)  # one count of bytes
            mine = f"{who}(tau={self.tau!r}, full_batch={self.full_batch})"
            texts = [text.decode() for text in ranks.gather_bytes(mine.encode(), ranks.device)]
            for rank, text in enumerate(texts):
                if text != texts[0]:
                    raise ConfigurationError(f"step: ranks differ: rank 0 has {texts[0]}, rank {rank} has {text}.")
            self._connected = True
        if self._loaded:
            if max(int(step) for step in self._of_state("step")) > self.communicator.stats.steps:
                raise CheckpointError(
                    f"{who}: expected the communicator's state with the loaded one, got none. Save and load the whole "
                    "state_dict() of every rank, or use gradwire.comm.checkpoint."
                )
            self._loaded = False

    # State.

    def _of_state(self, name: str) -> list[Tensor]:
        return [self.state[p][name] for p in self._players.params]

    def state_dict(self) -> dict[str, Any]:
        """The state, with that of this rank's communicator; every rank must keep its own."""
        return {**super().state_dict(), "communicator": self.communicator.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` of the same rank gave; every tensor is copied.

        Raises:
            ValueError: It belongs to another optimizer.
            CheckpointError: The communicator's part is another rank's, of another world size, or of other
                hyper-parameters. A state without it is accepted, but the next step raises unless
                `gradwire.comm.checkpoint` has brought it.
        """
        for saved in state_dict["state"].values():
            if saved.keys() != set(_STATE):
                raise ValueError(
                    f"{type(self).__name__}: expected a state of {list(_STATE)}, got {sorted(saved)}. It belongs to "
                    "another optimizer."
                )
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "communicator"})
        keys = itertools.chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = itertools.chain.from_iterable(group["params"] for group in self.param_groups)
        for key, p in zip(keys, params, strict=True):
            if saved := state_dict["state"].get(key):
                operator = torch.zeros_like(p, dtype=compute_dtype(p.dtype))  # torch would round it to p's dtype
                self.state[p] = {
                    "step": torch.tensor(float(saved["step"])),
                    "snapshot": p.detach().clone().copy_(saved["snapshot"]),
                    "snapshot_operator": operator.copy_(saved["snapshot_operator"]),
                }
        if "communicator" in state_dict:
            self.communicator.load_state_dict(state_dict["communicator"])
        self._loaded = True
        self._arrange()


def _wide(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x.to(compute_dtype(x.dtype)) for x in tensors]


def _take(current: list[Tensor], new: Sequence[Tensor], bad: Tensor) -> None:
    """Take new values over unless `bad`; on an accelerator without asking the host."""
    if bad.device.type == "cpu":
        if not bool(bad):
            torch._foreach_copy_(current, list(new))
        return
    for x, y in zip(current, new, strict=True):
        torch.where(bad != 0, x, y.to(x.dtype), out=x)
