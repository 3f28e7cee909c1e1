"""`fuse`: compile a function of tensors so that it gives what it gives uncompiled."""

import functools
import types
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
    compiled = torch.compile(_copy(function), options={"emulate_precision_casts": True})
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


def _copy(function: Callable[P, T]) -> Callable[P, T]:
    """The function with a code object of its own: Dynamo gives up, silently, at the 8th variant of one code object."""
    plain = getattr(function, "__func__", function)
    own = types.FunctionType(
        plain.__code__.replace(), plain.__globals__, plain.__name__, plain.__defaults__, plain.__closure__
    )
    bound: Callable[P, T] = own if plain is function else types.MethodType(own, function.__self__)  # type: ignore[attr-defined]
    return bound
