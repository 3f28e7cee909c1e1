"""Faults on real processes: whatever happens to one rank, all go on or all end in time, and say why."""

import os
import re
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import toy
from ranks import collect, run_ranks, start_ranks
from torch import nn

import gradwire
from gradwire.comm import EF, CheckpointError, Communicator, ConfigurationError, attach, checkpoint
from gradwire.compression import ChunkTopK

# The groups' own timeout is far longer than the tests wait: an end that only a timeout brings is a hang.
GROUP_TIMEOUT_S, WAIT_S = 600.0, 60.0


def _attached(host: str) -> tuple[nn.Module, nn.Module, torch.optim.Optimizer]:
    module = toy.model()
    communicator = Communicator(ChunkTopK(k=8, chunk=256), feedback=EF())
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    if host == "ddp":
        wrapped = toy.ddp(module)
        attach(wrapped, communicator, optimizer=optimizer)
        return module, wrapped, optimizer
    attach(module.named_parameters(), communicator, optimizer=optimizer, bucket_mb=toy.BUCKET_MB)
    return module, module, optimizer


def _kill(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _until_killed(host: str, where: str) -> str:
    """Rank 1 dies in its fourth step; returns how training ended on the others."""
    module, wrapped, optimizer = _attached(host)
    rank = dist.get_rank()
    for step in range(50):
        if step == 3 and rank == 1 and where == "forward":
            module[3].register_forward_hook(_kill)
        elif step == 3 and rank == 1 and where == "backward":
            module[3].register_full_backward_hook(_kill)
        elif step == 3 and rank == 1 and where == "collective":
            threading.Timer(1.0, _kill).start()
        elif step == 3 and rank == 2 and where == "collective":
            time.sleep(2.0)  # meanwhile the others wait in their collective
        optimizer.zero_grad()
        try:
            toy.loss(wrapped, step).backward()
            optimizer.step()
        except RuntimeError as error:
            return str(error)
    return "finished"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("host", "where"), [("ddp", "forward"), ("loop", "backward"), ("ddp", "collective"), ("loop", "collective")]
)
def test_a_rank_killed_in_the_middle_of_a_step_is_named_by_all_others(host: str, where: str) -> None:
    started = start_ranks(3, _until_killed, host, where, timeout_s=GROUP_TIMEOUT_S)
    outcomes = collect(started, WAIT_S)
    assert outcomes[1] == ("died", -signal.SIGKILL)
    for _, result in outcomes[::2]:
        assert "Communicator: rank 1 left, or gave no sign, while others were waiting" in str(result), outcomes
    assert [process.exitcode for process, _ in started] == [0, -signal.SIGKILL, 0]  # ended by themselves


def _a_slow_rank(seconds: float) -> tuple[str, float]:
    """Rank 2 falls asleep in its third step."""
    module, wrapped, optimizer = _attached("loop")
    for step in range(5):
        if step == 2 and dist.get_rank() == 2:
            time.sleep(seconds)
        optimizer.zero_grad()
        try:
            toy.loss(wrapped, step).backward()
            optimizer.step()
        except RuntimeError as error:
            return str(error), 0.0
    return toy.digest(module.parameters()), toy.evaluate(module)


@pytest.mark.slow
def test_a_slow_rank_is_waited_for() -> None:
    slow = run_ranks(3, _a_slow_rank, 1.5, timeout_s=60.0)
    assert toy.all_equal(slow)
    assert slow == run_ranks(3, _a_slow_rank, 0.0)


@pytest.mark.slow
def test_a_rank_slower_than_the_timeout_is_named_by_all() -> None:
    started = start_ranks(3, _a_slow_rank, 12.0, timeout_s=4.0)
    outcomes = collect(started, WAIT_S)
    for _, result in outcomes:
        assert "Communicator: rank 2 did not come within 0:00:04, the timeout" in str(result), outcomes
    assert [process.exitcode for process, _ in started] == [0, 0, 0]


def _another_version() -> None:
    if dist.get_rank() == 1:
        gradwire.__version__ = "99.0"
    with pytest.raises(
        ConfigurationError,
        match=rf"ranks differ in the version of gradwire: rank 0 has {_VERSION}, rank 1 has 99\.0",
    ):
        _attached("loop")


_VERSION = gradwire.__version__


def test_a_rank_with_another_version_is_named_by_all() -> None:
    run_ranks(2, _another_version)


# What is saved.

_SMALL, _LARGE = 1_000, 100_000


def _async_save_and_wait(path: str, **objects: Any) -> None:
    checkpoint.async_save(path, **objects).wait()


def _save_what_does_not_fit(path: str, limit: int | None, asynchronous: bool) -> None:
    """A small checkpoint, and one in which every rank has 400 kB of its own."""
    rank, key = dist.get_rank(), f"of rank {dist.get_rank()}"
    checkpoint.save(path, own={key: torch.full([_SMALL], 1.0)})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit is not None and rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    what = "File too large" if limit is not None else "No space left on device"
    expected = rf"save: could not write {path}: .*rank 1: OSError: .* {what}.*What was there before still is"
    write = _async_save_and_wait if asynchronous else checkpoint.save
    with pytest.raises(CheckpointError, match=expected):
        write(path, own={key: torch.full([_LARGE], 2.0)})
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    own = {key: torch.zeros(_SMALL)}
    checkpoint.load(path, own=own)
    assert [place.name for place in Path(path).parent.iterdir()] == ["saved"]  # what was begun has made room again
    assert torch.equal(own[key], torch.ones(_SMALL))
    checkpoint.save(path, own={key: torch.full([_SMALL], 3.0)})
    checkpoint.load(path, own=own)
    assert torch.equal(own[key], torch.full([_SMALL], 3.0))


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_file_system_that_refuses_on_one_rank_leaves_the_checkpoint_before(
    asynchronous: bool, tmp_path: Path
) -> None:
    run_ranks(2, _save_what_does_not_fit, str(tmp_path / "saved"), 200_000, asynchronous)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 kB."""
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", tmp_path], capture_output=True)
    if mount.returncode:
        pytest.skip("only root may mount a file system")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.slow
def test_a_full_disk_leaves_the_checkpoint_before(small_disk: Path) -> None:
    run_ranks(2, _save_what_does_not_fit, str(small_disk / "saved"), None, False)


def _communicator() -> Communicator:
    communicator = Communicator(ChunkTopK(k=4, chunk=64), feedback=EF())
    communicator.average_([torch.randn(32, 32)], ["weight"])
    return communicator


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "noise").mkdir()
    (tmp_path / "noise" / ".metadata").write_bytes(b"not what torch writes")
    with pytest.raises(CheckpointError, match=r"load: expected the metadata of a checkpoint in .*noise, got"):
        checkpoint.load(tmp_path / "noise", communicator=_communicator())

    dcp.save({"model": {"weight": torch.ones(3)}}, checkpoint_id=tmp_path / "foreign")
    with pytest.raises(CheckpointError, match=r"load: expected the state of 'communicator' in .*foreign, found none"):
        checkpoint.load(tmp_path / "foreign", communicator=_communicator())
    with pytest.raises(CheckpointError, match=r"load: could not read \['optimizer'\] from .*foreign: "):
        checkpoint.load(tmp_path / "foreign", optimizer={"lr": 0.1})
    with pytest.raises(CheckpointError, match=r"load: expected a finished checkpoint in .*nothing"):
        checkpoint.load(tmp_path / "nothing", communicator=_communicator())
    assert not checkpoint.exists(tmp_path / "nothing")
    assert checkpoint.exists(tmp_path / "foreign")


def test_digests_that_were_cut_are_named(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "saved", communicator=_communicator())
    place = tmp_path / "saved" / "digests-0.json"
    place.write_text(place.read_text()[:-5])
    with pytest.raises(CheckpointError, match=r"load: expected digests in .*digests-0\.json, got another content"):
        checkpoint.load(tmp_path / "saved", communicator=_communicator())


def test_a_checkpoint_of_another_version_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = _communicator()
    checkpoint.save(tmp_path / "saved", communicator=saved)
    monkeypatch.setattr(gradwire, "__version__", "99.0")
    loaded = Communicator(ChunkTopK(k=4, chunk=64), feedback=EF())
    checkpoint.load(tmp_path / "saved", communicator=loaded)
    loaded.prepare(["weight"], [torch.zeros(32, 32)])
    rows = zip(saved.state_rows().values(), loaded.state_rows().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in rows)


# docs/faults.md

_PAGE = Path(__file__).parent.parent / "docs" / "faults.md"
_FAULTS = {
    "a worker is killed in forward",
    "a worker is killed in backward",
    "a worker is killed inside a collective",
    "a worker is killed while saving",
    "one rank with another configuration",
    "one rank with another library version",
    "a rank that is slow",
    "a rank that is slower than the timeout",
    "disk full while saving",
    "a truncated checkpoint",
    "an altered checkpoint",
    "a foreign checkpoint",
    "inf or NaN from one rank",
}


def test_every_fault_is_listed_with_tests_that_exist() -> None:
    rows = [line.strip("| ").split(" | ") for line in _PAGE.read_text().splitlines() if line.startswith("| ")][1:]
    assert {row[0] for row in rows} >= _FAULTS
    for fault, _, tests in rows:
        named = re.findall(r"`(tests/\w+\.py)::(\w+)`", tests)
        assert len(named) == tests.count("`") // 2 > 0, fault
        for file, test in named:
            assert f"\ndef {test}(" in (_PAGE.parent.parent / file).read_text(), (fault, test)
