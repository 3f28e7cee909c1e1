"""`Optimizer`: a template that makes an algorithm's few lines a complete `torch.optim.Optimizer`.

A subclass states its hyper-parameters' ranges (`check_group`), the state of one parameter (`init_state`), the numbers
that one step needs (`scalars`) and the update on lists of tensors (`update_`). The template owns everything else. Loop,
foreach and fused are three ways to call that one update: on one parameter, on all of them, or compiled and on one.
Nothing in a step waits for an accelerator: step counts live beside their parameters and are never read by the host.
"""

import contextlib
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypedDict, final, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from gradwire.compression.base import compute_dtype
from gradwire.optim.kernels import Dims, Flat, Scalars, real, step_compiled, step_eager
from gradwire.optim.shards import Shards


class Options(TypedDict, total=False):
    """How an optimizer runs: keyword arguments of every class here, described by `Optimizer`."""

    foreach: bool | None
    fused: bool | None
    maximize: bool
    capturable: bool
    differentiable: bool
    stochastic_rounding: bool
    kahan_sum: bool
    state_dtype: torch.dtype | None


_DEFAULTS = Options(
    foreach=None,
    fused=None,
    maximize=False,
    capturable=False,
    differentiable=False,
    stochastic_rounding=False,
    kahan_sum=False,
    state_dtype=None,
)


class Optimizer(torch.optim.Optimizer, ABC):
    """Base of all optimizers here: torch's conventions around one mathematical update.

    Parameters narrower than float32 are updated in float32 with float32 state and rounded once, at the write-back. A
    complex parameter behaves as its `view_as_real`. `grad_scale` and `found_inf`, set as attributes by `GradScaler` or
    by a communicator's guard, are honoured on the device: where `found_inf` is set, nothing changes, not even `step`.

    Args:
        params: Tensors, `(name, tensor)` pairs or groups of them, as for every `torch.optim.Optimizer`.
        defaults: The algorithm's hyper-parameters; a group may override each.
        options: The keyword arguments of `Options`.
    """

    _step_supports_amp_scaling = True  # GradScaler then hands over grad_scale and found_inf and does not wait for them

    def __init__(self, params: ParamsT, defaults: dict[str, Any], options: Options) -> None:
        unknown = options.keys() - _DEFAULTS.keys()
        if unknown:
            raise TypeError(f"{type(self).__name__}: got unexpected keyword arguments {sorted(unknown)}.")
        super().__init__(params, {**defaults, **_DEFAULTS, **options})

    # What a subclass implements.

    @abstractmethod
    def check_group(self, group: Mapping[str, Any]) -> None:
        """Raise ValueError if a hyper-parameter of a group is out of its range."""

    @abstractmethod
    def init_state(self, param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """The state of one parameter before its first step, without `step`; see `zeros_like`."""

    def dims(self, shape: torch.Size, group: Mapping[str, Any]) -> Dims:
        """How `update_` sees a parameter: which of its dimensions become which one; by default all become one."""
        return (tuple(range(len(shape))),)

    @abstractmethod
    def scalars(self, step: Tensor, sizes: Tensor, group: Mapping[str, Any]) -> Scalars:
        """The numbers that `update_` takes.

        Args:
            step: `[n]` float64, steps of each parameter including this one, on the parameters' device.
            sizes: `[n, d]` float64, the size of each parameter in each of its `dims`, of the whole if it is sharded.
            group: The parameter group.
        """

    @staticmethod
    @abstractmethod
    def update_(
        params: list[Tensor], grads: list[Tensor], state: dict[str, list[Tensor]], scalars: Scalars, shards: Shards
    ) -> list[Tensor] | None:
        """Update parameters and state in place.

        Args:
            params: In the dimensions that `dims` gives, all of the same number; float32 or float64, as are `grads`.
            grads: Gradients to descend along, of equal shapes; not to be changed.
            state: One list per state tensor, of equal shapes where the state has its parameter's shape.
            scalars: As `scalars` returns them, with `[n]` tensors as lists of n numbers. Compiled, every number is a
                0-d tensor, so use operations that take either and leave `alpha=` and `value=` alone.
            shards: Sums over a whole dimension, where this process may hold a part of it only.

        Returns:
            Small intermediates, if any, that the compiler must store and not recompute at every use.
        """

    # torch's interface.

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient.

        Args:
            closure: Evaluates the model again and returns the loss; called first, with gradients enabled.

        Returns:
            The closure's loss, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None and found_inf.device.type == "cpu":
            if found_inf.item():
                return loss
            found_inf = None
        for group in self.param_groups:
            for bucket in self._buckets(group):
                self._step_bucket(bucket, group, getattr(self, "grad_scale", None), found_inf)
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, checked like the constructor's.

        Raises:
            ValueError: A hyper-parameter is out of its range; the optimizer is unchanged.
        """
        if isinstance(param_group, dict):
            group = {**self.defaults, **param_group}
            if group["foreach"] and group["fused"]:
                raise ValueError(f"{type(self).__name__}: expected foreach or fused, got both. Leave one of them out.")
            self.check_group(group)
        super().add_param_group(param_group)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state: every tensor is copied, in the dtype this optimizer keeps it in and beside its parameter.

        torch casts a state to its parameter's dtype and may share memory with `state_dict`; neither happens here.
        """
        seen: dict[str, Any] = {}

        def see(_: torch.optim.Optimizer, final_state_dict: dict[str, Any]) -> None:
            seen.update(final_state_dict)

        def restore(_: torch.optim.Optimizer) -> None:
            ids = (i for group in seen["param_groups"] for i in group["params"])
            own = ((p, group) for group in self.param_groups for p in group["params"])
            for i, (param, group) in zip(ids, own, strict=True):
                if seen["state"].get(i):
                    self.state[param] = self._own_state(param, group, seen["state"][i])

        # Between the user's hooks: after their changes to the state dict, before they see the loaded state.
        with contextlib.ExitStack() as hooks:
            hooks.enter_context(self.register_load_state_dict_pre_hook(see))
            hooks.enter_context(self.register_load_state_dict_post_hook(restore, prepend=True))
            super().load_state_dict(state_dict)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore from a pickle or a state dict; options that it does not know take their defaults."""
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    # The template.

    @staticmethod
    @final
    def zeros_like(param: Tensor, group: Mapping[str, Any]) -> Tensor:
        """Zeros in the parameter's shape and memory order, in the group's `state_dtype` or float32 or wider."""
        return torch.zeros_like(param, dtype=group["state_dtype"] or compute_dtype(param.dtype))

    @final
    def _new_state(self, param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        step = torch.zeros((), dtype=torch.float32, device=param.device)
        return {"step": step, **self.init_state(param, group)}

    @final
    def _own_state(self, param: Tensor, group: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Tensor]:
        """A saved state, each value copied into what this optimizer would have created itself."""
        own = self._new_state(param, group)
        if own.keys() != saved.keys():
            raise ValueError(
                f"{type(self).__name__}: expected a state of {sorted(own)}, got {sorted(saved)}. "
                "It belongs to another optimizer."
            )
        for name, value in saved.items():
            if not isinstance(value, Tensor):
                own[name].fill_(value)  # other packages keep `step` as a number
            elif value.shape == own[name].shape:
                own[name].copy_(value)
            else:
                raise ValueError(
                    f"{type(self).__name__}: expected {name} of shape {tuple(own[name].shape)}, "
                    f"got {tuple(value.shape)}. It belongs to another model."
                )
        return own

    @final
    def _buckets(self, group: dict[str, Any]) -> Iterator[list[Tensor]]:
        """Parameters with gradients, together as far as one call can take them; creates missing states."""
        buckets: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
        for i, param in enumerate(group["params"]):
            if param.grad is None:
                continue
            if param.grad.layout != torch.strided:
                name = group["param_names"][i] if "param_names" in group else f"number {i} of its group"
                raise RuntimeError(
                    f"{type(self).__name__}: expected dense gradients, got {param.grad.layout} for parameter {name} "
                    f"of shape {tuple(param.shape)}. Use sparse=False in its layer."
                )
            state = self.state[param]
            if not state:
                state.update(self._new_state(param, group))
            dims = self.dims(real(param).shape, group)
            buckets[param.device, param.dtype, param.grad.dtype, tuple(state), len(dims)].append(param)
        yield from buckets.values()

    @final
    def _step_bucket(
        self, params: list[Tensor], group: dict[str, Any], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        """Count the step and update parameters of one device and dtype."""
        device = params[0].device
        steps = [self.state[p]["step"] for p in params]
        if found_inf is None:
            skip = None
            torch._foreach_add_(steps, 1.0)
        else:
            skip = found_inf.to(device, non_blocking=True).reshape(()) != 0
            torch._foreach_add_(steps, (~skip).to(torch.float32))
        if grad_scale is not None:
            grad_scale = grad_scale.to(device, non_blocking=True).reshape(())

        filled = [i for i, p in enumerate(params) if p.numel() > 0]
        if not filled:
            return
        flats = [Flat.of(params[i], self.state[params[i]], self.dims(real(params[i]).shape, group)) for i in filled]
        sizes = torch.tensor([flat.param.shape for flat in flats], dtype=torch.float64, device=device)
        scalars = self.scalars(torch.stack([steps[i] for i in filled]).double(), sizes, group)
        options: dict[str, Any] = {"maximize": group["maximize"], "scale": grad_scale, "skip": skip}
        done = step_compiled(self.update_, flats, scalars, **options) if group["fused"] else 0
        foreach = device.type == "cuda" if group["foreach"] is None else group["foreach"]
        step_eager(self.update_, flats, scalars, foreach=foreach, first=done, **options)
        for flat in flats:
            flat.write_back()
        torch.autograd.graph.increment_version(params)  # so that autograd notices a graph that needs the old values
