"""Linear and convolutional layers as preconditioners see them: a matrix, and the statistics of both of its sides."""

import logging
from collections.abc import Callable, Iterable, Sequence, Set
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from gradwire.compression.base import compute_dtype

_log = logging.getLogger("gradwire")


@final
class Layer:
    """The weight of one or more modules, with their bias as one more column of it: `[outputs, inputs]`.

    Every backward pass adds, of each use of the layer, the inputs and the gradients of the outputs. Forward passes
    that no backward pass follows leave nothing, and a forward pass that is repeated to save memory counts once.

    Args:
        name: Of its module, the first one if several share the weight.
        module: That module.
    """

    def __init__(self, name: str, module: nn.Linear | nn.Conv2d) -> None:
        self.name = name
        self.weight, self.module_bias = module.weight, module.bias
        self.bias = module.bias if module.bias is not None and module.bias.requires_grad else None
        self.outputs = self.weight.shape[0]
        self.inputs = self.weight[0].numel() + (self.bias is not None)
        self.dtype = compute_dtype(self.weight.dtype)
        self.clear()

    def clear(self) -> None:
        """Forget what was added."""
        self._samples, self._input_sum, self._output_sum = 0, None, None

    _samples: int
    _input_sum: Tensor | None
    _output_sum: Tensor | None

    def add(self, input_sum: Tensor, samples: int, output_sum: Tensor) -> None:
        """Add sums over samples."""
        if self._input_sum is None or self._output_sum is None:
            self._samples, self._input_sum, self._output_sum = samples, input_sum, output_sum
        else:
            self._samples += samples
            self._input_sum = self._input_sum + input_sum
            self._output_sum = self._output_sum + output_sum

    def input_parts(self) -> list[Tensor]:
        """The mean input, with 1 for the bias behind it; zeros if the layer was not used."""
        ones = 0 if self.bias is None else 1
        if self._input_sum is None:
            return [self.weight.new_zeros(self.inputs, dtype=self.dtype)]
        mean = self._input_sum / self._samples
        return [mean, mean.new_ones(ones)] if ones else [mean]

    def output_sum(self) -> Tensor:
        """The gradients of the outputs, added up over samples; zeros if the layer was not used."""
        if self._output_sum is None:
            return self.weight.new_zeros(self.outputs, dtype=self.dtype)
        return self._output_sum


def find_layers(
    model: nn.Module | Iterable[tuple[str, nn.Module]], parameters: Set[Tensor], skip: Sequence[str], max_dim: int
) -> tuple[list[Layer], list[tuple[nn.Module, Layer]]]:
    """The layers of a model that can be preconditioned, and the modules that belong to each.

    What is left to the base optimizer is logged by name, with the reason.

    Args:
        model: A module, perhaps within `DistributedDataParallel`, or `(name, module)` pairs.
        parameters: Those of the base optimizer.
        skip: Patterns (`fnmatch`, case-sensitive) of names of modules to leave out.
        max_dim: The largest side of a matrix.

    Raises:
        ValueError: The base optimizer lacks a layer's parameter, or there is no layer.
    """
    if isinstance(model, DistributedDataParallel):
        model = model.module
    modules = {module: name for name, module in reversed(_named(model))}
    layers: dict[Tensor, Layer] = {}
    members: list[tuple[nn.Module, Layer]] = []
    left: dict[str, str] = {}
    for module, name in reversed(modules.items()):
        if not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        reason = _why_not(module, name, skip, max_dim)
        layer = layers.get(module.weight)
        if reason is None and layer is not None and layer.module_bias is not module.bias:
            reason = f"it shares its weight, but not its bias, with {layer.name}"
            left[layer.name] = f"it shares its weight, but not its bias, with {name}"
            del layers[layer.weight]
        if reason is not None:
            left[name] = reason
            continue
        layer = layers.setdefault(module.weight, layer or Layer(name, module))
        members.append((module, layer))
    members = [(module, layer) for module, layer in members if layer.weight in layers]
    if left:
        listed = ", ".join(f"{name} ({reason})" for name, reason in left.items())
        _log.info("MKOR: left to the base optimizer: %s.", listed)
    if not layers:
        raise ValueError("MKOR: expected a model with Linear or Conv2d layers to precondition, got none.")
    for layer in layers.values():
        if any(p is not None and p not in parameters for p in (layer.weight, layer.bias)):
            raise ValueError(
                f"MKOR: expected a base optimizer of all parameters of {layer.name!r}, got one without some. Give them "
                f"to it, or leave the layer out: skip=({layer.name!r},)."
            )
    return list(layers.values()), members


def gather(
    members: Iterable[tuple[nn.Module, Layer]], wanted: Callable[[], bool]
) -> list[torch.utils.hooks.RemovableHandle]:
    """Add to the layers' statistics from now on, in training mode and while `wanted()`; returns the hooks' handles."""
    return [module.register_forward_hook(partial(_watch, layer, wanted), with_kwargs=True) for module, layer in members]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _watch(
    layer: Layer, wanted: Callable[[], bool], module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> None:
    """Sum the inputs up, and add them when the gradient of the outputs has come."""
    if not (module.training and output.requires_grad and layer.weight.requires_grad and wanted()):
        return
    x: Tensor = args[0] if args else kwargs["input"]
    with torch.no_grad():
        inputs, samples = _input_sum(module, x.detach())

    def arrived(grad: Tensor) -> None:
        with torch.no_grad():
            layer.add(inputs, samples, _output_sum(module, grad.detach()))

    output.register_hook(arrived)  # type: ignore[no-untyped-call]


def _input_sum(module: nn.Linear | nn.Conv2d, x: Tensor) -> tuple[Tensor, int]:
    """Sum over samples of the inputs, of a convolution of its patches' mean, and the number of samples."""
    if isinstance(module, nn.Linear):
        x = x.reshape(-1, x.shape[-1])
        return x.sum(0, dtype=compute_dtype(x.dtype)), len(x)
    samples = len(x) if x.ndim == 4 else 1
    total = x.reshape(samples, *x.shape[-3:]).sum(0, keepdim=True, dtype=compute_dtype(x.dtype))
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    total = F.pad(total, module._reversed_padding_repeated_twice, mode=mode)
    patches = F.unfold(total, module.kernel_size, module.dilation, 0, module.stride)
    return patches.mean(-1).squeeze(0), samples


def _output_sum(module: nn.Linear | nn.Conv2d, grad: Tensor) -> Tensor:
    """Sum over samples of the gradients of outputs, of a convolution of their mean over positions."""
    dtype = compute_dtype(grad.dtype)
    if isinstance(module, nn.Linear):
        return grad.reshape(-1, grad.shape[-1]).sum(0, dtype=dtype)
    return grad.reshape(-1, *grad.shape[-3:]).sum(0, dtype=dtype).mean((1, 2))


def _named(model: nn.Module | Iterable[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    if isinstance(model, nn.Module):
        return list(model.named_modules())
    pairs: list[Any] = list(model)
    for pair in pairs:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[1], nn.Module)):
            raise TypeError(
                f"MKOR: expected a module or (name, module) pairs, got {type(pair).__name__} among them. "
                "Pass the model, or model.named_modules()."
            )
    return pairs


def _why_not(module: nn.Linear | nn.Conv2d, name: str, skip: Sequence[str], max_dim: int) -> str | None:
    """The reason why a layer is left to the base optimizer."""
    weight: object = module.weight
    pattern = next((pattern for pattern in skip if fnmatchcase(name, pattern)), None)
    if pattern is not None:
        return f"its name matches {pattern!r}"
    if not isinstance(weight, nn.Parameter):
        return "its weight is computed from others"
    if not weight.requires_grad:
        return "it is frozen"
    if isinstance(weight, DTensor) or weight.is_complex():
        return "its weight is sharded" if isinstance(weight, DTensor) else "its weight is complex"
    if isinstance(module, nn.Conv2d) and module.groups != 1:
        return f"it has {module.groups} groups"
    largest = max(weight.shape[0], weight[0].numel() + 1)
    return f"a side of {largest} exceeds max_dim={max_dim}" if largest > max_dim else None
