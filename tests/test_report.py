"""The README's tables are those of the kept results."""

import json
from pathlib import Path
from typing import Any

import pytest

from gradwire.bench import plots, report
from gradwire.bench.cli import main
from gradwire.bench.errors import UsageError

ROOT = Path(__file__).parents[1]
EMPTY = "before\n<!-- results:train -->\n<!-- /results:train -->\nafter\n"


def _run(configuration: str, loss: float | None, bytes_per_step: float) -> dict[str, object]:
    return {
        "configuration": configuration,
        "validation_loss": loss,
        "bytes_per_step": bytes_per_step,
        "compression_rate": 3.2e6 / bytes_per_step,
        "seconds": 12.3,
        "parameters": 820_352,
        "world_size": 2,
        "data": {"name": "test text"},
        "options": {"steps": 10, "batch": 2, "context": 8, "seed": 0},
    }


@pytest.fixture
def results(tmp_path: Path) -> Path:
    runs = [_run("dense", 2.0, 3.2e6), _run("ScaledSign + EF", 2.1234, 1e5), _run("bad", None, 1e5)]
    machine = {"cpu": "A CPU", "torch": "2.13.0", "date": "2026-01-02T03:04:05"}
    content = {"kind": "train", "command": "gradwire train", "machine": machine, "runs": runs}
    (tmp_path / "train.json").write_text(json.dumps(content))
    return tmp_path


def test_fill_writes_the_table_between_the_markers(results: Path) -> None:
    text = report.fill(EMPTY, results)
    assert text.startswith("before\n<!-- results:train -->\n| Configuration |")
    assert text.endswith("<!-- /results:train -->\nafter\n")
    assert "| `dense` | 2.000 |  | 3.2 MB | 1.0 | 12 |" in text
    assert "| `ScaledSign + EF` | 2.123 | +0.123 | 100 kB | 32.0 | 12 |" in text
    assert "| `bad` | not finite |  | 100 kB | 32.0 | 12 |" in text
    assert report.fill(text, results) == text


def test_what_a_gpu_measured_follows(results: Path) -> None:
    kept = json.loads((results / "train.json").read_text())
    kept["machine"]["gpu"] = "A GPU"
    kept["runs"][0]["seconds"] = 1.2
    (results / "train-cuda.json").write_text(json.dumps(kept))
    text = report.fill(EMPTY, results)
    first, second = text.split("\nOn a GPU:\n\n")
    assert "| `dense` | 2.000 |  | 3.2 MB | 1.0 | 12 |" in first
    assert "| `dense` | 2.000 |  | 3.2 MB | 1.0 | 1 |" in second
    assert report.fill(text, results) == text


def _step(algorithm: str, source: str, mode: str, ratio: float) -> list[dict[str, object]]:
    common = {"algorithm": algorithm, "source": source, "mode": mode, "ratio": ratio, "over_floor": 1.25}
    common |= {"us_per_tensor": 8.0, "peak_share": None, "first_step_cold_s": None, "first_step_warm_s": None}
    return [common | {"case": case} for case in ("matrix", "gpt2", "small")]


def _optim() -> dict[str, Any]:
    case = {"title": "", "tensors": 148, "parameters": 124_439_808, "reference_s": 0.05, "copy_bytes_per_s": 2e10}
    results = [
        *_step("AdamW", "torch", "fused", 1.0),
        *_step("AdamW", "torch", "loop", 6.25),
        *_step("AdamP", "gradwire", "loop", 12.0),
        *_step("AdamP", "gradwire", "foreach", 9.0),
        *_step("AdamP", "gradwire", "fused", 1.5),
        *_step("AdamP", "adamp", "default", 25.9),
        *_step("AdamP", "timm", "default", 26.3),
        *_step("LaProp", "timm", "default", 7.0),  # nothing of ours to set it beside
    ]
    (whole,) = [row for row in results if (row["source"], row["mode"], row["case"]) == ("gradwire", "fused", "gpt2")]
    whole |= {"peak_share": 0.0312, "first_step_cold_s": 21.04, "first_step_warm_s": 3.0}
    machine = {"cpu": "A CPU", "torch": "2.13.0", "date": "2026-01-02T03:04:05", "threads": 2, "command": "gradwire x"}
    cases = dict.fromkeys(("matrix", "gpt2", "small"), case)
    return {"machine": machine, "cases": cases, "results": results, "not_measured": {"heavyball": "not installed"}}


def test_fill_writes_the_table_of_optimizers(tmp_path: Path) -> None:
    (tmp_path / "optim.json").write_text(json.dumps(_optim()))
    text = report.fill(EMPTY.replace("train", "optim"), tmp_path)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert rows[2:] == [
        "| `AdamW` of torch | 1.00 | 1.00 | 1.2 | 8.0 |  |  | 6.2 |  |",
        "| `AdamP` | 1.50 | 1.50 | 1.2 | 8.0 | 21.0, 3.0 s | 3.1% | 9.0 | adamp 25.9, timm 26.3 |",
    ]
    assert len({row.count("|") for row in rows}) == 1
    assert "A CPU, threads: 2, torch 2.13.0, 2026-01-02. Not measured: heavyball: not installed." in text
    assert report.fill(text, tmp_path) == text


def test_whole_training_steps_are_told(tmp_path: Path) -> None:
    step = {"algorithm": "DeMo", "parameters": 815_360}
    training = [step | {"tokens": 65_536, "ratio": 1.0034}, step | {"tokens": 4_096, "ratio": 1.037}]
    (tmp_path / "optim.json").write_text(json.dumps(_optim() | {"training": training}))
    text = report.fill(EMPTY.replace("train", "optim"), tmp_path)
    assert (
        "Whole training steps of the 0.82 M-parameter transformer, over those with fused AdamW: "
        "of 65,536 tokens `DeMo` 1.003; of 4,096 tokens `DeMo` 1.037. A CPU"
    ) in text


def test_the_table_of_optimizers_needs_every_case(tmp_path: Path) -> None:
    kept = _optim()
    del kept["cases"]["matrix"]
    (tmp_path / "optim.json").write_text(json.dumps(kept))
    with pytest.raises(UsageError, match="expected results of bench optim on all cases, got gpt2, small"):
        report.fill(EMPTY.replace("train", "optim"), tmp_path)


def test_a_figure_of_optimizers_is_drawn_where_a_case_is_missing(tmp_path: Path) -> None:
    kept = _optim()
    kept["results"] = kept["results"][1:]
    plots.plot_optimizers(kept, tmp_path / "optim.png")
    assert (tmp_path / "optim.png").read_bytes().startswith(b"\x89PNG")


def _sweep() -> dict[str, Any]:
    losses = {"AdamW": (2.5, 2.0, None), "SGDP(momentum=0.9)": (3.0, 2.4, 2.25), "AdamP": (None, None, None)}
    runs = [
        {
            "optimizer": optimizer,
            "lr": lr,
            "seed": seed,
            "validation_loss": loss and loss + 0.01 * seed,
            "curve": [{"step": step, "validation_loss": (loss or 9.0) + 2 - step} for step in (1, 2)],
        }
        for optimizer, by_lr in losses.items()
        for lr, loss in zip((0.001, 0.01, 1.0), by_lr, strict=True)
        for seed in (0, 2)
    ]
    return {
        "machine": {"torch": "2.13.0", "date": "2026-01-02T03:04:05", "command": "gradwire bench sweep"},
        "options": {"steps": 10, "batch": 2, "context": 8, "warmup": 0.1},
        "parameters": 120_000,
        "data": {"name": "test text"},
        "optimizers": list(losses),
        "lrs": [0.001, 0.01, 1.0],
        "seeds": [0, 2],
        "runs": runs,
    }


def test_fill_writes_the_table_of_the_sweep(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text(json.dumps(_sweep()))
    text = report.fill(EMPTY.replace("train", "sweep"), tmp_path)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert rows[2:] == [
        "| `AdamW` | 0.01 | 2.010 |  |",
        "| `SGDP(momentum=0.9)` | 1 (edge of the grid) | 2.260 | +0.250 |",
        "| `AdamP` | every one diverged |  |  |",
    ]
    assert len({row.count("|") for row in rows}) == 1
    assert "peak learning rates 0.001, 0.01, 1, reached after a warm-up of 10% of the steps" in text
    assert "0.12 M parameters, 10 steps of 16 bytes, the mean over seeds 0 to 2." in text
    assert report.fill(text, tmp_path) == text


def test_a_curve_is_the_mean_over_seeds() -> None:
    kept = _sweep()
    kept["runs"][3]["curve"][1]["validation_loss"] = 3.0  # AdamW at 0.01, seed 2
    first, *_ = report.sweep_rows(kept)
    assert first.curve == [(1, 3.0), (2, 2.5)]
    assert first.losses[1.0] is None


def test_the_table_of_the_sweep_needs_every_run(tmp_path: Path) -> None:
    kept = _sweep()
    kept["runs"].pop()
    (tmp_path / "sweep.json").write_text(json.dumps(kept))
    with pytest.raises(UsageError, match="expected a finished sweep, got 17 of 18 runs"):
        report.fill(EMPTY.replace("train", "sweep"), tmp_path)


def test_figures_are_drawn_from_the_kept_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    readme, kept = tmp_path / "README.md", tmp_path / "sweep.json"
    kept.write_text(json.dumps(_sweep()))
    readme.write_text(EMPTY.replace("train", "sweep") + "![losses](docs/optimizers.png)\n")

    def outcome(mode: str) -> int:
        command = ["gradwire", "report", mode, "--readme", str(readme), "--results", str(tmp_path)]
        monkeypatch.setattr("sys.argv", command)
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0)

    assert [outcome(mode) for mode in ("--check", "--write", "--check")] == [1, 0, 0]
    figure = tmp_path / "docs" / "optimizers.png"
    assert figure.read_bytes().startswith(b"\x89PNG")
    plots.plot_sweep(_sweep() | {"parameters": 1_000_000}, figure)
    capsys.readouterr()
    assert outcome("--check") == 1
    assert str(figure) in capsys.readouterr().out
    assert [outcome(mode) for mode in ("--write", "--check")] == [0, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no marker", "expected markers"),
        (EMPTY.replace("train", "nothing"), "unknown results 'nothing'. There is train"),
    ],
)
def test_fill_names_what_is_missing(text: str, message: str, results: Path) -> None:
    with pytest.raises(UsageError, match=message):
        report.fill(text, results)


def test_fill_needs_the_results(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"expected results in .*train\.json"):
        report.fill(EMPTY, tmp_path)


def test_check_fails_until_written(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = results / "README.md"
    readme.write_text(EMPTY)
    for mode, code in (("--check", 1), ("--write", 0), ("--check", 0)):
        command = ["gradwire", "report", mode, "--readme", str(readme), "--results", str(results)]
        monkeypatch.setattr("sys.argv", command)
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == code


def test_the_readme_shows_the_kept_results() -> None:
    readme = (ROOT / "README.md").read_text()
    assert report.fill(readme, ROOT / "bench" / "results") == readme, "run `gradwire report --write`"
    assert not plots.stale(readme, ROOT / "bench" / "results", ROOT), "run `gradwire report --write`"


def test_the_kept_results_are_those_of_the_default_comparison() -> None:
    from gradwire.bench.specs import DEFAULTS

    runs = json.loads((ROOT / "bench" / "results" / "train.json").read_text())["runs"]
    assert [run["configuration"] for run in runs] == list(DEFAULTS)
    assert all(run["ranks_equal"] and run["skipped_steps"] == 0 for run in runs)
    assert all(run["validation_loss"] < 3 for run in runs)


def test_fill_writes_the_table_of_compressors(tmp_path: Path) -> None:
    seconds = {"encode eager": 0.002, "decode eager": 0.0005}
    result = {"name": "ScaledSign()", "source": "gradwire", "compression_rate": 31.0, "copy_s": 0.0004}
    results = [
        result | {"seconds": seconds | {"encode fused": 0.001, "decode fused": 0.0004}},
        result | {"name": "bf16_compress_hook", "source": "torch", "compression_rate": 2.0, "seconds": seconds},
    ]
    machine = {"cpu": "A CPU", "torch": "2.13.0", "date": "2026-01-02T03:04:05", "threads": 2, "command": "gradwire x"}
    (tmp_path / "compression.json").write_text(json.dumps({"machine": machine, "numel": 10**6, "results": results}))
    text = report.fill(EMPTY.replace("train", "compression"), tmp_path)
    assert [line for line in text.splitlines() if line.startswith("|")][2:] == [
        "| `ScaledSign()` | 31.0 | 4.00 | 2.00 | 10.00 | 8.00 |",
        "| `bf16_compress_hook` of torch | 2.0 |  | 2.00 |  | 8.00 |",
    ]
    assert "1,000,000 float32 entries, beside a copy of them (10.0 GB/s)" in text
    assert "A CPU, threads: 2, torch 2.13.0, 2026-01-02. Made by `gradwire x`." in text


def test_a_picture_of_optimizers_says_what_it_shows(tmp_path: Path) -> None:
    (tmp_path / "optim.json").write_text(json.dumps(_optim()))
    text = "[one picture](docs/optimizer-speed.png)"
    (draw,) = plots.stale(text, tmp_path, tmp_path).values()
    (tmp_path / "docs").mkdir()
    draw()
    assert plots.stale(text, tmp_path, tmp_path) == {}
    (tmp_path / "optim.json").write_text(json.dumps(_optim() | {"not_measured": {}}))
    assert len(plots.stale(text, tmp_path, tmp_path)) == 1
