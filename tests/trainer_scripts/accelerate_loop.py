"""A loop of `accelerate`: trained through, and trained on from the middle, which must give the same weights."""

from pathlib import Path

import torch
from accelerate import Accelerator
from report import FIRST, LAST, finish, model_and_batches

from gradwire.comm import EF, Communicator, attach, checkpoint
from gradwire.compression import ChunkTopK
from gradwire.optim import AdamP


def train(folder: Path, first: int) -> tuple[torch.nn.Module, Communicator]:
    model, batches = model_and_batches()
    optimizer = AdamP(model.parameters(), lr=1e-3)

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    communicator = Communicator(ChunkTopK(k=32), feedback=EF())
    attach(model, communicator, optimizer=optimizer.optimizer, scaler=accelerator.scaler)

    if first:
        accelerator.load_state(folder / "state")
        checkpoint.load(folder / "communicator", communicator=communicator)
    for epoch in range(first // FIRST, LAST // FIRST):
        for inputs, labels in batches:
            with accelerator.accumulate(model):
                loss = torch.nn.functional.cross_entropy(model(inputs), labels)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
        if epoch == 0:
            accelerator.save_state(folder / "state")
            checkpoint.save(folder / "communicator", communicator=communicator)
    return model, communicator


if __name__ == "__main__":
    finish(train)
