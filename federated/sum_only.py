"""`check_sum_only`: whether a server that sees sums over clients alone can carry out a stack of parts."""

from gradwire.federated.aggregators import Aggregator, WeightedMean
from gradwire.federated.algorithm import Algorithm
from gradwire.federated.link import Link


def check_sum_only(algorithm: Algorithm, aggregator: Aggregator | None = None, uplink: Link | None = None) -> int:
    """Refuse parts that need single clients' messages, as under secure aggregation no one has them.

    Args:
        algorithm: What clients send.
        aggregator: How messages become one; their weighted mean by default.
        uplink: What compresses them, if the algorithm does not.

    Returns:
        How many sums over clients a round takes, one after the other.

    Raises:
        ValueError: the aggregator needs every message by itself, or payloads cannot be added before decompression.

    Example:
        >>> from gradwire.federated import CenteredClipping, FedAvg, Krum
        >>> check_sum_only(FedAvg()), check_sum_only(FedAvg(), CenteredClipping(iterations=3))
        (1, 3)
        >>> check_sum_only(FedAvg(), Krum(byzantine=1))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: check_sum_only: expected an aggregator that sums are enough for, got Krum(byzantine=1). Use...
    """
    aggregator = WeightedMean() if aggregator is None else aggregator
    if aggregator.needs_individual:
        raise ValueError(
            f"check_sum_only: expected an aggregator that sums are enough for, got {aggregator!r}. "
            "Use NormClipping, CenteredClipping, GeometricMedian or TIES."
        )
    compressor = algorithm.message_compressor
    if compressor is None and uplink is not None:
        compressor = uplink.compressor
    if compressor is not None and compressor.reduction != "sum":
        raise ValueError(
            f"check_sum_only: expected a compressor whose payloads may be added, got {compressor!r}. Use RandomK, "
            "whose positions all clients share, or none."
        )
    return aggregator.passes
