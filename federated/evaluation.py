"""`Evaluate`: numbers about the server's model, asked for between rounds."""

from collections.abc import Callable, Mapping

import torch
from torch import nn

Evaluate = Callable[[nn.Module], Mapping[str, float]]
"""Numbers about the server's model."""


def metrics_of(module: nn.Module, evaluate: Evaluate) -> Mapping[str, float]:
    """What `evaluate` finds, called without gradients and in `eval()` mode; the module's mode is restored."""
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            return evaluate(module)
    finally:
        module.train(training)
