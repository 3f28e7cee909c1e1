"""What torchrun starts on every host: a rank that does what it is asked through a Unix socket, one line at a time.

`python -m gradwire.bench.network.job DOOR SETTINGS`
"""

import json
import os
import resource
import socket
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, final

import torch
import torch.distributed as dist

from gradwire.bench import data
from gradwire.bench.network.meter import CALLS, count_calls, counters, gloo_bytes, minus
from gradwire.bench.network.methods import Method
from gradwire.bench.network.overlap import record
from gradwire.bench.network.trainee import Shape, Trainee
from gradwire.bench.runs import Record


def settings(method: Method, shape: Shape) -> Record:
    """What a job is told, as JSON."""
    return {"method": asdict(method), "shape": asdict(shape)}


@final
class Rank:
    """The commands by name.

    Args:
        trainee: What trains here.
    """

    def __init__(self, trainee: Trainee) -> None:
        self.trainee, self.next = trainee, 0
        self.commands: dict[str, Callable[..., Record]] = {
            "train": self.train,
            "measure": self.measure,
            "probe": self.probe,
            "trace": self.trace,
        }

    def train(self, steps: int) -> Record:
        """Spend the token budget, and evaluate on the way; seconds are those of steps alone."""
        curve: list[Record] = []
        seconds = 0.0
        for step in range(1, steps + 1):
            start = time.perf_counter()
            self._step()
            seconds += time.perf_counter() - start
            if step % self.trainee.shape.eval_every == 0 or step == steps:
                start = time.perf_counter()
                self.trainee.settle()
                seconds += time.perf_counter() - start
                curve.append({"step": step, "validation_loss": self.trainee.evaluate(), "seconds": seconds})
        return {"curve": curve}

    def measure(self, steps: int) -> Record:
        """Seconds of every round of `every` steps per step; and per step the bytes of interface and declaration."""
        every = self.trainee.method.every
        dist.barrier()
        before = counters()
        dist.barrier()
        barrier, declared, processor = minus(counters(), before), self.trainee.declared_bytes, _processor_seconds()
        before, calls = counters(), dict(CALLS)
        seconds = []
        for _ in range(steps // every):
            start = time.perf_counter()
            for _ in range(every):
                self._step()
            seconds.append((time.perf_counter() - start) / every)
        self.trainee.settle()
        processor = _processor_seconds() - processor
        made = {kind: count - calls.get(kind, 0) for kind, count in CALLS.items()}
        dist.barrier()
        sent = minus(minus(counters(), before), barrier)
        return {
            "seconds": statistics.median(seconds),
            "processor_seconds": processor / steps,
            "declared_bytes": (self.trainee.declared_bytes - declared) / steps,
            "calls": {kind: count / steps for kind, count in made.items()},
            **{name: value / steps for name, value in sent.items()},
        }

    def probe(self) -> Record:
        """Bytes that gloo adds to one collective of each kind."""
        return gloo_bytes()

    def trace(self, steps: int, path: str) -> Record:
        """Record some steps of all threads; rank 0 writes them as a Chrome trace."""
        dist.barrier()
        with record(Path(path) if self.trainee.rank == 0 else None):
            for _ in range(steps):
                self._step()
            self.trainee.settle()
        return {}

    def _step(self) -> None:
        self.trainee.step(self.next)
        self.next += 1


def main() -> None:
    """Meet the others, meet who asks, and answer until told to end."""
    door, told = sys.argv[1], json.loads(sys.argv[2])
    torch.set_num_threads(1)
    count_calls()
    dist.init_process_group("gloo")
    with socket.socket(socket.AF_UNIX) as channel:
        channel.connect(door)
        channel.sendall(dist.get_rank().to_bytes(4, "big"))
        with channel.makefile("rwb") as file:
            _answer(file, told)
    # gloo aborts now and then at the interpreter's end; all is said.
    os._exit(0)


def _answer(file: Any, told: Record) -> None:
    rank: Rank | None = None
    while line := file.readline():
        command = json.loads(line)
        what = command.pop("do")
        try:
            if what == "end":
                dist.barrier()
                answer: Record = {}
            else:
                if rank is None:
                    rank = Rank(Trainee(Method(**told["method"]), Shape(**told["shape"]), data.standard_library()))
                answer = rank.commands[what](**command)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        file.write(json.dumps(answer).encode() + b"\n")
        file.flush()
        if what == "end":
            return


def _processor_seconds() -> float:
    """Of all threads of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
