"""`DiLoCo`: many steps of one optimizer on each rank, then one step of another along what they have moved."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, final, overload

import torch
from torch import Tensor

from gradwire.comm import Averager
from gradwire.comm.rank_state import Contents, RankState
from gradwire.comm.rounds import Rounds, named_parameters, read_state, saved_state, write_state
from gradwire.optim.checks import check_given
from gradwire.optim.layout import local

_OUTER = "outer_"
_OWN = ("agreed", "local_step")


@final
class DiLoCo(torch.optim.Optimizer):
    """Each rank takes `every` steps of an inner optimizer alone; an outer one steps along the mean of what they moved.

        H times:  x_i <- inner step along this rank's own gradient
        then:     pseudo_gradient = mean over ranks of C(agreed - x_i)
                  agreed <- outer step from agreed along pseudo_gradient;  x_i <- agreed

    Of H steps one communicates, and what it sends may be compressed by any communicator C. Before the first step, all
    ranks take the parameters of rank 0; after each round they are equal to the bit.

    Gradients must be local when `step` is called. In a plain loop they are; under `DistributedDataParallel` call
    `gradwire.comm.keep_local(ddp)`, and if the model has buffers turn off their broadcast in forward; under FSDP2 shard
    with `mesh["shard"]` alone and give the communicator `group=mesh["replicate"].get_group()`. All ranks must call
    `step` equally often. Schedulers act on this optimizer, whose groups are the inner's, once per step; or on the
    outer, once per round. A `GradScaler` scales on each rank by itself; a step that it leaves out counts. Clip
    gradients on each rank, before `step`.

    If a pseudo-gradient is not finite on any rank, all ranks skip the outer step and return to the last agreed point:
    the round is lost. The inner state of those parameters for which it is not finite, either, starts anew on the rank
    that has it, and residuals stay as they were. After a round `.grad` is None.

    Configurations:
        DiLoCo: AdamW, the default outer optimizer, `every` 30 to 500, the default communicator; or int8 both ways,
            `Communicator(BlockQuantize(bits=8), feedback=EF(), exchange=TwoPhase())`, with a quarter of the bytes.
        SparseLoCo: AdamW, outer `torch.optim.SGD(params, lr=1.0)`, `every` 15 to 50, and
            `Communicator(Chain(ChunkTopK(k=64), BlockQuantize(bits=2)), feedback=EF(decay=0.95))`: 1.6 % of the entries
            in 2 bits, 0.028 bytes per parameter. The residual takes the place of the outer momentum.
        Local SGD: outer `torch.optim.SGD(params, lr=1.0)`; the mean of the parameters.

    Args:
        inner: Steps on each rank; its parameters are the same on every rank, in the same order.
        outer: Steps along the pseudo-gradient, an optimizer of the same parameters, however grouped. By default
            `torch.optim.SGD(params, lr=0.7, momentum=0.9, nesterov=True)`, as published.
        every: Inner steps of a round, H >= 1.
        communicator: What averages pseudo-gradients, its own; dense averaging over all ranks by default.
        buffers: `(name, buffer)` pairs, such as `model.named_buffers()`: floating-point ones become their mean over
            ranks, sent dense, with each round. Without it every rank keeps its own, running statistics included.
        bucket_mb: Size of a bucket in MiB, > 0; each is one exchange.

    Shapes:
        Any but complex. Differences are averaged in float32 or wider, and rounded to the parameter's dtype.

    Cost:
        A copy of the parameters beside both optimizers' state, and while a round ends another, in place of the
        gradients. One exchange per round, in which the host waits once for the device. `communicator.stats` counts
        rounds as steps, and their bytes; against averaging gradients, its `compression_rate` grows by a factor of H.

    State:
        The inner's; agreed: the last agreed point; local_step: steps since then; outer_...: the outer's. Parameters
        within a round and the inner state are each rank's own: give this optimizer to `gradwire.comm.checkpoint`, which
        saves them of every rank, or save `state_dict` and the model's on every rank.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> outer = torch.optim.SGD([weight], lr=0.5)
        >>> optimizer = DiLoCo(torch.optim.SGD([weight], lr=0.1), outer, every=2)
        >>> for _ in range(2):
        ...     weight.grad = torch.ones(2)
        ...     optimizer.step()
        >>> weight.data  # the round went from 1 to 0.8, of which the outer optimizer takes half
        tensor([0.9000, 0.9000])

    Reference:
        A. Douillard, Q. Feng, A. A. Rusu, R. Chhaparia, Y. Donchev, A. Kuncoro, M. Ranzato, A. Szlam, J. Shen, "DiLoCo:
        Distributed Low-Communication Training of Language Models", 2023, arXiv:2311.08105, algorithm 1;
        A. Sarfi, B. Thérien, J. Lidin, E. Belilovsky, "Communication Efficient LLM Pre-training with SparseLoCo", 2025,
        arXiv:2508.15706, algorithm 1.

    Differences from the paper:
        Any two optimizers. SparseLoCo's 2 bits are there four levels with a codebook; here -s, 0 and s.
    """

    _step_supports_amp_scaling = True  # so that a GradScaler calls every step: ranks count alike

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        outer: torch.optim.Optimizer | None = None,
        *,
        every: int,
        communicator: Averager | None = None,
        buffers: Iterable[tuple[str, Tensor]] = (),
        bucket_mb: float = 25.0,
    ) -> None:
        for name, given in (("inner", inner), ("outer", outer)):
            if given is not None and not isinstance(given, torch.optim.Optimizer):
                raise TypeError(f"DiLoCo: expected an optimizer as {name}, got {given!r}. Make it of the parameters.")
            if getattr(given, "communicator", None) is not None:
                raise ValueError(
                    f"DiLoCo: expected an {name} optimizer that sends nothing, got {type(given).__name__}."
                )
        if inner is outer:
            raise ValueError("DiLoCo: expected two optimizers, got one twice. Make another of the same parameters.")
        if bucket_mb <= 0:
            raise ValueError(f"DiLoCo: expected bucket_mb > 0, got bucket_mb={bucket_mb}.")
        params = list(named_parameters(inner).values())
        if outer is None:
            outer = torch.optim.SGD(params, lr=0.7, momentum=0.9, nesterov=True)
        if _params(outer).keys() != _params(inner).keys():
            raise ValueError(
                f"DiLoCo: expected outer to have the {len(params)} parameters of inner, got {len(_params(outer))}, or "
                "others. Make both of the same."
            )
        self.inner, self.outer = inner, outer
        bucket_bytes = int(bucket_mb * 2**20)
        self._rounds = Rounds("DiLoCo", inner, every, communicator, buffers, bucket_bytes, self._settings)
        self.communicator = self._rounds.communicator
        self.rank_state = RankState("DiLoCo", self.communicator, self._read, self._write)
        super().__init__(inner.param_groups, inner.defaults)

    # What is the inner's.

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner's."""
        return self.inner.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        """Torch's constructor sets them; they are the inner's all the same."""

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The inner's, the outer's under `outer_...`, and the point agreed on: a copy, but for the tensors."""
        merged: defaultdict[Tensor, Any] = defaultdict(dict)
        step = torch.tensor(float(self._rounds.steps))
        for name, p in self._rounds.params.items():
            outer = {_OUTER + key: value for key, value in self.outer.state.get(p, {}).items()}
            own = {"agreed": self._rounds.agreed[name], "local_step": step.clone()}
            merged[p] = {**self.inner.state.get(p, {}), **outer, **own}
        return merged

    @state.setter
    def state(self, value: defaultdict[Tensor, Any]) -> None:
        """Torch's constructor sets it; it is the two optimizers' all the same."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the inner optimizer, and its parameters to the outer; all ranks must call it."""
        if any(param_group is own for own in self.inner.param_groups):  # torch's constructor hands over its own
            return
        self.inner.add_param_group(param_group)
        added = self.inner.param_groups[-1]
        named = "param_names" in added and "param_names" in self.outer.param_groups[0]
        new = list(zip(added["param_names"], added["params"], strict=True)) if named else list(added["params"])
        self.outer.add_param_group({"params": new})
        self._rounds.grow()

    # Steps.

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take an inner step, and end the round after every `every`-th; all ranks must call it.

        Args:
            closure: Evaluates the model again and returns the loss; handed to the inner optimizer.

        Returns:
            The closure's loss, or None.
        """
        check_given("DiLoCo", self.inner.param_groups, _params(self.outer))
        self._rounds.begin()
        loss = self._inner_step(closure)
        self._rounds.step(self._move)
        return loss

    def _inner_step(self, closure: Callable[[], float] | None) -> float | None:
        """As a `GradScaler` would call it, if there is one."""
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        scale: Tensor | None = getattr(self, "grad_scale", None)
        if found_inf is None:
            return self.inner.step(closure)
        if getattr(self.inner, "_step_supports_amp_scaling", False):
            self.inner.grad_scale, self.inner.found_inf = scale, found_inf  # type: ignore[attr-defined]
            try:
                return self.inner.step(closure)
            finally:
                del self.inner.grad_scale, self.inner.found_inf  # type: ignore[attr-defined]
        if bool(local(found_inf)):
            return None
        if scale is not None:
            with torch.no_grad():
                torch._foreach_mul_([p.grad for p in _params(self) if p.grad is not None], 1.0 / local(scale))
        return self.inner.step(closure)

    def _settings(self) -> dict[str, str]:
        """The outer optimizer, which must do the same on every rank."""
        groups = [{key: v for key, v in group.items() if key != "params"} for group in self.outer.param_groups]
        return {"outer": f"{type(self.outer).__name__} {groups}"}

    def _move(self, pseudo_gradients: dict[str, Tensor]) -> None:
        """Step along the pseudo-gradients with the outer optimizer."""
        for name, p in self._rounds.params.items():
            p.grad = pseudo_gradients[name].to(p.dtype)
        self.outer.step()
        for p in self._rounds.params.values():
            p.grad = None

    def synchronize(self) -> None:
        """End the round now, if a step was taken in it: parameters are then equal on all ranks, which all must call."""
        if self._rounds.steps:
            self._rounds.end(self._move)

    @contextmanager
    def returned(self) -> Iterator[None]:
        """Inside, parameters and buffers are those last agreed on, for an evaluation that sends nothing."""
        with self._rounds.returned():
            yield

    # State.

    def state_dict(self) -> dict[str, Any]:
        """The whole state of this rank, with that of the communicator; all ranks must call it, and keep their own."""
        self._rounds.connect()
        rounds = self._rounds.state_dict()
        del rounds["agreed"]
        return {
            **super().state_dict(),
            "outer_param_groups": self.outer.state_dict()["param_groups"],
            "rounds": rounds,
            "communicator": self.communicator.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` of the same rank gave; load the model of that rank, too.

        Raises:
            CheckpointError: It is another rank's, of another world size, or of a communicator configured otherwise.
            ValueError: It belongs to another model.
        """
        self._rounds.connect()
        state_dict = state_dict.copy()
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = before(self, state_dict) or state_dict
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        params = _params(self)
        if len(keys) != len(params):
            raise ValueError(f"DiLoCo: expected a state of {len(params)} parameters, got {len(keys)}.")
        saved = {p: state_dict["state"].get(key, {}) for key, p in zip(keys, params, strict=True)}
        inner = {p: _without(values) for p, values in saved.items()}
        outer = {p: _of_outer(values) for p, values in saved.items()}
        write_state(self.inner, inner, state_dict["param_groups"])
        write_state(self.outer, outer, state_dict.get("outer_param_groups"))
        for name, p in self._rounds.params.items():
            own = self._rounds.agreed[name]
            agreed = saved[p].get("agreed", p.detach())
            if agreed.shape != own.shape:
                raise ValueError(f"DiLoCo: expected agreed of shape {tuple(own.shape)}, got {tuple(agreed.shape)}.")
            own.copy_(agreed)
        steps = [int(values["local_step"]) for values in saved.values() if "local_step" in values]
        self._rounds.steps, self._rounds.started = max(steps, default=0), bool(steps)
        if "rounds" in state_dict:
            self._rounds.load_state_dict({**state_dict["rounds"], "agreed": self._rounds.agreed})
        if "communicator" in state_dict:
            self.communicator.load_state_dict(state_dict["communicator"])
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _read(self) -> Contents:
        """For checkpoints: what the rounds keep of this rank, and the outer optimizer."""
        tensors, others = self._rounds.read()
        read_state(self.outer, self._rounds.params, _OUTER, tensors, others["numbers"])
        groups = self.outer.state_dict()["param_groups"]
        others["outer_param_groups"] = [
            {key: float(v) if isinstance(v, Tensor) else v for key, v in group.items()} for group in groups
        ]
        return tensors, others

    def _write(self, tensors: dict[str, Tensor], others: dict[str, Any]) -> None:
        self._rounds.write(tensors, others)
        groups = [
            {key: _like(own[key], value) if key in own else value for key, value in saved.items()}
            for own, saved in zip(self.outer.param_groups, others["outer_param_groups"], strict=True)
        ]
        saved = saved_state(self._rounds.params, {**tensors, **others["numbers"]}, _OUTER)
        write_state(self.outer, saved, groups)


def _params(optimizer: torch.optim.Optimizer) -> dict[Tensor, None]:
    """An optimizer's parameters, in order."""
    return {p: None for group in optimizer.param_groups for p in group["params"]}


def _without(state: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter's inner state alone."""
    return {key: value for key, value in state.items() if key not in _OWN and not key.startswith(_OUTER)}


def _of_outer(state: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter's outer state alone."""
    return {key.removeprefix(_OUTER): value for key, value in state.items() if key.startswith(_OUTER)}


def _like(own: object, saved: Any) -> Any:
    """A hyper-parameter read from JSON, as the optimizer has it."""
    if isinstance(own, Tensor):
        return torch.full_like(own, saved)
    return tuple(saved) if isinstance(own, tuple) else saved
