"""What the scripts share: a model, its data, and a line of results for each rank."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import toy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gradwire.comm import Communicator

FIRST, LAST = 4, 8  # steps before the checkpoint, one epoch, and in all


def model_and_batches() -> tuple[nn.Module, DataLoader[tuple[torch.Tensor, ...]]]:
    """A classifier with equal weights on all ranks, and two batches a step for each of two ranks."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 10))
    inputs = torch.randn(2 * 2 * FIRST * 8, 64)
    return model, DataLoader(TensorDataset(inputs, inputs[:, :10].argmax(1)), batch_size=8)


def finish(train: Callable[[Path, int], tuple[nn.Module, Communicator]]) -> None:
    """Train through, then again from the checkpoint in the middle, and write what came of it."""
    folder = Path(sys.argv[1])
    runs = [train(folder, first) for first in (0, FIRST)]
    result = {
        "weights": [toy.digest(model.parameters()) for model, _ in runs],
        "residuals": [toy.state_digest(communicator) for _, communicator in runs],
        "steps": [communicator.stats.steps for _, communicator in runs],
        "skipped": [communicator.stats.skipped for _, communicator in runs],
        "rates": [communicator.stats.compression_rate for _, communicator in runs],
        "norms": [communicator.stats.residual_norm for _, communicator in runs],
    }
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo aborts now and then at interpreter exit
