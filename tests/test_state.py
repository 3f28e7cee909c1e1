"""Saving and loading in one process: bit-exact continuation, and errors that name what is wrong."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CommunicatorCase
from steps import ALL, ONE_RANK, SHAPES, equal, gradients, run_step, snapshot

from gradwire import comm
from gradwire import compression as C
from gradwire.comm import (
    EF,
    EF21,
    Averager,
    CheckpointError,
    Communicator,
    Plan,
    PowerSGD,
    Simulated,
    Warmup,
    checkpoint,
)

every_communicator = pytest.mark.parametrize("case", ONE_RANK, ids=lambda case: case.name)
NAMES = list(SHAPES)


def trained(case: CommunicatorCase, steps: int) -> Averager:
    communicator = case.make(plan=ALL)
    for step in range(steps):
        run_step(communicator, gradients(step))
    return communicator


def continues(communicator: Averager, case: CommunicatorCase, *buckets: list[str]) -> bool:
    """Whether steps 3 and 4 come out as without an interruption after step 2, bit for bit."""
    whole = trained(case, 3)
    same = True
    for step in (3, 4):
        same &= equal(run_step(communicator, gradients(step), *buckets), run_step(whole, gradients(step), *buckets))
    return same and equal(snapshot(communicator), snapshot(whole)) and communicator.stats.steps == 5


@every_communicator
@pytest.mark.parametrize("when", ["before the first step", "after prepare", "over other state"])
def test_state_dict_continues_bit_exact(case: CommunicatorCase, when: str) -> None:
    state = trained(case, 3).state_dict()
    resumed = case.make(plan=ALL) if when != "over other state" else trained(case, 1)
    if when == "after prepare":
        resumed.prepare(NAMES, list(gradients(0).values()))
    resumed.load_state_dict(state)
    assert continues(resumed, case)


@every_communicator
def test_state_dict_is_a_copy(case: CommunicatorCase) -> None:
    communicator = trained(case, 2)
    state = communicator.state_dict()
    before = {key: value.clone() for key, value in state["rows"].items()}
    for step in (2, 3):
        run_step(communicator, gradients(step))
    assert equal(state["rows"], before)


@every_communicator
def test_checkpoint_continues_bit_exact(case: CommunicatorCase, tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "saved", communicator=trained(case, 3))
    resumed = case.make(plan=ALL)
    checkpoint.load(tmp_path / "saved", communicator=resumed)
    assert continues(resumed, case)


@every_communicator
def test_loads_into_other_buckets(case: CommunicatorCase) -> None:
    """State that waits for its parameters survives being saved again, and goes to whichever bucket holds them."""
    first = case.make(plan=ALL)
    first.load_state_dict(trained(case, 3).state_dict())
    resumed = case.make(plan=ALL)
    resumed.load_state_dict(first.state_dict())
    assert continues(resumed, case, NAMES[4:], NAMES[:2], NAMES[2:4])


def test_skipped_steps_are_restored() -> None:
    communicator = Communicator(C.Identity(), feedback=EF())
    for value in (1.0, torch.inf):
        communicator.average_([torch.full((64, 64), value)], ["w"])
    resumed = Communicator(C.Identity(), feedback=EF())
    resumed.load_state_dict(communicator.state_dict())
    assert (resumed.stats.steps, resumed.stats.skipped) == (2, 1)


# Errors.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a communicator, a model and a dictionary."""
    communicator = Communicator(C.ChunkTopK(k=8, chunk=256), feedback=EF())
    communicator.average_([torch.ones(64, 64)], ["w"])
    path = tmp_path_factory.mktemp("checkpoint") / "saved"
    checkpoint.save(path, communicator=communicator, model=torch.nn.Linear(2, 2), extra={"epoch": torch.ones(1)})
    return path


SAVED = C.ChunkTopK(k=8, chunk=256)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Communicator(C.ChunkTopK(k=9, chunk=256), feedback=EF()),
            r"expected compressor=ChunkTopK\(k=9, chunk=256\) as configured now, got compressor=ChunkTopK\(k=8, chunk",
        ),
        (
            lambda: Communicator(SAVED, feedback=EF(decay=0.5)),
            "feedback=EF.decay=0.5. .* got feedback=EF.decay=1.0",
        ),
        (
            lambda: Communicator(SAVED, feedback=EF21()),
            r"feedback=EF21\(dense_start=False\) .* got feedback=EF\(decay=1.0\)",
        ),
        (
            lambda: Communicator(SAVED, feedback=EF(), exchange=comm.TwoPhase()),
            r"exchange=TwoPhase\(\) .* got exchange=AllGather\(\)",
        ),
        (
            lambda: Communicator(SAVED, feedback=EF(), plan=Plan(min_ndim=1)),
            "plan=Plan.min_ndim=1.* got plan=Plan.min_nd",
        ),
        (lambda: Communicator(SAVED, feedback=EF(), seed=1), "seed=1 as configured now, got seed=0"),
        (lambda: PowerSGD(2), "expected communicator=PowerSGD .* got communicator=Communicator"),
        (
            lambda: Warmup(Communicator(C.Identity()), Communicator(SAVED, feedback=EF()), 3),
            "expected communicator=Warmup .* got communicator=Communicator",
        ),
    ],
)
def test_a_changed_hyper_parameter_is_named(folder: Path, make: Callable[[], Averager], message: str) -> None:
    communicator = make()
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(folder, communicator=communicator)
    saved = Communicator(SAVED, feedback=EF()).state_dict()
    with pytest.raises(CheckpointError, match=message):
        communicator.load_state_dict(saved)
    assert communicator.stats.steps == 0
    assert communicator.state_rows() == {}


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        (PowerSGD(2), PowerSGD(3), "matrix_rank=3 as configured now, got matrix_rank=2"),
        (
            Warmup(Communicator(C.Identity()), Communicator(C.Identity()), 3),
            Warmup(Communicator(C.Identity()), Communicator(C.Identity()), 4),
            "warmup_steps=4 as configured now, got warmup_steps=3",
        ),
        (
            Communicator(C.Identity(), exchange=Simulated(2)),
            Communicator(C.Identity(), exchange=Simulated(3)),
            r"exchange=Simulated\(3\) as configured now, got exchange=Simulated\(2\)",
        ),
    ],
    ids=["PowerSGD", "Warmup", "Simulated"],
)
def test_other_communicators_name_it_too(one: Averager, other: Averager, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        other.load_state_dict(one.state_dict())


def test_state_of_another_rank_or_world() -> None:
    communicator = Communicator(SAVED, feedback=EF())
    communicator.average_([torch.ones(64, 64)], ["w"])
    state = communicator.state_dict()
    rows = {key.replace("rank0/", "rank1/"): value for key, value in state["rows"].items()}
    with pytest.raises(CheckpointError, match="expected the state of rank 0, got that of another rank"):
        communicator.load_state_dict({"head": state["head"], "rows": rows})
    head = state["head"].replace('"world_size": 1', '"world_size": 2')
    with pytest.raises(CheckpointError, match=r"a world of 1, got 2. Use gradwire.comm.checkpoint.load"):
        communicator.load_state_dict({"head": head, "rows": state["rows"]})


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        ({"other": Communicator(SAVED, feedback=EF())}, "expected the state of 'other' in .*, found none"),
        ({"model": torch.nn.Linear(3, 2)}, r"could not read \['model'\] from .*: Size mismatch .* model.weight"),
        ({"extra": {"round": torch.ones(1)}}, r"could not read \['extra'\] .*extra.round"),
    ],
    ids=["communicator", "model", "dictionary"],
)
def test_a_missing_entry_is_named(folder: Path, objects: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(folder, **objects)


def test_a_missing_file_is_named(folder: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    (file,) = damaged.glob("*.distcp")
    file.unlink()
    for objects in ({"communicator": Communicator(SAVED, feedback=EF())}, {"model": torch.nn.Linear(2, 2)}):
        with pytest.raises(CheckpointError, match=f"expected 1 files in {damaged}, missing {file.name}"):
            checkpoint.load(damaged, **objects)


def test_an_unfinished_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "__0_0.distcp").touch()
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match=f"expected a finished checkpoint in {path}, found no .metadata file"):
            checkpoint.load(path, communicator=Communicator(SAVED))


def test_an_optimizer_needs_its_model(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r"expected model=... beside the optimizer 'optimizer', got NoneType"):
        checkpoint.save(tmp_path, optimizer=torch.optim.SGD(model.parameters()))
