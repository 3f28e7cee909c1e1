"""A user's script for an elastic torchrun; it prints what `test_elastic.py` looks at.

With DIE_AT=N, the worker and its agent end in step N of a world of three, as a machine does that loses power.
"""

import json
import os
import signal
import sys
import zlib

import torch
import torch.distributed as dist
import toy
from torch.nn.parallel import DistributedDataParallel

from gradwire.comm import EF, Communicator, attach, checkpoint
from gradwire.compression import ChunkTopK

STEPS, EVERY = 60, 10


def main(path: str) -> None:
    dist.init_process_group("gloo")
    model = toy.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    communicator = Communicator(ChunkTopK(k=8, chunk=256), feedback=EF())
    ddp = DistributedDataParallel(model)
    attach(ddp, communicator, optimizer=optimizer)
    state = {"model": model, "optimizer": optimizer, "communicator": communicator}

    if checkpoint.exists(path):
        checkpoint.load(path, **state)
    report("starts", communicator, model)
    for step in range(communicator.steps_done, STEPS):
        if dist.get_world_size() == 3 and step == int(os.environ.get("DIE_AT", "-1")):
            checkpoint.wait()
            os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.zero_grad()
        toy.loss(ddp, step).backward()
        optimizer.step()
        if (step + 1) % EVERY == 0:
            report("saves", communicator, model)
            checkpoint.async_save(path, **state)
    checkpoint.wait()
    report("ends", communicator, model)
    dist.barrier()
    dist.destroy_process_group()


def report(event: str, communicator: Communicator, model: torch.nn.Module) -> None:
    """Print where training is, and numbers that tell the mean residual over all ranks."""
    seen = torch.zeros(2, dtype=torch.float64)
    for key, rows in sorted(communicator.state_rows().items()):
        name = key.rpartition("/")[0]
        some = torch.randn(
            2, rows.numel(), generator=torch.Generator().manual_seed(zlib.crc32(name.encode())), dtype=torch.float64
        )
        seen += some @ rows.double().flatten()
    dist.all_reduce(seen)
    if dist.get_rank() == 0:
        world = dist.get_world_size()
        record = {"event": event, "world": world, "step": communicator.steps_done, "loss": toy.evaluate(model)}
        print(json.dumps(record | {"mean": (seen / world).tolist()}), flush=True)


main(sys.argv[1])
