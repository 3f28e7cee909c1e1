"""Checkpoints of simulations: killed and resumed is uninterrupted, bit for bit, wherever the end comes."""

import json
import os
import resource
import signal
from pathlib import Path
from typing import Any

import federated_runs as runs
import pytest
import torch
from ranks import collect, run_ranks, start_ranks
from torch import nn

from gradwire.comm.checkpoint import exists
from gradwire.comm.errors import CheckpointError
from gradwire.compression import TopK
from gradwire.federated import SCAFCOM, Clients, ClientStore, FedAdam, FedAvg, LocalTraining, Simulation, TorchrunEngine
from gradwire.federated import client_store as client_store_module
from gradwire.federated.tensor_file import from_plain, read_tensors, to_plain, write_tensors


def _whole(case: str, rounds: int = 5) -> Any:
    simulation = runs.make(case)
    return runs.outcome(simulation, rounds), runs.client_digests(simulation)


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("case", list(runs.CASES))
def test_a_resumed_run_equals_the_uninterrupted_one(case: str, on_disk: bool, tmp_path: Path) -> None:
    store = tmp_path / "store" if on_disk else None
    first = runs.make(case, store=store)
    records = runs.told(list(first.run(2)))
    first.save(tmp_path / "saved", extra={"records": records})
    assert exists(tmp_path / "saved")
    list(first.run(1))  # goes on and is lost
    resumed = runs.make(case, store=store)
    assert resumed.load(tmp_path / "saved") == {"records": records}
    later, model, server = runs.outcome(resumed, 3)
    assert ((records + later, model, server), runs.client_digests(resumed)) == _whole(case)


class _Kill:
    """Ends this process, as a machine that is lost does."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def _killed(where: str, place: str) -> None:
    """Save after rounds 2 and 3, and die somewhere after or in the second save."""
    simulation = runs.make("scafcom", store=Path(place) / "store")
    list(simulation.run(2))
    simulation.save(Path(place) / "saved")
    list(simulation.run(1))
    if where == "saving":
        _replace(client_store_module.os, "fsync", _Kill(1))
    elif where == "renaming":
        _replace(Path, "replace", _Kill(2))  # the old one has stepped aside, the new one has not taken its place
    elif where == "after renaming":
        _replace(ClientStore, "commit", _Kill(1))
    simulation.save(Path(place) / "saved")
    if where == "training":
        original, kill = simulation.runner.trainer.loss, _Kill(7)

        def loss(*args: Any) -> torch.Tensor:
            kill()
            return original(*args)

        simulation.runner.trainer.loss = loss
    elif where == "writing":
        kill, write = _Kill(3), os.pwrite

        def half(handle: int, data: memoryview, offset: int) -> int:
            write(handle, data[: len(data) // 2], offset)
            kill()
            return len(data) // 2

        client_store_module.os.pwrite = half  # type: ignore[assignment]
    list(simulation.run(4))


def _replace(owner: Any, name: str, kill: _Kill) -> None:
    original = getattr(owner, name)

    def then(*args: Any, **kwargs: Any) -> Any:
        kill()
        return original(*args, **kwargs)

    setattr(owner, name, then)


@pytest.mark.parametrize("where", ["training", "writing", "saving", "renaming", "after renaming"])
def test_a_run_that_is_killed_goes_back_to_its_last_checkpoint(where: str, tmp_path: Path) -> None:
    (outcome,) = collect(start_ranks(1, _killed, where, str(tmp_path)))
    assert outcome == ("died", -signal.SIGKILL)
    resumed = runs.make("scafcom", store=tmp_path / "store")
    resumed.load(tmp_path / "saved")
    assert resumed.rounds == (2 if where in ("saving", "renaming") else 3)
    records, model, server = runs.outcome(resumed, 5 - resumed.rounds)
    found = (_whole("scafcom")[0][0][: 5 - len(records)] + records, model, server), runs.client_digests(resumed)
    assert found == _whole("scafcom")
    resumed.save(tmp_path / "saved")  # and its folder is as good as new
    again = runs.make("scafcom", store=tmp_path / "store")
    again.load(tmp_path / "saved")
    assert runs.client_digests(again) == runs.client_digests(resumed)


def _save_on_ranks(place: str, store: str | None) -> Any:
    engine = TorchrunEngine()
    simulation = runs.make("scafcom", engine=engine, store=runs.folder(store))
    records = runs.told(list(simulation.run(2)))
    simulation.save(place)
    engine.close()
    return records


def _load_on_ranks(place: str, store: str | None) -> Any:
    engine = TorchrunEngine()
    simulation = runs.make("scafcom", engine=engine, store=runs.folder(store))
    simulation.load(place)
    found = runs.outcome(simulation, 3)
    simulation.save(place)
    engine.close()
    return found, runs.client_digests(simulation)


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize(("before", "after"), [(2, 2), (3, 1), (1, 2)])
def test_a_run_resumes_on_another_number_of_ranks(before: int, after: int, on_disk: bool, tmp_path: Path) -> None:
    place, store = str(tmp_path / "saved"), str(tmp_path / "store") if on_disk else None
    records = run_ranks(before, _save_on_ranks, place, store)[0]
    results = run_ranks(after, _load_on_ranks, place, store)
    (whole, model, server), vectors = _whole("scafcom")
    assert all(found == (whole[2:], model, server) for found, _ in results)
    assert records == whole[:2]
    assert {client: digest for _, own in results for client, digest in own.items()} == vectors


def _make(**other: Any) -> Simulation:
    arguments: dict[str, Any] = {
        "algorithm": SCAFCOM(TopK(ratio=0.2)),
        "training": LocalTraining(lr=0.1),
        "cohort_size": 4,
        **other,
    }
    module, algorithm, training = (arguments.pop(n, None) for n in ("module", "algorithm", "training"))
    return Simulation(module or runs.Net(), runs.clients(), algorithm, training, loss=runs.loss, **arguments)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"algorithm": SCAFCOM(TopK(ratio=0.3))}, "algorithm.compressor.ratio=0.2.*got algorithm.compressor.ratio=0.3"),
        ({"algorithm": FedAvg()}, r"algorithm='?SCAFCOM'?.*got algorithm='?FedAvg"),
        ({"training": LocalTraining(lr=0.2)}, "training.lr=0.1.*got training.lr=0.2"),
        ({"cohort_size": 3}, "cohort_size=4.*got cohort_size=3"),
        ({"seed": 9}, "seed=0.*got seed=9"),
        ({"server_lr": 0.5}, "server_lr=1.0.*got server_lr=0.5"),
        ({"server_optimizer": lambda p: FedAdam(p, lr=0.1)}, "server_optimizer=None.*got server_optimizer='FedAdam'"),
        ({"dropout": 0.5}, "dropout=0.0.*got dropout=0.5"),
        ({"module": nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 3))}, "model="),
    ],
)
def test_an_argument_that_differs_is_an_error_with_both_values(
    changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    _make().save(tmp_path / "saved")
    _make().load(tmp_path / "saved")
    with pytest.raises(CheckpointError, match=message):
        _make(**changed).load(tmp_path / "saved")


def test_a_hyper_parameter_of_the_servers_optimizer_that_differs_is_an_error(tmp_path: Path) -> None:
    _make(server_optimizer=lambda p: FedAdam(p, lr=0.1)).save(tmp_path / "saved")
    with pytest.raises(CheckpointError, match=r"server_optimizer.lr=0.1 .*got server_optimizer.lr=0.2"):
        _make(server_optimizer=lambda p: FedAdam(p, lr=0.2)).load(tmp_path / "saved")


@pytest.mark.parametrize("name", [".metadata", "__0_server.safetensors", "__0_clients.safetensors"])
def test_a_file_that_was_altered_is_noticed(name: str, tmp_path: Path) -> None:
    simulation = _make()
    list(simulation.run(1))
    simulation.save(tmp_path / "saved")
    data = bytearray((tmp_path / "saved" / name).read_bytes())
    data[-3] ^= 1
    (tmp_path / "saved" / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=name):
        _make().load(tmp_path / "saved")
    (tmp_path / "saved" / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        _make().load(tmp_path / "saved")


def test_vectors_on_disk_that_a_later_run_has_overwritten_are_noticed(tmp_path: Path) -> None:
    simulation = _make(store=tmp_path / "store")
    list(simulation.run(3))
    simulation.save(tmp_path / "early")
    list(simulation.run(3))
    simulation.save(tmp_path / "late")
    list(simulation.run(3))
    with pytest.raises(CheckpointError, match="Only the last checkpoint"):
        _make(store=tmp_path / "store").load(tmp_path / "early")
    with pytest.raises(CheckpointError, match="store=FOLDER"):
        _make().load(tmp_path / "late")
    resumed = _make(store=tmp_path / "store")
    resumed.load(tmp_path / "late")
    assert resumed.rounds == 6


def _many_clients(place: str) -> tuple[int, int, int]:
    """Bytes by which memory grew over rounds, of the vectors, and clients that took part."""
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    x, y = torch.randn(10_000, 64), torch.randint(10, (10_000,))
    clients = Clients((x, y), torch.arange(10_000).split(1))
    training = LocalTraining(lr=0.1, steps=1, batch_size=1)
    simulation = Simulation(
        model, clients, SCAFCOM(TopK(ratio=0.01)), training, loss=runs.loss, cohort_size=400, store=Path(place)
    )
    simulation.step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    list(simulation.run(6))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return grown, sum(path.stat().st_size for path in Path(place).iterdir()), len(simulation.store.touched)


def test_ten_thousand_clients_with_state_take_no_memory(tmp_path: Path) -> None:
    ((grown, stored, touched),) = run_ranks(1, _many_clients, str(tmp_path))
    assert touched > 2200
    assert stored >= touched * 2 * 2410 * 4 > 40e6
    assert grown < stored / 4


class TestClientStore:
    def test_places_are_used_again_when_a_checkpoint_needs_them_no_more(self, tmp_path: Path) -> None:
        store = ClientStore({"a": 3, "b": 2}, clients=10, folder=tmp_path)
        for number in range(20):
            for client in range(4):
                store.put(client, {"a": torch.full((3,), float(number)), "b": torch.full((2,), float(client))})
            store.state_dict()
            store.commit()
        (file,) = tmp_path.iterdir()
        assert file.stat().st_size <= 2 * 4 * 5 * 4
        assert [store.get(client)["a"][0].item() for client in range(4)] == [19.0] * 4
        assert [store.get(client)["b"][1].item() for client in range(4)] == [0.0, 1.0, 2.0, 3.0]
        store.forget([2])
        assert store.touched == [0, 1, 3]
        assert not store.get(2)["a"].any()

    def test_only_clients_that_took_part_take_space(self, tmp_path: Path) -> None:
        store = ClientStore({"a": 1000}, clients=1_000_000, folder=tmp_path)
        for client in (5, 999_999):
            store.put(client, {"a": torch.ones(1000)})
        (file,) = tmp_path.iterdir()
        assert file.stat().st_size == 8000
        assert store.get(999_999)["a"].sum() == 1000

    def test_dtypes(self) -> None:
        with pytest.raises(ValueError, match="float32 or float64"):
            ClientStore({"a": 1}, clients=1, dtype=torch.bfloat16)


class TestTensorFile:
    def test_round_trip_of_every_dtype_and_of_plain_values(self, tmp_path: Path) -> None:
        kinds = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8]
        value: dict[Any, Any] = {str(kind): (torch.arange(6).view(2, 3).to(kind), kind.itemsize) for kind in kinds}
        value |= {3: [None, True, 0.1, float("inf"), "text"], "flag": torch.tensor(True), "none": torch.empty(0, 4)}
        tensors: dict[str, torch.Tensor] = {}
        plain = json.loads(json.dumps(to_plain(value, tensors, "root")))
        write_tensors(tmp_path / "file", tensors)
        found = from_plain(plain, read_tensors(tmp_path / "file"))
        assert found.keys() == value.keys()
        assert found[3] == value[3]
        for name, entry in value.items():
            if isinstance(entry, tuple):
                assert torch.equal(found[name][0], entry[0])
                assert found[name][0].dtype == entry[0].dtype
                assert found[name][1] == entry[1]
        assert bool(found["flag"])
        assert found["none"].shape == (0, 4)

    def test_other_objects_are_refused(self) -> None:
        with pytest.raises(TypeError, match=r"got Linear at root.a.1"):
            to_plain({"a": [1, nn.Linear(1, 1)]}, {}, "root")

    @pytest.mark.parametrize(
        "header",
        [
            {"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}},
            {"x": {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]}},
            {"x": {"dtype": "F32", "shape": [-1, -4], "data_offsets": [0, 16]}},
            {"x": {"dtype": "F12", "shape": [4], "data_offsets": [0, 16]}},
            {"x": {"shape": [4]}},
            [1],
        ],
    )
    def test_headers_are_not_trusted(self, header: Any, tmp_path: Path) -> None:
        text = json.dumps(header).encode()
        (tmp_path / "file").write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
        with pytest.raises(CheckpointError, match="expected tensors"):
            read_tensors(tmp_path / "file")
        (tmp_path / "file").write_bytes((1 << 60).to_bytes(8, "little"))
        with pytest.raises(CheckpointError, match="expected tensors"):
            read_tensors(tmp_path / "file")
