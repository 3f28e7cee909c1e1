"""`LookAhead`: parameters that stand ahead for a while, and where they return to."""

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from gradwire.optim.layout import local


@final
class LookAhead:
    """Moves parameters ahead and brings them back, to the bit: by a copy, since subtraction would round."""

    def __init__(self) -> None:
        self._returning: dict[Tensor, Tensor] = {}

    def go(self, steps: Mapping[Tensor, Tensor]) -> None:
        """Remember these parameters, and add its step to each."""
        if not steps:
            return
        params = [local(p) for p in steps]
        if self._returning.keys() != steps.keys():
            self._returning = {p: local(p).clone() for p in steps}
        else:
            torch._foreach_copy_(list(self._returning.values()), params)
        torch._foreach_add_(params, list(steps.values()))

    def back(self) -> None:
        """Bring them back."""
        if self._returning:
            torch._foreach_copy_([local(p) for p in self._returning], list(self._returning.values()))
