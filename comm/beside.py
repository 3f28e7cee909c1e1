"""`Beside`: run averaging beside the backward pass, in order, one bucket after the other.

On CPU one thread makes all calls, so collectives go out in the same order on every rank; on CUDA a side stream does the
same without a thread, and the host never waits.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import final

import torch
from torch import Tensor


@final
class Beside:
    """Runs functions in submission order beside the caller, for tensors on one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._threads = ThreadPoolExecutor(1, "gradwire") if device.type != "cuda" else None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def submit(self, work: Callable[[], None], result: Tensor) -> torch.futures.Future[Tensor]:
        """Start `work`; the future gives `result` when it is done, or the exception that it raised."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                future: torch.futures.Future[Tensor] = torch.futures.Future(devices=[self._device])
                work()
                future.set_result(result)
            return future
        assert self._threads is not None
        future = torch.futures.Future()
        self._threads.submit(_settle, future, work, result)
        return future


def _settle(future: torch.futures.Future[Tensor], work: Callable[[], None], result: Tensor) -> None:
    try:
        work()
    except BaseException as error:  # it must surface in backward(), whatever it is
        future.set_exception(error)  # type: ignore[arg-type]
    else:
        future.set_result(result)
