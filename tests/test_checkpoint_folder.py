"""A checkpoint is there whole or not at all, and what was cut or altered since it was saved is noticed."""

import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import collect, run_ranks, start_ranks
from torch import Tensor, nn

from gradwire.comm import EF, CheckpointError, Communicator, checkpoint, checkpoint_saving
from gradwire.compression import ChunkTopK


class _Run:
    """A model and a communicator after some steps."""

    def __init__(self, steps: int = 0) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(32, 32)
        self.communicator = Communicator(ChunkTopK(k=4, chunk=64), feedback=EF())
        for step in range(steps):
            gradient = torch.randn(32, 32, generator=torch.Generator().manual_seed(step))
            self.communicator.average_([gradient], ["weight"])
            with torch.no_grad():
                self.model.weight -= 0.1 * gradient

    def parts(self) -> dict[str, Any]:
        return {"model": self.model, "communicator": self.communicator}

    def values(self) -> list[Tensor]:
        return [self.model.weight.detach(), *self.communicator.state_rows().values()]


def _equal(one: _Run, other: _Run) -> bool:
    other.communicator.prepare(["weight"], [torch.zeros(32, 32)])
    return all(torch.equal(a, b) for a, b in zip(one.values(), other.values(), strict=True))


def test_a_save_that_fails_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, first, second = tmp_path / "saved", _Run(steps=2), _Run(steps=5)
    checkpoint.save(path, **first.parts())
    whole = checkpoint_saving.dcp_save

    def fail(state: dict[str, Any], *, storage_writer: Any, process_group: Any) -> None:
        whole(state, storage_writer=storage_writer, process_group=process_group)
        next(storage_writer.path.glob("__0_*")).write_bytes(b"half of it")
        raise OSError("the tide came in")

    monkeypatch.setattr(checkpoint_saving, "dcp_save", fail)
    message = r"save: could not write .*saved: rank 0: OSError: the tide came in\. What was there before still is"
    with pytest.raises(CheckpointError, match=message):
        checkpoint.save(path, **second.parts())
    assert [place.name for place in tmp_path.iterdir()] == ["saved"]
    monkeypatch.undo()
    loaded = _Run()
    checkpoint.load(path, **loaded.parts())
    assert _equal(first, loaded)

    checkpoint.save(path, **second.parts())
    loaded = _Run()
    checkpoint.load(path, **loaded.parts())
    assert _equal(second, loaded)
    assert not _equal(first, second)
    assert [place.name for place in tmp_path.iterdir()] == ["saved"]


def test_a_save_that_ends_between_its_renamings_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    path, first = tmp_path / "saved", _Run(steps=2)
    checkpoint.save(path, **first.parts())
    path.rename(tmp_path / "saved.previous")
    shutil.copytree(tmp_path / "saved.previous", tmp_path / "saved.partial")
    loaded = _Run()
    checkpoint.load(path, **loaded.parts())
    assert _equal(first, loaded)

    second = _Run(steps=3)
    checkpoint.save(path, **second.parts())
    loaded = _Run()
    checkpoint.load(path, **loaded.parts())
    assert _equal(second, loaded)
    assert [place.name for place in tmp_path.iterdir()] == ["saved"]


def _flip(place: Path) -> None:
    content = bytearray(place.read_bytes())
    content[len(content) // 2] ^= 1
    place.write_bytes(content)


def _cut(place: Path) -> None:
    place.write_bytes(place.read_bytes()[:-1])


@pytest.mark.parametrize("name", ["__0_*", ".metadata"])
@pytest.mark.parametrize("spoil", [_flip, _cut])
def test_a_file_that_changed_is_named(spoil: Any, name: str, tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "saved", **_Run(steps=2).parts())
    (file,) = (tmp_path / "saved").glob(name)
    spoil(file)
    with pytest.raises(CheckpointError, match=rf"load: expected {re.escape(file.name)} in .*saved as it was saved"):
        checkpoint.load(tmp_path / "saved", **_Run().parts())


def test_a_checkpoint_of_torch_itself_is_taken_as_it_is(tmp_path: Path) -> None:
    run = _Run(steps=2)
    checkpoint.save(tmp_path / "saved", **run.parts())
    for digests in (tmp_path / "saved").glob("digests-*"):
        digests.unlink()
    loaded = _Run()
    checkpoint.load(tmp_path / "saved", **loaded.parts())
    assert _equal(run, loaded)


def _save(path: str) -> None:
    checkpoint.save(path, **_Run(steps=2).parts())


def _load(path: str) -> str:
    try:
        checkpoint.load(path, **_Run().parts())
    except CheckpointError as error:
        return str(error)
    return "loaded"


@pytest.mark.slow
def test_every_rank_names_the_file_that_one_of_them_finds(tmp_path: Path) -> None:
    run_ranks(2, _save, str(tmp_path / "saved"))
    assert run_ranks(2, _load, str(tmp_path / "saved")) == ["loaded"] * 2
    (file,) = (tmp_path / "saved").glob("__1_*")
    _flip(file)
    for world_size in (1, 2, 3):
        for message in run_ranks(world_size, _load, str(tmp_path / "saved")):
            assert f"expected {file.name} in" in message


def _die_while_saving(path: str) -> None:
    def die(*args: Any, **kwargs: Any) -> None:
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        whole(*args, **kwargs)

    whole, checkpoint_saving.dcp_save = checkpoint_saving.dcp_save, die  # this process ends with the test
    checkpoint.save(path, **_Run(steps=5).parts())


@pytest.mark.slow
def test_a_rank_killed_while_saving_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    path = str(tmp_path / "saved")
    run_ranks(2, _save, path)
    (survivor, error), (killed, code) = collect(start_ranks(2, _die_while_saving, path, timeout_s=600.0), 60)
    assert (survivor, killed, code) == ("error", "died", -9)
    assert re.search(r"save: a rank has ended .*saved is as it was before", error)
    assert run_ranks(2, _load, path) == ["loaded"] * 2
