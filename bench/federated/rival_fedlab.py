"""FedLab's standalone pipeline, with clients drawn as everywhere and means weighted by samples."""

import sys
import types
from typing import Any

import torch

if "torchvision" not in sys.modules:
    # FedLab imports it for datasets that are not used here; its builds do not load beside every build of torch.
    sys.modules["torchvision"] = types.ModuleType("torchvision")
    sys.modules["torchvision.transforms"] = types.ModuleType("torchvision.transforms")
    sys.modules["torchvision"].transforms = sys.modules["torchvision.transforms"]  # type: ignore[attr-defined]

from fedlab.contrib.algorithm.basic_client import SGDSerialClientTrainer
from fedlab.contrib.algorithm.basic_server import SyncServerHandler
from fedlab.core.standalone import StandalonePipeline
from fedlab.utils import Aggregators, SerializationTool
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from gradwire.bench.federated.loops import Gate
from gradwire.bench.federated.work import Work, flat


def run(work: Work, gate: Gate) -> Tensor:
    """All rounds of a pass."""
    module, schedule = work.module(), work.schedule

    class Dataset:
        def __init__(self) -> None:
            self._of = [TensorDataset(*work.examples_of(client)) for client in range(work.clients)]

        def get_dataloader(self, client: int, batch_size: int) -> Any:
            return DataLoader(self._of[client], batch_size=batch_size)

    class Trainer(SGDSerialClientTrainer):  # type: ignore[misc]
        def train(self, model_parameters: Tensor, train_loader: Any) -> list[Tensor]:
            package: list[Tensor] = super().train(model_parameters, train_loader)
            return [*package, torch.tensor(float(len(train_loader.dataset)))]

    class Handler(SyncServerHandler):  # type: ignore[misc]
        def sample_clients(self) -> list[int]:
            gate()
            return schedule[self.round]

        def global_update(self, buffer: list[list[Tensor]]) -> None:
            models, weights = zip(*buffer, strict=True)
            mean = Aggregators.fedavg_aggregate(list(models), torch.stack(weights))
            SerializationTool.deserialize_model(self._model, mean)

    class Pipeline(StandalonePipeline):  # type: ignore[misc]
        def evaluate(self) -> None:
            pass

    trainer = Trainer(module, work.clients, cuda=False)
    trainer.setup_dataset(Dataset())
    trainer.setup_optim(1, work.batch_size, work.lr)
    handler = Handler(module, global_round=work.rounds, sample_ratio=work.cohort / work.clients)
    Pipeline(handler, trainer).main()
    gate()
    return flat(list(handler.model.parameters()))
