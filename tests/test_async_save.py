"""`async_save`: the state as of the call, whole or not at all, while training goes on on all ranks."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import toy
from ranks import collect, run_ranks, start_ranks

from gradwire.comm import EF, CheckpointError, Communicator, attach, checkpoint, checkpoint_saving
from gradwire.compression import ChunkTopK


class _Training:
    """A model, an optimizer with momenta and a communicator with residuals."""

    def __init__(self, seed: int = 0) -> None:
        self.model = toy.model(seed)
        self.communicator = Communicator(ChunkTopK(k=8, chunk=256), feedback=EF())
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3)
        attach(self.model.named_parameters(), self.communicator, optimizer=self.optimizer, bucket_mb=toy.BUCKET_MB)

    def run(self, first: int, last: int) -> None:
        rank = dist.get_rank() if dist.is_initialized() else 0
        for step in range(first, last):
            self.optimizer.zero_grad()
            toy.loss(self.model, step, rank).backward()
            self.optimizer.step()

    def objects(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "communicator": self.communicator}

    def digest(self) -> tuple[str, ...]:
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        return toy.digest(self.model.parameters()), toy.digest(moments), toy.state_digest(self.communicator)


def _loaded(path: str) -> tuple[str, ...]:
    training = _Training(seed=9)
    checkpoint.load(path, **training.objects())
    return training.digest()


def _held(write: Callable[..., None]) -> tuple[Callable[..., None], threading.Event]:
    """The same, but not before it is let go."""
    go = threading.Event()

    def held(*args: Any, **kwargs: Any) -> None:
        go.wait(60)
        write(*args, **kwargs)

    return held, go


def _save_and_train_on(path: str) -> None:
    training = _Training()
    training.run(0, 3)
    checkpoint.save(path, **training.objects())
    older = training.digest()
    training.run(3, 5)
    newer = training.digest()

    checkpoint_saving.write, go = _held(checkpoint_saving.write)
    saving = checkpoint.async_save(path, **training.objects())
    training.run(5, 8)  # changes everything in place, with collectives, while the save waits
    assert not saving.done()
    assert training.digest() != newer
    dist.barrier()
    go.set()
    saving.wait()
    assert saving.done()
    dist.barrier()
    assert _loaded(path) == newer != older
    second = checkpoint.async_save(path, **training.objects())
    assert _loaded(path) == training.digest()  # loading has waited for it
    assert second.done()


@pytest.mark.slow
def test_it_holds_the_state_as_of_the_call_while_training_goes_on(tmp_path: Path) -> None:
    run_ranks(2, _save_and_train_on, str(tmp_path / "saved"))
    assert [place.name for place in tmp_path.iterdir()] == ["saved"]


def _fail_on_rank_1(path: str) -> None:
    training = _Training()
    training.run(0, 2)
    kept = training.digest()
    checkpoint.async_save(path, **training.objects()).wait()
    training.run(2, 4)

    def fail(*args: Any) -> None:
        raise OSError("the tide came in")

    digests = checkpoint_saving.replacing.__wrapped__.__globals__
    if dist.get_rank() == 1:
        write_digests, digests["_write_digests"] = digests["_write_digests"], fail
    told = r"save: could not write .*: rank 1: OSError: the tide came in\. What was there before still is"
    saving = checkpoint.async_save(path, **training.objects())
    with pytest.raises(CheckpointError, match=told):
        saving.wait()
    assert _loaded(path) == kept  # nobody is told twice

    checkpoint.async_save(path, **training.objects())
    training.run(4, 5)
    with pytest.raises(CheckpointError, match=told):
        checkpoint.save(path, **training.objects())
    if dist.get_rank() == 1:
        digests["_write_digests"] = write_digests
    checkpoint.save(path, **training.objects())
    assert _loaded(path) == training.digest()


@pytest.mark.slow
def test_what_fails_on_one_rank_is_told_on_all_and_once(tmp_path: Path) -> None:
    run_ranks(2, _fail_on_rank_1, str(tmp_path / "saved"))


def _die_while_it_is_written(path: str) -> str:
    training = _Training()
    training.run(0, 2)
    checkpoint.save(path, **training.objects())
    whole = checkpoint_saving.dcp_save

    def die(*args: Any, **kwargs: Any) -> None:
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        whole(*args, **kwargs)

    checkpoint_saving.dcp_save = die
    with pytest.raises(CheckpointError) as told:
        checkpoint.async_save(path, **training.objects()).wait()
    return str(told.value)


def _load_steps(path: str) -> int:
    training = _Training(seed=9)
    checkpoint.load(path, **training.objects())
    return training.communicator.steps_done


@pytest.mark.slow
def test_a_rank_killed_while_it_is_written_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    path = str(tmp_path / "saved")
    (state, message), died = collect(start_ranks(2, _die_while_it_is_written, path, timeout_s=600.0), 60.0)
    assert died == ("died", -signal.SIGKILL)
    assert "a rank has ended or did not answer in time" in message, (state, message)
    assert run_ranks(2, _load_steps, path) == [2, 2]


_ENDS_AT_ONCE = """
import sys, torch
from gradwire.comm import checkpoint
model = torch.nn.Linear(64, 64)
torch.nn.init.constant_(model.weight, 3.0)
checkpoint.async_save(sys.argv[1], model=model)
torch.nn.init.constant_(model.weight, 4.0)
"""


def test_a_process_that_ends_finishes_it(tmp_path: Path) -> None:
    path = str(tmp_path / "saved")
    subprocess.run([sys.executable, "-W", "error", "-c", _ENDS_AT_ONCE, path], check=True, timeout=100)
    model = torch.nn.Linear(64, 64)
    checkpoint.load(path, model=model)
    np.testing.assert_array_equal(model.weight.detach().numpy(), 3.0)


def test_alone_it_returns_before_it_has_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = _Training()
    training.run(0, 2)
    held, go = _held(checkpoint_saving.write)
    monkeypatch.setattr(checkpoint_saving, "write", held)
    before = training.digest()
    saving = checkpoint.async_save(tmp_path / "saved", **training.objects())
    assert not saving.done()
    assert not (tmp_path / "saved").exists()
    training.run(2, 4)
    go.set()
    saving.wait()
    assert _loaded(str(tmp_path / "saved")) == before != training.digest()
