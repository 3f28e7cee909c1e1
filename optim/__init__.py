"""Drop-in optimizers: `from gradwire.optim import AdamP` in place of `from torch.optim import AdamW`."""

from gradwire.optim.adabelief import AdaBelief
from gradwire.optim.adafactor import Adafactor
from gradwire.optim.adamp import AdamP
from gradwire.optim.base import Optimizer
from gradwire.optim.diffgrad import DiffGrad
from gradwire.optim.laprop import LaProp
from gradwire.optim.release import in_backward
from gradwire.optim.sgdp import SGDP

__all__ = ["SGDP", "AdaBelief", "Adafactor", "AdamP", "DiffGrad", "LaProp", "Optimizer", "in_backward"]
