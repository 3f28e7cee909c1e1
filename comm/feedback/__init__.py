"""Error feedback: one class per mechanism, the only per-parameter state of communication."""

from gradwire.comm.feedback.base import ErrorFeedback, StateTensor
from gradwire.comm.feedback.decoupled_momentum import DecoupledMomentum
from gradwire.comm.feedback.ef import EF
from gradwire.comm.feedback.ef21 import EF21
from gradwire.comm.feedback.none import NoFeedback

__all__ = ["EF", "EF21", "DecoupledMomentum", "ErrorFeedback", "NoFeedback", "StateTensor"]
