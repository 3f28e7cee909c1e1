"""The README's tables are those of the kept results."""

import json
from pathlib import Path

import pytest

from gradwire.bench import report
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


def test_the_kept_results_are_those_of_the_default_comparison() -> None:
    from gradwire.bench.specs import DEFAULTS

    runs = json.loads((ROOT / "bench" / "results" / "train.json").read_text())["runs"]
    assert [run["configuration"] for run in runs] == list(DEFAULTS)
    assert all(run["ranks_equal"] and run["skipped_steps"] == 0 for run in runs)
    assert all(run["validation_loss"] < 3 for run in runs)
