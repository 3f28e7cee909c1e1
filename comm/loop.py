"""The adapter to plain training loops: post-accumulate-grad hooks that overlap, or one call per step."""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any, final

import torch
from torch import Tensor

from gradwire.comm.averager import Averager
from gradwire.comm.beside import Beside


@final
class LoopHandle:
    """Averages the gradients of some parameters between `backward` and `optimizer.step`.

    Parameters are put in buckets in reverse order, as backward meets them. A bucket whose gradients are all there is
    averaged while backward goes on; `wait` does the rest and returns when all gradients are means. A parameter without
    a gradient takes part with zero, and has the mean as its gradient afterwards.
    """

    def __init__(
        self,
        parameters: Sequence[tuple[str, Tensor]],
        communicator: Averager,
        *,
        overlap: bool,
        bucket_bytes: int,
    ) -> None:
        self._communicator = communicator
        self._buckets = fill_buckets(parameters, bucket_bytes if overlap else None)
        self._place = {p: place for place, bucket in enumerate(self._buckets) for _, p in bucket}
        self._overlap, self._sync = overlap, True
        self._beside = Beside(parameters[0][1].device)
        self._started: list[torch.futures.Future[Tensor]] = []
        self._missing = [len(bucket) for bucket in self._buckets]
        self._backward_ran = False
        communicator.prepare([name for name, _ in parameters], [p.detach() for _, p in parameters])
        self.hooks: list[Any] = [p.register_post_accumulate_grad_hook(self._arrive) for _, p in parameters]  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """Average what is left and return when all gradients are means; does nothing if no backward pass ran.

        Raises:
            RuntimeError: another rank failed; the message is its error.
        """
        if not self._backward_ran:
            return
        while len(self._started) < len(self._buckets):
            self._start_next()
        try:
            for future in self._started:
                future.wait()
        finally:
            self._started = []
            self._missing = [len(bucket) for bucket in self._buckets]
            self._backward_ran = False

    def check_waited(self) -> None:
        """Raise RuntimeError if gradients of a backward pass are not means yet."""
        if self._backward_ran:
            raise RuntimeError(
                "attach: expected the mean of the gradients before the scaler looks at them, got none yet. "
                "With a GradScaler call wait() before scaler.step() and scaler.unscale_()."
            )

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes inside only accumulate; use it for all but the last one before a step."""
        before, self._sync = self._sync, False
        try:
            yield
        finally:
            self._sync = before

    def detach(self) -> None:
        """Remove all hooks, the optimizer's too; the communicator may then be attached elsewhere."""
        for hook in self.hooks:
            hook.remove()
        self._communicator.attached = False

    def _arrive(self, parameter: Tensor) -> None:
        self._backward_ran = True
        if not (self._overlap and self._sync):
            return
        place = self._place[parameter]
        if place < len(self._started):
            raise RuntimeError(
                "attach: expected one backward pass per step, got a second one. Call wait() after each, or run all but "
                "the last inside no_sync()."
            )
        self._missing[place] -= 1
        while len(self._started) < len(self._buckets) and self._missing[len(self._started)] <= 0:
            self._start_next()

    def _start_next(self) -> None:
        """Start the next bucket in order, which is the same on all ranks."""
        bucket = self._buckets[len(self._started)]
        for _, p in bucket:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        grads = [p.grad for _, p in bucket if p.grad is not None]
        last = len(self._started) == len(self._buckets) - 1
        average = functools.partial(self._communicator.average_, grads, [name for name, _ in bucket], last=last)
        self._started.append(self._beside.submit(average, grads[0]))


def fill_buckets(parameters: Sequence[tuple[str, Tensor]], limit: int | None) -> list[list[tuple[str, Tensor]]]:
    """Cut the parameters, last first, into runs of one device of at most `limit` bytes each (one run without limit)."""
    buckets: list[list[tuple[str, Tensor]]] = [[]]
    size = 0
    for name, p in reversed(parameters):
        nbytes = p.numel() * p.element_size()
        if buckets[-1] and limit is not None and size + nbytes > limit:
            buckets.append([])
            size = 0
        buckets[-1].append((name, p))
        size += nbytes
    return buckets
