"""`gradwire bench curvature`: its K-FAC, its runs, its choice of rates, and the table."""

import json
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradwire.bench import curvature, curvature_overhead, curvature_problems, data, report
from gradwire.bench.cli import main
from gradwire.bench.curvature_problems import METHODS, SETTINGS, Digits, Problem, Setting
from gradwire.bench.curvature_table import curvature_rows, curvature_section
from gradwire.bench.errors import UsageError
from gradwire.bench.kfac import KFAC

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
TEXT = (torch.arange(4096) % 61).to(torch.uint8)
CORPUS = data.Corpus("counting", TEXT[:3500], TEXT[3500:])


# K-FAC.


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kl_clip", [1e9, 1e-4])
def test_kfac_solves_with_the_kronecker_product(bias: bool, kl_clip: float) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 2, bias=bias).double()
    lr, damping = 0.1, 0.01
    optimizer = KFAC(layer, torch.optim.SGD(layer.parameters(), lr=lr), damping=damping, kl_clip=kl_clip, decay=0.7)
    a_factor = g_factor = None
    for _ in range(3):
        x, target = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
        before = [p.detach().numpy().copy() for p in layer.parameters()]
        optimizer.zero_grad()
        (layer(x) - target).square().sum(1).mean().backward()
        optimizer.step()

        a = np.column_stack([x, np.ones(5)]) if bias else x.numpy()
        whole = np.column_stack([before[0], before[1]]) if bias else before[0]
        g = 2 * (a @ whole.T - target.numpy())
        new = (a.T @ a / 5, g.T @ g / 5)
        a_factor = new[0] if a_factor is None else 0.7 * a_factor + 0.3 * new[0]
        g_factor = new[1] if g_factor is None else 0.7 * g_factor + 0.3 * new[1]
        pi = np.sqrt((np.trace(a_factor) / len(a_factor)) / (np.trace(g_factor) / 2))
        fisher = np.kron(
            g_factor + np.sqrt(damping) / pi * np.eye(2), a_factor + pi * np.sqrt(damping) * np.eye(len(a_factor))
        )
        gradient = g.T @ a / 5
        update = np.linalg.solve(fisher, gradient.flatten()).reshape(gradient.shape)
        update *= min(1.0, np.sqrt(kl_clip / (lr**2 * np.sum(update * gradient))))
        after = [p.detach().numpy() for p in layer.parameters()]
        found = np.column_stack(after) if bias else after[0]
        np.testing.assert_allclose(found, whole - lr * update, rtol=1e-9, atol=1e-12)


# Runs.


class Toy(Problem):
    """A square whose loss falls by a known factor per step."""

    def __init__(self, seed: int, corpus: data.Corpus) -> None:
        self.model = nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.model.weight, 2.0 + seed)

    def loss(self, step: int) -> Tensor:
        return self.model.weight.square().sum() / 2

    def validation_loss(self) -> float:
        return float(self.model.weight.detach().square())


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The only problem; its models have no layer that a hook would see, so that only plain optimizers go."""
    lrs: Any = dict.fromkeys(("SGD", "K-FAC", "AdamW", "LAMB"), 0.1)
    setting = Setting(Toy, "Toy", (1.0, 0.5), 40, 2, 0, lrs)
    plain = curvature_problems.Method("SGD", lambda model, lr: torch.optim.SGD(model.parameters(), lr=lr))
    other = curvature_problems.Method("AdamW", plain.build, "plain")
    for module in (curvature, curvature_problems):
        monkeypatch.setattr(module, "SETTINGS", {"toy": setting})
        monkeypatch.setattr(module, "METHODS", {"plain": plain, "other": other})
    monkeypatch.setattr(curvature, "digest", lambda problem, corpus: "0")
    monkeypatch.setattr(curvature, "overhead", lambda *_, **__: OVERHEAD)
    monkeypatch.setattr(data, "standard_library", lambda: CORPUS)


OVERHEAD: dict[str, Any] = {
    "context": 64,
    "steps": 120,
    "parameters": 820_352,
    "base_ms": {"4": 25.0, "16": 90.0},
    "ratios": {
        "4": dict.fromkeys(curvature_overhead.VARIANTS, 1.5),
        "16": dict.fromkeys(curvature_overhead.VARIANTS, 1.25),
    },
}


def run_of(lr: float, **kwargs: Any) -> dict[str, Any]:
    task = curvature.Task(**{"problem": "toy", "method": "plain", "lr": lr, "seed": 0, "steps": 40, **kwargs})
    return curvature.train_once(task, CORPUS, CPU)


@pytest.mark.usefixtures("toy")
def test_a_run_ends_at_its_last_target() -> None:
    run = run_of(0.1)  # the square shrinks by 0.81 a step: 1 is reached after 7 steps, a half after 10
    assert (run["steps_to"], run["steps"], run["diverged"]) == ([8, 10], 10, False)
    assert run["validation_loss"] == round(4 * 0.9**20, 4)


@pytest.mark.usefixtures("toy")
def test_a_run_ends_after_its_last_step_or_when_it_diverges() -> None:
    slow = run_of(0.001)
    assert (slow["steps_to"], slow["steps"], slow["diverged"]) == ([None, None], 40, False)
    fast = run_of(3.0)
    assert (fast["validation_loss"], fast["steps"], fast["diverged"]) == (None, 2, True)
    assert run_of(1e30)["diverged"]


@pytest.mark.usefixtures("toy")
def test_the_rate_rises_during_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = curvature.SETTINGS["toy"]
    rising = Setting(Toy, "Toy", setting.targets, 4, 4, 4, setting.lrs)
    monkeypatch.setattr(curvature, "SETTINGS", {"toy": rising})
    expected = 2.0 * np.prod([1 - 0.1 * share for share in (0.25, 0.5, 0.75, 1.0)])
    assert run_of(0.1, steps=4)["validation_loss"] == pytest.approx(expected**2, abs=1e-4)


class _Sklearn(types.ModuleType):
    """Random digits."""

    @staticmethod
    def load_digits() -> Any:
        images = np.random.default_rng(0).integers(0, 17, (400, 64)).astype(np.float64)
        return types.SimpleNamespace(data=images, target=np.arange(400) % 10)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("problem", SETTINGS)
def test_every_method_learns_every_problem(problem: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", types.ModuleType("sklearn"))
    monkeypatch.setitem(sys.modules, "sklearn.datasets", _Sklearn("sklearn.datasets"))
    lr = SETTINGS[problem].lrs[METHODS[method].family]
    first = SETTINGS[problem].problem(0, CORPUS).validation_loss()
    run = curvature.train_once(curvature.Task(problem, method, lr, 0, 2 * SETTINGS[problem].every), CORPUS, CPU)
    assert run["validation_loss"] < 0.97 * first
    assert run["switched_at"] is None


def test_runs_depend_on_the_seed_alone() -> None:
    problems = [SETTINGS["text"].problem(seed, CORPUS) for seed in (0, 0, 1)]
    losses = [[problem.loss(step).item() for step in (0, 1)] for problem in problems]
    assert losses[0] == losses[1]
    assert len({loss for some in losses for loss in some}) == 4


def test_digits_are_always_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", types.ModuleType("sklearn"))
    monkeypatch.setitem(sys.modules, "sklearn.datasets", _Sklearn("sklearn.datasets"))
    (train, held_out), again = curvature_problems.digits(), curvature_problems.digits()
    assert train.shape == (103, 64)
    assert held_out.shape == (Digits.HELD_OUT, 64)
    assert torch.equal(train, again[0])
    assert float(train.max()) <= 1.0
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UsageError, match="expected scikit-learn for its digits, found none"):
        curvature_problems.digits()


def test_overhead_compares_whole_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curvature_overhead, "LAYERS", 1)
    monkeypatch.setattr(curvature_overhead, "WIDTH", 16)
    monkeypatch.setattr(curvature_overhead, "CONTEXT", 4)
    monkeypatch.setattr(curvature_overhead, "_BLOCK", 2)
    threads = torch.get_num_threads()
    found = curvature_overhead.overhead(curvature._BATCHES, blocks=2)
    assert torch.get_num_threads() == threads
    assert found["ratios"].keys() == found["base_ms"].keys() == {"4", "16"}
    assert all(ratios.keys() == curvature_overhead.VARIANTS.keys() for ratios in found["ratios"].values())
    assert all(ratio > 0 for ratios in found["ratios"].values() for ratio in ratios.values())


# The command.


@pytest.fixture
def trained(toy: None, monkeypatch: pytest.MonkeyPatch) -> list[curvature.Task]:
    """What has been trained, in this process."""
    tasks: list[curvature.Task] = []

    def deal(missing: Sequence[curvature.Task], train: Callable[..., Any], **_: Any) -> Iterator[dict[str, Any]]:
        for task in missing:
            tasks.append(task)
            yield train(task, CORPUS, CPU)

    monkeypatch.setattr(curvature, "deal", deal)
    return tasks


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["gradwire", "bench", "curvature", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_the_command_keeps_what_it_has_trained(
    tmp_path: Path, trained: list[curvature.Task], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "curvature.json"
    assert command(monkeypatch, "--seeds", "2", "--methods", "plain", "other", "--output", str(output)) == 0
    assert len(trained) == 2 * 5 * 2
    kept = json.loads(output.read_text())
    assert kept["overhead"] == OVERHEAD
    assert kept["problems"]["toy"]["lrs"]["plain"] == [0.025, 0.05, 0.1, 0.2, 0.4]
    assert (tmp_path / "curvature.png").read_bytes().startswith(b"\x89PNG")
    assert "Steps to 0.5" in capsys.readouterr().out

    kept["runs"] = kept["runs"][:-3]
    output.write_text(json.dumps(kept))
    assert command(monkeypatch, "--seeds", "2", "--output", str(output)) == 0
    assert len(trained) == 20 + 3
    assert json.loads(output.read_text())["runs"][:-3] == kept["runs"]
    assert command(monkeypatch, "--quick") == 0
    assert len(trained) == 23 + 2 * 2
    assert trained[-1].steps == curvature.QUICK_STEPS


def test_mistakes(
    trained: list[curvature.Task], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "--problems", "images") == 2
    assert "--problems: expected some of toy, got 'images'." in capsys.readouterr().err
    assert command(monkeypatch, "--methods", "MKOR") == 2
    assert "--methods: expected some of plain, other, got 'MKOR'." in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="bench curvature: expected one process, without torchrun"):
        curvature.main()
    assert trained == []


# Tables.


def kept_runs(steps: dict[tuple[str, float], list[list[int | None]]]) -> dict[str, Any]:
    """A record of runs with these steps to both targets, by method, rate and seed."""
    lrs = {method: sorted({lr for name, lr in steps if name == method}) for method, _ in steps}
    runs = [
        {"problem": "toy", "method": method, "lr": lr, "seed": seed, "steps_to": pair, "validation_loss": 1.0}
        for (method, lr), some in steps.items()
        for seed, pair in enumerate(some)
    ]
    machine = {"cpu": "A CPU", "torch": "2.13.0", "date": "2026-01-02T03:04:05", "command": "gradwire bench curvature"}
    problem = {"title": "Toy", "targets": [1.23, 0.9], "steps": 40, "every": 5, "lrs": lrs}
    bases = {"MKOR": "SGD", "SGD": None, "Lost": "SGD"}
    head = {"machine": machine, "problems": {"toy": problem}, "seeds": [0, 1], "bases": bases, "overhead": OVERHEAD}
    head["options"] = {"hybrid": {"threshold": 0.03, "check_every": 25}}
    return head | {"runs": runs}


STEPS: dict[tuple[str, float], list[list[int | None]]] = {
    ("SGD", 0.1): [[10, 50], [20, None]],
    ("SGD", 0.2): [[40, 100], [60, 120]],
    ("SGD", 0.4): [[30, 110], [50, 120]],
    ("MKOR", 0.1): [[30, 60], [40, 72]],
    ("MKOR", 0.2): [[25, 56], [25, 64]],
    ("MKOR", 0.4): [[None, None], [None, None]],
    ("Lost", 0.1): [[10, None], [10, None]],
    ("Lost", 0.2): [[9, None], [None, None]],
}


def test_the_best_rate_reaches_the_last_target_on_every_seed_first() -> None:
    rows = {row.method: row for row in curvature_rows(kept_runs(STEPS), "toy")}
    assert {name: (row.lr, row.edge) for name, row in rows.items()} == {
        "SGD": (0.2, False),
        "MKOR": (0.2, False),
        "Lost": (0.1, True),
    }
    assert rows["MKOR"].over_base == [0.5, 120 / 220]
    assert rows["Lost"].over_base == [0.2, None]
    assert rows["SGD"].cells() == ["0.2", "50 (40 to 60)", "110 (100 to 120)", ""]
    assert rows["Lost"].cells() == ["0.1 (edge)", "10 (10 to 10)", "not reached", "0.20"]


def test_the_section_of_the_readme(tmp_path: Path) -> None:
    kept = kept_runs(STEPS)
    (tmp_path / "curvature.json").write_text(json.dumps(kept))
    text = report.fill("<!-- results:curvature -->\n<!-- /results:curvature -->\n", tmp_path)
    assert "| Optimizer | Learning rate | Steps to 1.23 | Steps to 0.9 | Over its base |" in text
    assert "| `MKOR` | 0.2 | 25 (25 to 25) | 60 (56 to 64) | 0.50, 0.55 |" in text
    assert "| `MKOR(AdamW)` | 1.50 | 1.25 |" in text
    assert "`MKORH` switches when the loss falls by less than 3% in 25 steps" in text
    assert "the least and the most. In front of an optimizer MKOR takes 0.50 to 0.55 times its steps." in text
    assert "AdamW alone takes 25 ms and 90 ms." in text
    assert report.fill(text, tmp_path) == text
    kept["runs"].pop()
    with pytest.raises(UsageError, match="expected a finished curvature bench, got 15 of 16 runs"):
        curvature_section(kept)


def test_the_kept_results_are_those_of_the_default_command() -> None:
    kept = json.loads((ROOT / "bench" / "results" / "curvature.json").read_text())
    assert kept["methods"] == list(METHODS)
    assert kept["options"] == {"quick": False, "hybrid": {**curvature.HYBRID, "windows": [10, 50]}}
    for name, setting in SETTINGS.items():
        described = curvature._described(setting, kept["methods"], quick=False)
        assert kept["problems"][name] == described
    assert len(kept["seeds"]) == curvature.SEEDS
    assert kept["overhead"]["ratios"]["4"].keys() == curvature_overhead.VARIANTS.keys()
    assert curvature_section(kept)


def test_losses_of_the_autoencoder_are_sums_over_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.rand(100, 64)
    monkeypatch.setattr(curvature_problems, "digits", lambda: (images[:50], images[50:]))
    problem = Digits(0, CORPUS)
    expected = 64 * F.mse_loss(problem.model(images[50:]), images[50:])
    assert problem.validation_loss() == pytest.approx(expected.item(), rel=1e-5)
