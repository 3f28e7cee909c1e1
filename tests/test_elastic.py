"""Elastic torchrun: agents and workers die, the others go on from the last checkpoint in a world of another size."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradwire.bench import session
from gradwire.bench.errors import UsageError
from gradwire.bench.runs import RunFolder

_HERE = Path(__file__).parent
_ENV = os.environ | {"PYTHONSAFEPATH": "1", "PYTHONPATH": str(_HERE), "OMP_NUM_THREADS": "1"}
# Else torch 2.13 gives restarted workers the store of those before, in which gloo finds addresses that are gone.
_ENV |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
_RDZV = "join_timeout=90,last_call_timeout=6,keep_alive_interval=1,keep_alive_max_attempt=3"
Record = dict[str, Any]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def _torchrun(output: Path, *arguments: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """An agent that prints to a file; it and its workers are gone afterwards."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--monitor-interval", "0.2", *arguments]
    with output.open("w") as file:
        agent = subprocess.Popen(
            launcher, env=_ENV | environment, cwd=output.parent, stdout=file, stderr=subprocess.STDOUT
        )
        try:
            yield agent
        finally:
            if agent.poll() is None:
                agent.terminate()  # it ends its workers first
            agent.wait(30)


def _left(mark: str) -> list[int]:
    """Processes that have this text in their command line or their environment."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            text = (place / "cmdline").read_bytes() + (place / "environ").read_bytes()
            if mark.encode() in text and int(place.name) != os.getpid():
                found.append(int(place.name))
    return found


def _records(*outputs: Path) -> list[Record]:
    lines = [line for output in outputs for line in output.read_text().splitlines()]
    return [json.loads(line[line.index("{") :]) for line in lines if '{"event"' in line]


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")
def test_a_machine_that_is_lost_leaves_a_smaller_world_that_trains_on(tmp_path: Path) -> None:
    """Three agents with one worker each; one agent and its worker are killed after two checkpoints."""
    port = _free_port()
    common = ["--nnodes", "1:3", "--nproc-per-node", "1", "--max-restarts", "2", "--rdzv-backend", "c10d"]
    common += ["--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", str(tmp_path), "--local-addr", "127.0.0.1"]
    script = [str(_HERE / "elastic_script.py"), str(tmp_path / "saved")]
    outputs = [tmp_path / f"agent-{agent}.txt" for agent in range(3)]
    with contextlib.ExitStack() as stack:
        agents = []
        for number, output in enumerate(outputs):
            rdzv = ["--rdzv-conf", f"{_RDZV},is_host={'true' if number == 0 else 'false'}"]
            fault = {"DIE_AT": "25"} if number == 2 else {}
            agents.append(stack.enter_context(_torchrun(output, *common, *rdzv, *script, **fault)))
        codes = [agent.wait(100) for agent in agents]
    told = "\n".join(output.read_text() for output in outputs)
    assert codes == [0, 0, -signal.SIGKILL], told
    assert _left(str(tmp_path)) == []

    records = _records(*outputs)
    saved = next(r for r in records if (r["event"], r["world"], r["step"]) == ("saves", 3, 20))
    started = [r for r in records if r["event"] == "starts"]
    loaded = started[-1]
    ended = next(r for r in records if r["event"] == "ends")
    assert (loaded["world"], loaded["step"]) == (2, 20), told
    np.testing.assert_allclose(loaded["mean"], saved["mean"], rtol=1e-5)
    assert max(np.abs(saved["mean"])) > 0.01
    assert loaded["loss"] == pytest.approx(saved["loss"], rel=1e-6)
    assert (ended["world"], ended["step"]) == (2, 60)
    assert ended["loss"] < saved["loss"] < started[0]["loss"]
    assert "Communicator: rank" in told  # the others were told that somebody left


def test_gradwire_train_goes_on_where_it_stands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Called anew with the same options: after a fault, before the first checkpoint, and when all is done."""
    output = tmp_path / "run"
    values = {"optimizer": "AdamW", "layers": 1, "width": 32, "heads": 2, "context": 32, "batch": 2, "steps": 6}
    values |= {"configuration": "ChunkTopK(k=8) + EF", "seed": 0, "lr": 3e-3, "warmup": 0.1, "dtype": "float32"}
    values |= {
        "host": "loop",
        "bucket_mb": 25.0,
        "eval_every": 3,
        "checkpoint_every": 2,
        "data": [str(_HERE / "toy.py")],
    }
    given = {"steps": 6, "checkpoint_every": 2}
    output.mkdir()
    (output / "metrics.jsonl").write_text('{"step": 1, "tr')  # a run that ended before its first checkpoint
    session.elastic(values, given, output)
    through = RunFolder(output).metrics()

    for step in (4, 6):
        shutil.rmtree(output / "checkpoints" / f"step-{step:07d}")
    (output / "metrics.jsonl").write_text((output / "metrics.jsonl").read_text()[:-9])
    session.elastic(values, given, output)
    again = RunFolder(output).metrics()
    assert [(r["step"], r["train_loss"]) for r in again] == [(r["step"], r["train_loss"]) for r in through]

    capsys.readouterr()
    session.elastic(values, given, output)
    assert "all 6 steps are done" in capsys.readouterr().out
    (output / "checkpoints" / "step-0000006").rename(tmp_path / "aside")
    with pytest.raises(UsageError, match=r"expected steps=6 as the run began, got steps=7"):
        session.elastic(values | {"steps": 7}, {"steps": 7}, output)
