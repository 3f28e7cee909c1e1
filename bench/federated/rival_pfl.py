"""pfl's simulated backend, with clients drawn as everywhere and means weighted by samples."""

from typing import Any

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn

from gradwire.bench.federated.loops import Gate
from gradwire.bench.federated.work import Work, cross_entropy, flat


def run(work: Work, gate: Gate) -> Tensor:
    """All rounds of a pass."""
    users = iter([client for cohort in work.schedule for client in cohort])
    datasets = [PyTorchTensorDataset(work.examples_of(client), user_id=str(client)) for client in range(work.clients)]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = work.module()

        def loss(self, images: Tensor, labels: Tensor) -> Tensor:
            return cross_entropy(self.inner, images, labels)

        def metrics(self, images: Tensor, labels: Tensor) -> dict[str, Any]:
            return {}

    class Callback(TrainingProcessCallback):  # type: ignore[misc]
        def on_train_begin(self, *, model: Any) -> Any:
            gate()
            return Metrics()

        def after_central_iteration(self, aggregate_metrics: Any, model: Any, *, central_iteration: int) -> Any:
            gate()
            return False, Metrics()

    module = Model()
    model = PyTorchModel(
        module,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(module.parameters(), lr=1.0),
    )
    dataset = FederatedDataset(datasets.__getitem__, lambda: next(users))
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=work.rounds,
            evaluation_frequency=2 * work.rounds,
            train_cohort_size=work.cohort,
            val_cohort_size=None,
        ),
        backend=SimulatedBackend(training_data=dataset, val_data=dataset, postprocessors=[WeightByDatapoints()]),
        model=model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=work.lr, local_batch_size=work.batch_size
        ),
        model_eval_params=NNEvalHyperParams(local_batch_size=None),
        callbacks=[Callback()],
        send_metrics_to_platform=False,
    )
    return flat(list(module.parameters()))
