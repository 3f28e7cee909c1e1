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
        self._ahead = False

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
        self._ahead = True

    def back(self) -> None:
        """Bring them back, if they are ahead."""
        if self._ahead:
            torch._foreach_copy_([local(p) for p in self._returning], list(self._returning.values()))
            self._ahead = False

    @torch.no_grad()
    def swap(self) -> None:
        """Bring them back and remember where they were, or the other way round."""
        if self._ahead:
            params = [local(p) for p in self._returning]
            here = [p.clone() for p in params]
            torch._foreach_copy_(params, list(self._returning.values()))
            torch._foreach_copy_(list(self._returning.values()), here)
