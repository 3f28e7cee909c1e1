"""What the server keeps of an uplink's feedback, by message, and what it makes of the means of what arrived."""

from collections.abc import Mapping

from torch import Tensor

from gradwire.federated.algorithm import Algorithm
from gradwire.federated.link import Link


def server_sizes(algorithm: Algorithm, uplink: Link | None, numel: int) -> dict[str, int]:
    """Entries of the server's vectors, by name."""
    sizes: dict[str, int] = {}
    for message in algorithm.messages if uplink is not None else ():
        assert uplink is not None
        own = uplink.state_sizes(numel, replicated=True)
        sizes |= {f"uplink.{message}.{name}": size for name, size in own.items()}
    return sizes


def estimate_(
    mean: dict[str, Tensor], uplink: Link | None, state: Mapping[str, Tensor], *, participants: int, clients: int
) -> None:
    """Replace means of what arrived by what the feedback makes of them; the server's vectors change in place.

    Args:
        mean: By message.
        uplink: What the messages came through.
        state: The server's vectors.
        participants: Clients that sent.
        clients: All clients.
    """
    for name in mean if uplink is not None else ():
        assert uplink is not None
        prefix = f"uplink.{name}."
        own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        mean[name], new = uplink.estimate(mean[name], own, participants, clients)
        for key, value in new.items():
            state[prefix + key].copy_(value)
