"""Virtual time: the clock, models of clients' times, traces, and synchronous rounds with deadlines."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from gradwire.federated import (
    Clients,
    ClientTimes,
    ClientTrace,
    ExponentialTimes,
    FedAvg,
    FedProx,
    FixedTimes,
    HalfNormalTimes,
    LocalTraining,
    Simulation,
    TraceTimes,
)
from gradwire.federated.client_times import Job
from gradwire.federated.clock import EventClock, to_seconds, to_ticks
from gradwire.federated.workload import examples_in

SECOND = to_ticks(1.0)


def test_ticks_compare_exactly_where_floats_do_not() -> None:
    assert all(n * to_ticks(0.1) == to_ticks(n / 10) for n in range(1, 10_000))
    assert sum(n * 0.1 != n / 10 for n in range(1, 10_000)) > 1000
    assert to_ticks(0.0) == 0
    assert to_ticks(1e-30) == 1
    for bad in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="expected a finite time >= 0"):
            to_ticks(bad)


def test_messages_arrive_by_time_and_at_one_tick_by_dispatch() -> None:
    clock = EventClock()
    for client, duration in ((5, 3), (1, 2), (4, 2), (0, 9)):
        clock.send_off(client, duration, version=0, wave=0)
    saved = clock.state_dict()
    assert [clock.next_arrival().client for _ in range(3)] == [1, 4, 5]
    assert (clock.now, clock.next_tick, len(clock)) == (3, 9, 1)
    other = EventClock()
    other.load_state_dict(saved)
    assert [flight.client for flight in other.arrivals_until(3)] == [1, 4, 5]
    assert (other.now, [flight.client for flight in other.flights]) == (3, [0])


MODELS = [FixedTimes(2.0), ExponentialTimes(2.0), HalfNormalTimes(2.0)]


@pytest.mark.parametrize("times", MODELS)
def test_drawn_times_follow_the_declared_law(times: ClientTimes) -> None:
    drawn = np.array([times.duration(Job(client, number), seed=3) for client in range(20) for number in range(500)])
    job = Job(client=0)
    mean = times.mean(job)
    assert mean == 2.0
    assert drawn.mean() / SECOND == pytest.approx(mean, rel=0.03)
    for interval in (0.3, 1.0, 2.0, 7.0):
        ticks = to_ticks(interval)
        expected = times.mean_intervals(job, ticks)
        assert expected == pytest.approx(np.ceil(drawn / ticks).mean(), rel=0.03)
    tiny = to_ticks(1e-6)  # so many intervals that their number times their length is the mean
    assert (times.mean_intervals(job, tiny) or 0) * 1e-6 == pytest.approx(mean, rel=1e-5)


def test_half_normal_intervals_agree_on_both_sides_of_the_approximation() -> None:
    times, job = HalfNormalTimes(1.0), Job(client=0)
    for factor in (0.999, 1.001):
        ticks = to_ticks(factor * 1e-4 * math.sqrt(math.pi))
        intervals = times.mean_intervals(job, ticks)
        assert ((intervals or 0) - 0.5) * to_seconds(ticks) == pytest.approx(1.0, rel=1e-8)


@pytest.mark.parametrize("times", MODELS[1:])
def test_draws_depend_on_seed_client_and_job_alone(times: ClientTimes) -> None:
    jobs = [(client, number) for client in range(5) for number in range(5)]
    forward = {key: times.duration(Job(*key), seed=1) for key in jobs}
    backward = {key: times.duration(Job(*key, start=99, examples=7, bytes_up=8), seed=1) for key in reversed(jobs)}
    assert forward == backward
    assert len(set(forward.values())) == len(jobs)
    assert forward != {key: times.duration(Job(*key), seed=2) for key in jobs}


@pytest.mark.parametrize("cls", [FixedTimes, ExponentialTimes, HalfNormalTimes])
def test_wrong_seconds_are_refused(cls: type) -> None:
    for bad in (0.0, -1.0, math.inf, math.nan, [1.0, 0.0]):
        with pytest.raises(ValueError, match=f"{cls.__name__}: expected finite seconds > 0"):
            cls(bad)
    with pytest.raises(ValueError, match="expected seconds for 3 clients, got 2"):
        cls([1.0, 2.0]).check(3)


def test_examples_of_batches() -> None:
    data = Clients((torch.arange(10.0),), [range(10)])
    for steps, size in ((1, 4), (3, 4), (5, 4), (7, 3), (2, None), (3, 64)):
        batches = data.batches(0, size, steps=steps, epochs=1, generator=None)
        assert examples_in(steps, 10, size) == sum(len(batch[0]) for batch in batches)
    assert examples_in(3, 0, 4) == 0


def _walk(available: list[tuple[int, int]], period: int | None, start: int, work: int) -> int:
    """When so much work is done, second by second."""
    tick = start
    while work:
        at = tick % period if period else tick
        beyond = period is None and at >= available[-1][1]
        if beyond or any(first <= at < last for first, last in available):
            work -= 1
        tick += 1
    return tick


@pytest.mark.parametrize("period", [None, 20, 23])
def test_clients_work_while_they_are_available(period: int | None) -> None:
    available = [(2, 5), (9, 10), (14, 20)]
    trace = ClientTrace(1.0, 0.5, 2.0, tuple((float(a), float(b)) for a, b in available))
    times = TraceTimes([trace], period=None if period is None else float(period))
    for start in range(0, 60, 3):
        for examples in (1, 2, 5, 11):
            job = Job(0, start=start * SECOND, examples=examples, bytes_down=1, bytes_up=2)
            expected = _walk(available, period, start, 2 + examples + 1) - start
            assert times.duration(job, seed=0) == expected * SECOND
            for deadline in (1, 4, 9, 30):
                done = sum(_walk(available, period, start, n + 1) <= start + deadline for n in range(60)) - 3
                share = min(1.0, max(0.0, done / examples))
                assert times.share_done(job, 0, deadline * SECOND) == pytest.approx(share)
        begin = times.available_from(0, start * SECOND)
        assert begin == (_walk(available, period, start, 1) - 1) * SECOND


CSV = """client,seconds_per_example,bytes_per_second_up,bytes_per_second_down,available
1,0.5,1e6,2e6,
0,0.25,inf,100, 0-10; 20-30.5

"""


def test_a_trace_is_read_from_csv(tmp_path: Path) -> None:
    place = tmp_path / "trace.csv"
    place.write_text(CSV)
    times = TraceTimes.from_csv(place, period=100.0)
    assert times.clients == [
        ClientTrace(0.25, 100.0, math.inf, ((0.0, 10.0), (20.0, 30.5))),
        ClientTrace(0.5, 2e6, 1e6, ()),
    ]
    assert to_seconds(times.duration(Job(0, examples=4, bytes_down=200, bytes_up=10**9), seed=0)) == 3.0
    assert times.mean(Job(1)) is None
    assert not times.always_available
    times.check(2)
    with pytest.raises(ValueError, match="expected a trace of 3 clients, got one of 2"):
        times.check(3)


HEAD = "client,seconds_per_example,bytes_per_second_down,bytes_per_second_up,available\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: expected columns client, seconds_per_example.* got none"),
        ("client,seconds\n", "line 1: expected columns .* got client, seconds"),
        (HEAD.replace("available", "client"), "line 1: expected columns"),
        (HEAD, "expected clients 0, 1, … without gaps, got no client 0"),
        (HEAD + "1,1,1,1,\n", "got no client 0"),
        (HEAD + "0,1,1,1,\n2,1,1,1,\n", "got no client 1"),
        (HEAD + "0,1,1,1,\n0,1,1,1,\n", "line 3: expected each client once, got client 0 again"),
        (HEAD + "0,1,1\n", "line 2: expected 5 fields, got 3"),
        (HEAD + "0.5,1,1,1,\n", "line 2: expected a client's number from 0 on, got '0.5'"),
        (HEAD + "-1,1,1,1,\n", "line 2: expected a client's number from 0 on, got '-1'"),
        (HEAD + "inf,1,1,1,\n", "line 2: "),
        (HEAD + "0,fast,1,1,\n", "line 2: expected a number in seconds_per_example, got 'fast'"),
        (HEAD + "0,nan,1,1,\n", "line 2: expected a number in seconds_per_example, got 'nan'"),
        (HEAD + "0,-1,1,1,\n", "line 2: ClientTrace: expected 0 <= seconds_per_example <= 1e9, got -1"),
        (HEAD + "0,inf,1,1,\n", "line 2: ClientTrace: expected 0 <= seconds_per_example"),
        (HEAD + "0,1,0,1,\n", "line 2: ClientTrace: expected bytes_per_second_down >= 1e-9, got 0"),
        (HEAD + "0,1,1,-3,\n", "line 2: ClientTrace: expected bytes_per_second_up >= 1e-9, got -3"),
        (HEAD + "0,1,1,1,5\n", "line 2: expected intervals like 0-3600;7200-9000 in available, got '5'"),
        (HEAD + "0,1,1,1,a-b\n", "line 2: expected intervals like"),
        (HEAD + "0,1,1,1,5-3\n", "line 2: ClientTrace: expected intervals from 0 to 1e9, in order"),
        (HEAD + "0,1,1,1,0-5;4-9\n", "line 2: ClientTrace: expected intervals .* got 4-9"),
        (HEAD + "0,1,1,1,0-nan\n", "line 2: ClientTrace: expected intervals"),
        (HEAD + "0,1,1,1,0-inf\n", "line 2: ClientTrace: expected intervals"),
        (HEAD + '0,1,1,1,"0-1\n', "line"),
    ],
)
def test_a_trace_that_is_not_one_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    place = tmp_path / "trace.csv"
    place.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        TraceTimes.from_csv(place)
    assert str(caught.value).startswith(f"TraceTimes: {place}")


def test_intervals_end_with_the_period() -> None:
    with pytest.raises(ValueError, match="expected intervals within period=10, got one to 12 of client 0"):
        TraceTimes([ClientTrace(1.0, available=((0.0, 12.0),))], period=10.0)
    with pytest.raises(ValueError, match="expected 0 < period"):
        TraceTimes([ClientTrace(1.0)], period=0.0)


class Point(nn.Module):
    """One number, x."""

    def __init__(self, x: float = 0.0) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.tensor([x], dtype=torch.float64))


def synchronous(
    times: ClientTimes | None, *, steps: int = 4, cohort_size: int | None = None, **more: object
) -> Simulation:
    """Clients 0 to 3 pull x to 0, 1, 2, 10, by so many steps of lr 0.1."""
    rows = torch.tensor([0.0, 1.0, 2.0, 10.0], dtype=torch.float64)[:, None]
    options = {"algorithm": FedAvg(weighting="uniform"), "cohort_size": cohort_size} | more
    return Simulation(
        Point(5.0),
        Clients((rows,), [[client] for client in range(4)]),
        training=LocalTraining(lr=0.1, steps=steps, batch_size=None),
        loss=lambda module, b: ((module.x - b) ** 2).sum() / 2,
        times=times,
        **options,  # type: ignore[arg-type]
    )


def test_a_round_takes_as_long_as_its_slowest_client() -> None:
    seconds = [1.0, 2.5, 0.1, 7.0]
    made = synchronous(FixedTimes(seconds), cohort_size=2)
    total = 0.0
    for number, record in enumerate(made.run(12)):
        total += max(seconds[client] for client in made.cohort(number))
        assert record.time == pytest.approx(total, rel=1e-15)
    assert [record.time for record in synchronous(None).run(2)] == [0.0, 0.0]
    times = ExponentialTimes(1.0)
    drawn = [max(times.duration(Job(client, number), seed=4) for client in range(4)) for number in range(3)]
    records = list(synchronous(times, seed=4).run(3))
    assert [record.time for record in records] == [to_seconds(sum(drawn[: n + 1])) for n in range(3)]


def test_stragglers_are_dropped_at_the_deadline() -> None:
    made = synchronous(FixedTimes([1.0, 2.0, 3.0, 8.0]), deadline=3.0)
    record = made.step()
    assert (record.time, record.late, record.participants) == (3.0, 1, 3)
    assert record.bytes_up == 3 * 8
    assert record.bytes_down == 4 * 8
    expected = np.mean([b + (5 - b) * 0.9**4 for b in (0, 1, 2)])
    assert made.module.x.item() == pytest.approx(expected, abs=1e-14)
    nobody = synchronous(FixedTimes(2.0), deadline=1.0)
    record = nobody.step()
    assert (record.time, record.late, record.participants, nobody.module.x.item()) == (1.0, 4, 0, 5.0)


@pytest.mark.parametrize("algorithm", [FedProx(mu=0.3, weighting="uniform"), FedAvg(weighting="uniform")])
def test_partial_work_of_stragglers_is_kept(algorithm: FedProx | FedAvg) -> None:
    made = synchronous(FixedTimes([1.0, 4.0, 6.0, 20.0]), deadline=3.0, stragglers="partial", algorithm=algorithm)
    record = made.step()
    assert (record.time, record.late, record.participants) == (3.0, 1, 3)  # 3 s of 20 s are no step of 4
    mu = algorithm.mu if isinstance(algorithm, FedProx) else 0.0
    ends = []
    for b, steps in ((0, 4), (1, 3), (2, 2)):
        y = 5.0
        for _ in range(steps):
            y -= 0.1 * (y - b + mu * (y - 5.0))
        ends.append(y)
    assert made.module.x.item() == pytest.approx(np.mean(ends), abs=1e-14)
    assert made.step().participants == 3


def test_the_server_waits_until_the_deadline_for_clients_that_never_answer() -> None:
    made = synchronous(FixedTimes(1.0), deadline=3.0, dropout=0.4, seed=2)
    for record in made.run(6):
        assert made.time == pytest.approx(record.time)
        assert record.participants + record.lost == 4
    waits = np.diff([0.0] + [r.time for r in synchronous(FixedTimes(1.0), deadline=3.0, dropout=0.4, seed=2).run(12)])
    lost = [r.lost for r in synchronous(FixedTimes(1.0), deadline=3.0, dropout=0.4, seed=2).run(12)]
    assert set(lost) > {0}
    assert [wait == 3.0 for wait in waits.round(9)] == [count > 0 for count in lost]


def test_a_trace_times_rounds_by_work_and_bytes() -> None:
    clients = [ClientTrace(0.5, bytes_per_second_down=4.0, bytes_per_second_up=8.0)] * 4
    record = synchronous(TraceTimes(clients)).step()
    assert record.time == 8 / 4 + 4 * 0.5 + 8 / 8


def test_times_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="expected times with a deadline"):
        synchronous(None, deadline=1.0)
    with pytest.raises(ValueError, match="expected a finite deadline > 0"):
        synchronous(FixedTimes(1.0), deadline=0.0)
    with pytest.raises(ValueError, match='expected stragglers="drop" or "partial"'):
        synchronous(FixedTimes(1.0), deadline=1.0, stragglers="wait")
    with pytest.raises(ValueError, match="expected seconds for 4 clients, got 3"):
        synchronous(FixedTimes([1.0, 1.0, 1.0]))
