"""One step through which autograd can differentiate: nothing is changed in place that a gradient needs."""

import math
from typing import Any

import torch
from torch import Tensor

from gradwire.optim.kernels import Around, Scalars, Update, apply
from gradwire.optim.layout import Dims, real, real_shape


def step_differentiable(
    update_: Update, param: Tensor, state: dict[str, Tensor], dims: Dims, scalars: Scalars, around: Around
) -> None:
    """Update a parameter by `copy_` and its state by new tensors, both with a history.

    Args:
        update_: The update; `torch.func.functionalize` makes its in-place operations new tensors.
        param: The parameter, its gradient in `grad`; no leaf, if it is to be differentiated.
        state: Its state, whose tensors are replaced.
        dims: Which dimensions the update sees.
        scalars: Numbers of this step, those of each parameter as `[1]`.
        around: What surrounds the update.
    """
    assert param.grad is not None
    shape = real_shape(param)
    order = [d for group in dims for d in group]
    flat_shape = [math.prod(shape[d] for d in group) for group in dims]
    inverse = sorted(range(len(order)), key=order.__getitem__)
    shaped = {name: x.shape == param.shape for name, x in state.items() if name != "step"}

    def arrange(x: Tensor) -> Tensor:
        return real(x).permute(order).reshape(flat_shape)

    def restore(x: Tensor, like: Tensor) -> Tensor:
        x = x.reshape([shape[d] for d in order]).permute(inverse)
        return torch.view_as_complex(x.contiguous()) if like.is_complex() else x

    numbers = {
        name: list(value.unbind()) if isinstance(value, Tensor) and value.ndim else value
        for name, value in scalars.items()
    }

    def new(flat: Tensor, grad: Tensor, values: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        flat, values = flat.clone(), {name: x.clone() for name, x in values.items()}
        apply(update_, [flat], [grad], {name: [x] for name, x in values.items()}, numbers, around)
        return flat, values

    values = {name: arrange(state[name]) if same else state[name] for name, same in shaped.items()}
    functional: Any = torch.func.functionalize(new)
    flat, values = functional(arrange(param), arrange(param.grad), values)
    param.copy_(restore(flat, param))
    for name, same in shaped.items():
        state[name] = restore(values[name], state[name]) if same else values[name]
