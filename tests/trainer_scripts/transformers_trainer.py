"""`transformers.Trainer`: trained through, and trained on from the middle, which must give the same weights."""

from pathlib import Path
from typing import Any

import torch
from report import FIRST, LAST, finish
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from gradwire.comm import EF, Communicator, attach, checkpoint
from gradwire.compression import ChunkTopK
from gradwire.optim import AdamP


class Compressed(TrainerCallback):
    def __init__(self, trainer: Trainer, communicator: Communicator) -> None:
        self.trainer, self.communicator = trainer, communicator

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        optimizer, scaler = trainer.optimizer.optimizer, trainer.accelerator.scaler
        attach(trainer.model_wrapped, self.communicator, optimizer=optimizer, scaler=scaler)
        if state.global_step:  # resumed
            checkpoint.load(self.folder(args, state), communicator=self.communicator)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        checkpoint.save(self.folder(args, state), communicator=self.communicator)

    def folder(self, args: Any, state: Any) -> str:
        return f"{args.output_dir}/checkpoint-{state.global_step}/communicator"


def train(folder: Path, first: int) -> tuple[torch.nn.Module, Communicator]:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_head=2, n_embd=64, n_positions=16, vocab_size=64, use_cache=False)
    model, tokens = GPT2LMHeadModel(config), torch.arange(17 * 128).view(128, 17)[:, :16] % 64
    dataset = [{"input_ids": row, "labels": row} for row in tokens]
    args = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        max_steps=LAST,
        save_steps=FIRST,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
    )
    optimizer = AdamP(model.parameters(), lr=1e-3)

    communicator = Communicator(ChunkTopK(k=32), feedback=EF())
    trainer = Trainer(model, args, train_dataset=dataset, optimizers=(optimizer, None))
    trainer.add_callback(Compressed(trainer, communicator))

    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{first}") if first else None)
    return model, communicator


if __name__ == "__main__":
    finish(train)
