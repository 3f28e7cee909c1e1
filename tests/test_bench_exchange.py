"""`gradwire bench exchange`: real ranks, runs that are taken over, and each method's best beside the baseline."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from gradwire.bench import data, exchange, plots, report, teams
from gradwire.bench.cli import main
from gradwire.bench.errors import UsageError
from gradwire.bench.exchange import QUICK_OPTIONS, Task, train_once
from gradwire.bench.exchange_table import exchange_rows, exchange_section
from gradwire.bench.model import ByteTransformer, num_parameters

DEMO = "DeMo(k=8, chunk=16)"
EMPTY = "<!-- results:exchange -->\n<!-- /results:exchange -->\n![loss](docs/loss-over-bytes.png)\n"


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The command, in this process; returns its exit code."""
    monkeypatch.setattr("sys.argv", ["gradwire", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def counting() -> data.Corpus:
    """Counting bytes: easy to learn, and nothing to read."""
    text = (torch.arange(4096) % 61).to(torch.uint8)
    return data.Corpus("counting", text[:3500], text[3500:])


def pretend(task: Task) -> dict[str, Any]:
    """A run whose loss is least at lr 0.01, twice the baseline's rate for DeMo, and which diverges at 1."""
    options, demo = task.options, task.options.configuration.startswith("DeMo")
    loss = 2.0 + 0.1 * demo + abs(options.lr - 0.01) + 0.5 * options.seed
    sent = (100.0 if demo else 8000.0) * task.world_size
    diverged = options.lr == 1
    points = [{"step": step, "validation_loss": loss + 2 - step, "bytes_sent": sent * step} for step in (1, 2)]
    return {
        **task.entries,
        "ranks_equal": True,
        "validation_loss": None if diverged else loss,
        "diverged": diverged,
        "seconds": 1.0,
        "curve": points[: 2 - diverged],
    }


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What has been trained; nothing is, really."""
    entries: list[dict[str, Any]] = []

    def fake(tasks: Sequence[Task]) -> Iterator[dict[str, Any]]:
        for task in reversed(tasks):  # any order will do
            entries.append(task.entries)
            yield pretend(task)

    monkeypatch.setattr(exchange, "_trained", fake)
    return entries


# Runs.


def _run(configuration: str, lr: float, batch: int) -> dict[str, Any]:
    options = replace(QUICK_OPTIONS, configuration=configuration, lr=lr, batch=batch, steps=6, eval_every=2)
    return train_once(Task(dist.get_world_size(), options), counting(), torch.device("cpu"))


def test_a_run_of_dense_averaging_counts_a_ring_of_all_gradients() -> None:
    first, second = run_ranks(2, _run, "dense + AdamW", 0.01, 2)
    assert first["curve"] == second["curve"]
    assert first["ranks_equal"]
    assert [point["step"] for point in first["curve"]] == [2, 4, 6]
    model = ByteTransformer(QUICK_OPTIONS.layers, QUICK_OPTIONS.width, QUICK_OPTIONS.heads)
    entries, flags = 4 * num_parameters(model), 64  # with room for what tells whether all of it is finite
    for point in first["curve"]:
        assert entries <= point["bytes_sent"] / point["step"] <= entries + flags
    assert first["curve"][-1]["validation_loss"] == first["validation_loss"] < first["curve"][0]["validation_loss"]
    assert {key: first[key] for key in ("configuration", "world_size", "lr", "seed")} == {
        "configuration": "dense + AdamW", "world_size": 2, "lr": 0.01, "seed": 0,
    }  # fmt: skip


def test_a_run_of_an_optimizer_that_exchanges_by_itself() -> None:
    first, second = run_ranks(2, _run, DEMO, 0.01, 2)
    assert first["curve"] == second["curve"]
    assert first["ranks_equal"]
    assert first["validation_loss"] < first["curve"][0]["validation_loss"]
    (dense, _) = run_ranks(2, _run, "dense + AdamW", 0.01, 2)
    assert 0 < first["curve"][-1]["bytes_sent"] < dense["curve"][-1]["bytes_sent"] / 5


def test_a_run_that_diverges_ends_on_all_ranks_at_once() -> None:
    first, second = run_ranks(2, _run, "dense + SGD", 1e3, 2)
    assert first["diverged"]
    assert first["validation_loss"] is None
    assert first["curve"][-1]["step"] == second["curve"][-1]["step"] < 6


@pytest.mark.slow
def test_the_command_trains_on_ranks_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "exchange.json"
    monkeypatch.setattr(teams, "_RUNS_PER_PROCESS", 3)
    options = ["--methods", "dense + AdamW", DEMO, "--lrs", "0.03", "0.003", "--world-sizes", "2", "--steps", "2"]
    assert command(monkeypatch, "bench", "exchange", *options, "--quick", "--output", str(output)) == 0
    kept = json.loads(output.read_text())
    assert {"date", "command", "torch", "gradwire", "cpu", "cores"} <= kept["machine"].keys()
    assert (kept["benchmark"], kept["machine"]["threads"], kept["options"]["global_batch"]) == ("exchange", 1, 4)
    assert [(run["configuration"], run["world_size"], run["lr"]) for run in kept["runs"]] == [
        (method, 2, lr) for method in ("dense + AdamW", DEMO) for lr in (0.003, 0.03)
    ]
    assert all(run["ranks_equal"] and not run["diverged"] for run in kept["runs"])
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "[4/4]" in printed
    assert "best lr" in printed


@pytest.mark.slow
def test_a_rank_that_fails_ends_the_comparison(capfd: pytest.CaptureFixture[str]) -> None:
    task = Task(2, replace(QUICK_OPTIONS, configuration="dense + LBFGS", lr=0.5, batch=2))  # needs a closure
    with pytest.raises(RuntimeError, match=r"the process of 2 ranks, dense \+ LBFGS, lr 0\.5 has ended"):
        list(exchange._trained([task]))
    assert "closure" in capfd.readouterr().err


# Comparisons.


def test_every_world_trains_on_the_same_number_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks: list[Task] = []

    def fake(missing: Sequence[Task]) -> Iterator[dict[str, Any]]:
        tasks.extend(missing)
        return map(pretend, missing)

    monkeypatch.setattr(exchange, "_trained", fake)
    exchange.main(["dense + AdamW"], [0.01], world_sizes=[2, 4])
    assert {task.world_size * task.options.batch for task in tasks} == {exchange.OPTIONS.batch}
    differing = {"configuration", "batch"}
    for task in tasks:
        options, base = asdict(task.options), asdict(exchange.OPTIONS)
        assert {name for name in base if options[name] != base[name]} <= differing | {"lr"}


def test_an_interrupted_comparison_goes_on(
    tmp_path: Path, trained: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output, methods, lrs = tmp_path / "exchange.json", ["dense + AdamW", "DeMo"], [0.001, 0.01, 0.1]
    uninterrupted = tmp_path / "uninterrupted.json"
    exchange.main(methods, lrs, output=uninterrupted)

    def interrupted(tasks: Sequence[Task]) -> Iterator[dict[str, Any]]:
        yield pretend(tasks[4])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(exchange, "_trained", interrupted)
        with pytest.raises(KeyboardInterrupt):
            exchange.main(methods, lrs, output=output)
    assert "1 of 12 runs are in" in capsys.readouterr().out
    with pytest.raises(UsageError, match="expected a finished comparison, got 1 of 12 runs"):
        exchange_rows(json.loads(output.read_text()))

    trained.clear()
    exchange.main(methods, lrs, output=output)
    assert len(trained) == 11
    assert {"configuration": "DeMo", "world_size": 2, "lr": 0.01, "seed": 0} not in trained
    assert json.loads(output.read_text())["runs"] == json.loads(uninterrupted.read_text())["runs"]


def test_rows_set_each_method_beside_the_first_on_as_many_ranks(tmp_path: Path, trained: list[Any]) -> None:
    output = tmp_path / "exchange.json"
    exchange.main(["dense + AdamW", "DeMo"], [0.001, 0.01, 1.0], seeds=2, output=output)
    kept = json.loads(output.read_text())
    rows = exchange_rows(kept)
    assert [(row.world_size, row.method) for row in rows] == [
        (2, "dense + AdamW"), (2, "DeMo"), (4, "dense + AdamW"), (4, "DeMo"),
    ]  # fmt: skip
    dense, demo = rows[2:]
    assert (dense.lr, dense.loss, dense.edge, dense.difference, dense.fewer) == (0.01, 2.25, False, None, 1.0)
    assert (demo.lr, demo.loss, demo.bytes_per_step, demo.fewer) == (0.01, pytest.approx(2.35), 400.0, 80.0)
    assert demo.difference == pytest.approx(0.1 / 2.25)
    assert demo.curve == [(400.0, pytest.approx(3.35)), (800.0, pytest.approx(2.35))]
    assert demo.losses[1.0] is None
    assert demo.cells() == ["0.01", "2.350", "+4.4%", "400 B", "80"]


def test_rows_say_what_is_at_the_edge_and_what_diverged(tmp_path: Path, trained: list[Any]) -> None:
    output = tmp_path / "exchange.json"
    exchange.main(["dense + AdamW", "DeMo"], [0.01, 0.1], world_sizes=[2], output=output)
    kept = json.loads(output.read_text())
    assert exchange_rows(kept)[1].cells() == ["0.01 (edge)", "2.100", "+5.0%", "200 B", "80"]
    assert "counts. A rate at the edge of the grid may not be the best. Bytes" in exchange_section(kept)
    exchange.main(["dense + AdamW", "DeMo"], [1.0], world_sizes=[2], output=tmp_path / "diverged.json")
    rows = exchange_rows(json.loads((tmp_path / "diverged.json").read_text()))
    assert rows[1].cells() == ["every one diverged", "", "", "200 B", "80"]
    assert rows[1].curve == []


def test_the_readme_gets_table_and_picture(tmp_path: Path, trained: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    exchange.main(["dense + AdamW", "DeMo"], [0.001, 0.01, 1.0], output=tmp_path / "exchange.json")
    readme = tmp_path / "README.md"
    readme.write_text(EMPTY)
    made = ["report", "--readme", str(readme), "--results", str(tmp_path)]
    assert [command(monkeypatch, *made, mode) for mode in ("--check", "--write", "--check")] == [1, 0, 0]
    rows = [line for line in readme.read_text().splitlines() if line.startswith("|")]
    assert rows[2:] == [
        "| 2 | `dense + AdamW` | 0.01 | 2.000 |  | 16 kB | 1 |",
        "| 2 | `DeMo` | 0.01 | 2.100 | +5.0% | 200 B | 80 |",
        "| 4 | `dense + AdamW` | 0.01 | 2.000 |  | 32 kB | 1 |",
        "| 4 | `DeMo` | 0.01 | 2.100 | +5.0% | 400 B | 80 |",
    ]
    assert len({row.count("|") for row in rows}) == 1
    assert "500 steps of 1024 bytes of text shared among the ranks, seed 0." in readme.read_text()
    assert "edge" not in readme.read_text()
    figure = tmp_path / "docs" / "loss-over-bytes.png"
    assert figure.read_bytes().startswith(b"\x89PNG")

    kept = json.loads((tmp_path / "exchange.json").read_text())
    plots.plot_exchange(kept | {"parameters": 1_000_000}, figure)
    assert command(monkeypatch, *made, "--check") == 1
    assert report.fill(readme.read_text(), tmp_path) == readme.read_text()  # it is the picture that differs


def test_a_picture_is_drawn_where_everything_diverged(tmp_path: Path, trained: list[Any]) -> None:
    output = tmp_path / "exchange.json"
    exchange.main(["dense + AdamW", "DeMo"], [1.0], output=output)
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_mistakes_are_named(tmp_path: Path, trained: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    output, other = tmp_path / "exchange.json", tmp_path / "other.json"
    exchange.main(["dense + AdamW"], [0.01], steps=5, output=output)
    other.write_text(json.dumps(json.loads(output.read_text()) | {"benchmark": "sweep"}))
    trained.clear()
    for arguments, message in [
        ({"methods": ["dense + Nothing"]}, "unknown name 'Nothing'"),
        ({"methods": ["dense + AdamW(lr=0.1)"]}, "--methods: expected no lr, .* got 'dense \\+ AdamW\\(lr=0.1\\)'"),
        ({"methods": ["dense + DeMo"]}, "DeMo: expected no compressor, feedback or exchange beside it"),
        ({"lrs": [0.1, 0.0]}, "--lrs: expected learning rates > 0, got 0.0"),
        ({"world_sizes": [2, 3]}, "--world-sizes: expected numbers from 2 on that divide the 16 sequences .* got 3"),
        ({"world_sizes": [1]}, "--world-sizes: .* got 1"),
        ({"steps": 6, "output": output}, "--output: expected a new file or one with steps=6, .* with steps=5"),
        ({"steps": 5, "output": output, "lrs": [0.1]}, "holds 2 ranks, dense \\+ AdamW, lr 0.01, which is not part of"),
        ({"steps": 5, "output": other}, "expected a new file or one with benchmark='exchange', .* benchmark='sweep'"),
    ]:
        with pytest.raises(UsageError, match=message):
            exchange.main(**{"methods": ["dense + AdamW"], "lrs": [0.01], **arguments})
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="bench exchange: expected one process, without torchrun"):
        exchange.main()
    assert trained == []
    assert not dist.is_initialized()


def test_the_kept_results_are_those_of_the_default_comparison() -> None:
    kept = json.loads((Path(__file__).parents[1] / "bench" / "results" / "exchange.json").read_text())
    assert (kept["methods"], kept["lrs"]) == (list(exchange.METHODS), list(exchange.LRS))
    assert kept["world_sizes"] == list(exchange.WORLD_SIZES)
    assert kept["options"].pop("global_batch") == exchange.OPTIONS.batch
    assert kept["options"].items() <= asdict(exchange.OPTIONS).items()
    assert all(run["ranks_equal"] for run in kept["runs"])
    assert all(run["skipped_steps"] == 0 for run in kept["runs"] if not run["diverged"])
    assert not any(row.lr is None for row in exchange_rows(kept))
