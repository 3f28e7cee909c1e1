"""`gradwire bench sweep`: runs that end early, runs that are taken over, and the best of each optimizer."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from gradwire import optim
from gradwire.bench import data, specs, sweep
from gradwire.bench.cli import main
from gradwire.bench.errors import UsageError
from gradwire.bench.launch import process_group
from gradwire.bench.sweep import QUICK_OPTIONS, train_once
from gradwire.bench.train import Options, Trainer

OPTIONS = replace(QUICK_OPTIONS, steps=6, lr=0.01)
CPU = torch.device("cpu")


@pytest.fixture
def group() -> Iterator[None]:
    with process_group():
        yield


@pytest.fixture(scope="module")
def corpus() -> data.Corpus:
    """Counting bytes: easy to learn, and nothing to read."""
    text = (torch.arange(4096) % 61).to(torch.uint8)
    return data.Corpus("counting", text[:3500], text[3500:])


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The command, in this process; returns its exit code."""
    monkeypatch.setattr("sys.argv", ["gradwire", "bench", "sweep", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def pretend(task: Options) -> dict[str, Any]:
    """A run whose loss is least at lr 0.01, and which diverges at 1."""
    loss = 2 + abs(task.lr - 0.01) + 0.5 * task.seed
    diverged = task.lr == 1
    curve = [{"step": step, "train_loss": 3.0, "validation_loss": loss + 1 - step} for step in (0, 1)]
    return {
        "optimizer": task.optimizer,
        "lr": task.lr,
        "seed": task.seed,
        "validation_loss": None if diverged else loss,
        "diverged": diverged,
        "skipped_steps": 0,
        "seconds": 1.0,
        "curve": curve[: 2 - diverged],
    }


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float, int]]:
    """What has been trained; nothing is, really."""
    keys: list[tuple[str, float, int]] = []

    def fake(tasks: Sequence[Options], workers: int) -> Iterator[dict[str, Any]]:
        for task in reversed(tasks):  # any order will do
            keys.append((task.optimizer, task.lr, task.seed))
            yield pretend(task)

    monkeypatch.setattr(sweep, "_trained", fake)
    return keys


# Runs.


@pytest.mark.usefixtures("group")
def test_a_run_is_that_of_gradwire_train(corpus: data.Corpus) -> None:
    run = train_once(OPTIONS, corpus, CPU)
    trainer = Trainer(OPTIONS, corpus, CPU)
    for step in range(OPTIONS.steps):
        trainer.step(step)
    assert run["validation_loss"] == pytest.approx(trainer.evaluate(), abs=1e-5)
    assert [point["step"] for point in run["curve"]] == [2, 4, 6]
    assert run["curve"][-1]["validation_loss"] == run["validation_loss"] < run["curve"][0]["validation_loss"]
    assert (run["optimizer"], run["lr"], run["seed"], run["diverged"]) == ("AdamW", 0.01, 0, False)
    assert train_once(OPTIONS, corpus, CPU)["curve"] == run["curve"]
    assert train_once(replace(OPTIONS, seed=1), corpus, CPU)["curve"] != run["curve"]


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("lr", [1e3, 1e30])
def test_a_run_that_diverges_ends_early(corpus: data.Corpus, lr: float) -> None:
    options = replace(OPTIONS, steps=1000, optimizer="SGDP(momentum=0.9)", lr=lr)
    run = train_once(options, corpus, CPU)
    assert run["diverged"]
    assert run["validation_loss"] is None
    assert run["curve"][-1]["step"] < 1000


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("optimizer", sweep.default_optimizers())
def test_every_optimizer_learns(corpus: data.Corpus, optimizer: str) -> None:
    run = train_once(replace(OPTIONS, optimizer=optimizer, lr=0.1 if "SGD" in optimizer else 0.03), corpus, CPU)
    assert run["validation_loss"] < run["curve"][0]["validation_loss"]


def test_the_default_is_adamw_and_all_of_ours_that_leave_the_exchange_to_others() -> None:
    names = [text.partition("(")[0] for text in sweep.default_optimizers()]
    ours = [name for name, cls in specs.catalogue()["optimizer"].items() if getattr(optim, name, None) is cls]
    assert names == ["AdamW", *(name for name in ours if not specs.exchanges_itself(name))]
    assert {"AdamP", "SGDP", "DeMo"} <= set(ours)
    assert "SGDP(momentum=0.9)" in sweep.default_optimizers()


# Sweeps.


@pytest.mark.slow
def test_the_command_trains_in_processes_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "sweep.json"
    options = ["--optimizers", "AdamW", "adamp", "--lrs", "0.03", "0.003", "--steps", "3", "--workers", "2", "--quick"]
    assert command(monkeypatch, *options, "--output", str(output)) == 0
    kept = json.loads(output.read_text())
    assert {"date", "command", "torch", "gradwire", "cpu", "cores"} <= kept["machine"].keys()
    assert (kept["machine"]["threads"], kept["machine"]["workers"]) == (1, 2)
    assert (kept["optimizers"], kept["lrs"], kept["seeds"]) == (["AdamW", "adamp"], [0.003, 0.03], [0])
    assert [(run["optimizer"], run["lr"]) for run in kept["runs"]] == [
        (optimizer, lr) for optimizer in kept["optimizers"] for lr in kept["lrs"]
    ]
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "[4/4]" in printed
    assert "over AdamW" in printed

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with process_group():
        task = replace(QUICK_OPTIONS, steps=3, eval_every=1, lr=0.003)
        assert train_once(task, data.standard_library(), CPU)["curve"] == kept["runs"][0]["curve"]
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_a_process_that_fails_ends_the_sweep(capfd: pytest.CaptureFixture[str]) -> None:
    task = replace(QUICK_OPTIONS, optimizer="LBFGS", lr=0.5)  # needs a closure
    with pytest.raises(RuntimeError, match=r"the process of LBFGS, lr 0\.5 has ended"):
        list(sweep._trained([task], workers=2))
    assert "closure" in capfd.readouterr().err


def test_the_best_rate_is_found_and_its_place_named(
    tmp_path: Path, trained: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output, figure = tmp_path / "sweep.json", tmp_path / "docs" / "picture.png"
    options = ["--optimizers", "SGDP", "AdamW", "--lrs", "0.001", "0.01", "1", "--seeds", "2"]
    assert command(monkeypatch, *options, "--output", str(output), "--figure", str(figure)) == 0
    assert len(trained) == 12
    assert figure.exists()
    assert not output.with_suffix(".png").exists()
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith((" SGDP ", " AdamW "))]
    assert rows == [
        ["SGDP", "0.01", "no", "2.250", "1", "of", "3"],
        ["AdamW", "0.01", "no", "2.250", "+0.000", "1", "of", "3"],
    ]
    sweep.main(["AdamW"], [1.0])
    assert "none" in capsys.readouterr().out
    sweep.main(["AdamW"], [0.001, 0.003])
    assert "yes" in capsys.readouterr().out


def test_an_interrupted_sweep_goes_on(
    tmp_path: Path, trained: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "sweep.json"
    lrs = [0.003, 0.01, 0.03]
    uninterrupted = tmp_path / "uninterrupted.json"
    sweep.main(["AdamP"], lrs, output=uninterrupted)

    def interrupted(tasks: Sequence[Options], workers: int) -> Iterator[dict[str, Any]]:
        yield pretend(tasks[1])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sweep, "_trained", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sweep.main(["AdamP"], lrs, output=output)
    assert "1 of 3 runs are in" in capsys.readouterr().out
    assert [run["lr"] for run in json.loads(output.read_text())["runs"]] == [0.01]
    with pytest.raises(UsageError, match="expected a finished sweep, got 1 of 3 runs"):
        sweep.sweep_rows(json.loads(output.read_text()))

    trained.clear()
    sweep.main(["AdamP"], lrs, output=output)
    assert trained == [("AdamP", 0.03, 0), ("AdamP", 0.003, 0)]
    assert "1 of 3 runs are taken from" in capsys.readouterr().out
    assert json.loads(output.read_text())["runs"] == json.loads(uninterrupted.read_text())["runs"]

    trained.clear()
    sweep.main(["AdamW", "AdamP"], [*lrs, 1.0], output=output)  # more of everything
    assert len(trained) == 8 - 3
    assert len(json.loads(output.read_text())["runs"]) == 8


def test_mistakes_are_named(tmp_path: Path, trained: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "sweep.json"
    sweep.main(["AdamW"], [0.01], steps=5, output=output)
    other = tmp_path / "other.json"
    other.write_text("{}")
    trained.clear()
    for arguments, message in [
        ({"optimizers": ["nothing"]}, "unknown name 'nothing'"),
        ({"optimizers": ["AdamP(lr=0.1)"]}, "--optimizers: expected no lr, .* got 'AdamP\\(lr=0.1\\)'"),
        ({"lrs": [0.1, 0.0]}, "--lrs: expected learning rates > 0, got 0.0"),
        ({"steps": 6, "output": output}, "--output: expected a new file or one with steps=6, .* with steps=5"),
        ({"steps": 5, "output": output, "lrs": [0.1]}, "holds AdamW, lr 0.01, which is not part of this sweep"),
        ({"output": other}, "--output: expected a new file or that of a sweep, got .*other.json"),
    ]:
        with pytest.raises(UsageError, match=message):
            sweep.main(**{"optimizers": ["AdamW"], "lrs": [0.01], **arguments})
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="expected one process, without torchrun"):
        sweep.main()
    assert trained == []
    assert not dist.is_initialized()


def test_options_of_all_runs_are_equal_but_for_three(tmp_path: Path, trained: list[Any]) -> None:
    sweep.main(["AdamW"], [0.01], output=tmp_path / "sweep.json")
    kept = json.loads((tmp_path / "sweep.json").read_text())
    assert asdict(sweep.OPTIONS).keys() - kept["options"].keys() == {"optimizer", "lr", "seed"}


def test_the_kept_results_are_those_of_the_default_sweep() -> None:
    kept = json.loads((Path(__file__).parents[1] / "bench" / "results" / "sweep.json").read_text())
    assert (kept["optimizers"], kept["lrs"]) == (sweep.default_optimizers(), list(sweep.LRS))
    assert kept["options"].items() <= asdict(sweep.OPTIONS).items()
    shown = {(row.optimizer, row.lr) for row in sweep.sweep_rows(kept)}
    assert all(run["skipped_steps"] == 0 for run in kept["runs"] if (run["optimizer"], run["lr"]) in shown)
    assert not any(row.edge or row.lr is None for row in sweep.sweep_rows(kept))
