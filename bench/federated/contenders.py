"""Simulators in processes of their own, that go one round at a time, and the CPU time that a process tree takes."""

import contextlib
import importlib
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from gradwire.bench.federated.work import Work

CONTENDERS: Mapping[str, tuple[str, str]] = {
    "lean loop": ("loops", "lean"),
    "gradwire": ("loops", "gradwire"),
    "naive loop": ("loops", "naive"),
    "pfl": ("rival_pfl", "run"),
    "FedLab": ("rival_fedlab", "run"),
    "Flower on Ray": ("rival_flower", "run"),
}
"""Module in this package and function of every simulator, the first one that which others are compared with."""

_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    "PYTHONWARNINGS": "ignore",
}
_MARK = "GRADWIRE_CONTENDER"
_PATIENCE_S = 600.0
_SECONDS_TO_DIE = 0.05
_LAST_WORDS = 300


class ContenderError(Exception):
    """A simulator has failed."""


@final
@dataclass
class Cpu:
    """User and system time of a process and all that it has started, in seconds.

    Args:
        pid: Of the process.
    """

    pid: int
    _seen: dict[int, float] = field(default_factory=dict, init=False)

    def total(self) -> float:
        """So far; what has ended counts as it was last seen."""
        for pid in tree(self.pid):
            with contextlib.suppress(OSError):
                self._seen[pid] = time.clock_gettime((~pid << 3) | 2)  # Linux's clock of another process
        return sum(self._seen.values())


def tree(root: int) -> list[int]:
    """A process and its descendants."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    found = [root]
    for pid in found:
        found += children.get(pid, ())
    return found


@final
class Contender:
    """A simulator at work in a process of its own; every method may raise `ContenderError`.

    Args:
        name: In `CONTENDERS`.
        work: What it does.
    """

    def __init__(self, name: str, work: Work) -> None:
        self.name = name
        self._pipe, theirs = multiprocessing.Pipe()
        self._log = tempfile.NamedTemporaryFile(prefix="gradwire-", suffix=".log")  # noqa: SIM115
        self._mark = f"{_MARK}={self._log.name}"
        resource_tracker.ensure_running()  # before, since all contenders share it
        with _environment({_MARK: self._log.name}):
            context = multiprocessing.get_context("spawn")
            arguments = (theirs, self._log.name, *CONTENDERS[name], work)
            self._process = context.Process(target=_work, args=arguments, daemon=True, name="MainProcess")  # pfl asks
            self._process.start()
        theirs.close()
        assert self._process.pid is not None
        self._cpu = Cpu(self._process.pid)

    def wait(self) -> None:
        """Until it is ready for the first round."""
        self._wait()

    def round(self) -> tuple[float, float]:
        """Seconds of CPU and by the clock of the next round."""
        cpu, start = self._cpu.total(), time.perf_counter()
        self._pipe.send(None)
        self._wait()
        seconds = time.perf_counter() - start
        return self._cpu.total() - cpu, seconds

    def weights(self) -> Tensor:
        """The model after the last round, as a vector."""
        self._pipe.send(None)
        found = self._wait()
        assert isinstance(found, list)
        return torch.tensor(found)

    def end(self) -> None:
        """End the process and all that it has started."""
        while pids := _marked(self._mark):  # those that have lost their parents, too
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(_SECONDS_TO_DIE)
        self._process.join()
        self._log.close()

    def _wait(self) -> Any:
        if not self._pipe.poll(_PATIENCE_S):
            raise ContenderError(f"no answer for {_PATIENCE_S:.0f} s")
        try:
            kind, content = self._pipe.recv()
        except (EOFError, OSError):
            said = " ".join(Path(self._log.name).read_text(errors="replace").split())
            raise ContenderError(f"its process has ended: {said[-_LAST_WORDS:]}") from None
        if kind == "failed":
            raise ContenderError(content)
        return content


def _marked(mark: str) -> list[int]:
    """Processes that were started with this in their environment, or by such ones."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark.encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


@contextlib.contextmanager
def _environment(more: Mapping[str, str]) -> Iterator[None]:
    """What is started inside has these, and all that keeps simulators to themselves."""
    new = {**_ENVIRONMENT, **more}
    before = {name: os.environ.get(name) for name in new}
    os.environ.update(new)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _work(pipe: Connection, log: str, module: str, function: str, work: Work) -> None:
    """Go through all rounds, each when the other end of the pipe says so."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it, too, and decides
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)

    def gate() -> None:
        pipe.send(("ready", None))
        pipe.recv()

    try:
        run = getattr(importlib.import_module(f"{__package__}.{module}"), function)
        pipe.send(("weights", run(work, gate).tolist()))
    except (EOFError, BrokenPipeError):
        return
    except BaseException as error:
        pipe.send(("failed", f"{type(error).__name__}: {error}"[:_LAST_WORDS]))
