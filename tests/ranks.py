"""Real gloo processes for tests, forked from one server that has imported torch and gradwire already.

`run_ranks(n, fn, *args)` calls `fn(*args)` in n fresh processes with a gloo group of that size and returns the results
in rank order. `fn` must stand at the top level of a test file. A fork takes about 0.1 s and every job starts clean.
"""

import importlib.util
import multiprocessing as mp
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

_PRELOAD = ["torch", "torch.distributed", "torch.nn.parallel", "gradwire.comm", "gradwire.optim", "gradwire.federated"]
_context = mp.get_context("forkserver")
_context.set_forkserver_preload(_PRELOAD)


class RankError(AssertionError):
    """A rank raised, died or did not finish in time."""


def _child(
    rank: int, world_size: int, store: str, file: str, name: str, args: tuple[Any, ...], timeout_s: float, pipe: Any
) -> None:
    import datetime

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        spec = importlib.util.spec_from_file_location(Path(file).stem, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store, world_size),
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=timeout_s),
        )
        result = getattr(module, name)(*args)
        pipe.send(("ok", result))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        pipe.send(("error", traceback.format_exc()))
    finally:
        pipe.close()
        os._exit(0)  # gloo aborts now and then at interpreter exit; everything is sent already


def start_ranks(world_size: int, fn: Callable[..., Any], *args: Any, timeout_s: float = 60.0) -> list[tuple[Any, Any]]:
    """Start the processes; returns `(process, connection)` per rank, for tests that kill one."""
    store = tempfile.mktemp(prefix="gradwire-store-")
    file, name = fn.__code__.co_filename, fn.__qualname__
    started = []
    for rank in range(world_size):
        ours, theirs = _context.Pipe(duplex=False)
        process = _context.Process(
            target=_child, args=(rank, world_size, store, file, name, args, timeout_s, theirs), daemon=True
        )
        process.start()
        theirs.close()
        started.append((process, ours))
    return started


def collect(started: list[tuple[Any, Any]], timeout_s: float = 60.0) -> list[tuple[str, Any]]:
    """Wait for every rank: `("ok", result)`, `("error", traceback)`, `("died", exit code)` or `("hung", None)`."""
    outcomes: list[tuple[str, Any]] = []
    for process, pipe in started:
        if not wait([pipe], timeout_s):
            process.kill()
            outcomes.append(("hung", None))
            continue
        try:
            outcomes.append(pipe.recv())
        except EOFError:
            process.join(5)
            outcomes.append(("died", process.exitcode))
    for process, _ in started:
        process.join(5)
        if process.is_alive():
            process.kill()
    return outcomes


def run_ranks(world_size: int, fn: Callable[..., Any], *args: Any, timeout_s: float = 60.0) -> list[Any]:
    """Call `fn(*args)` on every rank of a gloo group; returns the results in rank order.

    Raises:
        RankError: a rank raised, died or hung; the message holds its rank and traceback.
    """
    outcomes = collect(start_ranks(world_size, fn, *args, timeout_s=timeout_s), timeout_s)
    failed = [f"rank {rank} {state}:\n{value}" for rank, (state, value) in enumerate(outcomes) if state != "ok"]
    if failed:
        raise RankError("\n".join(failed))
    return [value for _, value in outcomes]
