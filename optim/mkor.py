"""`MKOR`: gradients preconditioned by inverse Kronecker factors, which every step corrects by rank one."""

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypedDict, Unpack, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradwire.comm import Communicator, Plan
from gradwire.compression import Cast, Identity
from gradwire.optim.checks import check_given, check_range
from gradwire.optim.kronecker_factors import Factors, Rule
from gradwire.optim.kronecker_layers import find_layers, gather

_OWN = ("output_inverse", "input_inverse", "mkor_step")
_CASTS: dict[torch.dtype | None, Cast | Identity] = {
    torch.bfloat16: Cast("bfloat16"),
    torch.float16: Cast("float16"),
    None: Identity(),
}


class Settings(TypedDict, total=False):
    """Keyword arguments of `MKOR`, which `MKORH` takes, too; described there."""

    decay: float
    every: int
    inverse: Literal["exact", "reference"]
    max_norm: float
    zeta: float
    rescale: bool
    vector_dtype: torch.dtype | None
    state_dtype: torch.dtype | None
    skip: tuple[str, ...]
    max_dim: int
    group: dist.ProcessGroup | None
    scaler: torch.amp.GradScaler | None


DEFAULTS = Settings(
    decay=0.95,
    every=1,
    inverse="exact",
    max_norm=10.0,
    zeta=0.9,
    rescale=True,
    vector_dtype=torch.bfloat16,
    state_dtype=None,
    skip=(),
    max_dim=8192,
    group=None,
    scaler=None,
)


class MKOR(torch.optim.Optimizer):
    """Precondition the gradients of linear and convolutional layers, then let any optimizer step.

        L <- decay L + (1 - decay) g g^T,    R <- decay R + (1 - decay) a a^T,    G <- L^-1 G R^-1 |G| / |L^-1 G R^-1|

    For each weight `[outputs, inputs]`, a is the mean input over samples, with 1 behind it for a bias, and g the sum
    over samples of the gradients of the outputs; both are means over ranks. The inverses are what is kept. They start
    as identities and are corrected by rank one (Sherman, Morrison), which takes no decomposition:

        u = L^-1 g,    L^-1 <- (L^-1 - (1 - decay) u u^T / (decay + (1 - decay) g^T u)) / decay

    Directions that no g has grow by 1 / decay each time. So before a correction, a factor with an entry above
    `max_norm` becomes zeta L^-1 + (1 - zeta) I.

    A sample is whatever a linear layer is applied to, such as a token; a convolution's is an image, with the mean of
    its patches and of its outputs' gradients over positions. Statistics are gathered by hooks in training mode, over
    all backward passes until `step`, and all uses of a weight; `zero_grad` drops them. Everything else, such as biases
    of frozen weights, grouped convolutions and embeddings, goes to the base as it is; layers that are left to it are
    logged by name.

    Gradients are averaged over ranks by others, such as DDP, before `step`; MKOR averages its vectors alone, in one
    all-reduce. After `step`, `.grad` holds what the base has used.

    Args:
        model: A module, also one within `DistributedDataParallel`, or `(name, module)` pairs.
        base: An optimizer of all of the layers' parameters. Its groups are MKOR's own: schedulers may act on either.
        decay: Weight of the past in the factors, 0 < decay <= 1; with 1 they stay identities.
        every: Steps from one correction to the next, >= 1.
        inverse: "exact", as above; or "reference", the rule of the authors' code: with S = decay L^-1 + (1 - decay) I,
            L^-1 <- S - S g g^T S / (1 + g^T S g). There no entry exceeds 1, so that nothing has to be bounded.
        max_norm: Largest entry of an exact inverse, >= 1.
        zeta: Share that is left of one above it, 0 < zeta <= 1; below decay, so that it shrinks.
        rescale: Give the result the norm of the gradient, layer by layer.
        vector_dtype: In which vectors travel: bfloat16, float16, or None for their own. bfloat16 has the range of
            float32, so that neither large inputs nor small gradients are lost, and averages noise as well as float16.
        state_dtype: Dtype of the inverses. None: float32, or float64 if a weight has it. bfloat16 halves their memory,
            and the time of the matrix products, which are then in bfloat16, too; float16 halves the memory alone.
        skip: Patterns (`fnmatch`) of names of modules that are left to the base.
        max_dim: Layers with more inputs or outputs are left to the base, >= 1.
        group: The ranks that share the model; all by default.
        scaler: The `GradScaler` in use, by whose scale g is divided.

    Shapes:
        Weights of `torch.nn.Linear` and of `torch.nn.Conv2d` with groups=1, as `[outputs, rest]`.

    Cost:
        4 (inputs^2 + outputs^2) bytes of state per layer. Per correction O(inputs^2 + outputs^2) operations, and one
        all-reduce of inputs + outputs numbers of all layers, padded to 64 and one flag. Per step two matrix products,
        2 inputs outputs (inputs + outputs) operations.

    State:
        The base's, and for each weight output_inverse, input_inverse: L^-1 and R^-1; mkor_step: steps taken. Equal on
        all ranks. A state of the base alone can be loaded; factors then start anew.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> optimizer = MKOR(model, torch.optim.SGD(model.parameters(), lr=0.1), rescale=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> model(torch.tensor([[2.0, 0.0]])).sum().backward()
        >>> optimizer.step()  # L = 0.95 + 0.05, R = 0.95 I + 0.05 [[4, 0], [0, 0]]
        >>> model.weight.grad
        tensor([[1.7391, 0.0000]])

    Reference:
        Mozaffari, Li, Zhang, Mehri Dehnavi. MKOR: Momentum-Enabled Kronecker-Factor-Based Optimizer Using Rank-1
        Updates. NeurIPS 2023. arXiv:2306.01685. Algorithm 1.

    Differences from the paper: "exact" is the inverse of the averaged factor, which the printed equation is not: that
    has + for -, decay for 1 / decay, and decay (1 - decay) for (1 - decay) / decay. The paper names no values for
    max_norm and zeta. Corrections come every step, and vectors travel when all are there.

    Differences from the authors' code, with "reference": the mean over ranks is divided by their number once, the first
    vector counts, and inputs and gradients are not clamped.
    """

    def __init__(
        self,
        model: nn.Module | Iterable[tuple[str, nn.Module]],
        base: torch.optim.Optimizer,
        **settings: Unpack[Settings],
    ) -> None:
        name = type(self).__name__
        if unknown := settings.keys() - DEFAULTS.keys():
            raise TypeError(f"{name}: got unexpected keyword arguments {sorted(unknown)}.")
        if not isinstance(base, torch.optim.Optimizer) or isinstance(base, MKOR):
            raise TypeError(f"{name}: expected a base optimizer such as torch.optim.SGD(...), got {base!r}.")
        self.settings: dict[str, Any] = {**DEFAULTS, **settings}
        _check(name, self.settings)
        self.base = base
        parameters = {p for group in base.param_groups for p in group["params"]}
        self._given = parameters
        self.layers, self._members = find_layers(model, parameters, self.settings["skip"], self.settings["max_dim"])
        super().__init__(base.param_groups, base.defaults)
        self._factors: Factors | None = None
        self._step, self._stepped = 0, False
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self.communicator = Communicator(
            _CASTS[self.settings["vector_dtype"]], plan=Plan(compress=("vectors",)), group=self.settings["group"]
        )
        self.attach()

    # What is the base's.

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base's."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        """Torch's constructor sets them; they are the base's all the same."""

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The base's, and this one's under the layers' weights: a copy, but for the tensors."""
        merged: defaultdict[Tensor, Any] = defaultdict(dict)
        merged.update({p: dict(state) for p, state in self.base.state.items()})
        for p, own in self._own_state().items():
            merged[p].update(own)
        return merged

    @state.setter
    def state(self, value: defaultdict[Tensor, Any]) -> None:
        """Torch's constructor sets it; it is the base's all the same."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base; its layers, if any, are not preconditioned."""
        if not any(param_group is own for own in self.base.param_groups):  # torch's constructor hands over its own
            self.base.add_param_group(param_group)
            self._given.update(self.base.param_groups[-1]["params"])

    # Steps.

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Correct the factors, precondition the gradients, and let the base step.

        Args:
            closure: Evaluates the model again and returns the loss; called first, with gradients enabled.

        Returns:
            The closure's loss, or None.
        """
        check_given(type(self).__name__, self.base.param_groups, self._given)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._hooks:
            with torch.autocast(self.layers[0].weight.device.type, enabled=False):
                self._precondition(loss)
        self.base.step()
        self._stepped = True
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, and what has been gathered with them."""
        super().zero_grad(set_to_none)
        for layer in self.layers:
            layer.clear()

    def attach(self) -> None:
        """Precondition from now on; the constructor has called it already."""
        if not self._hooks:
            self._hooks = gather(self._members, lambda: self._due)

    def detach(self) -> None:
        """Remove all hooks from the model and free the factors; `step` is the base's from now on."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._factors = [], None
        for layer in self.layers:
            layer.clear()

    @property
    def _due(self) -> bool:
        """Whether the next step corrects the factors."""
        return self._step % int(self.settings["every"]) == 0

    def _precondition(self, loss: float | Tensor | None) -> None:
        factors = self._factors = self._factors or Factors(self.layers, self.settings["state_dtype"])
        vectors = {"vectors": factors.vectors(self._scale())} if self._due else {}
        self._average(vectors)
        if vectors:
            factors.update_(vectors["vectors"], self._rule())
            for layer in self.layers:
                layer.clear()
        self._step += 1
        factors.precondition_(rescale=self.settings["rescale"])

    def _average(self, vectors: dict[str, Tensor]) -> None:
        """Make them means over ranks, in place."""
        if vectors:
            self.communicator.average_(list(vectors.values()), list(vectors))

    def _scale(self) -> Tensor | float:
        """What the loss has been multiplied by."""
        scaler: torch.amp.GradScaler | None = self.settings["scaler"]
        if scaler is None or not scaler.is_enabled() or scaler._scale is None:
            return 1.0
        return scaler._scale  # the tensor itself: get_scale() would wait for the device

    def _rule(self) -> Rule:
        decay, zeta, max_norm = (self.settings[name] for name in ("decay", "zeta", "max_norm"))
        if self.settings["inverse"] == "exact":
            return Rule(decay=decay, weight=1 - decay, keep=zeta, above=max_norm)
        return Rule(decay=1.0, weight=1.0, keep=decay, above=0.0)

    # State.

    def _own_state(self) -> dict[Tensor, dict[str, Tensor]]:
        """What is kept besides the base's state, by weight."""
        if self._factors is None:
            return {}
        step = torch.tensor(float(self._step))
        return {layer.weight: {**self._factors.of(layer), "mkor_step": step.clone()} for layer in self.layers}

    def _load_own_state(self, saved: Mapping[Tensor, Mapping[str, Tensor]]) -> None:
        """Take over what `_own_state` gave, of some or all weights; the factors of others start anew."""
        self._factors, self._step = None, 0
        if not any("mkor_step" in state for state in saved.values()):
            return
        self._factors, self._stepped = Factors(self.layers, self.settings["state_dtype"]), True
        for layer in self.layers:
            state = saved.get(layer.weight, {})
            self._step = max(self._step, int(state.get("mkor_step", 0)))
            for key, factor in self._factors.of(layer).items():
                if key in state and state[key].shape != factor.shape:
                    raise ValueError(
                        f"{type(self).__name__}: expected {key} of shape {tuple(factor.shape)} for {layer.name!r}, got "
                        f"{tuple(state[key].shape)}. It belongs to another model."
                    )
                if key in state:
                    factor.copy_(state[key])

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the base's state, and the factors; every tensor of theirs is copied.

        Raises:
            ValueError: It belongs to another model.
        """
        state_dict = state_dict.copy()
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = before(self, state_dict) or state_dict
        bases: dict[Any, Any] = {}
        own: dict[Any, dict[str, Tensor]] = {}
        for key, values in state_dict["state"].items():
            own[key] = {name: value for name, value in values.items() if name in self._own_names()}
            rest = {name: value for name, value in values.items() if name not in own[key]}
            if rest or not own[key]:
                bases[key] = rest
        self.base.load_state_dict({**state_dict, "state": bases})
        keys = itertools.chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = itertools.chain.from_iterable(group["params"] for group in self.param_groups)
        self._load_own_state({p: own[key] for key, p in zip(keys, params, strict=True) if own.get(key)})
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    @staticmethod
    def _own_names() -> tuple[str, ...]:
        """Names in `_own_state`."""
        return _OWN


def _check(name: str, settings: Mapping[str, Any]) -> None:
    """Raise ValueError or TypeError unless the settings are in the ranges given above."""
    for key in ("decay", "zeta"):
        if not 0 < settings[key] <= 1:
            raise ValueError(f"{name}: expected 0 < {key} <= 1, got {key}={settings[key]!r}.")
    for key in ("every", "max_dim"):
        if not isinstance(settings[key], int) or settings[key] < 1:
            raise ValueError(f"{name}: expected an integer {key} >= 1, got {key}={settings[key]!r}.")
    if settings["inverse"] not in ("exact", "reference"):
        raise ValueError(f"{name}: expected inverse 'exact' or 'reference', got {settings['inverse']!r}.")
    if settings["inverse"] == "exact":
        check_range(name, "max_norm", settings["max_norm"])
        if settings["max_norm"] < 1:
            raise ValueError(f"{name}: expected max_norm >= 1, the identity's, got {settings['max_norm']!r}.")
        if settings["zeta"] >= settings["decay"]:
            raise ValueError(
                f"{name}: expected zeta < decay, got zeta={settings['zeta']!r} and decay={settings['decay']!r}. "
                "A factor that is too large must shrink by more than it grows, 1 / decay per correction."
            )
    if settings["vector_dtype"] not in _CASTS:
        raise ValueError(
            f"{name}: expected vector_dtype torch.bfloat16, torch.float16 or None, got {settings['vector_dtype']!r}."
        )
    dtype = settings["state_dtype"]
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"{name}: expected a floating-point state_dtype, got state_dtype={dtype!r}.")
    if isinstance(settings["skip"], str):
        raise TypeError(f"{name}: expected a tuple of patterns for skip, got the string {settings['skip']!r}.")
