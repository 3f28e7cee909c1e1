"""`FSDPHandle`: where a step begins and ends in the backward passes of an FSDP2 model."""

from typing import Any

import torch
from torch import Tensor

from gradwire.comm.averager import Averager
from gradwire.comm.guard import skip_non_finite


class FSDPHandle:
    """What `attach` returns for FSDP2: counts modules into steps, and skips those that were not finite.

    A step ends with the backward pass. A module that ran twice before it begins another step. All ranks must run the
    same modules in the same order, as FSDP2 needs it, too.
    """

    def __init__(self, communicator: Averager) -> None:
        self._communicator = communicator
        self._arrived: list[str] = []
        self._hooks: list[Any] = []
        self._queued, self._first = False, True
        self._stream: torch.cuda.Stream | None = None
        self._found_inf: Tensor | None = None
        self._accumulates_found_inf = False

    def detach(self) -> None:
        """Let go of the optimizer, and the communicator."""
        for hook in self._hooks:
            hook.remove()
        self._communicator.attached = False

    def skip_with(self, optimizer: torch.optim.Optimizer) -> None:
        """Skip a step if any of the backward passes before it met a non-finite gradient, not the last one alone."""
        self._accumulates_found_inf = True
        self._hooks.append(skip_non_finite(optimizer, self._communicator))
        self._hooks.append(optimizer.register_step_post_hook(lambda *_: setattr(self, "_found_inf", None)))

    def begin(self, name: str, flat: Tensor) -> None:
        """A module's gradient has come, on the current stream."""
        if flat.is_cuda:
            self._stream = torch.cuda.current_stream(flat.device)
            flat.record_stream(self._stream)  # FSDP2 frees it on another one when it casts it
        if not self._queued:  # after FSDP2's own callback, in which modules whose inputs need no gradient come
            torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)
            self._queued = True
        if name in self._arrived:
            self._end_step()
        self._arrived.append(name)

    def _end_backward(self) -> None:
        self._queued = self._first = False
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        self._end_step()

    def _end_step(self) -> None:
        self._arrived.clear()
        self._communicator.average_([], [], last=True)
        found_inf = self._communicator.found_inf
        if self._accumulates_found_inf and found_inf is not None:
            if self._found_inf is not None:
                found_inf = self._communicator.found_inf = torch.maximum(found_inf, self._found_inf)
            self._found_inf = found_inf


WRONG_SIZE = (
    "attach: expected {expected} entries, the gradients of all parameters of module {name!r}, got {got}. Attach after "
    "freezing parameters, and again after each change; where torch lacks set_reduce_scatter_unused_params, use every "
    "parameter in each step."
)


def take_unused_along(module: Any) -> None:
    """Have FSDP2 reduce zero for parameters without a gradient, where torch can."""
    if hasattr(module, "set_reduce_scatter_unused_params"):
        module.set_reduce_scatter_unused_params(True, recurse=False)
