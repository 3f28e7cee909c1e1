"""`in_backward`: gradient release, the optimizer's step inside the backward pass."""

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradwire.optim.base import Optimizer

T = TypeVar("T", bound=torch.optim.Optimizer)


def in_backward(model: nn.Module, factory: Callable[[Iterable[tuple[str, nn.Parameter]]], T]) -> T:
    """Step each parameter as soon as its gradient is complete, and free the gradient at once.

    Gradients then never exist all at the same time, which saves nearly all of their memory, 4 bytes per float32
    parameter. `loss.backward()` is the step; `zero_grad` and `step` afterwards find nothing to do. Schedulers,
    `state_dict` and `load_state_dict` work as ever on the returned optimizer, `hook.remove()` of every handle in its
    attribute `in_backward_hooks` ends it. Works on FSDP2's sharded parameters, too.

    What needs all gradients together is impossible: clipping by global norm, accumulation over several backward
    passes, and `GradScaler`, which would have to look for infinities first.

    Args:
        model: Its parameters that require a gradient are optimized.
        factory: Makes the optimizer from `(name, parameter)` pairs; of `gradwire.optim`, or any other that skips
            parameters without gradient.

    Returns:
        What the factory made.

    Raises:
        TypeError: The model is a `DistributedDataParallel`, whose gradients are complete only after they are averaged.

    Example:
        >>> from gradwire.optim import AdamP
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = in_backward(model, lambda params: AdamP(params, lr=0.1))
        >>> model(torch.ones(1, 3)).sum().backward()
        >>> model.weight.grad is None, optimizer.state[model.weight]["step"]
        (True, tensor(1.))

    Reference:
        K. Lv et al., "Full Parameter Fine-tuning for Large Language Models with Limited Resources", ACL 2024,
        arXiv:2306.09782, section 3.1 (fused update).
    """
    if isinstance(model, DistributedDataParallel):
        raise TypeError(
            "in_backward: expected a model whose gradients are complete when they are accumulated, got a "
            "DistributedDataParallel. Use FSDP2, or step after the backward pass."
        )
    optimizer = factory((name, p) for name, p in model.named_parameters() if p.requires_grad)

    def step(param: Tensor) -> None:
        if isinstance(optimizer, Optimizer):
            optimizer.step_parameter(param)
        else:
            optimizer.step()  # every other gradient is gone already, or not there yet
        param.grad = None

    params = [p for group in optimizer.param_groups for p in group["params"]]
    hooks = [p.register_post_accumulate_grad_hook(step) for p in params]
    optimizer.in_backward_hooks = hooks  # type: ignore[attr-defined]
    return optimizer
