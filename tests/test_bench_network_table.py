"""The table of `gradwire bench network`, its figure, and what the command runs, on results that are pretended."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from gradwire.bench import plots, report
from gradwire.bench.errors import UsageError
from gradwire.bench.network import methods, run, table
from gradwire.bench.network.methods import DDP, NONE, POWER_SGD_HOOK

OURS = "PowerSGD(matrix_rank=1)"
EMPTY = "<!-- results:network -->\n<!-- /results:network -->\n![](docs/network.png)\n"

_LOSSES = {NONE.name: 9.0, DDP.name: 2.0, POWER_SGD_HOOK.name: 2.1, OURS: 2.05}
_SECONDS = {NONE.name: 0.05, DDP.name: 5.0, POWER_SGD_HOOK.name: 0.25, OURS: 0.1}


def pretend(task: run.Task) -> dict[str, Any]:
    """A run whose loss falls by a straight line to `_LOSSES`, and whose steps are 10 times as quick at 1 Gbit/s."""
    name = task.method.name
    head: dict[str, Any] = {"what": task.what, "name": name, "seconds": 1.0}
    curve = [
        {"step": step, "validation_loss": 5.0 - step / 300 * (5.0 - _LOSSES.get(name, 2.0)), "seconds": 0.11 * step}
        for step in (15, 60, 225, 300)
    ]
    if task.what == "trace":
        times = {"communication": 0.2, "backward": 1.0, "exposed": 0.03, "exposed_share": 0.15}
        return head | {"network": "1gbit", "hosts": 2, "tokens": 2048, "steps": 5} | times
    if task.what == "check":
        return head | {"network": "10mbit", "curve": curve}
    cell = {"declared_bytes": 0.0, "sent_bytes": 10.0, "sent_packets": 0.1, "calls": {}, "processor_seconds": 0.03}
    if name != NONE.name:
        cell |= {
            "declared_bytes": 60_000.0,
            "sent_bytes": 70_000.0,
            "sent_packets": 100.0,
            "calls": {"all_reduce": 2.0},
        }
    cells = {
        network.text: cell
        | {
            "seconds": _SECONDS.get(name, 1.0) / (10 if network.text == "1gbit" else 1),
            "rounds": [],
            "counts_frames": network.counts_frames,
        }
        for network in task.networks
    }
    gloo = {"all_reduce": 1700.0, "all_gather": 500.0, "all_to_all": 500.0}
    return head | {
        "ours": task.method.ours, "lr": task.method.lr, "every": task.method.every, "curve": curve, "gloo_bytes": gloo,
        "networks": cells,
    }  # fmt: skip


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Runs that have only been pretended, in order."""
    done: list[tuple[str, str]] = []

    def fake(tasks: Sequence[run.Task]) -> Iterator[dict[str, Any]]:
        for task in tasks:
            done.append(task.key)
            yield pretend(task)

    monkeypatch.setattr(run, "_run", fake)
    monkeypatch.setattr(run, "why_not", lambda: None)
    return done


FOUR = [NONE.name, DDP.name, POWER_SGD_HOOK.name, OURS]


def _kept(folder: Path, **options: Any) -> dict[str, Any]:
    output = folder / "network.json"
    run.main(FOUR, ["10mbit", "1gbit", "10mbit,100mbit"], output=output, **options)
    kept: dict[str, Any] = json.loads(output.read_text())
    return kept


def test_steps_to_a_loss_lie_on_straight_lines() -> None:
    curve = [(10.0, 4.0), (20.0, 3.0), (30.0, 3.5), (40.0, 2.0)]
    assert table.steps_to(curve, 4.0) == 10.0
    assert table.steps_to(curve, 3.25) == 17.5
    assert table.steps_to(curve, 2.75) == 35.0
    assert table.steps_to(curve, 1.0) is None


def test_wire_bytes_are_explained_by_payload_headers_and_gloo() -> None:
    cell = {
        "declared_bytes": 1000.0,
        "sent_bytes": 2000.0,
        "sent_packets": 10.0,
        "calls": {"all_reduce": 2.0, "x": 9.0},
    }
    assert table.explained(cell, {"all_reduce": 20.0}) == (1000 + 660 + 40) / 2000
    assert table.explained(cell | {"declared_bytes": 0.0}, {}) is None


def test_rows_and_what_they_amount_to(tmp_path: Path, ran: list[Any]) -> None:
    kept = _kept(tmp_path)
    assert table.target(kept) == 4.4  # of DDP after 60 of 300 steps
    none, ddp, hook, ours = table.network_rows(kept)
    assert (none.steps, none.explained) == (None, None)
    assert ddp.steps == pytest.approx(60)
    assert ours.steps == pytest.approx(300 * 0.6 / 2.95)
    assert ours.time_to_loss("10mbit") == pytest.approx(0.1 * 300 * 0.6 / 2.95)
    assert ours.explained == pytest.approx((60_000 + 6_600 + 3_400) / 70_000)
    assert [row.wire for row in (none, hook)] == [10.0, 70_000.0]
    names, cells = table.headings(kept), table.cells(ours, [none, ddp, hook, ours], kept)
    assert len(names) == len(cells)
    assert dict(zip(names, cells, strict=True)) == {
        "Method": OURS, "Bytes per step": "60 kB", "On the wire": "70 kB", "Of it explained": "100.0%",
        "Step, ms: 10 Mbit/s": "100 (2.0)", "Step, ms: 1 Gbit/s": "10 (2.0)",
        "Step, ms: first host 10 Mbit/s; others 100 Mbit/s": "100 (2.0)",
        "Steps to the loss": "61", "Seconds to it: 10 Mbit/s": "6", "Seconds to it: 1 Gbit/s": "1",
    }  # fmt: skip
    assert table.findings(kept)[0] == (
        f"10 Mbit/s: the shortest step is that of `{OURS}`, 2 times none, 0.02 times DDP's, 0.4 times that of "
        f"torch's PowerSGD; first to the loss is `{OURS}` after 6.1 s, 49.2 times sooner than DDP, 2.54 times "
        "sooner than torch's PowerSGD"
    )
    assert table.checks(kept)[0].endswith("300 steps in 33 s where 30 s were said, losses the same to the last digit")
    assert "15% run while no operation of backward does" in table.checks(kept)[1]


def test_the_readme_gets_table_and_picture(tmp_path: Path, ran: list[Any]) -> None:
    kept = _kept(tmp_path)
    text = report.fill(EMPTY, tmp_path)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(FOUR)
    assert len({row.count("|") for row in rows}) == 1
    assert rows[-1].startswith(f"| `{OURS}` | 60 kB | 70 kB | 100.0% | 100 (2.0) |")
    assert "The loss is 4.40 nats per byte" in text
    assert "Medians of 3 rounds" in text
    assert kept["machine"]["command"] in text
    figures = plots.stale(text, tmp_path, tmp_path)
    assert list(figures) == [tmp_path / "docs" / "network.png"]
    for draw in figures.values():
        draw()
    assert plots.stale(text, tmp_path, tmp_path) == {}


def test_jobs_are_methods_then_a_check_then_traces(tmp_path: Path, ran: list[tuple[str, str]]) -> None:
    _kept(tmp_path)
    traces = [("trace", "dense, loop"), ("trace", "dense, ddp")]
    assert ran == [*(("method", name) for name in FOUR), ("check", OURS), *traces]
    ran.clear()
    run.main(quick=True, output=tmp_path / "quick.json")
    assert ran == [("method", name) for name in methods.QUICK]
    kept = json.loads((tmp_path / "quick.json").read_text())
    assert (kept["options"]["hosts"], kept["options"]["rounds"], kept["options"]["steps"]) == (2, 1, 30)
    ran.clear()
    run.main([OURS], ["1gbit"], trace=tmp_path)
    assert ran == [("method", OURS), *traces]


def test_an_interrupted_bench_goes_on(
    tmp_path: Path, ran: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(tasks: Sequence[run.Task]) -> Iterator[dict[str, Any]]:
        yield pretend(tasks[0])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "_run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            _kept(tmp_path)
    assert "1 of 7 runs are in" in capsys.readouterr().out
    with pytest.raises(UsageError, match="expected a finished network bench, got 1 of 4 runs"):
        table.network_rows(json.loads((tmp_path / "network.json").read_text()))
    _kept(tmp_path)
    assert ran[0] == ("method", DDP.name)
    assert len(ran) == 6
    with pytest.raises(UsageError, match="expected a new file or one with hosts=2"):
        _kept(tmp_path, host_count=2)


def test_a_window_holds_what_fits_and_rounds_of_local_steps_are_whole() -> None:
    assert run.rounds_of_window(0.1, 1) == 12
    assert run.rounds_of_window(0.5, 1) == 5
    assert run.rounds_of_window(5.0, 1) == 3
    assert run.rounds_of_window(0.05, 15) == 3
    assert run.rounds_of_window(5.0, 15) == 1


def test_a_summary_is_of_medians() -> None:
    names = ("seconds", "processor_seconds", "declared_bytes", "sent_bytes", "sent_packets")
    windows = [dict.fromkeys(names, value) | {"calls": {"all_reduce": 1.0}} for value in (1.0, 9.0, 2.0)]
    found = run.summary(windows)
    assert {name: found[name] for name in names} == dict.fromkeys(names, 2.0)
    assert found["rounds"] == [1.0, 9.0, 2.0]
