"""Checks of `gradwire train --host deepspeed`; `tests/test_deepspeed.py` runs them."""

from pathlib import Path
from typing import Any

import torch
from deepspeed_training import check
from test_train import corpus, options

from gradwire.bench.runs import RunFolder
from gradwire.bench.train import Trainer, train

CPU = torch.device("cpu")
STEPS = 6


def _trainer(**changes: Any) -> Trainer:
    return Trainer(options(optimizer="AdaBelief", **changes), corpus(), CPU)


def _losses(trainer: Trainer, first: int = 0) -> list[float]:
    return [trainer.step(step).item() for step in range(first, STEPS)]


@check
def train_gives_the_losses_of_ddp() -> None:
    expected = torch.tensor(_losses(_trainer()))
    for stage in (0, 1, 2):
        losses = torch.tensor(_losses(_trainer(host="deepspeed", zero_stage=stage)))
        torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0.0)  # sums of float32 in another order


@check
def train_resumes_to_the_bit() -> None:
    for number, changes in enumerate(
        ({"zero_stage": 1, "configuration": "ChunkTopK(k=64, chunk=256) + EF21"}, {"optimizer": "DeMo(k=8, chunk=16)"})
    ):
        made: dict[str, Any] = {"optimizer": "AdaBelief", "configuration": "", "host": "deepspeed"} | changes
        if not made["configuration"]:
            made["configuration"] = made["optimizer"]
        folder = RunFolder(Path(f"resume-{number}"))
        whole, again = (Trainer(options(**made), corpus(), CPU) for _ in range(2))
        for step in range(STEPS // 2):
            whole.step(step)
        whole.save(folder, STEPS // 2)
        again.load(folder, STEPS // 2)
        assert _losses(whole, STEPS // 2) == _losses(again, STEPS // 2)
        assert whole.ranks_equal()


@check
def train_learns_in_16_bits() -> None:
    chosen = options(
        host="deepspeed", dtype="bfloat16", configuration="BlockQuantize(bits=8) + EF + TwoPhase", steps=40
    )
    summary = train(chosen, corpus(), RunFolder(Path("bf16")), CPU, resume=False, keep=False)
    assert summary["ranks_equal"]
    assert summary["validation_loss"] < 4.5  # log 256 = 5.5 at the start
