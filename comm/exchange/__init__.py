"""Exchanges: how the payloads of all ranks become their mean on every rank."""

from gradwire.comm.exchange.all_gather import AllGather
from gradwire.comm.exchange.all_reduce import AllReduce
from gradwire.comm.exchange.base import Exchange
from gradwire.comm.exchange.gossip import Gossip
from gradwire.comm.exchange.hierarchical import Hierarchical
from gradwire.comm.exchange.reduce_scatter import ReduceScatter
from gradwire.comm.exchange.simulated import Simulated
from gradwire.comm.exchange.two_phase import TwoPhase

__all__ = ["AllGather", "AllReduce", "Exchange", "Gossip", "Hierarchical", "ReduceScatter", "Simulated", "TwoPhase"]
