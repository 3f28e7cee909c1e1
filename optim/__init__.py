"""Drop-in optimizers: `from gradwire.optim import AdamP` in place of `from torch.optim import AdamW`."""

from gradwire.optim.adamp import AdamP
from gradwire.optim.base import Optimizer

__all__ = ["AdamP", "Optimizer"]
