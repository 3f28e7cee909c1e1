"""Error feedback: one class per mechanism, the only per-parameter state of communication."""

from gradwire.comm.feedback.base import ErrorFeedback, StateTensor
from gradwire.comm.feedback.decoupled_momentum import DecoupledMomentum
from gradwire.comm.feedback.diana import DIANA
from gradwire.comm.feedback.econtrol import EControl
from gradwire.comm.feedback.ef import EF
from gradwire.comm.feedback.ef21 import EF21
from gradwire.comm.feedback.ef21_sgdm import EF21SGDM
from gradwire.comm.feedback.ef21_w import EF21W
from gradwire.comm.feedback.marina import MARINA
from gradwire.comm.feedback.none import NoFeedback

__all__ = [
    "DIANA",
    "EF",
    "EF21",
    "EF21SGDM",
    "EF21W",
    "MARINA",
    "DecoupledMomentum",
    "EControl",
    "ErrorFeedback",
    "NoFeedback",
    "StateTensor",
]
