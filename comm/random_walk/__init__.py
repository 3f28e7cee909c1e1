"""Token algorithms: a model that walks over a graph of ranks, driven by a Markov chain or a self-repellent walk."""

from gradwire.comm.random_walk.covariance import iterate_covariance, mean_squared_error, measure_covariance
from gradwire.comm.random_walk.ensemble import WalkEnsemble
from gradwire.comm.random_walk.markov import MarkovChain
from gradwire.comm.random_walk.self_repellent import SelfRepellentWalk
from gradwire.comm.random_walk.token import TokenWalk

__all__ = [
    "MarkovChain",
    "SelfRepellentWalk",
    "TokenWalk",
    "WalkEnsemble",
    "iterate_covariance",
    "mean_squared_error",
    "measure_covariance",
]
