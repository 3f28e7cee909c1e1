"""`ControlVariates`: what SCAFFOLD, SCALLION and SCAFCOM have in common; `resync`."""

from collections.abc import Callable

import torch
from torch import Tensor

from gradwire.federated.algorithm import Algorithm, Correction, Vectors
from gradwire.federated.client_store import ClientStore
from gradwire.federated.engine import Engine
from gradwire.federated.server import Server


class ControlVariates(Algorithm):
    """Every client keeps c_i, near its own gradient, and the server keeps their mean c.

        y <- y - lr (g - c_i + c);  c = sum_i p_i c_i / sum_i p_i  after every round

    So local training starts downhill of the mean loss on every client, and at its minimum stands still. Both sides move
    c_i by what arrived, so that c stays the mean whatever compression, lost clients and partial cohorts do.
    """

    @property
    def client_state(self) -> tuple[str, ...]:
        """c_i."""
        return ("control",)

    @property
    def server_state(self) -> tuple[str, ...]:
        """The mean, c."""
        return ("control",)

    @property
    def broadcast(self) -> tuple[str, ...]:
        """The mean, c."""
        return ("control",)

    @property
    def needs_plain_sgd(self) -> bool:
        """(x - y) / (lr K) is the mean corrected gradient."""
        return True

    def correction(self, start: Tensor, received: Vectors, state: Vectors) -> Correction:
        """The difference c - c_i."""
        return Correction(vector=received["control"] - state["control"])


def resync(
    server: Server,
    store: ClientStore,
    weight: Callable[[int], float] | None = None,
    *,
    engine: Engine | None = None,
) -> Tensor:
    """Set the server's control variate to the mean of its clients': for algorithms with `control` on both sides.

    Rounds keep the two together but for rounding; this mends what happened outside of them, such as clients whose
    vectors were lost (`ClientStore.forget`) or restored from an older copy.

    Args:
        server: Its `state["control"]` is changed in place.
        store: Vectors of all clients, or of this process's.
        weight: Of a client, as the algorithm weighs them, 0 if it has no examples; uniform by default.
        engine: Of the simulation, where clients' vectors lie with several processes: all of them call this.

    Returns:
        By how much it was off: the norm of the change, 0-d.

    Example:
        >>> from gradwire.federated import SCAFFOLD
        >>> server = Server(SCAFFOLD(), torch.zeros(2), {"w": torch.Size([2])})
        >>> store = ClientStore({"control": 2}, clients=4)
        >>> store.put(3, {"control": torch.tensor([4.0, -8.0])})
        >>> resync(server, store), server.state["control"]
        (tensor(2.2361), tensor([ 1., -2.]))
    """
    control = server.state["control"]
    weights = [1.0 if weight is None else weight(client) for client in range(store.clients)]
    total = torch.zeros_like(control, dtype=torch.float64)
    for client in store.touched:
        total.add_(store.get(client)["control"].to(control.device), alpha=weights[client])
    if engine is not None:
        engine.sum_([total])
    before = control.clone()
    control.copy_(total.div_(sum(weights)))
    return (control - before).square().sum().sqrt()
