"""Parts of `gradwire federate`: data, partitions by text, methods as text, options, what is said and drawn."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawn_digits import PARAMETERS, Sklearn, write_texts

from gradwire import compression, federated
from gradwire.bench import federate_data, federate_method, federate_options, federate_plots, federate_table, specs
from gradwire.bench.errors import UsageError
from gradwire.bench.federate_simulation import make
from gradwire.bench.model import ByteTransformer
from gradwire.federated import SerialEngine, partition


@pytest.fixture
def sklearn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", types.ModuleType("sklearn"))
    monkeypatch.setitem(sys.modules, "sklearn.datasets", Sklearn("sklearn.datasets"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six clients, each with a text of its own."""
    path = tmp_path / "texts"
    write_texts(path)
    return path


def options(task: federate_data.Task, **changes: Any) -> federate_options.Options:
    unset = ("clients", "partition", "cohort", "rounds", "local_steps", "epochs", "batch", "lr", "server_lr")
    values: dict[str, Any] = dict.fromkeys((*unset, "downlink", "deadline"))
    values |= {"method": "FedAvg", "data": "digits", "dropout": 0.0, "on_error": "raise", "times": "devices"}
    values |= {"stragglers": "drop", "seed": 0, "vectorize": "auto", "state": "memory", "eval_every": 1}
    return federate_options.checked(values | {"checkpoint_every": 0} | changes, task)


# Data.


def test_windows_of_every_client(folder: Path) -> None:
    task = federate_data.load(str(folder))
    text = (folder / "client-0.txt").read_bytes()
    parts = federate_data.split("by_id", task, 6, seed=0)
    (windows,) = task.clients(parts).examples(0)
    context = federate_data.CONTEXT
    count = (len(text) - 1) // context
    assert len(windows) == count - max(1, count // 20)
    for number, window in enumerate(windows):
        assert bytes(window.tolist()) == text[number * context : (number + 1) * context + 1]
    held_out = bytes(task.held_out[0][0].tolist())
    assert held_out == text[len(windows) * context : (len(windows) + 1) * context + 1]
    amounts = task.distribution(parts)[0]
    targets = text[1 : len(windows) * context + 1].decode()
    assert dict(zip(task.kinds, amounts.tolist(), strict=True)) == {
        "a-z": sum(letter.islower() for letter in targets),
        "A-Z": 0,
        "0-9": targets.count("0"),
        "punctuation": targets.count(".") + targets.count(":"),
        "white space": targets.count(" ") + targets.count("\n"),
        "other bytes": 0,
    }


def test_the_standard_library_has_a_client_per_package() -> None:
    task = federate_data.load("text")
    assert task.owners is not None
    assert task.defaults["clients"] == len(set(task.owners)) > 15
    names, texts = federate_data._packages()
    assert {"asyncio", "email", "json", "unittest"} <= set(names)
    assert not {"site-packages", "test", "os.py"} & set(names)
    source = Path(json.__file__).read_bytes()
    assert source in texts[names.index("json")]
    assert isinstance(task.new_module(0), ByteTransformer)
    largest = federate_data.split("by_id", task, 5, seed=0)
    everyone = sorted(map(len, federate_data.split("by_id", task, len(names), seed=0)))
    assert sorted(map(len, largest)) == everyone[-5:]
    assert len(federate_data.split("iid", task, 40, seed=0)) == 40


@pytest.mark.usefixtures("sklearn")
def test_a_partition_can_be_used_again(tmp_path: Path) -> None:
    task = federate_data.digits()
    parts = federate_data.split("dirichlet_clients(0.1, num_examples=9)", task, 12, seed=4)
    partition.save(tmp_path / "p.json", parts, num_examples=task.num_examples)
    again = federate_data.split(str(tmp_path / "p.json"), task, 12, seed=0)
    assert all(map(torch.equal, parts, again))
    with pytest.raises(UsageError, match=r"--partition: expected 11 clients, got 12 in .* Set --clients"):
        federate_data.split(str(tmp_path / "p.json"), task, 11, seed=0)
    other = federate_data.split("dirichlet_clients(0.1, num_examples=9, seed=4)", task, 12, seed=0)
    assert all(map(torch.equal, parts, other))


@pytest.mark.usefixtures("sklearn")
def test_weights_follow_the_seed_and_leave_the_generator_alone() -> None:
    task = federate_data.digits()
    torch.manual_seed(5)
    before = torch.rand(1)
    torch.manual_seed(5)
    first, again, other = (torch.nn.utils.parameters_to_vector(task.new_module(s).parameters()) for s in (1, 1, 2))
    assert torch.equal(torch.rand(1), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(first) == PARAMETERS


# Methods.


def test_a_method_is_a_sum_of_terms() -> None:
    method = federate_method.parse("scaffold + topk(ratio=0.1) + ef + sgd(momentum=0.9)")
    assert method.algorithm() == federated.SCAFFOLD()
    assert repr(method.uplink()) == repr(federated.Link(compression.TopK(ratio=0.1), specs.comm.EF()))
    assert method.aggregator() is method.policy() is None
    factory = method.server_optimizer(None)
    assert factory is not None
    made = factory([torch.nn.Parameter(torch.ones(2))])
    assert (type(made), made.defaults["lr"], made.defaults["momentum"]) == (torch.optim.SGD, 1.0, 0.9)
    adam = federate_method.parse("FedAdam(tau=0.1)").server_optimizer(None)
    rates = [
        factory([torch.nn.Parameter(torch.ones(2))]).defaults["lr"]
        for factory in (adam, federate_method.parse("FedAdam").server_optimizer(0.5))
        if factory is not None
    ]
    assert rates == [federated.FedAdam([torch.ones(2)]).defaults["lr"], 0.5]
    plain = federate_method.parse("FedAvg + dense")
    assert plain.uplink() is plain.server_optimizer(1.0) is None
    assert federate_method.parse("CoordinateMedian").algorithm() == federated.FedAvg()
    assert isinstance(federate_method.parse("FedFix(1.5)").policy(), federated.FedFix)


def test_every_name_is_of_one_family() -> None:
    names = [name.lower() for family in federate_method.FAMILIES for name in specs.catalogue()[family]]
    assert len(names) == len(set(names))
    assert {"SCAFCOM", "FedDyn"} <= specs.catalogue()["algorithm"].keys()
    assert {"FedAdam", "AdamP", "SGD"} <= specs.catalogue()["server optimizer"].keys()
    assert {"WeightedMean", "CoordinateMedian"} <= specs.catalogue()["aggregator"].keys()
    assert not {"FedAdam"} & specs.catalogue()["optimizer"].keys()
    with pytest.raises(UsageError, match="unknown name 'FedAvg'"):
        specs.parse("dense + FedAvg")


def test_join() -> None:
    assert federate_method.join({}) == "FedAvg"
    texts = {"server optimizer": "FedYogi", "compressor": "TopK + EF", "algorithm": "FedProx(mu=1.0)"}
    assert federate_method.join(texts) == "FedProx(mu=1.0) + TopK + EF + FedYogi"
    with pytest.raises(UsageError, match=r"unknown name 'TopK'. There is aggregator: "):
        federate_method.join({"aggregator": "TopK"})


@pytest.mark.usefixtures("sklearn")
def test_every_option_reaches_the_simulation(tmp_path: Path) -> None:
    task = federate_data.digits()
    chosen = options(
        task, method="FedProx(mu=0.5) + TopK(ratio=0.5) + TrimmedMean(0.2) + FedAdam", downlink="TopK(ratio=0.25)",
        clients=40, partition="iid", cohort=8, epochs=3, batch=0, lr=0.25, server_lr=0.125, dropout=0.5, seed=7,
        on_error="skip", times="FixedTimes(2.0)", deadline=9.0, stragglers="partial", state="disk", eval_every=2,
    )  # fmt: skip
    parts = federate_data.split(chosen.partition, task, chosen.clients, chosen.seed)
    simulation = make(chosen, task, parts, SerialEngine(), tmp_path / "clients")
    assert isinstance(simulation, federated.Simulation)
    assert (simulation.cohort_size, len(simulation.clients), simulation.dropout, simulation.seed) == (8, 40, 0.5, 7)
    assert simulation.algorithm == federated.FedProx(mu=0.5)
    training = simulation.training
    assert (training.epochs, training.steps, training.batch_size, training.lr) == (3, None, None, 0.25)
    assert repr(simulation.uplink) == repr(federated.Link(compression.TopK(ratio=0.5)))
    assert simulation.downlink is not None
    assert type(simulation.aggregators["pseudo_gradient"]).__name__ == "TrimmedMean"
    assert simulation.server.optimizer is not None
    assert simulation.server.optimizer.defaults["lr"] == 0.125
    assert simulation.evaluate_every == 2
    record = simulation.step()
    assert record.time == (9.0 if record.lost else 2.0)  # who does not answer is waited for
    assert record.metrics == {}
    assert simulation.step().metrics.keys() == {"loss", "accuracy"}


def test_client_times(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("client,seconds_per_example,bytes_per_second_down,bytes_per_second_up\n0,1,inf,inf\n1,2,inf,inf\n")
    job = federated.client_times.Job(client=1, examples=3, bytes_down=1000, bytes_up=1000)
    assert federate_method.client_times(str(trace), 2, seed=0).duration(job, seed=0) == 6 * 10**9
    with pytest.raises(UsageError, match="--times: TraceTimes: expected a trace of 3 clients, got one of 2"):
        federate_method.client_times(str(trace), 3, seed=0)
    first, again, other = (federate_method.devices(500, seed) for seed in (0, 0, 1))
    assert first.clients == again.clients != other.clients
    logs = np.log([client.seconds_per_example / 1e-3 for client in first.clients])
    assert (logs.mean(), logs.std()) == pytest.approx((0, 0.5), abs=0.1)


# What is said.


def record_of(number: int, accuracy: float | None, **more: Any) -> dict[str, Any]:
    return {
        "round": number, "train_loss": 0.5, "loss": 0.25, "accuracy": accuracy, "bytes_up": 1000 * number,
        "bytes_down": 2000 * number, "time": 60.0 * number, "participants": 3, "lost": 1, "late": 0, "not_finite": 0,
        "failures": {}, "seconds": 0.5 * number,
    } | more  # fmt: skip


def test_the_table() -> None:
    records = [record_of(number, (number + 80) / 100) for number in range(1, 21)]
    summary = federate_table.summary(records, method="FedAvg")
    assert summary["accuracy"] == pytest.approx(0.995)  # of the last two rounds
    worse = federate_table.summary([record_of(number, 0.5) for number in range(1, 21)], method="worse")
    assert federate_table.headers([worse, summary])[4] == "Rounds to 94%"
    assert federate_table.rows([worse, summary]) == [
        ("worse", "50.0%", "50.0%", "0.250", "-", "20 kB", "40 kB", "20 min", "10.0"),
        ("FedAvg", "99.5%", "100.0%", "0.250", "14", "20 kB", "40 kB", "20 min", "10.0"),
    ]
    unknown = federate_table.summary([record_of(1, None, loss=None)], method="FedAvg")
    assert federate_table.rows([unknown])[0][1:5] == ("-", "-", "-", "-")
    assert federate_table.headers([unknown])[4] == "Rounds to -"
    assert "| `FedAvg` | 99.5% |" in federate_table.markdown([summary])


def test_the_progress_line() -> None:
    line = federate_table.describe(record_of(3, 0.875, not_finite=2, failures={"4": "ValueError: no"}), 10)
    assert line == (
        "round 3/10  loss 0.500  accuracy 87.5%  up 3 kB  down 6 kB  time 180 s  1 lost  2 not finite  1 failed"
    )
    assert federate_table.describe(record_of(3, None, train_loss=None, lost=0), 10) == (
        "round 3/10  loss -  up 3 kB  down 6 kB  time 180 s"
    )


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (599, "599 s"), (900, "15 min"), (36000, "10 h"), (20 * 86400, "20 d")]
)
def test_durations(seconds: float, text: str) -> None:
    assert federate_table.duration(seconds) == text


def test_pictures_of_many_clients_and_no_accuracy(tmp_path: Path) -> None:
    path = tmp_path / "clients.png"
    federate_plots.plot_distribution(torch.ones(1000, 3), ["a", "b", "c"], "examples", "many", path)
    federate_plots.plot_accuracy({"none": [record_of(1, None)]}, "nothing known", tmp_path / "accuracy.png")
    for picture in tmp_path.iterdir():
        assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "expected a folder with one file per client, got .* which has no files"),
        ({"a.txt": "x" * 64}, "expected at least 65 bytes of every client, got 64 of a.txt"),
    ],
)
def test_folders_that_cannot_be_used(content: dict[str, str], message: str, tmp_path: Path) -> None:
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=message):
        federate_data.load(str(tmp_path))


def test_natural_owners_are_no_more_than_there_are(folder: Path) -> None:
    task = federate_data.load(str(folder))
    with pytest.raises(UsageError, match="--clients: expected at most 6 for texts, got 7"):
        federate_data.split("by_id", task, 7, seed=0)
    with pytest.raises(UsageError, match=r"--partition: expected iid, by_id or a .json file"):
        federate_data.split("dirichlet(0.3)", task, 6, seed=0)
