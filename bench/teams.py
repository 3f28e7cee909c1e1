"""Runs dealt to teams of new processes, of one thread each.

A run gets a fresh model in processes that do nothing else meanwhile. So its result depends neither on the order of the
runs nor on how many of them go on at once.
"""

import contextlib
import multiprocessing
import signal
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

from gradwire.bench import data
from gradwire.bench.launch import leave_process_groups, process_group
from gradwire.bench.runs import Record

_RUNS_PER_PROCESS = 10
"""Then the team is replaced: gloo's threads outlive a run, wake a hundred times a second, and add up."""

Task = TypeVar("Task")


def deal(
    tasks: Sequence[Task],
    train: Callable[[Task, data.Corpus, torch.device], Record],
    *,
    teams: int,
    ranks: int = 1,
    title: Callable[[Task], str],
) -> Iterator[Record]:
    """Train every task in one of several teams of new processes; yields each team's record as it ends.

    Args:
        tasks: What can be pickled.
        train: A function of a module; every rank of a team calls it, and that of rank 0 has its record taken.
        teams: How many tasks go on at once, >= 1.
        ranks: Processes of a team: one as `process_group` makes it, or several on gloo.
        title: A task in words.

    Raises:
        RuntimeError: A process has ended.
    """
    context = multiprocessing.get_context("spawn")
    waiting = deque(tasks)
    running: dict[Connection, tuple[int, Task]] = {}
    records: dict[int, dict[Connection, Record]] = {}
    members: dict[int, list[Connection]] = {}
    runs: dict[int, int] = {}
    processes: list[Any] = []

    def begin(team: int) -> None:
        if not waiting:
            return
        if runs.get(team, 0) % _RUNS_PER_PROCESS == 0:
            found(team)
        runs[team] = runs.get(team, 0) + 1
        task = waiting.popleft()
        records[team] = {}
        for pipe in members[team]:
            running[pipe] = team, task
            pipe.send(task)

    def found(team: int) -> None:
        for pipe in members.get(team, ()):
            pipe.close()  # the old ones end by themselves
        members[team] = []
        store = str(Path(folder) / f"store-{len(processes)}")
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, train, rank, ranks, store), daemon=True)
            process.start()
            theirs.close()
            members[team].append(ours)
            processes.append(process)

    with tempfile.TemporaryDirectory() as folder:
        try:
            for team in range(min(teams, len(tasks))):
                begin(team)
            while running:
                for pipe in wait(list(running)):
                    assert isinstance(pipe, Connection)
                    team, task = running.pop(pipe)
                    try:
                        records[team][pipe] = pipe.recv()
                    except EOFError:
                        raise RuntimeError(f"bench: the process of {title(task)} has ended.") from None
                    if len(records[team]) == ranks:
                        finished = records[team][members[team][0]]
                        begin(team)
                        yield finished
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                process.join()


def _work(
    pipe: Connection, train: Callable[[Any, data.Corpus, torch.device], Record], rank: int, ranks: int, store: str
) -> None:
    """Train what comes through the pipe until its other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it, too, and decides
    torch.set_num_threads(1)
    corpus = data.standard_library()
    with _team(rank, ranks, store) as device, contextlib.suppress(EOFError):
        while True:
            pipe.send(train(pipe.recv(), corpus, device))


@contextlib.contextmanager
def _team(rank: int, ranks: int, store: str) -> Iterator[torch.device]:
    """The default process group of one process, or of several on this machine's gloo."""
    if ranks == 1:
        with process_group() as device:
            yield device
        return
    dist.init_process_group("gloo", store=FileStore(store, ranks), rank=rank, world_size=ranks)
    yield torch.device("cpu")
    dist.barrier()  # gloo may abort a rank that still talks to one which has gone
    leave_process_groups()
