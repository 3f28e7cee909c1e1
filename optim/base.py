"""`Optimizer`: a template that makes an algorithm's few lines a complete `torch.optim.Optimizer`.

A subclass states its hyper-parameters' ranges (`check_group`), the state of one parameter (`init_state`), the numbers
that one step needs (`scalars`) and the update on lists of tensors (`update_`). The template owns everything else. Loop,
foreach and fused are three ways to call that one update: on one parameter, on all of them, or compiled and on packs.
Nothing in a step waits for an accelerator: step counts live beside their parameters and are never read by the host.
"""

import contextlib
import functools
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, final, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from gradwire.compression import counter_rng
from gradwire.compression.base import compute_dtype
from gradwire.optim.bucket import Bucket
from gradwire.optim.checks import check_whole
from gradwire.optim.compiled import step_compiled
from gradwire.optim.differentiable import step_differentiable
from gradwire.optim.kernels import CHUNK, PIECE, Around, Scalars, step_eager
from gradwire.optim.layout import Dims, Flat, local, real_shape
from gradwire.optim.options import DEFAULTS, STORAGE, Options, check_options
from gradwire.optim.shards import Shards


class Optimizer(torch.optim.Optimizer, ABC):
    """Base of all optimizers here: torch's conventions around one mathematical update.

    Parameters narrower than float32 are updated in float32 with float32 state and rounded once, at the write-back. A
    complex parameter behaves as its `view_as_real`. `grad_scale` and `found_inf`, set as attributes by `GradScaler` or
    by a communicator's guard, are honoured on the device: where `found_inf` is set, nothing changes, not even `step`.

    Args:
        params: Tensors, `(name, tensor)` pairs or groups of them, as for every `torch.optim.Optimizer`.
        defaults: The algorithm's hyper-parameters; a group may override each.
        options: The keyword arguments of `Options`, which a group may override, too.
    """

    elementwise: ClassVar[bool] = False
    """Whether `update_` treats each element alone, and so may see a tensor in pieces."""

    supports_complex: ClassVar[bool] = True
    """Whether the update has a meaning for the real view of a complex parameter."""

    _step_supports_amp_scaling = True  # GradScaler then hands over grad_scale and found_inf and does not wait for them

    def __init__(self, params: ParamsT, defaults: dict[str, Any], options: Options) -> None:
        unknown = options.keys() - DEFAULTS.keys()
        if unknown:
            raise TypeError(f"{type(self).__name__}: got unexpected keyword arguments {sorted(unknown)}.")
        self._forget()
        self._shapes: set[torch.Size] = set()
        super().__init__(params, {**defaults, **DEFAULTS, **options})

    # What a subclass implements.

    @abstractmethod
    def check_group(self, group: Mapping[str, Any]) -> None:
        """Raise ValueError if a hyper-parameter of a group is out of its range."""

    @abstractmethod
    def init_state(self, param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """The state of one parameter before its first step, without `step`; see `zeros_like`."""

    def init_state_like(self, param: Tensor, group: Mapping[str, Any], like: Tensor) -> dict[str, Tensor]:
        """The state of a stand-in for `like` of another shape; by default `init_state`, which sees the shape alone."""
        return self.init_state(param, group)

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

    def gradients(self, params: Sequence[Tensor]) -> list[Tensor | None]:
        """What each parameter descends along: by default its gradient; of its local shape or its own."""
        return [param.grad for param in params]

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
        for group in self.param_groups:
            self._step_group(group, group["params"])
        return loss

    @final
    @torch.no_grad()
    def step_parameter(self, param: Tensor) -> None:
        """Update one parameter; hooks on `step` are not called."""
        self._step_group(self._place(param)[0], [param])
        self._opt_called = True  # what schedulers look at

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, checked like the constructor's.

        Raises:
            ValueError: A hyper-parameter is out of its range; the optimizer is unchanged.
        """
        if isinstance(param_group, dict):
            group = {**self.defaults, **param_group}
            check_options(type(self).__name__, group)
            self.check_group(group)
        super().add_param_group(param_group)
        self._shapes.update(param.shape for param in self.param_groups[-1]["params"])
        for param in self.param_groups[-1]["params"]:
            if param.is_complex() and not self.supports_complex:
                self.param_groups.pop()
                raise ValueError(
                    f"{type(self).__name__}: expected real parameters, got {param.dtype} of shape "
                    f"{tuple(param.shape)}. Its second moments have no meaning for complex ones."
                )

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state: every tensor is copied, in the dtype this optimizer keeps it in and beside its parameter.

        torch casts a state to its parameter's dtype and may share memory with `state_dict`; neither happens here.
        Hyper-parameters become the saved ones, but for `state_dtype` and `kahan_sum`.
        """
        seen: dict[str, Any] = {}
        storage = [{name: group[name] for name in STORAGE} for group in self.param_groups]

        def see(_: torch.optim.Optimizer, final_state_dict: dict[str, Any]) -> None:
            seen.update(final_state_dict)

        def restore(_: torch.optim.Optimizer) -> None:
            for group, own in zip(self.param_groups, storage, strict=True):
                group.update(own)
            ids = (i for group in seen["param_groups"] for i in group["params"])
            places = ((p, group) for group in self.param_groups for p in group["params"])
            for i, (param, group) in zip(ids, places, strict=True):
                if seen["state"].get(i):
                    self.state[param] = self._own_state(param, group, seen["state"][i])

        # Between the user's hooks: after their changes to the state dict, before they see the loaded state.
        with contextlib.ExitStack() as hooks:
            hooks.enter_context(self.register_load_state_dict_pre_hook(see))
            hooks.enter_context(self.register_load_state_dict_post_hook(restore, prepend=True))
            super().load_state_dict(state_dict)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore from a pickle or a state dict; options that it does not know take their defaults."""
        self._forget()
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        if not hasattr(self, "_shapes"):  # from a pickle
            self._shapes = {param.shape for group in self.param_groups for param in group["params"]}

    # The template.

    @final
    def _forget(self) -> None:
        """Drop what can be made again from parameters and state."""
        self._flats: dict[Tensor, Flat] = {}
        self._places: dict[Tensor, tuple[dict[str, Any], str | int]] = {}
        self._buckets: dict[tuple[Tensor, int, torch.dtype], Bucket] = {}

    @staticmethod
    @final
    def zeros_like(param: Tensor, group: Mapping[str, Any]) -> Tensor:
        """Zeros in the parameter's shape and memory order, in the group's `state_dtype` or float32 or wider."""
        return torch.zeros_like(param, dtype=group["state_dtype"] or compute_dtype(param.dtype))

    @final
    def _new_state(self, param: Tensor, group: Mapping[str, Any], like: Tensor | None = None) -> dict[str, Tensor]:
        step = torch.zeros((), dtype=torch.float32, device=param.device)
        state = {"step": step, **self.init_state_like(param, group, param if like is None else like)}
        if group["kahan_sum"] and compute_dtype(param.dtype) != param.dtype:
            state["compensation"] = torch.zeros_like(param)
        return state

    @final
    def _own_state(self, param: Tensor, group: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Tensor]:
        """A saved state, each value copied into what this optimizer would have created itself."""
        own = self._new_state(param, group)
        if own.keys() - {"compensation"} != saved.keys() - {"compensation"}:
            raise ValueError(
                f"{type(self).__name__}: expected a state of {sorted(own)}, got {sorted(saved)}. "
                "It belongs to another optimizer."
            )
        for name in own.keys() & saved.keys():
            value = saved[name]
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
    def _step_group(self, group: dict[str, Any], params: Sequence[Tensor]) -> None:
        """Update those of a group's parameters that have a gradient."""
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if found_inf is not None and _on_host(found_inf):
            if found_inf.item():
                return
            found_inf = None
        scale: Tensor | None = getattr(self, "grad_scale", None)
        if group["differentiable"]:
            with torch.enable_grad():
                for param in params:
                    if param.grad is not None:
                        self._step_differentiable(param, group, scale, found_inf)
            return
        buckets: dict[tuple[int, torch.dtype], list[Flat]] = defaultdict(list)
        known, states = self._flats, self.state
        for param, grad in zip(params, self.gradients(params), strict=True):
            if grad is None:
                continue
            if grad.layout != torch.strided:
                raise RuntimeError(
                    f"{type(self).__name__}: expected dense gradients, got {grad.layout} for parameter "
                    f"{self._place(param)[1]} of shape {tuple(param.shape)}. Use sparse=False in its layer."
                )
            flat = known.get(param)
            if flat is None or not flat.fits(states[param]):
                flat = self._flat(param, group)
            flat.take(grad)
            buckets[flat.kind, grad.dtype].append(flat)
        for flats in buckets.values():
            self._step_bucket(flats, group, scale, found_inf)
            for flat in flats:
                flat.finish()
            torch.autograd.graph.increment_version([flat.owner for flat in flats])  # for graphs that need old values

    @final
    def _step_bucket(
        self, flats: list[Flat], group: dict[str, Any], scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        """Count the step and update parameters of one kind."""
        spares = functools.partial(self._spares, group, flats[0])
        key = flats[0].owner, flats[0].kind, flats[0].grad.dtype  # `in_backward` has one for each parameter
        bucket = self._buckets.get(key)
        if bucket is None or not bucket.is_for(flats, fused=bool(group["fused"])):
            bucket = self._buckets[key] = Bucket(flats, spares if group["fused"] else None)
        device, skip = flats[0].param.device, None
        if found_inf is None:
            bucket.steps += 1
        else:
            skip = local(found_inf).to(device, non_blocking=True).reshape(()) != 0
            bucket.steps += ~skip
        if not bucket.ordered:
            return
        if scale is not None:
            scale = local(scale).to(device, non_blocking=True).reshape(())
        step = bucket.steps[: len(bucket.ordered)].double()
        scalars = self.scalars(step, bucket.sizes, group)
        keys = counter_rng.at_step(bucket.keys, step.long()) if group["stochastic_rounding"] else None
        around = Around(group["maximize"], scale, skip, keys, self.elementwise)
        done = step_compiled(self.update_, bucket.ordered, bucket.packs, scalars, around, spares)
        if group["foreach"] is None:
            at_once = CHUNK if bucket.sharded or device.type != "cpu" else PIECE
        else:
            at_once = CHUNK if group["foreach"] else 0
        step_eager(self.update_, bucket.ordered, scalars, around, at_once=at_once, first=done)

    @final
    def _step_differentiable(
        self, param: Tensor, group: dict[str, Any], scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        """Count the step and update one parameter, with a history."""
        state, skip = self._state(param, group), None
        if found_inf is None:
            state["step"] = state["step"] + 1
        else:
            skip = found_inf.reshape(()) != 0
            state["step"] = state["step"] + (~skip).to(torch.float32)
        dims = self.dims(real_shape(param), group)
        sizes = Flat(param.detach(), state, dims, 0, whole=False).sizes
        scalars = self.scalars(state["step"].double().reshape(1), sizes.reshape(1, -1), group)
        step_differentiable(self.update_, param, state, dims, scalars, Around(group["maximize"], scale, skip))

    @final
    def _flat(self, param: Tensor, group: dict[str, Any]) -> Flat:
        """The parameter and its state as the update sees them; creates a missing state."""
        dims = self.dims(real_shape(param), group)
        state, name = self._state(param, group), self._place(param)[1]
        flat = self._flats[param] = Flat(param, state, dims, name, whole=not self.elementwise)
        return flat

    @final
    def _state(self, param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[param]
        if not state:
            state.update(self._new_state(param, group))
        return state

    @final
    def _place(self, param: Tensor) -> tuple[dict[str, Any], str | int]:
        """A parameter's group, and its name or its number in the optimizer."""
        if param not in self._places:
            everything = [(p, group, i) for group in self.param_groups for i, p in enumerate(group["params"])]
            if not self.elementwise or hasattr(self, "communicator"):
                check_whole(type(self).__name__, (p for p, _, _ in everything), self._shapes)
            self._places = {
                p: (group, group["param_names"][i] if "param_names" in group else number)
                for number, (p, group, i) in enumerate(everything)
            }
        return self._places[param]

    @final
    def _spares(self, group: dict[str, Any], like: Flat, n: int, sizes: Sequence[int]) -> list[Flat]:
        """Parameters of one kind, with gradients, that nobody reads; larger than `sizes` if need be."""
        shape = torch.Size(sizes)
        while len(self.dims(shape, group)) != len(sizes):
            shape = torch.Size(2 * size for size in shape)  # below some size, the update sees it in other dimensions
        spares = []
        for _ in range(n):
            param = torch.zeros(shape, dtype=like.param.dtype, device=like.param.device)
            state = self._new_state(param, group, like.owner)
            state["step"].fill_(1.0)
            spares.append(Flat(param, state, self.dims(shape, group), "spare", whole=False))
            spares[-1].take(torch.zeros_like(param, dtype=like.grad.dtype))
        return spares


def _on_host(x: Tensor) -> bool:
    """Whether reading a number waits for no device."""
    return x.device.type == "cpu"
