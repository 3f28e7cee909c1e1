"""`gradwire federate` as a user runs it: alone, under torchrun, interrupted, compared, and with mistakes."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from drawn_digits import PARAMETERS, Sklearn, write_texts

from gradwire.bench import federate_data, federate_options
from gradwire.bench.cli import main, spread
from gradwire.bench.runs import RunFolder
from gradwire.federated import partition

SCRIPTS = Path(sys.executable).parent
FILES = {"accuracy.png", "checkpoints", "clients.png", "metrics.jsonl", "options.json", "partition.json",
         "summary.json", "table.md"}  # fmt: skip


@pytest.fixture
def sklearn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", types.ModuleType("sklearn"))
    monkeypatch.setitem(sys.modules, "sklearn.datasets", Sklearn("sklearn.datasets"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six clients, each with a text of its own."""
    path = tmp_path / "texts"
    write_texts(path)
    return path


def federate(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """The command, here; returns its exit code."""
    monkeypatch.setattr("sys.argv", ["gradwire", "federate", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def metrics(path: Path) -> list[dict[str, Any]]:
    """All rounds, without the clock on the wall."""
    return [{**record, "seconds": None} for record in RunFolder(path, "round").metrics()]


# Whole commands.


@pytest.mark.usefixtures("sklearn")
def test_without_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert federate(monkeypatch) == 0
    (path,) = (tmp_path / "runs").iterdir()
    assert {entry.name for entry in path.iterdir()} == FILES
    said = capsys.readouterr().out
    assert "FedAvg: round 100/100  loss 0." in said
    for word in (
        "accuracy",
        "up 9.64 MB",
        "down 9.64 MB",
        "time",
        "Virtual time",
        f"are in {path.relative_to(tmp_path)}",
    ):
        assert word in said
    records = metrics(path)
    assert [record["round"] for record in records] == list(range(1, 101))
    assert records[-1]["bytes_up"] == records[-1]["bytes_down"] == 100 * 10 * 4 * PARAMETERS
    assert all(b["time"] > a["time"] > 0 for a, b in itertools.pairwise(records))
    assert json.loads((path / "summary.json").read_text())["accuracy"] > 0.9
    task = federate_data.digits()
    expected = partition.dirichlet(task.labels, 100, 0.3, seed=0)  # type: ignore[arg-type]
    assert all(map(torch.equal, expected, partition.load(path / "partition.json", num_examples=1437)))


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert federate(monkeypatch) == 2
    assert "Install it: pip install scikit-learn, or choose --data text." in capsys.readouterr().err


@pytest.mark.usefixtures("sklearn")
@pytest.mark.parametrize(
    "made",
    [
        ["--algorithm", "SCAFCOM(TopK(ratio=0.05))", "--server-optimizer", "FedAdam(lr=0.01)", "--state", "disk"],
        ["--uplink", "TopK(ratio=0.1) + EF21", "--downlink", "TopK(ratio=0.2)", "--dropout", "0.3"],
        ["--algorithm", "FedProx(mu=0.1) + FedBuff(buffer=3)", "--uplink", "QSGD(levels=3)", "--cohort", "7"],
    ],
    ids=["state on disk", "links", "asynchronous"],
)
def test_interrupted_run_goes_on_to_the_bit(made: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = [*made, "--rounds", "9", "--checkpoint-every", "3", "--local-steps", "2"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert federate(monkeypatch, *more, "--output", whole) == 0
    append = RunFolder.append

    def die_in_round_8(self: RunFolder, record: dict[str, Any]) -> None:
        if record["round"] == 8:
            raise RuntimeError("killed")
        append(self, record)

    with monkeypatch.context() as dying:
        dying.setattr(RunFolder, "append", die_in_round_8)
        dying.setattr("sys.argv", ["gradwire", "federate", *more, "--output", str(cut)])
        with pytest.raises(RuntimeError, match="killed"):
            main()
    assert [entry.name for entry in (cut / "checkpoints").iterdir()] == ["round-0000006"]
    assert len(metrics(cut)) == 7
    assert federate(monkeypatch, "--resume", cut) == 0
    assert metrics(cut) == metrics(whole)
    assert {entry.name for entry in cut.iterdir()} - {"clients"} == FILES


@pytest.mark.usefixtures("sklearn")
def test_a_finished_run_gets_more_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    short, long = tmp_path / "short", tmp_path / "long"
    assert federate(monkeypatch, "--rounds", "4", "--output", short) == 0
    assert federate(monkeypatch, "--rounds", "6", "--output", long) == 0
    assert federate(monkeypatch, "--resume", short) == 2
    assert "expected more than the 4 rounds that" in capsys.readouterr().err
    assert federate(monkeypatch, "--resume", short, "--lr", "0.2") == 2
    assert "expected lr=0.1 as the run began, got lr=0.2" in capsys.readouterr().err
    assert federate(monkeypatch, "--resume", short, "--algorithm", "SCAFFOLD") == 2
    assert "expected method='FedAvg' as the run began, got method='SCAFFOLD'" in capsys.readouterr().err
    assert federate(monkeypatch, "--output", short) == 2
    assert "Use --resume to go on." in capsys.readouterr().err
    assert federate(monkeypatch, "--resume", short, "--rounds", "6") == 0
    assert metrics(short) == metrics(long)


@pytest.mark.usefixtures("sklearn")
def test_compare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    methods = ["FedAvg", "SCAFCOM(TopK(ratio=0.01))", "FedAvg + CoordinateMedian", "FedBuff(buffer=5)", "FedAvg"]
    path = tmp_path / "runs"
    assert federate(monkeypatch, "--compare", *methods, "--rounds", "5", "--output", path, "--seed", "3") == 0
    assert {entry.name for entry in path.iterdir()} == {
        "1-fedavg", "2-scafcom-topk-ratio-0-01", "3-fedavg-coordinatemedian", "4-fedbuff-buffer-5", "accuracy.png",
        "clients.png", "comparison.json", "comparison.md",
    }  # fmt: skip
    kept = json.loads((path / "comparison.json").read_text())
    assert [run["method"] for run in kept["runs"]] == methods[:4]
    assert kept["command"].startswith("gradwire federate --compare FedAvg")
    dense, sparse = (kept["runs"][number]["bytes_up"] for number in (0, 1))
    assert dense == 5 * 10 * 4 * PARAMETERS
    assert sparse < 0.03 * dense
    assert (path / "comparison.md").read_text().count("\n") == 6
    assert all(f"{method}" in capsys.readouterr().out for method in methods[:1])
    parts = {(entry / "partition.json").read_text() for entry in path.iterdir() if entry.is_dir()}
    assert len(parts) == 1


@pytest.mark.slow
def test_torchrun_does_what_one_process_does(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [
        "--data",
        str(folder),
        "--algorithm",
        "SCAFCOM(TopK(ratio=0.05))",
        "--rounds",
        "3",
        "--local-steps",
        "2",
    ]
    arguments += ["--cohort", "4", "--dropout", "0.2"]
    assert federate(monkeypatch, *arguments, "--output", tmp_path / "one") == 0
    launcher = [str(SCRIPTS / "torchrun"), "--standalone", "--nproc-per-node", "2", "--no-python"]
    command = [*launcher, str(SCRIPTS / "gradwire"), "federate", *arguments, "--output", str(tmp_path / "two")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=110, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("round 3/3") == 1
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert len(one) == len(two) == 3
    for a, b in zip(one, two, strict=True):
        numbers = {name: value for name, value in a.items() if isinstance(value, int | float)}
        assert {name: b[name] for name in numbers} == pytest.approx(numbers, rel=1e-5)
        assert len(numbers) == len(a) - 2


def test_text_of_a_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run"
    made = ["--data", folder, "--rounds", "3", "--cohort", "3", "--clients", "5", "--epochs", "1", "--eval-every", "3"]
    assert federate(monkeypatch, *made, "--output", path) == 0
    records = metrics(path)
    assert [record["accuracy"] is None for record in records] == [True, True, False]
    assert len(partition.load(path / "partition.json")) == 5


# Mistakes.


@pytest.mark.usefixtures("sklearn")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--algorithm", "FedAvgg"], r"unknown name 'FedAvgg'. Did you mean FedAvg? There is algorithm: "),
        (["--algorithm", "SCAFCOM"], r"SCAFCOM: missing a required argument: 'compressor'"),
        (["--algorithm", "SCALLION(TopK(ratio=0.1))"], r"SCALLION: expected"),
        (["--uplink", "EF"], r"expected a compressor, too"),
        (["--uplink", "Krum"], r"unknown name 'Krum'. "),
        (["--downlink", "dense + TopK"], r"expected one compressor"),
        (["--algorithm", "SCAFFOLD", "--aggregator", "CoordinateMedian"], r"expected a mean, since"),
        (["--algorithm", "SCAFCOM(TopK)", "--uplink", "TopK"], r"expected no uplink beside SCAFCOM"),
        (["--algorithm", "FedBuff", "--downlink", "TopK"], r"--downlink: expected rounds, got 'FedBuff'"),
        (["--server-optimizer", "FedAdam(0.1)"], r"FedAdam: expected named values such as lr=1e-3, got 0.1"),
        (["--server-optimizer", "SCAFFOLD"], r"unknown name 'SCAFFOLD'. There is server optimizer: "),
        (["--partition", "dirichlet"], r"dirichlet: missing a required argument: 'alpha'; expected dirichlet(alpha, "),
        (["--partition", "dirichlet(0.3, clients=3)"], r"dirichlet: multiple values for argument 'clients'"),
        (["--partition", "dirichlet(0.3, min_size=14)"], r"dirichlet: expected a draw whose smallest client has"),
        (["--partition", "halves"], r"expected iid, dirichlet, dirichlet_clients, shards or a .json file"),
        (["--partition", "by_id"], r"--partition: expected data with an owner of every example, got by_id of digits"),
        (["--partition", "iid(open('x'))"], r"expected text such as 'dirichlet(0.3)'"),
        (["--partition", "none.json"], r"No such file"),
        (["--cohort", "101"], r"--cohort: expected at most 100, all clients, got 101"),
        (["--data", "nowhere"], r"--data: expected digits, text or a folder with one file per client"),
        (["--times", "Soon"], r"--times: unknown name 'Soon'. There is client times: FixedTimes, "),
        (["--times", "none.csv"], r"No such file"),
        (["--engine", "torchrun"], r"--engine: expected serial without torchrun"),
        (["--lr", "0"], r"--lr: expected a number > 0, got 0"),
        (["--epochs", "1", "--local-steps", "2"], r"expected either --local-steps or --epochs, got both"),
        (["--compare", "FedAvg", "--algorithm", "SCAFFOLD"], r"--compare: expected whole methods"),
        (["--compare", "FedAvg", "SCAFFOLD + EF"], r"expected a compressor, too"),
        (["--compare", "FedAvg", "SCAFFOLD + SGD(lr=0.1) + CoordinateMedian"], r"expected a mean, since"),
        (["--resume", "nowhere"], r"--resume: expected a run folder with a checkpoint, got 'nowhere'"),
        (["--resume", "nowhere", "--output", "elsewhere"], r"--resume: expected no --output"),
    ],
)
def test_mistakes_get_one_sentence_and_no_files(
    arguments: Sequence[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert federate(monkeypatch, *arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.startswith("gradwire: ")
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_compare_takes_several_values() -> None:
    assert spread(["federate", "--compare", "a", "b", "--seed", "1"])[-4:] == ["--compare", "b", "--seed", "1"]


def test_help_names_every_option(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert federate(monkeypatch, "--help") == 0
    said = capsys.readouterr().out
    named = {"method": "algorithm", "data": "data"}
    for field in federate_options.Options.__dataclass_fields__:
        assert f"--{named.get(field, field).replace('_', '-')}" in said


def test_torchrun_and_serial_do_not_mix(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert federate(monkeypatch, "--data", shutil.os.curdir, "--engine", "serial") == 2
    assert "--engine: expected torchrun under torchrun, got serial" in capsys.readouterr().err
