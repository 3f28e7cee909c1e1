"""`check_parts`: which parts of a simulation fit one another."""

from gradwire.federated.aggregators import Aggregator
from gradwire.federated.algorithm import Algorithm
from gradwire.federated.link import Link


def check_parts(
    algorithm: Algorithm,
    aggregator: Aggregator | None,
    uplink: Link | None,
    downlink: Link | None,
    *,
    cohort_size: int,
    clients: int,
    dropout: float,
) -> None:
    """Raise ValueError where they do not."""
    if not 1 <= cohort_size <= clients:
        raise ValueError(f"Simulation: expected 1 <= cohort_size <= {clients}, got {cohort_size}.")
    if not 0 <= dropout < 1:
        raise ValueError(f"Simulation: expected 0 <= dropout < 1, got dropout={dropout}.")
    stateful = bool(algorithm.server_state or algorithm.client_state)
    quotient = len(algorithm.messages) > 1
    if aggregator is not None and not aggregator.averages and algorithm.linear and (stateful or quotient):
        raise ValueError(
            f"Simulation: expected a mean, since {type(algorithm).__name__} is right for means alone, "
            f"got {aggregator!r}. Use it with FedAvg or FedProx."
        )
    if uplink is not None and algorithm.message_compressor is not None:
        raise ValueError(
            f"Simulation: expected no uplink beside {type(algorithm).__name__}, which compresses with "
            f"{algorithm.message_compressor!r} itself, got {uplink!r}."
        )
    if uplink is not None and algorithm.client_state and uplink.estimates:
        raise ValueError(
            f"Simulation: expected an uplink with EF or without feedback, since {type(algorithm).__name__} keeps "
            f"what arrives, got {uplink!r}."
        )
    if downlink is not None and algorithm.settles:
        raise ValueError(
            f"Simulation: expected no downlink beside {algorithm!r}, whose clients need the server's model "
            f"exactly, got {downlink!r}."
        )
