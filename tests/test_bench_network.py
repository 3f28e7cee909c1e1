"""`gradwire bench network`: real hosts where namespaces can be made, and everywhere what is read and counted."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

from gradwire.bench.data import Corpus
from gradwire.bench.errors import UsageError
from gradwire.bench.model import ByteTransformer, num_parameters
from gradwire.bench.network import links, methods, namespaces, overlap, run, table
from gradwire.bench.network.job import settings
from gradwire.bench.network.links import Link, parse
from gradwire.bench.network.methods import CATALOGUE, DDP, NONE, POWER_SGD_HOOK, Method, find
from gradwire.bench.network.namespaces import hosts, standing, sweep
from gradwire.bench.network.team import team
from gradwire.bench.network.trainee import Shape, Trainee

WHY_NOT = namespaces.why_not()
needs_namespaces = pytest.mark.skipif(WHY_NOT is not None, reason=f"no network namespaces here: {WHY_NOT}")

TINY = Shape(layers=1, width=32, heads=2, context=16, batch=2, steps=8, eval_every=4)
OURS = "PowerSGD(matrix_rank=1)"


# Real hosts.


@needs_namespaces
@pytest.mark.slow
def test_two_hosts_train_over_a_slow_link_and_leave_nothing() -> None:
    method = find("BlockQuantize(bits=8) + EF + TwoPhase")
    started: list[int] = []
    with hosts(2) as made:
        assert all(name.startswith(f"gradwire-{os.getpid()}-") for name in made.names)
        assert set(made.names) < standing().keys()
        network = parse("20mbit/80mbit", 2)
        with contextlib.ExitStack() as stack:
            ranks = stack.enter_context(team(made, settings(method, replace(TINY, width=128, heads=4))))
            trained = ranks.ask({"do": "train", "steps": 8}, timeout=60)
            made.shape(network)
            assert "rate 20Mbit" in _qdisc(made.names[0], "eth0")
            assert "rate 80Mbit" in _qdisc(made.names[0].replace("h0", "switch"), "p0")
            measured = ranks.ask({"do": "measure", "steps": 6}, timeout=60)
            gloo = ranks.ask({"do": "probe"}, timeout=60)
            for name in made.names:
                started += map(int, _printed("ip", "netns", "pids", name).split())
            with pytest.raises(RuntimeError, match=r"a rank failed: TypeError"):
                ranks.ask({"do": "measure", "steps": "six"}, timeout=60)
    assert trained[0]["curve"][-1]["step"] == 8
    assert [point["validation_loss"] for point in trained[0]["curve"]] == [
        point["validation_loss"] for point in trained[1]["curve"]
    ]
    busiest = max(measured, key=lambda rank: float(rank["sent_bytes"]))
    assert busiest["calls"] == {"all_reduce": 1.0, "all_to_all": 1.0, "all_gather": 1.0}
    assert busiest["sent_bytes"] > busiest["declared_bytes"] > 50_000
    share = table.explained(busiest, gloo[0])
    assert share is not None
    assert abs(share - 1) < 0.05
    floor = busiest["declared_bytes"] * 8 / 20e6
    assert busiest["seconds"] > 0.7 * floor  # it went through the bucket; how much longer it takes is the machine's
    assert len(started) >= 4  # an agent and a rank on each host
    assert not any(Path(f"/proc/{process}").exists() for process in started)
    assert os.getpid() not in standing().values()


def _qdisc(namespace: str, device: str) -> str:
    return _printed("tc", "-n", namespace, "qdisc", "show", "dev", device)


def _printed(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@needs_namespaces
@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_removes_its_namespaces(stop: signal.Signals) -> None:
    command = shutil.which("gradwire", path=str(Path(sys.executable).parent))
    assert command is not None
    process = subprocess.Popen(
        [command, "bench", "network", "--quick", "--methods", "none"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONSAFEPATH": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which shells ignore in the background
    )
    try:
        inside = ""
        while not inside and process.poll() is None:  # until torchrun runs in the first of them
            time.sleep(0.1)
            if len([name for name, maker in standing().items() if maker == process.pid]) == 3:
                with contextlib.suppress(subprocess.CalledProcessError):
                    inside = _printed("ip", "netns", "pids", f"gradwire-{process.pid}-h0")
        process.send_signal(stop)
        assert process.wait(60) != 0
        assert process.pid not in standing().values()
        assert inside
        assert not any(Path(f"/proc/{pid}").exists() for pid in inside.split())
    finally:
        if process.poll() is None:
            process.kill()


@needs_namespaces
@pytest.mark.slow
def test_what_a_killed_command_has_left_is_swept_by_the_next() -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    left, ours = f"gradwire-{ended.pid}-h0", f"gradwire-{os.getpid()}-h7"
    for name in (left, ours):
        subprocess.run(["ip", "netns", "add", name], check=True)
    inside = subprocess.Popen(["ip", "netns", "exec", left, "sleep", "600"])
    try:
        while not _printed("ip", "netns", "pids", left):
            time.sleep(0.02)
        sweep()
        assert inside.wait(10) != 0
        assert left not in standing()
        assert ours in standing()  # this process lives
    finally:
        subprocess.run(["ip", "netns", "delete", ours], check=True)


def test_where_there_are_no_namespaces_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "darwin")
        with pytest.raises(UsageError, match=r"bench network: expected Linux, .* got darwin"):
            run.main()
    monkeypatch.setattr(sys, "platform", "linux")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "which", lambda name: None)
        assert namespaces.why_not() == "expected the command ip, found none. Install iproute2."
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(UsageError, match=r"expected root, .* got user 1000. Use sudo"):
        run.main()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="bench network: expected one process, without torchrun"):
        run.main()


# Networks as text.


def test_networks_are_read() -> None:
    assert parse("10mbit", 2).links == (Link(10_000_000, 10_000_000),) * 2
    assert parse("unlimited", 2).links == (Link(None, None),) * 2
    assert parse("10Mbit/1.5gbit", 2).links == (Link(10_000_000, 1_500_000_000),) * 2
    slow = parse("10mbit,100mbit/unlimited", 3)
    assert slow.links == (Link(10**7, 10**7), Link(10**8, None), Link(10**8, None))
    assert [slow.slowest, parse("unlimited", 2).slowest] == [10**7, None]
    assert [parse(text, 2).counts_frames for text in ("10mbit", "1gbit", "unlimited", "1gbit,10mbit")] == [
        True, False, False, True,
    ]  # fmt: skip
    for text in ("", "10", "10mbit/", "0mbit", "10mbps", "-1gbit", "10mbit;1gbit"):
        with pytest.raises(UsageError, match="--networks: expected rates such as 10mbit"):
            parse(text, 2)
    with pytest.raises(UsageError, match=r"expected at most 2 links, .* got '1gbit,1gbit,1gbit'"):
        parse("1gbit,1gbit,1gbit", 2)


def test_networks_in_words() -> None:
    assert links.title("10mbit") == "10 Mbit/s"
    assert links.title("10mbit/1.5gbit") == "10 Mbit/s up, 1.5 Gbit/s down"
    assert links.title("512kbit,unlimited") == "first host 512 kbit/s; others unlimited"


def test_a_bucket_holds_a_millisecond_but_no_less_than_two_frames() -> None:
    assert links.tbf(10**7) == ["tbf", "rate", "10000000bit", "burst", "3200", "latency", "500ms"]
    assert links.tbf(10**9)[4] == "125000"


# Methods.


def _declared(names: Sequence[str], steps: int) -> dict[str, tuple[float, float, list[float]]]:
    """Bytes per step, the first loss and the weights in the end."""
    corpus = Corpus("counting", (torch.arange(10_000) % 251).byte(), (torch.arange(2_000) % 251).byte())
    found = {}
    for name in names:
        trainee = Trainee(CATALOGUE[name], TINY, corpus)
        losses = [float(trainee.step(step)) for step in range(steps)]
        trainee.settle()
        assert trainee.evaluate() > 0
        weights = [float(p.detach().double().sum()) for p in trainee.model.parameters()]
        found[name] = trainee.declared_bytes / steps, losses[0], weights
    return found


def test_methods_train_and_declare_what_they_send() -> None:
    """On 2 ranks a ring all-reduce sends as many bytes as it is given."""
    model = ByteTransformer(TINY.layers, TINY.width, TINY.heads)
    whole, rank = num_parameters(model), methods.TORCH_RANK
    low = sum(rank * sum(p.shape) if p.ndim == 2 else p.numel() for p in model.parameters())
    local = "SparseLoCo(every=15)"
    expected = {
        NONE.name: 0.0,
        DDP.name: 4.0 * whole,
        "torch bf16 hook": 2.0 * whole,
        POWER_SGD_HOOK.name: 4 * (2 * whole + 13 * low) / 15,  # dense in two steps
    }
    ours = [f"{OURS}, DDP", OURS, local]
    first, second = run_ranks(2, _declared, [*expected, *ours], 15)
    for name, (declared, loss, weights) in first.items():
        assert loss == first[NONE.name][1] != second[name][1]  # the same text for all methods, another on each rank
        assert (weights == second[name][2]) == (name != NONE.name)
        if name in expected:
            assert declared == pytest.approx(expected[name])
        else:
            assert CATALOGUE[name].ours
            assert 0 < declared < whole
    assert first[f"{OURS}, DDP"] == first[OURS]
    assert 15 * first[local][0] < whole  # one exchange of less than a byte per parameter


def test_methods_are_found_by_name_or_made_of_a_configuration() -> None:
    assert find("none") is NONE
    assert list(CATALOGUE)[:2] == [NONE.name, DDP.name]
    assert set(methods.QUICK) <= CATALOGUE.keys()
    assert find("TopK(ratio=0.5) + EF") == Method("TopK(ratio=0.5) + EF", "gradwire", "TopK(ratio=0.5) + EF")
    with pytest.raises(UsageError, match=r"--methods: expected one of 'none', 'DDP', .* got 'Nothing': unknown name"):
        find("Nothing")


# Overlap.


def test_exposed_is_what_no_backward_covers(tmp_path: Path) -> None:
    found = overlap.overlap(communication=[(0, 4), (3, 5), (9, 10)], backward=[(1, 2), (1.5, 3), (4.5, 9.5)])
    assert (found.communication, found.backward, found.exposed) == (6, 7, 3)
    assert found.exposed_share == 0.5
    assert overlap.overlap(communication=[], backward=[(0, 1)]).exposed_share == 0.0
    events = [
        {"ph": "X", "name": "gradwire::collective", "ts": 1000, "dur": 2000},
        {"ph": "X", "name": "autograd::engine::evaluate_function: AddBackward0", "ts": 2000, "dur": 5000},
        {"ph": "X", "name": "aten::add", "ts": 0, "dur": 9000},
        {"ph": "M", "name": "gradwire::collective"},
    ]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": events}))
    found = overlap.read(path)
    assert [round(1e6 * seconds) for seconds in (found.communication, found.backward, found.exposed)] == [
        2000, 5000, 1000,
    ]  # fmt: skip


def _traced(host: str, path: str) -> list[float]:
    corpus = Corpus("counting", (torch.arange(10_000) % 251).byte(), (torch.arange(2_000) % 251).byte())
    trainee = Trainee(
        Method("dense", "gradwire", "dense", "ddp" if host == "ddp" else "loop", bucket_mb=0.02), TINY, corpus
    )
    trainee.step(0)
    with overlap.record(Path(path) if trainee.rank == 0 else None):
        trainee.step(1)
    trainee.step(2)  # nothing of the recording stays
    found = overlap.read(Path(path)) if trainee.rank == 0 else overlap.Overlap(1, 1, 1)
    return [found.communication, found.backward, found.exposed]


@pytest.mark.parametrize("host", ["loop", "ddp"])
def test_a_trace_holds_communication_and_backward_of_all_threads(host: str, tmp_path: Path) -> None:
    communication, backward, exposed = run_ranks(2, _traced, host, str(tmp_path / "trace.json"))[0]
    assert communication > 0
    assert backward > 0
    assert 0 <= exposed <= communication + 1e-9
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    spans = [event for event in events if event.get("name") == overlap.COMMUNICATION]
    assert len(spans) >= 2  # one for each bucket
    assert len({event["tid"] for event in spans}) == 1
    backwards = {event["tid"] for event in events if str(event.get("name", "")).startswith("autograd::engine")}
    assert spans[0]["tid"] not in backwards
