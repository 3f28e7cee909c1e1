"""`gradwire plan`: what it measures, what it prints, what it refuses, and its predictions against the network lab."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks

from gradwire.bench import plan as bench_plan
from gradwire.bench import (
    plan_case,
    plan_code,
    plan_lab,
    plan_measure,
    plan_models,
    plan_units,
    plan_work,
    plots,
    report,
)
from gradwire.bench.cli import main, spread
from gradwire.bench.errors import UsageError
from gradwire.comm.planner import Compute, Link, Network

PLAIN = plan_measure.PLAIN
COMPRESSING = tuple(method for method in bench_plan.CANDIDATES if method != PLAIN)


# Measuring.


def test_machines_are_told_apart() -> None:
    assert plan_measure.ranks_per_machine(["a", "a", "b", "b"]) == 2
    assert plan_measure.ranks_per_machine(["a", "a", "a", "b"]) == 1
    assert plan_measure.ranks_per_machine(["a", "b", "a", "b"]) == 1
    assert plan_measure.ranks_per_machine(["a", "a"]) == 2


def _links() -> Any:
    device = torch.device("cpu")
    links = plan_measure.links(device)
    network = Network(Link(0.0, min(link.bandwidth for link in links.values()) / 100))
    machine = plan_measure.neighbours(["a", "b", "a"])
    machine()
    return links, plan_measure.overhead(device, links), vars(plan_measure.stretch(device, network))


def test_links_are_measured_between_all_pairs() -> None:
    found = run_ranks(3, _links)
    assert all(links == found[0][0] for links, *_ in found)
    links, overhead, stretch = found[0]
    assert all(0.1 <= times < 1 for times in stretch.values())  # of links a hundred times as slow
    assert all(other == stretch for *_, other in found)
    assert set(links) == {(0, 1), (0, 2), (1, 2)}
    assert all(0 < link.latency < 10 and link.bandwidth > 0 for link in links.values())
    assert overhead >= 0


def test_layers_of_a_large_model_are_measured_once() -> None:
    model = plan_models.transformer(125_000_000, 64, torch.device("meta"))
    assert model.parameters == pytest.approx(125e6, rel=0.1)
    assert [weight for _, weight in model.parts] == [1 + 11.0, -11.0]  # two layers, and 11 times what the second adds
    small = plan_models.transformer(1_000_000, 64, torch.device("cpu"))
    compute = plan_measure.compute(small, torch.device("cpu"))
    assert 0 < compute.backward < compute.step


# Options.


@pytest.mark.parametrize(
    ("text", "expected"),
    [("100Mbit", 12.5e6), ("1Gbit", 125e6), ("25Gb/s", 3.125e9), ("1.5 GB/s", 1.5e9), ("10kbps", 1250), ("8b", 1)],
)
def test_bandwidths(text: str, expected: float) -> None:
    assert plan_units.bandwidth(text) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["", "fast", "100", "100 Mm", "0Gbit", "1.2.3Gbit", "-1Gbit"])
def test_bad_bandwidths(text: str) -> None:
    with pytest.raises(UsageError, match="--bandwidth: expected a bandwidth such as 100Mbit"):
        plan_units.bandwidth(text)


@pytest.mark.parametrize("text", ["40", "fast", "3 parsec", "ms"])
def test_bad_times(text: str) -> None:
    with pytest.raises(UsageError, match=r"--latency: expected a time with its unit such as 0\.5ms"):
        plan_units.seconds(text)


def test_quantities_read_what_they_show() -> None:
    assert [plan_units.count(text, "") for text in ("125M", "8k", "1.5B", "4_096")] == [
        125_000_000,
        8000,
        1_500_000_000,
        4096,
    ]
    assert plan_units.show_rate(plan_units.bandwidth("25Gb/s")) == "25 Gbit/s"
    assert plan_units.show_seconds(plan_units.seconds("40ms")) == "40 ms"
    with pytest.raises(UsageError, match="--tokens: expected a number above 0"):
        plan_units.count("0", "--tokens")


FACTORY = """
import torch

def with_loss():
    model = torch.nn.Linear(64, 64)
    return model, lambda: model(torch.ones(4, 64)).square().mean()

def without_loss():
    return torch.nn.Linear(64, 64)

def wrong():
    return 3
"""


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    name = f"planned_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(FACTORY)
    return name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing", "expected package.module:function, got 'nothing'"),
        ("no_such_module:make", "expected a module that can be imported, got 'no_such_module'"),
        ("{name}:missing", "expected a function of .*, got 'missing'"),
        ("{name}:wrong", "expected .*wrong to return a module, .*got int"),
    ],
)
def test_wrong_models_are_named(text: str, message: str, factory: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan_models.of_factory(text.format(name=factory), 64)


def _plan(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *options: str) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["gradwire", "plan", *options])
    monkeypatch.setattr("torch.set_num_threads", lambda threads: None)
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr()
    return int(ended.value.code or 0), printed.out, printed.err


LINKS = ("--bandwidth", "10Mbit", "--latency", "1ms", "--world-size", "4", "--compute", "50ms", "--tokens", "64")


def test_the_command_prints_lines_that_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, factory: str
) -> None:
    output = tmp_path / "plan.json"
    code, out, _ = _plan(
        capsys, monkeypatch, *LINKS, "--model", f"{factory}:without_loss", "--host", "loop", "--output", str(output),
        "--methods", "ScaledSign + EF + TwoPhase",
    )  # fmt: skip
    assert code == 0
    assert "Communication is exposed" in out
    pasted = out.rstrip().splitlines()[-3:]
    assert pasted == list(plan_code.lines("ScaledSign + EF + TwoPhase"))
    _run_pasted(pasted)
    kept = json.loads(output.read_text())
    assert kept["best"] == "ScaledSign + EF + TwoPhase"
    assert kept["predictions"][PLAIN]["sent"] == pytest.approx(1.5 * 4 * (64 * 64 + 64))


def _run_pasted(pasted: list[str]) -> None:
    model = torch.nn.Linear(64, 64)
    names: dict[str, Any] = {
        "model": model.named_parameters(),
        "optimizer": torch.optim.SGD(model.parameters(), lr=1.0),
    }
    exec("\n".join(pasted), names)
    before = model.weight.detach().clone()
    model(torch.ones(4, 64)).square().mean().backward()
    names["optimizer"].step()
    assert not torch.equal(before, model.weight)
    assert names["communicator"].stats.steps == 1


@pytest.mark.parametrize("method", COMPRESSING)
def test_every_candidate_can_be_pasted(method: str) -> None:
    pasted = plan_code.lines(method)
    assert len(pasted) == 3
    names: dict[str, Any] = {}
    exec("\n".join(pasted[:2]), names)
    expected = plan_measure.averager(method)
    assert repr(names["communicator"]) == repr(expected)
    _run_pasted(list(pasted))


def test_a_model_of_the_user_is_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, factory: str
) -> None:
    options = ("--bandwidth", "1Gbit", "--world-size", "2", "--methods", "Cast", "--model", f"{factory}:with_loss")
    code, out, _ = _plan(capsys, monkeypatch, *options)
    assert code == 0
    assert f"{factory}:with_loss, 0.00416 M parameters" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "plan: expected --bandwidth and --world-size, or torchrun"),
        (("--bandwidth", "1Gbit", "--world-size", "3", "--ranks-per-host", "2"), "--ranks-per-host=2 divides, got 3"),
        (("--bandwidth", "ten"), "--bandwidth: expected a bandwidth"),
        (("--backward", "1s"), "--backward: expected --compute with it"),
        (("--compute", "1s", "--backward", "2s"), "--backward: expected at most --compute=1s"),
        (("--measured", "plan.json"), "--measured: expected --against with it"),
        (("--methods", "TopKK"), "unknown name 'TopKK'"),
        (("--parameters", "many"), "--parameters: expected a number above 0"),
    ],
)
def test_mistakes_are_one_sentence(
    options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = _plan(capsys, monkeypatch, *options)
    assert code == 2
    assert message in err


def test_methods_take_several_texts() -> None:
    assert spread(["plan", "--methods", "a", "b"]) == ["plan", "--methods", "a", "--methods", "b"]


@pytest.mark.slow
def test_ranks_of_one_host_are_measured_side_by_side(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--ranks-per-host", "2", "--parameters", "200k", "--methods", "Cast")
    code, out, err = _plan(capsys, monkeypatch, *LINKS, *options)
    assert code == 0, err
    assert "between machines of 2 ranks" in out


@pytest.mark.slow
def test_under_torchrun_the_links_are_measured() -> None:
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node", "2", "--no-python"]
    command = [*torchrun, str(Path(sys.executable).parent / "gradwire"), "plan", "--parameters", "200k"]
    options = ["--tokens", "64", "--methods", "Cast", "ChunkTopK + EF"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "Measured links" in done.stdout
    assert "0 - 1" in done.stdout
    assert "Compression pays" in done.stdout


# Against the network lab.


def _lab() -> dict[str, Any]:
    links = {"unlimited": None, "10mbit": 10_000_000}
    names = ["none", "DDP", "torch bf16 hook", "torch PowerSGD hook, rank 2", "ChunkTopK(k=32) + EF", "DeMo(k=32)"]
    names += ["DiLoCo(every=15), int8", "DeMo(form='overlapped', k=32)"]
    cell = {"counts_frames": True, "declared_bytes": 0, "sent_bytes": 1, "sent_packets": 1, "calls": {}}
    seconds = {"unlimited": 0.1, "10mbit": 4.5}
    runs = [
        {
            "what": "method",
            "name": name,
            "ours": plan_lab.find(name).ours,
            "gloo_bytes": {},
            "curve": [{"step": 1, "validation_loss": 2.0}],
            "networks": {text: cell | {"seconds": 0.06 if name == "none" else seconds[text]} for text in links},
        }
        for name in names
    ]
    return {
        "benchmark": "network",
        "machine": {"command": "gradwire bench network", "date": "2026-01-02T03:04:05"},
        "options": {"layers": 2, "width": 64, "heads": 2, "context": 16, "batch": 2, "hosts": 4, "steps": 4},
        "methods": names,
        "networks": {text: [{"up": rate, "down": rate}] * 4 for text, rate in links.items()},
        "runs": runs,
    }


INPUTS = {"backward_share": 0.5, "overhead": 1e-3, "loopback": 1e9}


def test_cells_of_the_lab_are_predicted() -> None:
    lab = _lab()
    texts = {plan_lab.text_of(method) for method in plan_lab.predicted(lab)}
    found = plan_lab.compare(lab, INPUTS | {"work": dict.fromkeys(texts, 0.2) | {PLAIN: 0.0}})
    cells = {(cell["method"], cell["network"]): cell["predicted"] for cell in found["cells"]}
    assert {method for method, _ in cells} == set(lab["methods"]) - {"none"}
    numel = 2 * (12 * 64**2 + 2 * 64) + 256 * 64 + 64
    line = 1.5 * 4 * numel * plan_case.FRAMING * 8 / 1e7
    ddp = cells["DDP", "10mbit"]
    assert ddp == pytest.approx(0.06 + 1e-3 + 1.03 * line)  # one bucket, whose gradients are there when backward ends
    assert cells["torch bf16 hook", "10mbit"] == pytest.approx(0.06 + line / 2, abs=0.031)
    assert cells["ChunkTopK(k=32) + EF", "10mbit"] < ddp / 3
    assert cells["DiLoCo(every=15), int8", "10mbit"] < 0.06 + (0.02 + line / 2) / 15
    assert cells["torch PowerSGD hook, rank 2", "10mbit"] < ddp / 3
    overlapped = "DeMo(form='overlapped', k=32)"
    assert cells[overlapped, "unlimited"] == pytest.approx(1.2 * 0.06)  # beside the step, but for its work
    assert cells[overlapped, "10mbit"] < cells["DeMo(k=32)", "10mbit"]
    assert all(cells[method, "unlimited"] <= seconds for (method, network), seconds in cells.items() if "10" in network)


def test_the_report_shows_how_far_predictions_are_off(tmp_path: Path) -> None:
    machine = {"cpu": "A CPU", "torch": "2.13.0", "date": "2026-01-02T03:04:05", "command": "gradwire plan"}
    cells = [
        {"method": "DDP", "network": "10mbit", "measured": 4.0, "predicted": 4.4},
        {"method": "DDP", "network": "1gbit", "measured": 0.1, "predicted": 0.05},
    ]
    lab = {"command": "gradwire bench network", "date": "2026-01-02", "hosts": 4}
    kept = {"machine": machine, "lab": lab, "cells": cells, "inputs": INPUTS | {"work": {}}}
    (tmp_path / "plan.json").write_text(json.dumps(kept))
    readme = "<!-- results:plan -->\n<!-- /results:plan -->\n![](docs/plan.png)\n"
    text = report.fill(readme, tmp_path)
    assert "| `DDP` | 4400, 4000 | 50, 100 |" in text
    assert "1 of 2 within 25%" in text
    assert "by 50%" in text
    (draw,) = plots.stale(text, tmp_path, tmp_path).values()
    draw()
    assert plots.stale(text, tmp_path, tmp_path) == {}


def test_only_results_of_the_lab_are_compared(tmp_path: Path) -> None:
    for text in (None, "{}"):
        if text is not None:
            (tmp_path / "lab.json").write_text(text)
        with pytest.raises(UsageError, match="--against: expected results of `gradwire bench network`"):
            plan_lab.main(tmp_path / "lab.json", None)


@pytest.mark.slow
def test_what_predictions_need_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lab = _lab()
    lab["options"]["hosts"] = 2
    (tmp_path / "lab.json").write_text(json.dumps(lab))
    plan_lab.main(tmp_path / "lab.json", tmp_path / "plan.json")
    assert "Milliseconds of a step, predicted and measured, on 2 hosts" in capsys.readouterr().out
    inputs = json.loads((tmp_path / "plan.json").read_text())["inputs"]
    assert 0.2 < inputs["backward_share"] < 0.95
    assert min(inputs["overhead"], inputs["loopback"], inputs["work"]["DeMo(k=32)"]) > 0
    assert inputs["work"].keys() == {plan_lab.text_of(method) for method in plan_lab.predicted(lab)}
    plan_lab.main(tmp_path / "lab.json", tmp_path / "again.json", tmp_path / "plan.json")
    first, again = (json.loads((tmp_path / name).read_text()) for name in ("plan.json", "again.json"))
    assert again["cells"] == first["cells"]
    assert again["machine"]["date"] == first["machine"]["date"]
    lab["methods"].append("ScaledSign + EF")
    lab["runs"].append(lab["runs"][-1] | {"name": "ScaledSign + EF", "ours": True})
    (tmp_path / "lab.json").write_text(json.dumps(lab))
    with pytest.raises(UsageError, match=r"--measured: expected measurements of ScaledSign \+ EF, too"):
        plan_lab.main(tmp_path / "lab.json", None, tmp_path / "plan.json")


KEPT = Path(__file__).parents[1] / "bench" / "results"


def test_bytes_are_those_that_the_lab_declared() -> None:
    """Independent of the rehearsal: what real ranks on real links counted, torch's PowerSGD hook among them."""
    lab = json.loads((KEPT / "network.json").read_text())
    shapes, hosts = plan_lab.shapes_of(lab["options"]), lab["options"]["hosts"]
    declared = {
        run["name"]: next(iter(run["networks"].values()))["declared_bytes"]
        for run in lab["runs"]
        if run["what"] == "method"
    }
    for method in plan_lab.predicted(lab):
        codecs = {plan_lab.text_of(method): 0.0}
        found = plan_lab.predict(method, shapes, hosts, Network(Link(0.0, 1e6)), Compute(0.1, 0.05), codecs)
        assert found.sent == pytest.approx(declared[method.name], rel=0.01), method.name


def test_kept_predictions_are_those_of_the_cost_model_and_all_within_the_bound() -> None:
    lab, kept = (json.loads((KEPT / f"{name}.json").read_text()) for name in ("network", "plan"))
    cells = [cell for cell in kept["cells"] if cell["network"] == "10mbit"]
    lab["networks"] = {"10mbit": lab["networks"]["10mbit"]}  # the one where the most is sent; each takes seconds
    again = plan_lab.compare(lab, kept["inputs"])
    assert kept["lab"] == again["lab"], "predictions are of another run of the lab"
    assert {cell["method"] for cell in kept["cells"]} == set(lab["methods"]) - {"none"}
    for cell, other in zip(cells, again["cells"], strict=True):
        assert cell == other | {"predicted": pytest.approx(other["predicted"])}
    for cell in kept["cells"]:
        assert abs(cell["predicted"] / cell["measured"] - 1) <= plan_lab.WITHIN, cell


@pytest.mark.parametrize("method", ["ScaledSign + EF", "DeMo(k=8)", "DeMo(form='overlapped', k=8)"])
def test_a_method_works_in_the_place_where_it_trains(method: str) -> None:
    model = plan_models.transformer(20_000, 32, torch.device("cpu"), layers=1, width=32)
    waited = []
    device = torch.device("cpu")
    with plan_work.training(model, method, 4, device, lambda: waited.append(1)) as step:
        step()
        step()
    assert bool(waited) is not plan_measure.is_late(method)  # one process, whose collectives ask for the others
    found = plan_work.seconds([PLAIN, method], model, Compute(0.01, 0.005), 4, device)
    assert found[PLAIN] == 0 <= found[method]


def test_gradients_of_a_large_model_are_compressed_alone() -> None:
    model = plan_models.transformer(125_000_000, 64, torch.device("meta"))
    waited: list[int] = []
    found = plan_work.seconds(
        ["ScaledSign + EF"], model, Compute(9.0, 6.0), 4, torch.device("cpu"), lambda: waited.append(1)
    )
    assert found["ScaledSign + EF"] > 0
    assert waited
