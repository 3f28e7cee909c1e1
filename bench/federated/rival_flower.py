"""Flower's simulation on Ray, with clients drawn as everywhere; its own average is weighted by samples."""

import functools
from collections.abc import Iterable
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch import Tensor, nn

from gradwire.bench.federated.loops import Gate
from gradwire.bench.federated.work import Work, cross_entropy, flat

_ACTORS = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
"""As many as there are cores."""


def run(work: Work, gate: Gate) -> Tensor:
    """All rounds of a pass."""
    schedule, found = work.schedule, {}
    client_app, server_app = ClientApp(), ServerApp()
    client_app.train()(functools.partial(_train, work))

    class Strategy(FedAvg):  # type: ignore[misc]
        def configure_train(
            self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
        ) -> Iterable[Message]:
            gate()
            # A node trains whichever client the message names, since ids of nodes say nothing of clients.
            nodes = list(grid.get_node_ids())[: work.cohort]
            for node, client in zip(nodes, schedule[server_round - 1], strict=True):
                content = RecordDict({"arrays": arrays, "config": ConfigRecord({"client": client})})
                yield Message(content=content, message_type="train", dst_node_id=node)

    @server_app.main()  # type: ignore[untyped-decorator]
    def main(grid: Grid, context: Context) -> None:
        while len(list(grid.get_node_ids())) < work.clients:
            pass
        strategy = Strategy(fraction_evaluate=0.0, min_evaluate_nodes=0)
        result = strategy.start(grid, ArrayRecord(work.module().state_dict()), num_rounds=work.rounds)
        gate()
        found["arrays"] = result.arrays

    run_simulation(server_app, client_app, num_supernodes=work.clients, backend_config=_ACTORS)
    return flat(list(found["arrays"].to_torch_state_dict().values()))


def _train(work: Work, message: Any, context: Any) -> Any:
    """What a client does."""
    module = _module(work)
    module.load_state_dict(message.content["arrays"].to_torch_state_dict())
    images, labels = work.examples_of(int(message.content["config"]["client"]))
    optimizer = torch.optim.SGD(module.parameters(), lr=work.lr)
    for first in range(0, len(labels), work.batch_size):
        last = first + work.batch_size
        optimizer.zero_grad()
        cross_entropy(module, images[first:last], labels[first:last]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    content = {"arrays": ArrayRecord(module.state_dict()), "metrics": MetricRecord({"num-examples": len(labels)})}
    return Message(content=RecordDict(content), reply_to=message)


@functools.lru_cache(1)
def _module(work: Work) -> nn.Module:
    """One model for all clients of an actor."""
    torch.set_num_threads(1)
    return work.module()
