"""A small model trained on one device with the gradients of simulated workers, each compressed on its own.

What `gradwire train --compare` does with processes: the same communicators, so the same arithmetic, without sending.
"""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gradwire.bench import data, machine
from gradwire.bench.model import ByteTransformer, nats_per_byte, num_parameters
from gradwire.bench.runs import Record
from gradwire.comm import EF, EF21, Communicator, Simulated
from gradwire.compression import BlockQuantize, Cast, ChunkTopK, Identity, ScaledSign

CONFIGURATIONS: dict[str, Callable[[Simulated], Communicator]] = {
    "dense": lambda workers: Communicator(Identity(), exchange=workers),
    "Cast(dtype='bfloat16')": lambda workers: Communicator(Cast("bfloat16"), exchange=workers),
    "BlockQuantize(bits=8) + EF": lambda workers: Communicator(BlockQuantize(bits=8), feedback=EF(), exchange=workers),
    "BlockQuantize(bits=4) + EF": lambda workers: Communicator(BlockQuantize(bits=4), feedback=EF(), exchange=workers),
    "ScaledSign(width=128) + EF": lambda workers: Communicator(ScaledSign(width=128), feedback=EF(), exchange=workers),
    "ChunkTopK(k=256) + EF": lambda workers: Communicator(ChunkTopK(k=256), feedback=EF(), exchange=workers),
    "ChunkTopK(k=256) + EF21": lambda workers: Communicator(ChunkTopK(k=256), feedback=EF21(), exchange=workers),
}
"""The dense one first; those of `gradwire train --compare default` as far as workers can be simulated."""

STEPS, WORKERS = 500, 2
LAYERS, WIDTH, HEADS, CONTEXT, BATCH = 4, 128, 4, 64, 4
_LR, _WARMUP, _HELD_OUT = 3e-3, 0.1, 256


def compare(device: str, *, steps: int = STEPS, progress: Callable[[str], None] = lambda name: None) -> Record:
    """Train every configuration from the same weights on the same text; what the report shows as a comparison.

    Args:
        device: Where.
        steps: Of each, >= 1.
        progress: Told what comes next.
    """
    corpus, runs = data.standard_library(), []
    for name, build in CONFIGURATIONS.items():
        progress(f"training with {name}")
        runs.append({"configuration": name} | _run(build(Simulated(WORKERS)), corpus, torch.device(device), steps))
    about = machine.describe(device)
    return {"kind": "train", "simulated": True, "command": about["command"], "machine": about, "runs": runs}


def _run(communicator: Communicator, corpus: data.Corpus, device: torch.device, steps: int) -> Record:
    torch.manual_seed(0)
    model = ByteTransformer(LAYERS, WIDTH, HEADS).to(device)
    names, parameters = zip(*model.named_parameters(), strict=True)
    optimizer = torch.optim.AdamW(parameters, lr=_LR, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LR, total_steps=steps + 1, pct_start=_WARMUP)
    start = time.perf_counter()
    for step in range(steps):
        gradients = _of_workers(model, parameters, corpus, device, step)
        communicator.average_(gradients, names)
        for parameter, workers in zip(parameters, gradients, strict=True):
            parameter.grad = workers[0]
        optimizer.step()
        schedule.step()
    loss = _held_out(model, corpus, device)
    seconds = time.perf_counter() - start
    stats, dense = communicator.stats, 4 * num_parameters(model)
    sent = stats.payload_bytes / WORKERS / steps
    return {
        "validation_loss": round(loss, 4) if loss < float("inf") else None,
        "bytes_per_step": sent,
        "compression_rate": dense / sent,
        "seconds": round(seconds, 2),
        "parameters": num_parameters(model),
        "world_size": WORKERS,
        "data": {"name": corpus.name},
        "options": {"steps": steps, "batch": BATCH, "context": CONTEXT, "seed": 0},
    }


def _of_workers(
    model: torch.nn.Module, parameters: Sequence[Tensor], corpus: data.Corpus, device: torch.device, step: int
) -> list[Tensor]:
    """Gradients `[workers, ...]`, of every worker's own text."""
    found = []
    for worker in range(WORKERS):
        inputs, targets = corpus.batch(0, step, worker, BATCH, CONTEXT)
        loss = nats_per_byte(model(inputs.to(device)), targets.to(device))
        found.append(torch.autograd.grad(loss, list(parameters)))
    return [torch.stack(some) for some in zip(*found, strict=True)]


@torch.no_grad()
def _held_out(model: torch.nn.Module, corpus: data.Corpus, device: torch.device) -> float:
    inputs, targets = corpus.held_out(_HELD_OUT, CONTEXT, 0, 1)
    return float(nats_per_byte(model(inputs.to(device)), targets.to(device)))
