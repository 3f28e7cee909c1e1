"""`skip_non_finite`: an optimizer leaves out the steps whose gradients were not finite on some rank."""

import logging
from collections.abc import Callable
from typing import Any

import torch

from gradwire.comm.averager import Averager

_log = logging.getLogger("gradwire")


def skip_non_finite(optimizer: torch.optim.Optimizer, communicator: Averager) -> Any:
    """Register a step pre-hook that makes a step after a non-finite exchange change nothing.

    Fused optimizers on CUDA decide on the device (`found_inf`, the name that `GradScaler` uses); for all others the
    hook drops the gradients, which on CUDA waits for the device once a step.
    """

    def skip() -> None:
        found_inf = communicator.found_inf
        if found_inf is None:
            return
        on_device = found_inf.device.type == "cuda" and getattr(optimizer, "_step_supports_amp_scaling", False)
        if on_device:
            optimizer.found_inf = found_inf  # type: ignore[attr-defined]
            optimizer.grad_scale = None  # type: ignore[attr-defined]
        elif bool(found_inf):
            _log.warning("A gradient is not finite on some rank: the step is skipped on all ranks.")
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None

    return before_update(optimizer, skip)


def before_update(optimizer: torch.optim.Optimizer, work: Callable[[], None]) -> Any:
    """Run `work` in every step when its gradients are there: at once, or after each call of the step's closure."""

    def before_step(_: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            work()
            return None

        def then_work() -> Any:
            loss = closure()
            work()
            return loss

        given = {key: value for key, value in kwargs.items() if key != "closure"}
        return (args[0], then_work, *args[2:]), given

    return optimizer.register_step_pre_hook(before_step)
