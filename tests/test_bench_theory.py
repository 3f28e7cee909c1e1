"""`gradwire bench theory`: every claim holds at small size, on functions that are what they say; and the command."""

import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gradwire.bench import plots, report
from gradwire.bench.cli import main
from gradwire.bench.errors import UsageError
from gradwire.bench.theory import catalogue, counterexample, drawing, econtrol, momentum, problems, run, weights
from gradwire.bench.theory.claim import Claim, Line
from gradwire.bench.theory.network import Network
from gradwire.bench.theory.problems import Logistic, Quadratic
from gradwire.comm import EF21

ROOT = Path(__file__).parents[1]
SHOWN = ("counterexample", "weights", "econtrol", "momentum", "unbiased")
"""Claims whose tests stand here."""


class _Sklearn(types.ModuleType):
    """Classes that can be told apart, in the shape of scikit-learn's data: tests need no package for them."""

    @staticmethod
    def load_digits() -> Any:
        rng = np.random.default_rng(0)
        target = np.arange(600) % 10
        strokes = rng.integers(0, 17, (10, 64)) * (rng.random((10, 64)) < 0.5)
        data = strokes[target] + rng.normal(0, 8, (600, 64))
        return types.SimpleNamespace(data=np.clip(data, 0, 16), target=target)

    @staticmethod
    def load_breast_cancer() -> Any:
        rng = np.random.default_rng(1)
        target = (rng.random(200) < 0.6).astype(np.int64)
        data = rng.standard_normal((200, 5)) @ rng.standard_normal((5, 30)) + 0.5 * rng.standard_normal((200, 30))
        return types.SimpleNamespace(data=np.exp(rng.normal(0, 2, 30)) * (data + target[:, None]), target=target)


@pytest.fixture(autouse=True)
def _data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", types.ModuleType("sklearn"))
    monkeypatch.setitem(sys.modules, "sklearn.datasets", _Sklearn("sklearn.datasets"))


@pytest.fixture(scope="module")
def records() -> dict[str, Any]:
    """What claims found, as it is read from JSON."""
    return {}


def record_of(name: str, records: dict[str, Any]) -> Any:
    if name not in records:
        records[name] = json.loads(json.dumps(run.make(name, True)["numbers"], allow_nan=False))
    return records[name]


# Claims.


@pytest.mark.parametrize("name", SHOWN)
def test_holds(name: str, records: dict[str, Any]) -> None:
    claim = catalogue.load(name)
    assert claim.name == name
    lines = claim.lines(record_of(name, records))
    assert [line for line in lines if not line.holds] == []
    assert len(lines) >= 3


def test_top_1_diverges_and_feedback_repairs_it(records: dict[str, Any]) -> None:
    found = record_of("counterexample", records)
    assert found["lr"] == pytest.approx(5.859121e-3, rel=1e-6)
    assert found["factors"]["none"] == pytest.approx(1 + 11 * found["lr"] / 6, abs=1e-9)
    for name in ("EF", "EF21", "EControl"):
        assert found["factors"][name] == pytest.approx(0.9931, abs=2e-4)


def test_the_counterexample_is_the_published_one() -> None:
    x = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    found = counterexample.gradients(x.detach()[None])[:, 0]
    for a, gradient in zip(torch.tensor([[-3.0, 2, 2], [2, -3, 2], [2, 2, -3]]).double(), found, strict=True):
        (expected,) = torch.autograd.grad((a @ x) ** 2 + x.square().sum() / 4, x)
        torch.testing.assert_close(gradient, expected)


def test_weights_lengthen_steps_as_the_means_say(records: dict[str, Any]) -> None:
    (found,) = record_of("weights", records)["problems"].values()
    functions, _ = weights.problem("x100", workers=12, d=8)
    each = functions.each_smoothness.numpy()
    xi = math.sqrt(7 / 8) / (1 - math.sqrt(7 / 8))
    for method, mean in (("EF21", np.sqrt(np.mean(each**2))), ("EF21W", each.mean())):
        assert found["lr"][method] == pytest.approx(1 / (functions.smoothness + xi * mean), rel=1e-12)
    assert found["rounds"]["EF21"] > 2.5 * found["rounds"]["EF21W"] > 100
    assert found["difference"] < 1e-12


def test_more_unlike_workers_gain_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_MOST_ROUNDS", 1)
    ratios = {}
    for workers in (4, 9):
        found = weights._compare("x10000", workers, 4)
        ratios[workers] = found["quadratic_mean"] / found["mean"]
    assert ratios == {4: pytest.approx(2, rel=0.01), 9: pytest.approx(3, rel=0.01)}  # roots of their numbers


def test_weights_on_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_MOST_ROUNDS", 3)
    found = weights._compare("breast cancer", 8, 10)
    assert found["quadratic_mean"] > 1.2 * found["mean"]
    assert found["difference"] < 1e-12


def test_econtrol_is_between_ef21_and_sgd(records: dict[str, Any]) -> None:
    found = record_of("econtrol", records)
    floors = {name: values[-1] for name, values in found["floors"].items()}
    assert floors["SGD"] < floors["delta"] < floors["delta/400"] < floors["EF21"] < floors["EF"] / 100
    lr, d = found["lrs"][0], found["dimension"]
    variance = econtrol.NOISE**2 * d / 10  # of the mean of ten workers
    assert found["floors"]["SGD"][0] == pytest.approx(lr * variance / (2 - lr), rel=0.2)


def test_noise_of_three_points_has_the_variance_that_is_said() -> None:
    noise = momentum.gradients(30_000)(torch.zeros(30_000, 2, dtype=torch.float64))
    assert float(noise.square().sum(dim=1).mean()) == pytest.approx(momentum.VARIANCE, rel=0.03)
    assert noise.mean(dim=0).abs().max() < 0.02


def test_a_line_fails_where_a_claim_does(records: dict[str, Any]) -> None:
    found = json.loads(json.dumps(record_of("counterexample", records)))
    found["factors"]["EF"] = found["factors"]["none"] = 1.0
    assert [line.holds for line in counterexample.CLAIM.lines(found)] == [False, False, True, True]
    found = json.loads(json.dumps(record_of("econtrol", records)))
    found["floors"]["EF"], found["floors"]["delta"] = found["floors"]["SGD"], found["floors"]["EF21"]
    found["exact"] = {key: [1.0, 1.0, 1.0] for key in found["exact"]}
    found["too_much"] = [1.0, 1.0]
    assert [line.holds for line in econtrol.CLAIM.lines(found)] == [False, False, False, False, True, False]
    found = json.loads(json.dumps(record_of("momentum", records)))
    found["floors"], found["losses"] = (dict.fromkeys(some, some["SGD"]) for some in (found["floors"], found["losses"]))
    assert [line.holds for line in momentum.CLAIM.lines(found)] == [True, False, True, True, False, True]
    found = json.loads(json.dumps(record_of("unbiased", records)))
    found["methods"]["QSGD"]["half"]["floor"] = found["methods"]["QSGD"]["DIANA"]["factor"] = 1.0
    assert [line.holds for line in catalogue.load("unbiased").lines(found)] == [False, False, True, True]


# What is minimised.


def _hessian(gradients: problems.Gradients, x: Tensor) -> Tensor:
    """Of every worker, `[n, d, d]`."""
    jacobian: Tensor = torch.autograd.functional.jacobian(lambda point: gradients(point[None])[:, 0], x)
    return jacobian


def test_logistic_functions_are_what_they_say() -> None:
    rng = torch.Generator().manual_seed(0)
    features, order = torch.randn(10, 3, generator=rng, dtype=torch.float64), torch.arange(10) % 4
    functions = Logistic(*problems.dealt(features, order, 4), ridge=0.3, rough=0.2)
    x = torch.randn(3, generator=rng, dtype=torch.float64, requires_grad=True)
    for worker in range(4):
        rows = features[torch.tensor_split(order.argsort(stable=True), 4)[worker]]
        assert len(rows) == (3, 3, 2, 2)[worker]
        value = F.softplus(-rows @ x).mean() + 0.15 * x.square().sum() + 0.2 * (x**2 / (1 + x**2)).sum()
        (expected,) = torch.autograd.grad(value, x)
        torch.testing.assert_close(functions.gradients(x.detach()[None])[worker, 0], expected)
    hessians = _hessian(functions.gradients, torch.zeros(3, dtype=torch.float64))  # where both terms bend most
    largest = torch.linalg.eigvalsh(hessians)[:, -1]
    torch.testing.assert_close(functions.each_smoothness, largest)
    assert functions.smoothness == pytest.approx(float(torch.linalg.eigvalsh(hessians.mean(dim=0))[-1]))


def test_the_minimum_has_no_gradient() -> None:
    features, labels = problems.classes("breast_cancer")
    scaled = problems.standardised(features)
    assert scaled.mean(dim=0).abs().max() < 1e-12
    torch.testing.assert_close(scaled.square().mean(dim=0), torch.ones(30, dtype=torch.float64))
    functions = Logistic(*problems.dealt(scaled, labels, 6), ridge=0.1)
    minimum = functions.minimum()
    each = functions.gradients(minimum[None])
    assert each.mean(dim=0).abs().max() < 1e-12
    assert each.abs().max() > 1e-3  # workers differ there


def test_a_feature_that_is_constant_is_nothing() -> None:
    assert torch.equal(problems.standardised(torch.ones(4, 1)), torch.zeros(4, 1))


def test_quadratics_are_what_they_say() -> None:
    curvature, slope = torch.tensor([[1.0, 2.0], [5.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    functions = Quadratic(curvature, slope)
    expected = torch.tensor([[[1.0, 4.0]], [[10.0, -3.0]]])
    assert torch.equal(functions.gradients(torch.tensor([[2.0, 2.0]])), expected)
    assert (functions.smoothness, functions.each_smoothness.tolist()) == (3.0, [2.0, 5.0])


def test_the_network_has_the_gradients_of_its_batches() -> None:
    network = Network(workers=10, batch=5, hidden=3)
    x = 3 * network.start()
    steep = network.gradients()(torch.stack([x, x, 2 * x]))
    assert steep.shape == (10, 3, network.parameters)
    torch.testing.assert_close(steep[:, 0], steep[:, 1])
    torch.testing.assert_close(steep[:, :1], network.gradients()(x[None]))
    layers = torch.nn.Sequential(torch.nn.Linear(64, 3), torch.nn.ReLU(), torch.nn.Linear(3, 10)).double()
    images, labels = problems.classes("digits")
    first, second, third, fourth = torch.split(x, [192, 3, 30, 10])
    values = (first.view(64, 3).T, second, third.view(3, 10).T, fourth)
    with torch.no_grad():
        for parameter, value in zip(layers.parameters(), values, strict=True):
            parameter.copy_(value)
    torch.testing.assert_close(network.loss(x[None])[0], F.cross_entropy(layers(images / 16), labels).detach())
    batches = network.gradients(seed=1)
    mean = torch.stack([batches(x[None])[:, 0] for _ in range(600)]).mean(dim=0)
    for worker in (0, 9):  # each has one class, so its batches' mean is that class's gradient
        layers.zero_grad()
        own = labels == worker
        F.cross_entropy(layers(images[own] / 16), labels[own]).backward()
        whole = torch.cat([p.grad.t().flatten() for p in layers.parameters() if p.grad is not None])
        assert float((mean[worker] - whole).norm() / whole.norm()) < 0.1


def test_descent_stops_at_its_target() -> None:
    functions = Quadratic(torch.ones(2, 2).double(), torch.zeros(2, 2).double())
    average = problems.communicator(weights.ChunkTopK(k=1, chunk=2), EF21(), workers=2)
    start = torch.tensor([[8.0, 0.0], [4.0, 0.0]]).double()
    x, sizes = problems.descend(
        average, functions.gradients, start, 0.5, 100, lambda x: x[:, 0].abs(), every=2, target=1.0
    )
    assert sizes.tolist() == [[8.0, 4.0], [2.0, 1.0], [0.5, 0.25]]
    assert x.tolist() == [[0.5, 0.0], [0.25, 0.0]]


def test_curves_are_thinned_out() -> None:
    curve = drawing.curve(torch.arange(1001.0), every=10)
    assert len(curve["steps"]) == len(curve["values"]) == 60
    assert (curve["steps"][0], curve["steps"][-1], curve["values"][-1]) == (0, 10_000, 1000.0)
    assert drawing.curve([3.0, 2.0]) == {"steps": [0, 1], "values": [3.0, 2.0]}


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UsageError, match="expected scikit-learn for its digits data, found none"):
        run.main(["counterexample", "momentum"])


# The command.


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["gradwire", "bench", "theory", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


@pytest.mark.slow
def test_a_claim_runs_in_a_process_of_its_own(
    tmp_path: Path, records: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "theory.json"
    assert command(monkeypatch, "--claims", "counterexample", "--quick", "--output", str(output)) == 0
    printed = capsys.readouterr().out
    assert "[1/1] counterexample: holds" in printed
    assert "error per step, with EControl" in printed
    kept = json.loads(output.read_text())
    assert (kept["options"], kept["machine"]["threads"]) == ({"quick": True}, 1)
    assert kept["claims"]["counterexample"]["numbers"] == record_of("counterexample", records)
    assert (tmp_path / "counterexample.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Claims that were run, without processes; they say what they are told to."""
    names: list[str] = []

    def toy(name: str) -> Claim:
        def lines(record: dict[str, Any]) -> list[Line]:
            return [Line("|what|", "1", f"{record['value']}", record["value"] == 1), Line("more", "2", "2", True)]

        def draw(figure: Any, record: dict[str, Any]) -> None:
            figure.subplots().plot([0, record["value"]])

        return Claim(name, f"Title of {name}", lambda quick: {}, draw, lines)

    def make(chosen: list[str], workers: int, *, quick: bool) -> Any:
        for name in chosen:
            names.append(name)
            yield name, {"seconds": 1.0, "numbers": {"value": 0 if name == "econtrol" else 1}}

    for module in (catalogue, run):
        monkeypatch.setattr(module, "load", toy)
    monkeypatch.setattr(run, "_run", make)
    return names


def test_claims_of_one_file_add_up(
    tmp_path: Path, made: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output, figures = tmp_path / "kept" / "theory.json", tmp_path / "figures"
    there = ("--output", str(output), "--figures", str(figures))
    assert command(monkeypatch, "--claims", "walk", "weights", *there) == 0
    assert command(monkeypatch, "--claims", "econtrol", *there) == 1
    assert "econtrol: does not hold" in capsys.readouterr().out
    assert made == ["weights", "walk", "econtrol"]
    assert list(json.loads(output.read_text())["claims"]) == ["weights", "econtrol", "walk"]
    assert sorted(path.name for path in figures.iterdir()) == ["econtrol.png", "walk.png", "weights.png"]
    assert command(monkeypatch, "--quick", "--claims", "walk", *there) == 2
    assert "expected a new file or one with quick=True" in capsys.readouterr().err
    assert command(monkeypatch, *there) == 1
    assert made[3:] == list(catalogue.NAMES)


def test_a_plain_command_writes_below_the_folder_it_is_called_in(
    tmp_path: Path, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, "--claims", "saddle") == 0
    assert sorted(path.name for path in (tmp_path / "runs" / "theory").iterdir()) == ["saddle.png", "theory.json"]


def test_mistakes(
    tmp_path: Path, made: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "--claims", "everything") == 2
    assert "--claims: expected some of counterexample, weights, " in capsys.readouterr().err
    other = tmp_path / "other.json"
    other.write_text("[]")
    assert command(monkeypatch, "--output", str(other)) == 2
    assert "--output: expected a new file or that of bench theory" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="bench theory: expected one process, without torchrun"):
        run.main()
    assert made == []


# The README.


def test_the_section_and_the_figures_of_the_readme(
    tmp_path: Path, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output, docs = tmp_path / "theory.json", tmp_path / "docs" / "theory"
    command(monkeypatch, "--claims", "walk", "econtrol", "--output", str(output), "--figures", str(docs))
    text = report.fill("<!-- results:theory -->\n<!-- /results:theory -->\n", tmp_path)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert rows == [
        "| Claim | Theory | Measured | Holds |",
        "|---|---|---|---|",
        "| [econtrol](docs/theory/econtrol.png): \\|what\\| | 1 | 0 | no |",
        "| more | 2 | 2 | yes |",
        "| [walk](docs/theory/walk.png): \\|what\\| | 1 | 1 | yes |",
        "| more | 2 | 2 | yes |",
    ]
    assert "Made by `gradwire bench theory --claims walk econtrol" in text
    assert plots.stale(text, tmp_path, tmp_path) == {}
    kept = json.loads(output.read_text())
    kept["claims"]["walk"]["numbers"]["value"] = 2
    output.write_text(json.dumps(kept))
    stale = plots.stale(text, tmp_path, tmp_path)
    assert list(stale) == [docs / "walk.png"]
    stale[docs / "walk.png"]()
    assert plots.stale(text, tmp_path, tmp_path) == {}


@pytest.mark.parametrize("name", SHOWN)
def test_draws_what_it_found(name: str, records: dict[str, Any], tmp_path: Path) -> None:
    kept = {"claims": {name: {"numbers": record_of(name, records)}}}
    catalogue.draw(kept, tmp_path / f"{name}.png")
    assert plots._description(tmp_path / f"{name}.png") == catalogue.digest(kept, tmp_path / f"{name}.png")


def test_the_kept_results_hold() -> None:
    path = ROOT / "bench" / "results" / "theory.json"
    kept = json.loads(path.read_text())
    assert list(kept["claims"]) == list(catalogue.NAMES)
    assert kept["options"] == {"quick": False}
    for name in kept["claims"]:
        assert [line for line in catalogue.lines(kept, name) if not line.holds] == []
    assert path.stat().st_size < 300_000
    numbers = {name: claim["numbers"] for name, claim in kept["claims"].items()}
    real = numbers["weights"]["problems"]["breast cancer"]
    assert real["quadratic_mean"] / real["mean"] == pytest.approx(1.68, rel=0.01)
    assert real["rounds"] == {"EF21": 152, "EF21W": 90}
    one_of_1000 = numbers["weights"]["problems"]["x10000"]
    assert one_of_1000["quadratic_mean"] / one_of_1000["mean"] == pytest.approx(28.8, rel=0.01)
    assert numbers["momentum"]["floors"]["EF21"][-1] == pytest.approx(5.7e-3, rel=0.15)
