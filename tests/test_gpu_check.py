"""`make gpu-check` without a GPU: what it measures on one runs here on tiny sizes, and the report takes it in."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gradwire.bench import data, gpu_check, gpu_training, report
from gradwire.bench.model import ByteTransformer, nats_per_byte

_BARE = """
import sys
for name in ("rich", "typer", "matplotlib", "sklearn"):
    sys.modules[name] = None  # importing it is an error
import gradwire.bench.gpu_check
"""


def test_it_needs_no_package_of_the_command() -> None:
    done = subprocess.run([sys.executable, "-c", _BARE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_without_a_gpu_nothing_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu_check.subprocess, "run", lambda *args, **kwargs: SimpleNamespace(returncode=3))
    monkeypatch.setenv("OUT", str(tmp_path))
    assert gpu_check.main() == 3
    assert "nothing was measured" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_with_a_gpu_all_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check.subprocess, "run", lambda *args, **kwargs: SimpleNamespace(returncode=0))
    parts = ("_compressors", "_optimizers", "_work", "_curvature", "_training")
    for part in parts:
        monkeypatch.setattr(gpu_check, part, lambda part=part: ran.append(part))
    assert gpu_check.main() == 0
    assert ran == list(parts)


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OUT", str(tmp_path))
    return tmp_path


def _shown(name: str, out: Path, before: dict[str, Any]) -> str:
    """What the README would show after the results of the CPU."""
    (out / f"{name}.json").write_text(json.dumps(before))
    text = report.fill(f"<!-- results:{name} -->\n<!-- /results:{name} -->\n", out)
    assert report.fill(text, out) == text
    return text.partition("On a GPU:\n\n")[2]


def _kept(name: str) -> dict[str, Any]:
    path = Path(__file__).parents[1] / "bench" / "results" / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_work_beside_a_training_step_is_reported(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "_METHODS", ("ScaledSign + EF", "DeMo(k=8)"))
    gpu_check._work("cpu", parameters=30_000, tokens=32)
    shown = _shown("plan", out, _kept("plan"))
    work, step = (json.loads((out / "plan-cuda.json").read_text())[key] for key in ("work", "step"))
    assert f"| `DeMo(k=8)` | {1 + work['DeMo(k=8)'] / step:.3f} | {1e3 * work['DeMo(k=8)']:.2f} |" in shown
    assert "one of 8 ranks whose collectives send nothing" in shown


def test_steps_with_mkor_are_reported(out: Path) -> None:
    gpu_check._curvature("cpu", batches=(1,), blocks=1)
    shown = _shown("curvature", out, _kept("curvature"))
    ratio = json.loads((out / "curvature-cuda.json").read_text())["overhead"]["ratios"]["1"]["MKOR(AdamW)"]
    assert f"| `MKOR(AdamW)` | {ratio:.2f} |" in shown
    assert "64 tokens" in shown


def test_training_with_simulated_workers_is_reported(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("LAYERS", 1), ("WIDTH", 32), ("HEADS", 2)):
        monkeypatch.setattr(gpu_training, name, value)
    gpu_check._training("cpu", steps=2)
    shown = _shown("train", out, _kept("train"))
    runs = json.loads((out / "train-cuda.json").read_text())["runs"]
    assert [run["configuration"] for run in runs] == list(gpu_training.CONFIGURATIONS)
    dense, half, *_ = runs
    assert dense["compression_rate"] == pytest.approx(1, rel=0.01)
    assert half["compression_rate"] == pytest.approx(2, rel=0.02)
    assert 3 < dense["validation_loss"] < 9  # nats per byte of a model that has seen next to nothing: 5.5
    assert "each of 2 workers, simulated in one process" in shown
    assert "| `dense` |" in shown


def test_the_mean_over_simulated_workers_is_the_gradient_of_their_text_together() -> None:
    corpus = data.standard_library()
    model = ByteTransformer(1, 32, 2)
    parameters = list(model.parameters())
    found = gpu_training._of_workers(model, parameters, corpus, torch.device("cpu"), step=3)
    texts = [corpus.batch(0, 3, worker, gpu_training.BATCH, gpu_training.CONTEXT) for worker in range(2)]
    inputs, targets = (torch.cat(some) for some in zip(*texts, strict=True))
    whole = torch.autograd.grad(nats_per_byte(model(inputs), targets), parameters)
    for workers, together in zip(found, whole, strict=True):
        assert len(workers) == gpu_training.WORKERS
        assert torch.allclose(workers.mean(0), together, atol=1e-6)
