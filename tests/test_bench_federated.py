"""`gradwire bench federated`: the same work for all, its clocks, and accuracy on digits."""

import json
import os
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gradwire.bench import data, report
from gradwire.bench.cli import main
from gradwire.bench.errors import UsageError
from gradwire.bench.federated import accuracy, contenders, loops, methods, ranks, speed
from gradwire.bench.federated.accuracy_table import accuracy_rows, accuracy_section
from gradwire.bench.federated.contenders import Contender, ContenderError, Cpu, tree
from gradwire.bench.federated.methods import METHODS
from gradwire.bench.federated.table import speed_section
from gradwire.bench.federated.work import QUICK_WORKS, WORKS, Work, all_clients, model_size

ROOT = Path(__file__).parents[1]
CORPUS = data.Corpus("none", torch.zeros(0), torch.zeros(0))
TINY = Work("mlp", clients=6, cohort=2, rounds=3, examples=120)


# Loops, and gradwire.


def numpy_averaging(work: Work) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Federated averaging of the MLP, with gradients written out, in float64."""
    module = work.module()
    x = [parameter.detach().double().numpy() for parameter in module.parameters()]
    for cohort in work.schedule:
        models, sizes = [], []
        for client in cohort:
            images, labels = (part.numpy() for part in work.examples_of(client))
            w1, b1, w2, b2 = (part.copy() for part in x)
            for first in range(0, len(labels), work.batch_size):
                batch, classes = images[first : first + work.batch_size], labels[first : first + work.batch_size]
                hidden = np.maximum(batch @ w1.T + b1, 0)
                scores = hidden @ w2.T + b2
                shares = np.exp(scores - scores.max(1, keepdims=True))
                shares /= shares.sum(1, keepdims=True)
                shares[np.arange(len(classes)), classes] -= 1
                shares /= len(classes)
                back = (shares @ w2) * (hidden > 0)
                for value, gradient in ((w2, shares.T @ hidden), (b2, shares.sum(0)), (w1, back.T @ batch)):
                    value -= work.lr * gradient
                b1 -= work.lr * back.sum(0)
            models.append((w1, b1, w2, b2))
            sizes.append(len(labels))
        x = [
            sum(size * model[place] for size, model in zip(sizes, models, strict=True)) / sum(sizes)
            for place in range(4)
        ]
    return np.concatenate([part.ravel() for part in x])


@pytest.mark.parametrize("run", [loops.lean, loops.naive, loops.gradwire])
def test_all_do_the_same_work(run: Callable[[Work, loops.Gate], Tensor]) -> None:
    gates: list[int] = []
    found = run(TINY, lambda: gates.append(1))
    assert len(gates) == TINY.rounds + 1
    np.testing.assert_allclose(found.numpy(), numpy_averaging(TINY), rtol=0, atol=2e-6)


def test_the_work_is_that_of_its_description() -> None:
    assert {name: (work.clients, work.cohort) for name, work in WORKS.items()} == {
        "mlp-100": (100, 10),
        "mlp-1000": (1000, 100),
        "lenet-100": (100, 10),
    }
    assert model_size(TINY) == 59_635
    assert model_size(replace(TINY, model="lenet")) == 61_706
    sizes = all_clients(TINY).num_examples
    assert sum(sizes) == 120
    assert min(sizes) >= 1
    assert all(len(set(cohort)) == 2 for cohort in TINY.schedule)


# Processes.


def test_cpu_counts_children_and_rests() -> None:
    burn = "import time; e = time.process_time() + 0.2\nwhile time.process_time() < e: pass\n"
    child = f"subprocess.Popen([sys.executable, '-c', {burn + 'time.sleep(9)'!r}])"
    script = f"import subprocess, sys, time; {child}; time.sleep(9)"
    process = subprocess.Popen([sys.executable, "-c", script])
    try:
        cpu, deadline = Cpu(process.pid), time.monotonic() + 30
        while cpu.total() < 0.2 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert cpu.total() >= 0.2
        assert len(tree(process.pid)) == 2
        before = cpu.total()
    finally:
        for pid in reversed(tree(process.pid)):
            os.kill(pid, 9)
        process.wait()
    assert cpu.total() >= before, "what has ended counts as it was"
    assert process.pid not in tree(os.getpid())[1:]


@pytest.mark.slow
def test_a_contender_goes_round_by_round() -> None:
    contender = Contender("gradwire", TINY)
    try:
        contender.wait()
        found = [contender.round() for _ in range(TINY.rounds)]
        assert all(0 < cpu < 10 and seconds > 0 for cpu, seconds in found)
        np.testing.assert_allclose(contender.weights().numpy(), numpy_averaging(TINY), rtol=0, atol=2e-6)
    finally:
        contender.end()
    assert not contenders._marked(contender._mark)
    assert contenders._MARK not in os.environ


def test_two_ranks_take_turns_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[str] = []

    def torchrun(command: list[str], *, env: dict[str, str], **_: Any) -> None:
        assert env["OMP_NUM_THREADS"] == "1"
        sizes.append(command[command.index("--nproc-per-node") + 1])
        assert command[-4] == "gradwire.bench.federated.ranks"
        threads = torch.get_num_threads()
        ranks._rank(*command[-3:])
        torch.set_num_threads(threads)

    monkeypatch.setattr(subprocess, "run", torchrun)
    found = ranks.compare("mlp-100", 2, quick=True)
    assert sizes == ["1", "2", "1", "2"]
    assert found["difference"] == 0
    assert found["rounds"] == 2 * (QUICK_WORKS["mlp-100"].rounds - 1)
    assert found["seconds"].keys() == {"1", "2"}


class InProcess:
    """A contender of this process, whose rounds take what is told."""

    cost: dict[str, float] = {}  # noqa: RUF012
    off: dict[str, float] = {}  # noqa: RUF012
    failing: dict[str, str] = {}  # noqa: RUF012
    order: list[str] = []  # noqa: RUF012

    def __init__(self, name: str, work: Work) -> None:
        self.name, self.ended, self.rounds = name, False, 0

    def wait(self) -> None:
        if self.failing.get(self.name) == "start":
            raise ContenderError("no such thing")

    def round(self) -> tuple[float, float]:
        self.order.append(self.name)
        self.rounds += 1
        if self.failing.get(self.name) == "round" and self.rounds == 2:
            raise ContenderError("lost")
        first = 5.0 if self.rounds == 1 else 1.0
        return first * self.rounds * self.cost.get(self.name, 1.0), 2.0

    def weights(self) -> Tensor:
        return torch.full((3,), self.off.get(self.name, 0.0))

    def end(self) -> None:
        self.ended = True


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> type[InProcess]:
    monkeypatch.setattr(speed, "Contender", InProcess)
    monkeypatch.setattr(speed, "compare", lambda *_, **__: RANKS)
    monkeypatch.setattr(speed, "_version", lambda name: "1.2" if name != "pfl" else None)
    for name in ("cost", "off", "failing"):
        monkeypatch.setattr(InProcess, name, {})
    monkeypatch.setattr(InProcess, "order", [])
    return InProcess


RANKS: dict[str, Any] = {"seconds": {"1": 0.4, "2": 0.2}, "speedup": 1.9, "rounds": 2, "difference": 0.0}


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["gradwire", "bench", "federated", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_contenders_take_turns_and_are_compared_round_by_round(
    simulated: type[InProcess], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    simulated.cost |= {"gradwire": 1.5, "Flower on Ray": 7.0}
    simulated.failing |= {"FedLab": "round"}
    output = tmp_path / "federated.json"
    assert command(monkeypatch, "--quick", "--works", "mlp-100", "--output", str(output)) == 0
    assert simulated.order[:4] == ["lean loop", "gradwire", "naive loop", "FedLab"]
    assert simulated.order[-2:] == ["lean loop", "Flower on Ray"], "it does not rest while others run"
    kept = json.loads(output.read_text())
    found = kept["works"]["mlp-100"]["results"]
    assert {name: (one["cpu_ms"], one["ratio"]) for name, one in found.items()} == {
        "lean loop": (2500.0, 1.0),
        "gradwire": (3750.0, 1.5),
        "naive loop": (2500.0, 1.0),
        "Flower on Ray": (17500.0, 7.0),
    }
    assert kept["skipped"] == {"pfl": "not installed", "FedLab": "lost"}
    assert kept["ranks"] is None
    assert "FedLab: not measured: lost" in capsys.readouterr().out


def test_other_weights_fail_the_command(
    simulated: type[InProcess], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    simulated.off["gradwire"] = 1e-5
    assert command(monkeypatch, "--quick", "--works", "mlp-100", "--simulators", "gradwire") == 1
    assert "other weights" in capsys.readouterr().out
    assert command(monkeypatch, "--quick", "--works", "lenet-100", "--simulators", "gradwire") == 0
    simulated.failing["gradwire"] = "start"
    with pytest.raises(RuntimeError, match="bench federated: gradwire: no such thing"):
        speed.main(["mlp-100"], ["gradwire"], quick=True)


def test_mistakes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--works", "resnet"], "--works: expected some of mlp-100, mlp-1000, lenet-100, got 'resnet'."),
        (["--simulators", "FedML"], "--simulators: expected some of lean loop, gradwire, naive loop, pfl"),
        (["--accuracy", "--methods", "FedMA"], "--methods: expected some of FedAvg(), FedProx(mu=0.1)"),
    ):
        assert command(monkeypatch, *arguments) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setattr(speed.platform, "system", lambda: "Darwin")
    with pytest.raises(UsageError, match="expected Linux, for its clocks of processes, got Darwin"):
        speed.main()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="bench federated: expected one process"):
        speed.main()


# Accuracy.


class _Sklearn(types.ModuleType):
    """Digits that can be told apart."""

    @staticmethod
    def load_digits() -> Any:
        rng = np.random.default_rng(0)
        labels = np.arange(1797) % 10
        images = 0.4 * rng.integers(0, 17, (10, 64))[labels] + 0.6 * rng.integers(0, 17, (1797, 64))
        return types.SimpleNamespace(data=images, target=labels)


@pytest.fixture
def digits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "sklearn", types.ModuleType("sklearn"))
    monkeypatch.setitem(sys.modules, "sklearn.datasets", _Sklearn("sklearn.datasets"))
    methods.digits.cache_clear()
    yield
    methods.digits.cache_clear()


@pytest.mark.usefixtures("digits")
def test_what_is_held_out_is_nobodys() -> None:
    images, labels = methods.digits(3)
    clients = methods.clients(0.1, 3)
    assert min(clients.num_examples) >= methods.MIN_SIZE
    assert clients.num_examples != methods.clients(100.0, 3).num_examples
    assert sum(clients.num_examples) == 1797 - methods.HELD_OUT
    mine = {tuple(row) for client in range(len(clients)) for row in clients.examples(client)[0].tolist()}
    assert mine == {tuple(row) for row in images[: -methods.HELD_OUT].tolist()}
    assert not torch.equal(labels, methods.digits(4)[1])
    model = methods.model(0)
    assert sum(parameter.numel() for parameter in model.parameters()) == methods.NUMEL
    right = (model(images).argmax(1) == labels)[-methods.HELD_OUT :]
    assert methods.accuracy(model, 3)["accuracy"] == pytest.approx(100 * float(right.double().mean()))


@pytest.mark.usefixtures("digits")
@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns(name: str) -> None:
    run = accuracy.train_once(accuracy.Task(name, 100.0, 0.3, 0, 12), CORPUS, torch.device("cpu"))
    first, *_, last = run["curve"]
    assert len(run["curve"]) == len(accuracy.rounds_of_curve(12)) == 2
    assert last > first
    per_message = run["bytes_up"] / (12 * methods.COHORT)
    dense = 4 * methods.NUMEL
    assert per_message < 0.2 * dense if "QSGD" in name or "TopK" in name else per_message >= dense


def test_digits_need_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    methods.digits.cache_clear()
    with pytest.raises(UsageError, match="expected scikit-learn for its digits, found none"):
        methods.digits(0)


@pytest.mark.usefixtures("digits")
def test_the_command_keeps_its_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: list[accuracy.Task] = []

    def deal(missing: Sequence[accuracy.Task], train: Callable[..., Any], **_: Any) -> Iterator[dict[str, Any]]:
        for task in missing:
            trained.append(task)
            yield train(task, CORPUS, torch.device("cpu"))

    monkeypatch.setattr(accuracy, "deal", deal)
    output = tmp_path / "federated-accuracy.json"
    arguments = ["--accuracy", "--quick", "--methods", "FedAvg()", "SCAFFOLD()", "--output", str(output)]
    assert command(monkeypatch, *arguments) == 0
    assert len(trained) == 2 * 2 * 2
    assert trained[0].rounds == accuracy.QUICK_ROUNDS
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "Dirichlet(0.1)" in capsys.readouterr().out
    kept = json.loads(output.read_text())
    kept["runs"].pop()
    output.write_text(json.dumps(kept))
    assert command(monkeypatch, *arguments) == 0
    assert len(trained) == 9


# Tables.


def kept_accuracy() -> dict[str, Any]:
    found = {0.1: [90.0, 94.0], 0.3: [96.0, 97.0]}
    runs = [
        {
            "method": "FedAvg()",
            "alpha": alpha,
            "lr": lr,
            "seed": seed,
            "accuracy": value - (5 if alpha == 0.1 and lr == 0.3 else 0),
            "deviation": 0.5,
            "bytes_up": 200_000,
            "curve": [50.0 + seed, 60.0],
        }
        for alpha in (100.0, 0.1)
        for lr, values in found.items()
        for seed, value in enumerate(values)
    ]
    machine = {"torch": "2.13.0", "date": "2026-01-02T03:04:05", "command": "gradwire bench federated --accuracy"}
    options = {"rounds": 20, "last": 5, "clients": 20, "min_size": 10, "cohort": 5, "steps": 10, "batch_size": 32}
    head = {"machine": machine, "options": options, "data": {"held_out": 360}, "parameters": 2410}
    head |= {"methods": ["FedAvg()"], "references": {"FedAvg()": [98.0, None]}, "rounds_of_curve": [1, 10]}
    return head | {"alphas": [100.0, 0.1], "lrs": [0.1, 0.3], "seeds": [0, 1], "runs": runs}


def test_the_best_rate_counts(tmp_path: Path) -> None:
    kept = kept_accuracy()
    (row,) = accuracy_rows(kept)
    assert [(best.lr, best.accuracy, best.deviation) for best in row.best] == [(0.3, 96.5, 0.5), (0.1, 92.0, 0.5)]
    assert row.best[0].curve == [50.5, 60.0]
    assert row.cells() == ["96.5 ± 0.7", "98.0", "0.3", "92.0 ± 2.8", "", "0.1", "2 kB"]
    (tmp_path / "federated-accuracy.json").write_text(json.dumps(kept))
    marks = "<!-- results:federated-accuracy -->\n<!-- /results:federated-accuracy -->\n"
    text = report.fill(marks, tmp_path)
    assert "| `FedAvg()` | 96.5 ± 0.7 | 98.0 | 0.3 | 92.0 ± 2.8 |  | 0.1 | 2 kB |" in text
    assert "rounds 16 to 20" in text
    assert "Farthest from NumPy: 1.5 points, `FedAvg()`" in text
    assert report.fill(text, tmp_path) == text
    kept["runs"].pop()
    with pytest.raises(UsageError, match="expected a finished federated accuracy bench, got 7 of 8 runs"):
        accuracy_section(kept)


def test_the_section_of_speed() -> None:
    one = {"cpu_ms": 20.0, "ratio": 1.0, "seconds": 0.02, "rounds": 57, "difference": 0.0, "same_work": True}
    results = {"lean loop": one, "gradwire": one | {"cpu_ms": 20.6, "ratio": 1.03, "difference": 2e-7}}
    works = {
        "mlp-100": {**vars(WORKS["mlp-100"]), "parameters": 59_635, "results": results},
        "lenet-100": {
            **vars(WORKS["lenet-100"]),
            "parameters": 61_706,
            "results": {"lean loop": one, "pfl": one | {"same_work": False}},
        },
    }
    machine = {"cpu": "A CPU", "torch": "2.13.0", "date": "2026-01-02T03:04:05", "command": "gradwire bench federated"}
    kept = {"works": works, "machine": machine, "options": {"passes": 3}, "versions": {"pfl": "0.6.0"}}
    text = speed_section(kept | {"skipped": {"FedLab": "not installed"}, "ranks": {"work": "lenet-100"} | RANKS})
    assert "| Simulator | MLP, 10 of 100 clients | LeNet-5, 10 of 100 clients |" in text
    assert "| gradwire | 20.6 ms, 1.03 |  |" in text
    assert "| pfl (0.6.0) |  | other weights |" in text
    assert "those of the lean loop within 2e-07" in text
    assert "takes 400 ms on one rank and 200 ms on two, 1.90 times as fast." in text
    assert "Not measured: FedLab: not installed." in text
    assert "one rank" not in speed_section(kept | {"skipped": {}, "ranks": None})


def test_the_kept_accuracy_is_that_of_the_default_command() -> None:
    kept = json.loads((ROOT / "bench" / "results" / "federated-accuracy.json").read_text())
    assert kept["methods"] == list(METHODS)
    assert kept["lrs"] == list(accuracy.LRS)
    assert (kept["options"]["rounds"], kept["options"]["quick"]) == (accuracy.ROUNDS, False)
    off = {
        (row.method, alpha): abs(best.accuracy - best.reference)
        for row in accuracy_rows(kept)
        for alpha, best in zip(kept["alphas"], row.best, strict=True)
        if best.reference is not None
    }
    del off["SCALLION(QSGD(1), alpha=0.1)", 0.1]  # beyond what is stable
    assert max(off.values()) <= 1.5
