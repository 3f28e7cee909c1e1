"""Federated training from the library's own parts: algorithms, aggregators, and a simulation of server and clients.

    cohort --> local training --message--> uplink --> aggregator --> algorithm --> server optimizer

`Simulation` goes through that line round by round. What clients and server keep, send and do is an `Algorithm`, in
vectors of all trainable parameters; how messages become one is an `Aggregator`; what becomes of them on the way is a
`Link`, made of the compressors of `gradwire.compression` and the error feedback of `gradwire.comm`. A server's
optimizer is any `torch.optim.Optimizer`, fed with the pseudo-gradient x - y, which points uphill.
"""

from gradwire.federated import partition
from gradwire.federated.aggregators import (
    TIES,
    Aggregator,
    Bucketing,
    Bulyan,
    CenteredClipping,
    CoordinateMedian,
    GeometricMedian,
    Krum,
    MultiKrum,
    NormClipping,
    TrimmedMean,
    WeightedMean,
    merge,
)
from gradwire.federated.algorithm import Algorithm, Correction, LocalWork, Round
from gradwire.federated.async_fedavg import AsyncFedAvg
from gradwire.federated.async_policy import AsyncPolicy
from gradwire.federated.asynchronous import AsyncSimulation
from gradwire.federated.buffers import Buffers, Recalibrate
from gradwire.federated.client_store import ClientStore
from gradwire.federated.client_times import ClientTimes, ExponentialTimes, FixedTimes, HalfNormalTimes
from gradwire.federated.clients import Clients
from gradwire.federated.control_variates import ControlVariates, resync
from gradwire.federated.downlink import Downlink
from gradwire.federated.engine import Engine, SerialEngine
from gradwire.federated.fedadagrad import FedAdagrad
from gradwire.federated.fedadam import FedAdam
from gradwire.federated.fedasync import FedAsync
from gradwire.federated.fedavg import FedAvg
from gradwire.federated.fedbuff import FedBuff
from gradwire.federated.feddyn import FedDyn
from gradwire.federated.fedfix import FedFix
from gradwire.federated.fednova import FedNova
from gradwire.federated.fedprox import FedProx
from gradwire.federated.fedyogi import FedYogi
from gradwire.federated.fisher import FisherAveraging, empirical_fisher, exact_fisher
from gradwire.federated.flat_model import FlatModel
from gradwire.federated.link import Link
from gradwire.federated.local_training import LocalTrainer, LocalTraining
from gradwire.federated.participation_weights import ParticipationWeights
from gradwire.federated.round_record import RoundRecord
from gradwire.federated.scafcom import SCAFCOM
from gradwire.federated.scaffold import SCAFFOLD
from gradwire.federated.scallion import SCALLION
from gradwire.federated.server import Server
from gradwire.federated.simulation import Simulation
from gradwire.federated.sum_only import check_sum_only
from gradwire.federated.torchrun_engine import TorchrunEngine
from gradwire.federated.trace_times import ClientTrace, TraceTimes

__all__ = [
    "SCAFCOM",
    "SCAFFOLD",
    "SCALLION",
    "TIES",
    "Aggregator",
    "Algorithm",
    "AsyncFedAvg",
    "AsyncPolicy",
    "AsyncSimulation",
    "Bucketing",
    "Buffers",
    "Bulyan",
    "CenteredClipping",
    "ClientStore",
    "ClientTimes",
    "ClientTrace",
    "Clients",
    "ControlVariates",
    "CoordinateMedian",
    "Correction",
    "Downlink",
    "Engine",
    "ExponentialTimes",
    "FedAdagrad",
    "FedAdam",
    "FedAsync",
    "FedAvg",
    "FedBuff",
    "FedDyn",
    "FedFix",
    "FedNova",
    "FedProx",
    "FedYogi",
    "FisherAveraging",
    "FixedTimes",
    "FlatModel",
    "GeometricMedian",
    "HalfNormalTimes",
    "Krum",
    "Link",
    "LocalTrainer",
    "LocalTraining",
    "LocalWork",
    "MultiKrum",
    "NormClipping",
    "ParticipationWeights",
    "Recalibrate",
    "Round",
    "RoundRecord",
    "SerialEngine",
    "Server",
    "Simulation",
    "TorchrunEngine",
    "TraceTimes",
    "TrimmedMean",
    "WeightedMean",
    "check_sum_only",
    "empirical_fisher",
    "exact_fisher",
    "merge",
    "partition",
    "resync",
]
