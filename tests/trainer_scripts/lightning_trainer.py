"""`lightning.Trainer`: trained through, and trained on from the middle, which must give the same weights."""

from pathlib import Path
from typing import Any

import lightning
import torch
from report import FIRST, LAST, finish, model_and_batches

from gradwire.comm import EF, Communicator, attach, checkpoint
from gradwire.compression import ChunkTopK
from gradwire.optim import AdamP


class Compressed(lightning.Callback):
    def __init__(self, communicator: Communicator) -> None:
        self.communicator = communicator

    def on_fit_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        attach(trainer.strategy.model, self.communicator, optimizer=trainer.optimizers[0])

    def on_save_checkpoint(self, trainer: lightning.Trainer, module: Any, state: dict[str, Any]) -> None:
        checkpoint.save(self.folder(trainer, state), communicator=self.communicator)

    def on_load_checkpoint(self, trainer: lightning.Trainer, module: Any, state: dict[str, Any]) -> None:
        checkpoint.load(self.folder(trainer, state), communicator=self.communicator)

    def folder(self, trainer: lightning.Trainer, state: dict[str, Any]) -> str:
        return f"{trainer.default_root_dir}/communicator-{state['global_step']}"


class Classifier(lightning.LightningModule):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: tuple[torch.Tensor, ...], number: int) -> torch.Tensor:
        inputs, labels = batch
        return torch.nn.functional.cross_entropy(self.model(inputs), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return AdamP(self.parameters(), lr=1e-3)


def train(folder: Path, first: int) -> tuple[torch.nn.Module, Communicator]:
    """Two epochs at once, or one and then, by new objects, the other."""
    for epochs in (1, 2) if first else (2,):
        model, batches = model_and_batches()
        module, saved = Classifier(model), folder / "first.ckpt" if first and epochs == 2 else None
        communicator, trainer = fit(module, batches, saved, max_epochs=epochs, default_root_dir=folder)
        trainer.save_checkpoint(folder / "first.ckpt")
    assert trainer.global_step == LAST == 2 * FIRST
    return model, communicator


def fit(module: Classifier, batches: Any, path: Path | None, **options: Any) -> tuple[Communicator, lightning.Trainer]:
    options |= {"accelerator": "cpu", "devices": 2, "accumulate_grad_batches": 2, "enable_checkpointing": False}
    options |= {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}

    communicator = Communicator(ChunkTopK(k=32), feedback=EF())
    trainer = lightning.Trainer(strategy="ddp", callbacks=[Compressed(communicator)], **options)
    trainer.fit(module, batches, ckpt_path=path)

    return communicator, trainer


if __name__ == "__main__":
    finish(train)
