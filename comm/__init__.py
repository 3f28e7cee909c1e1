"""Gradient averaging over slow links: any compressor x any error feedback x any exchange."""

from gradwire.comm import checkpoint
from gradwire.comm.attach import attach
from gradwire.comm.averager import Averager
from gradwire.comm.communicator import Communicator
from gradwire.comm.ddp import keep_local
from gradwire.comm.errors import CheckpointError, ConfigurationError
from gradwire.comm.exchange import AllGather, AllReduce, Exchange, Hierarchical, Simulated, TwoPhase
from gradwire.comm.feedback import EF, EF21, DecoupledMomentum, ErrorFeedback, NoFeedback
from gradwire.comm.plan import Plan
from gradwire.comm.powersgd import PowerSGD
from gradwire.comm.stats import Stats
from gradwire.comm.warmup import Warmup

__all__ = [
    "EF",
    "EF21",
    "AllGather",
    "AllReduce",
    "Averager",
    "CheckpointError",
    "Communicator",
    "ConfigurationError",
    "DecoupledMomentum",
    "ErrorFeedback",
    "Exchange",
    "Hierarchical",
    "NoFeedback",
    "Plan",
    "PowerSGD",
    "Simulated",
    "Stats",
    "TwoPhase",
    "Warmup",
    "attach",
    "checkpoint",
    "keep_local",
]
