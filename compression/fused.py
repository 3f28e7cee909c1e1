"""`fuse`: compile a function of tensors so that it gives what it gives uncompiled."""

import functools
import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def fuse(function: Callable[P, T]) -> Callable[P, T]:
    """Compile `function` with `torch.compile`, once per width and dtype of its arguments.

    Rounding to narrow formats is kept: without that option the compiler drops a conversion to bfloat16 and back inside
    a kernel, and a residual would miss what the payload lost. Where there is no working compiler the function runs as
    it is, after one warning.
    """
    compiled = torch.compile(function, options={"emulate_precision_casts": True})
    works = True

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        nonlocal works
        if works:
            try:
                return compiled(*args, **kwargs)
            except torch._dynamo.exc.TorchDynamoException as error:
                works = False
                reason = str(error).strip().splitlines()[0]
                warnings.warn(f"fuse: torch.compile failed, so this runs uncompiled: {reason}", stacklevel=2)
        return function(*args, **kwargs)

    return call
