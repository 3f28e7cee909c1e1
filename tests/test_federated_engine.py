"""The same simulation on 1, 2 and 3 processes: the same bits, balanced work, errors that reach all."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import federated_runs as runs
import pytest
import torch
from ranks import RankError, collect, run_ranks, start_ranks

from gradwire.federated import SerialEngine, TorchrunEngine

_HERE = Path(__file__).parent


def _ranks(cases: list[str], placement: Any, exact: bool, double: bool, store: str | None) -> Any:
    engine = TorchrunEngine(placement=placement, exact=exact)
    dtype = torch.float64 if double else torch.float32
    results = {}
    for case in cases:
        simulation = runs.make(case, dtype, engine=engine, store=runs.folder(store))
        results[case] = runs.outcome(simulation, 3), runs.client_digests(simulation)
    engine.close()
    return results


def _together(results: list[Any], case: str) -> tuple[Any, dict[int, str]]:
    """What all ranks found, which is the same, and the vectors of all clients."""
    found, vectors = results[0][case][0], {}
    for result in results:
        other, own = result[case]
        assert other == found
        assert not vectors.keys() & own.keys()
        vectors |= own
    return found, vectors


def _serial(case: str, dtype: torch.dtype = torch.float32) -> tuple[Any, dict[int, str]]:
    simulation = runs.make(case, dtype)
    return runs.outcome(simulation, 3), runs.client_digests(simulation)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As ranks have: torch's BatchNorm rounds otherwise on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=[2, 3])
def several(request: pytest.FixtureRequest) -> list[Any]:
    return run_ranks(request.param, _ranks, list(runs.CASES), "load", False, False, None)


@pytest.mark.parametrize("case", list(runs.CASES))
def test_two_and_three_ranks_give_the_bits_of_one(several: list[Any], case: str) -> None:
    expected = _serial(case)
    assert expected[0][0][-1][5] > 1
    assert _together(several, case) == expected


def test_exact_sums_give_the_bits_of_one_rank_in_float64_too() -> None:
    cases = ["scafcom", "pooled"]
    results = run_ranks(3, _ranks, cases, "load", True, True, None)
    for case in cases:
        assert _together(results, case) == _serial(case, torch.float64)


def test_clients_may_stay_with_their_vectors_which_may_lie_on_disk(tmp_path: Path) -> None:
    expected = _serial("scafcom")
    assert _together(run_ranks(2, _ranks, ["scafcom"], "owner", False, False, None), "scafcom") == expected
    assert _together(run_ranks(2, _ranks, ["scafcom"], "load", False, False, str(tmp_path)), "scafcom") == expected
    assert {path.name for path in tmp_path.iterdir()} == {"clients-0-of-2.state", "clients-1-of-2.state"}


def test_one_all_reduce_a_round() -> None:
    """Without vectors at clients, a round is one collective."""
    assert run_ranks(2, _collectives, "fedavg") == [["all_reduce"] * 3] * 2
    assert run_ranks(2, _collectives, "scaffold") == [["all_to_all", "all_reduce", "all_to_all"] * 3] * 2


def _collectives(case: str) -> list[str]:
    from gradwire.comm.collectives import Collectives

    calls: list[str] = []
    for name in ("all_reduce_", "all_gather", "all_to_all", "broadcast_", "gather_bytes"):
        original = getattr(Collectives, name)

        def counted(self: Any, *args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Any:
            calls.append(name.rstrip("_"))
            return original(self, *args, **kwargs)

        setattr(Collectives, name, counted)
    simulation = runs.make(case, engine=TorchrunEngine(), dropout=0.0)
    calls.clear()
    list(simulation.run(3))
    return calls


class TestDeal:
    def _engine(self, world_size: int, **options: Any) -> TorchrunEngine:
        engine = TorchrunEngine(threads=None, **options)
        engine.world_size = world_size
        return engine

    def test_longest_first_to_the_rank_with_the_least(self) -> None:
        assert self._engine(2).deal([2.0, 3.0, 7.0, 2.0, 2.0]) == [1, 1, 0, 1, 0]

    def test_is_within_a_third_of_the_best_and_the_same_every_time(self) -> None:
        generator = torch.Generator().manual_seed(0)
        for world_size in (2, 3, 5):
            loads = (torch.rand(20, generator=generator) * 9).tolist()
            ranks = self._engine(world_size).deal(loads)
            assert ranks == self._engine(world_size).deal(loads)
            shares = [0.0] * world_size
            for load, rank in zip(loads, ranks, strict=True):
                shares[rank] += load
            assert max(shares) <= 4 / 3 * max(sum(loads) / world_size, max(loads))

    def test_a_client_stays_with_its_vectors_where_that_is_fair(self) -> None:
        assert self._engine(2).deal([1.0, 1.0, 1.0, 1.0], [1, 1, 0, 0]) == [1, 1, 0, 0]
        assert sorted(self._engine(2).deal([1.0, 1.0, 1.0, 1.0], [1, 1, 1, 1])) == [0, 0, 1, 1]
        assert self._engine(2, placement="owner").deal([1.0, 1.0, 1.0, 1.0], [1, 1, 1, 1]) == [1, 1, 1, 1]

    def test_one_process_has_all(self) -> None:
        assert SerialEngine().deal([1.0, 2.0]) == TorchrunEngine(threads=None).deal([1.0, 2.0]) == [0, 0]


def _fails(on_error: Any) -> Any:
    def loss(module: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if x.shape[0] == 3:  # the last batch of clients with 11 and 15 examples
            raise ArithmeticError("three is too few")
        return runs.loss(module, x, y)

    engine = TorchrunEngine()
    simulation = runs.make("scaffold", engine=engine, on_error="skip")
    simulation.runner.trainer.loss = loss
    simulation.collector.on_error = on_error
    return runs.told(list(simulation.run(2)))


def test_clients_that_fail_are_skipped_and_named_on_all_ranks() -> None:
    found = run_ranks(2, _fails, "skip")
    assert found[0] == found[1] == run_ranks(1, _fails, "skip")[0]
    failures = found[0][0][7]
    assert set(failures.values()) == {"ArithmeticError: three is too few"}
    cohort = runs.make("scaffold").cohort(0)
    assert list(failures) == [client for client in cohort if client % 4 >= 2]
    assert found[0][0][5] == len(cohort) - len(failures)


def test_a_client_that_fails_stops_all_ranks() -> None:
    with pytest.raises(RankError) as caught:
        run_ranks(2, _fails, "raise", timeout_s=20.0)
    text = str(caught.value)
    assert text.count("three is too few") >= 2
    assert "rank 0 error" in text
    assert "rank 1 error" in text


def _dies() -> None:
    engine = TorchrunEngine()
    simulation = runs.make("fedavg", engine=engine)
    list(simulation.run(1))
    if engine.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    list(simulation.run(1))


def test_a_rank_that_dies_is_named() -> None:
    first, second = collect(start_ranks(2, _dies))
    assert second == ("died", -signal.SIGKILL)
    assert first[0] == "error"
    assert "rank 1 left" in first[1]


def test_after_an_error_the_module_is_the_servers_model_and_the_round_can_be_run_again() -> None:
    simulation, plain = runs.make("pooled"), runs.make("pooled")
    list(simulation.run(2))
    before = runs.digest([*simulation.module.parameters(), *simulation.module.buffers()])
    original, calls = simulation.runner.trainer.loss, []

    def loss(*args: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 9:
            raise ArithmeticError
        return original(*args)

    simulation.runner.trainer.loss = loss
    with pytest.raises(ArithmeticError):
        simulation.step()
    assert runs.digest([*simulation.module.parameters(), *simulation.module.buffers()]) == before
    list(plain.run(2))
    assert runs.outcome(simulation, 2) == runs.outcome(plain, 2)
    assert runs.client_digests(simulation) == runs.client_digests(plain)


def _differs() -> None:
    import torch.distributed as dist

    runs.make("fedavg", engine=TorchrunEngine(), seed=dist.get_rank())


def _start_differs() -> Any:
    import torch.distributed as dist

    engine = TorchrunEngine()
    module = runs.Net(norm=True)
    torch.nn.init.constant_(module[0].weight, dist.get_rank() + 1.0)
    module[1].running_mean.fill_(dist.get_rank() + 1.0)
    arguments = runs.CASES["fedavg"]()
    runs.Simulation(
        module,
        runs.clients(),
        arguments["algorithm"],
        runs.LocalTraining(lr=0.1),
        loss=runs.loss,
        engine=engine,
    )
    return float(module[0].weight.mean()), float(module[1].running_mean.mean())


def test_ranks_must_agree_and_start_from_the_first_ranks_model() -> None:
    with pytest.raises(RankError, match=r"got seed=0 on rank 0 and 1 on rank 1"):
        run_ranks(2, _differs)
    assert run_ranks(2, _start_differs) == [(1.0, 1.0)] * 2


def test_the_same_script_under_torchrun(tmp_path: Path) -> None:
    """It initialises torch.distributed, uses one thread, says so, saves, and leaves."""
    script = tmp_path / "script.py"
    script.write_text(
        f"""
import logging, sys
sys.path.insert(0, {str(_HERE)!r})
logging.basicConfig(level=logging.INFO)
import torch
import federated_runs as runs
from gradwire.federated import TorchrunEngine
with TorchrunEngine() as engine:
    simulation = runs.make("scafcom", engine=engine)
    found = runs.outcome(simulation, 3)
    simulation.save({str(tmp_path / "saved")!r}, extra=found[0])
    if engine.rank == 0:
        print("FOUND", found[1], torch.get_num_threads())
assert not torch.distributed.is_initialized()
"""
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert "2 ranks with 1 intra-op thread(s) each" in done.stderr
    found, _ = _serial("scafcom")
    assert f"FOUND {found[1]} 1" in done.stdout
    resumed = runs.make("scafcom")
    assert resumed.load(tmp_path / "saved") == found[0]
    assert runs.outcome(resumed, 2) == _later("scafcom", 3, 2)


def _later(case: str, first: int, then: int) -> Any:
    simulation = runs.make(case)
    list(simulation.run(first))
    return runs.outcome(simulation, then)
