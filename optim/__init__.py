"""Drop-in optimizers: `from gradwire.optim import AdamP` in place of `from torch.optim import AdamW`."""

from gradwire.optim.adabelief import AdaBelief
from gradwire.optim.adafactor import Adafactor
from gradwire.optim.adamp import AdamP
from gradwire.optim.base import Optimizer
from gradwire.optim.demo import DeMo
from gradwire.optim.diffgrad import DiffGrad
from gradwire.optim.diloco import DiLoCo
from gradwire.optim.lamb import LAMB
from gradwire.optim.laprop import LaProp
from gradwire.optim.masha1 import MASHA1
from gradwire.optim.masha2 import MASHA2
from gradwire.optim.mkor import MKOR
from gradwire.optim.mkorh import MKORH
from gradwire.optim.one_bit_adam import OneBitAdam
from gradwire.optim.one_bit_lamb import OneBitLAMB
from gradwire.optim.release import in_backward
from gradwire.optim.sgdp import SGDP
from gradwire.optim.zero_one_adam import ZeroOneAdam

__all__ = [
    "LAMB",
    "MASHA1",
    "MASHA2",
    "MKOR",
    "MKORH",
    "SGDP",
    "AdaBelief",
    "Adafactor",
    "AdamP",
    "DeMo",
    "DiLoCo",
    "DiffGrad",
    "LaProp",
    "OneBitAdam",
    "OneBitLAMB",
    "Optimizer",
    "ZeroOneAdam",
    "in_backward",
]
