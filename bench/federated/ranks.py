"""Rounds under torchrun on two ranks against one, by the clock.

Run by torchrun, this module is a rank: it writes the seconds of its rounds, and the model that it ends at.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from gradwire.bench.federated.work import QUICK_WORKS, WORKS, flat
from gradwire.bench.runs import Record


def compare(work: str, passes: int, *, quick: bool) -> Record:
    """Median seconds of a round on one rank and on two, which take turns pass by pass, and their ratio.

    Args:
        work: A name in `WORKS`.
        passes: Of each, in fresh processes, >= 1.
        quick: The work of this name in `QUICK_WORKS`.
    """
    seconds: dict[int, list[float]] = {1: [], 2: []}
    models: dict[int, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "rank0.json"
        for _ in range(passes):
            for size, found in seconds.items():
                launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
                own = ["-m", __spec__.name if __spec__ else __name__, work, str(int(quick)), str(output)]
                subprocess.run([sys.executable, *launcher, *own], check=True, capture_output=True, env=_environment())
                said = json.loads(output.read_text())
                found += said["seconds"]
                models[size] = said["model"]
    off = (torch.tensor(models[1]) - torch.tensor(models[2])).abs().max()
    return {
        "seconds": {str(size): round(statistics.median(found), 5) for size, found in seconds.items()},
        "speedup": round(statistics.median(one / two for one, two in zip(*seconds.values(), strict=True)), 3),
        "rounds": len(seconds[1]),
        "difference": float(off),
    }


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}


def _rank(name: str, quick: str, output: str) -> None:
    from gradwire.federated import TorchrunEngine

    work = (QUICK_WORKS if int(quick) else WORKS)[name]
    with TorchrunEngine() as engine:
        simulation, seconds = work.simulation(engine), []
        for _ in range(work.rounds):
            start = time.perf_counter()
            simulation.step()
            seconds.append(time.perf_counter() - start)
        if engine.rank == 0:
            model = flat(list(simulation.module.parameters())).tolist()
            Path(output).write_text(json.dumps({"seconds": seconds[1:], "model": model}))


if __name__ == "__main__":
    _rank(*sys.argv[1:])
