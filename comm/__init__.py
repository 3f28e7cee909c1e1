"""Gradient averaging over slow links: any compressor x any error feedback x any exchange."""

from gradwire.comm import checkpoint, planner, random_walk
from gradwire.comm.attach import attach
from gradwire.comm.averager import Averager
from gradwire.comm.communicator import Communicator
from gradwire.comm.ddp import keep_local
from gradwire.comm.errors import CheckpointError, ConfigurationError
from gradwire.comm.exchange import (
    AllGather,
    AllReduce,
    Exchange,
    Gossip,
    Hierarchical,
    ReduceScatter,
    Simulated,
    TwoPhase,
)
from gradwire.comm.feedback import (
    DIANA,
    EF,
    EF21,
    EF21SGDM,
    EF21W,
    MARINA,
    DecoupledMomentum,
    EControl,
    ErrorFeedback,
    NoFeedback,
)
from gradwire.comm.local_sgd import LocalSGD
from gradwire.comm.mixing import choco_gossip_, choco_stepsize
from gradwire.comm.plan import Plan
from gradwire.comm.powersgd import PowerSGD
from gradwire.comm.smoothness import estimate_smoothness
from gradwire.comm.stats import Stats
from gradwire.comm.warmup import Warmup

__all__ = [
    "DIANA",
    "EF",
    "EF21",
    "EF21SGDM",
    "EF21W",
    "MARINA",
    "AllGather",
    "AllReduce",
    "Averager",
    "CheckpointError",
    "Communicator",
    "ConfigurationError",
    "DecoupledMomentum",
    "EControl",
    "ErrorFeedback",
    "Exchange",
    "Gossip",
    "Hierarchical",
    "LocalSGD",
    "NoFeedback",
    "Plan",
    "PowerSGD",
    "ReduceScatter",
    "Simulated",
    "Stats",
    "TwoPhase",
    "Warmup",
    "attach",
    "checkpoint",
    "choco_gossip_",
    "choco_stepsize",
    "estimate_smoothness",
    "keep_local",
    "planner",
    "random_walk",
]
