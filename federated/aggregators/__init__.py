"""How a server makes one vector of its clients': means, robust rules, merging rules."""

from gradwire.federated.aggregators.base import Aggregator
from gradwire.federated.aggregators.bucketing import Bucketing
from gradwire.federated.aggregators.bulyan import Bulyan
from gradwire.federated.aggregators.centered_clipping import CenteredClipping
from gradwire.federated.aggregators.coordinate_median import CoordinateMedian
from gradwire.federated.aggregators.geometric_median import GeometricMedian
from gradwire.federated.aggregators.krum import Krum, MultiKrum
from gradwire.federated.aggregators.merge import merge
from gradwire.federated.aggregators.norm_clipping import NormClipping
from gradwire.federated.aggregators.ties import TIES
from gradwire.federated.aggregators.trimmed_mean import TrimmedMean
from gradwire.federated.aggregators.weighted_mean import WeightedMean

__all__ = [
    "TIES",
    "Aggregator",
    "Bucketing",
    "Bulyan",
    "CenteredClipping",
    "CoordinateMedian",
    "GeometricMedian",
    "Krum",
    "MultiKrum",
    "NormClipping",
    "TrimmedMean",
    "WeightedMean",
    "merge",
]
