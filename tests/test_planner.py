"""The planner: closed forms of its cost model, where compression stops paying, declared bytes against real ranks."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from ranks import run_ranks

from gradwire import comm, compression
from gradwire.bench import plan as bench_plan
from gradwire.bench import plan_case, plan_measure, plan_text
from gradwire.comm import planner
from gradwire.comm.planner import Bucket, Call, Compute, Link, Network
from gradwire.comm.planner_rehearsal import Rehearsal, rehearse

PLAIN = plan_measure.PLAIN
SHAPES = [("bytes.weight", (64, 48)), ("norm.weight", (48,)), ("up.weight", (96, 48)), ("down.weight", (48, 96))]
COMPRESSING = tuple(method for method in bench_plan.CANDIDATES if method != PLAIN)
NESTED = tuple(text.format(inside=2) for text in plan_case.NESTED)
FREE = Link(latency=0.0, bandwidth=math.inf)


def everyone(size: int) -> tuple[int, ...]:
    return tuple(range(size))


# The cost of a collective.


@pytest.mark.parametrize("size", [2, 3, 8])
def test_a_collective_takes_latency_per_hop_and_bytes_over_bandwidth(size: int) -> None:
    network = Network(Link(latency=0.01, bandwidth=1000.0, overhead=0.5))
    expected = {
        "all_reduce": (2 * (size - 1), 2 * (size - 1) / size * 4000),
        "all_gather": (size - 1, (size - 1) * 4000),
        "all_to_all": (size - 1, 4000),
        "message": (1, 4000),
    }
    for kind, (hops, nbytes) in expected.items():
        call = Call(kind, 4000, everyone(size))  # type: ignore[arg-type]
        assert call.sent == pytest.approx(nbytes)
        assert network.seconds(call) == pytest.approx(0.5 + 0.01 * hops + nbytes / 1000)


@pytest.mark.parametrize(
    ("kind", "times"), [("all_reduce", 2.0), ("all_gather", 3.0), ("all_to_all", 4.0), ("message", 1.0)]
)
def test_a_transport_may_take_longer_for_a_collective_than_for_its_bytes(kind: Any, times: float) -> None:
    stretch = planner.Stretch(all_reduce=2.0, all_gather=3.0, all_to_all=4.0)
    call, link = Call(kind, 4000, everyone(4)), Link(latency=0.01, bandwidth=1000.0, overhead=0.5)
    plain, longer = Network(link), Network(link, stretch=stretch)
    assert longer.seconds(call) - plain.seconds(call) == pytest.approx((times - 1) * call.sent / 1000)
    near = Network(link, inside=link, ranks_per_machine=4, stretch=stretch)
    assert near.seconds(call) == plain.seconds(call)


def test_a_stretch_is_positive() -> None:
    with pytest.raises(ValueError, match=r"Stretch: expected all_gather > 0, got all_gather=0\.0"):
        planner.Stretch(all_gather=0.0)
    assert planner.GLOO.all_to_all > planner.GLOO.all_gather > planner.GLOO.all_reduce > 1


def test_two_phases_send_as_much_as_a_ring_of_the_same_payload() -> None:
    payload = 8192
    shard = payload // 4
    network = Network(Link(latency=0.0, bandwidth=1.0))
    phases = [Call("all_to_all", payload - shard, everyone(4)), Call("all_gather", shard, everyone(4))]
    ring = Call("all_reduce", payload, everyone(4))
    assert sum(map(network.seconds, phases)) == pytest.approx(network.seconds(ring))


def test_nothing_is_sent_to_oneself() -> None:
    assert Network(Link(1.0, 1.0, 1.0)).seconds(Call("all_reduce", 100, (3,))) == 0


def test_what_stays_inside_a_machine_takes_its_link() -> None:
    network = Network(Link(0.0, 1.0), inside=Link(0.0, 100.0), ranks_per_machine=2)
    assert network.seconds(Call("all_to_all", 100, (2, 3))) == pytest.approx(1.0)
    assert network.seconds(Call("all_to_all", 100, (1, 3))) == pytest.approx(200.0)  # and 0 with 2, beside it


def test_what_leaves_a_machine_of_several_ranks_shares_its_link() -> None:
    network = Network(Link(0.0, 1.0), inside=FREE, ranks_per_machine=2)
    assert network.seconds(Call("all_reduce", 100, everyone(4))) == pytest.approx(150.0)  # the ring leaves it once
    assert network.seconds(Call("all_to_all", 90, everyone(4))) == pytest.approx(2 * 60.0)  # two of three are outside


# Overlap.


def test_exposed_is_what_outlasts_backward() -> None:
    network, compute = Network(Link(0.0, 100.0)), Compute(step=3.0, backward=2.0)

    def exposed(nbytes: int, ready: float) -> float:
        return planner.predict([Bucket((Call("message", nbytes, (0, 1)),), 0.0, ready)], compute, network).exposed

    assert exposed(100, ready=0.5) == 0
    assert exposed(150, ready=0.5) == pytest.approx(0.5)
    assert exposed(150, ready=1.0) == pytest.approx(1.5)


def test_buckets_wait_for_one_another() -> None:
    network, compute = Network(Link(0.0, 100.0)), Compute(step=1.0, backward=1.0)
    buckets = [Bucket((Call("message", 100, (0, 1)),), 0.25, ready) for ready in (0.5, 0.75)]
    found = planner.predict(buckets, compute, network, contention=0.0)
    assert (found.network, found.codec, found.calls, found.sent) == (2.0, 0.5, 2, 200.0)
    assert found.step == pytest.approx(0.5 + 2 * 1.25)


def test_compression_on_busy_cores_puts_backward_off() -> None:
    buckets = [Bucket((), 0.5, 0.1), Bucket((), 0.0, 1.0)]
    steps = [
        planner.predict(buckets, Compute(1.0, 1.0), Network(FREE), contention=share).step for share in (0.0, 0.5, 1.0)
    ]
    assert steps == pytest.approx([1.0, 1.25, 1.5])


def test_a_step_is_never_longer_on_a_better_link() -> None:
    shapes, rates = SHAPES, [10.0**power for power in range(3, 11)]
    for method in bench_plan.CANDIDATES:
        found = plan_case.buckets(method, shapes, 4, codec=1e-3)
        steps = [planner.predict(found, Compute(0.1, 0.05), Network(Link(1e-4, rate))).step for rate in rates]
        assert all(slow >= fast for slow, fast in pairwise(steps))
        assert steps[0] > steps[-1]


def test_what_is_late_runs_beside_the_whole_next_step() -> None:
    """By hand: of 3 s of computing with 1 s of compression, sending of 1 s is hidden and of 5 s is not."""
    network, compute = Network(Link(0.0, 100.0)), Compute(step=3.0, backward=1.0)
    steps = []
    for nbytes in (100, 500):
        bucket = Bucket((Call("message", nbytes, (0, 1)),), 1.0, 1.0)
        steps += [planner.predict([bucket], compute, network, late=late).step for late in (False, True)]
    assert steps == [5.0, 4.0, 9.0, 6.0]
    free = planner.predict([Bucket((), 1.0, 1.0)], compute, network, contention=0.0, late=True)
    assert free.step == 3.0


# Where it stops paying.


def test_break_even_is_where_the_times_cross() -> None:
    """Without overlap or latency: B* = 2(n-1)/n S (1 - 1/c) / codec."""
    size, nbytes, rate, codec = 4, 4_000_000, 2.0, 0.05
    dense = [Bucket((Call("all_reduce", nbytes, everyone(size)),), 0.0, 1.0)]
    small = [Bucket((Call("all_reduce", int(nbytes / rate), everyone(size)),), codec, 1.0)]

    def gain(bandwidth: float) -> float:
        network = Network(Link(0.0, bandwidth))
        first, second = (planner.predict(found, Compute(1.0, 0.6), network).step for found in (dense, small))
        return first - second

    expected = 2 * (size - 1) / size * nbytes * (1 - 1 / rate) / codec
    assert planner.greatest_gain(gain, 1e3, 1e12) == pytest.approx(expected, rel=1e-6)
    assert gain(0.99 * expected) > 0 > gain(1.01 * expected)


def test_break_even_may_be_nowhere_or_everywhere() -> None:
    assert planner.greatest_gain(lambda x: -1.0, 1.0, 100.0) is None
    assert planner.greatest_gain(lambda x: 1.0, 1.0, 100.0) == 100.0


def _case(bandwidth: float, **changes: Any) -> plan_case.Case:
    codecs = {PLAIN: 0.0, "Cast(dtype='bfloat16')": 0.002, "ChunkTopK(k=32) + EF": 0.02}
    values: dict[str, Any] = {
        "model": "test",
        "shapes": [(f"layer{number}.weight", (512, 512)) for number in range(8)],
        "tokens": 1024,
        "world_size": 4,
        "network": Network(Link(1e-4, bandwidth, 1e-4)),
        "compute": Compute(0.3, 0.2),
        "codecs": codecs,
    }
    return plan_case.Case(**values | changes)


def test_the_plan_pays_below_its_break_even_and_not_above() -> None:
    plan = bench_plan.make(_case(1.25e6))
    assert plan.best == "ChunkTopK(k=32) + EF"
    assert plan.gain > 5
    assert plan.bandwidth is not None
    for factor, pays in ((0.9, True), (1.1, False)):
        at = bench_plan.make(_case(plan.bandwidth * factor)).predictions
        plain = at.pop(PLAIN).step
        assert (min(found.step for found in at.values()) < (1 - bench_plan.WORTH_IT) * plain) is pays


def test_more_tokens_hide_communication() -> None:
    plan = bench_plan.make(_case(1.25e7))
    assert plan.tokens is not None
    assert 1024 < plan.tokens < math.inf
    long = bench_plan.make(_case(1.25e7, tokens=1024, compute=Compute(0.3, 0.2).scaled(1.1 * plan.tokens / 1024)))
    steps = [found.step for method, found in long.predictions.items() if method != PLAIN]
    assert min(steps) > (1 - bench_plan.WORTH_IT) * long.predictions[PLAIN].step


def test_answers_say_what_is_so() -> None:
    slow = _case(1.25e6)
    said = " ".join(plan_text.answers(slow, bench_plan.make(slow)))
    assert "Communication is exposed" in said
    assert "shortest step is that of ChunkTopK(k=32) + EF" in said
    fast = _case(math.inf, network=Network(FREE))
    said = " ".join(plan_text.answers(fast, bench_plan.make(fast)))
    assert "Communication is hidden" in said
    assert "Nothing here makes the step shorter" in said
    assert any("for 12.6 MB at 1.25 MB/s and 100 µs" in line for line in plan_text.formula(slow, bench_plan.make(slow)))


# Buckets, and what a communicator does with them.


@pytest.mark.parametrize(("bucket_mb", "expected"), [(None, [1, 7]), (25.0, [8]), (1.5, [2, 2, 2, 2])])
def test_buckets_of_ddp(bucket_mb: float | None, expected: list[int]) -> None:
    shapes = [(f"w{number}", (512, 512)) for number in range(8)]  # 1 MiB each
    found = planner.in_buckets(shapes, bucket_mb=bucket_mb)
    assert [len(bucket) for bucket in found] == expected
    assert found[0][0][0] == "w7"


def test_buckets_of_a_loop_are_those_of_attach() -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(100, 100) for _ in range(5)))
    handle = comm.attach(model.named_parameters(), comm.Communicator(compression.Identity()), bucket_mb=0.1)
    shapes = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    found = planner.in_buckets(shapes, bucket_mb=0.1, host="loop")
    assert [[name for name, _ in bucket] for bucket in found] == [
        [name for name, _ in bucket] for bucket in handle._buckets
    ]
    handle.detach()


def _sent(methods: tuple[str, ...], buckets: list[Any]) -> list[float]:
    """Bytes of the second step, by method, on a real rank."""
    found = []
    for method in methods:
        communicator = plan_measure.averager(method)
        assert communicator is not None
        sent = 0.0
        for _ in range(2):
            before = communicator.stats.bytes_sent
            for place, bucket in enumerate(buckets):
                grads = [torch.randn(shape) for _, shape in bucket]
                communicator.average_(grads, [name for name, _ in bucket], last=place == len(buckets) - 1)
            sent = communicator.stats.bytes_sent - before
        found.append(sent)
    return found


@pytest.mark.parametrize(("size", "methods"), [(2, COMPRESSING), (4, NESTED)], ids=["candidates", "nested"])
def test_declared_bytes_are_those_of_real_ranks(size: int, methods: tuple[str, ...]) -> None:
    buckets = planner.in_buckets(SHAPES, bucket_mb=0.02, host="loop")
    assert len(buckets) > 1
    measured = run_ranks(size, _sent, methods, buckets)
    for rank in range(size):
        declared = []
        for method in methods:
            communicator = plan_measure.averager(method)
            assert communicator is not None
            calls = [call for found, _ in rehearse(communicator, buckets, size, rank=rank, steps=2) for call in found]
            declared.append(sum(call.sent for call in calls))
        assert declared == pytest.approx(measured[rank])


def test_plain_averaging_sends_the_gradients() -> None:
    numel = sum(torch.Size(shape).numel() for _, shape in SHAPES)
    calls = [call for bucket in plan_case.buckets(PLAIN, SHAPES, 4, codec=0.0) for call in bucket.calls]
    assert sum(call.sent for call in calls) == pytest.approx(1.5 * 4 * numel)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_rehearsals_need_no_device(device: str) -> None:
    """On CPU the communicator computes what it would if all ranks had the same gradients."""
    communicator = comm.Communicator(compression.BlockQuantize(bits=8), feedback=comm.EF(), exchange=comm.TwoPhase())
    ((calls, seconds),) = rehearse(communicator, [SHAPES], 4, steps=2, device=device, clock=iter(range(99)).__next__)
    assert [call.kind for call in calls] == ["all_reduce", "all_to_all", "all_gather"]
    assert seconds == [1, 1]


def test_a_rehearsal_means_over_equal_ranks() -> None:
    communicator = comm.Communicator(compression.Identity(), exchange=comm.AllGather())
    ranks = Rehearsal(2)
    communicator.join(ranks)
    grad = torch.randn(64, 64)
    before = grad.clone()
    communicator.average_([grad], ["weight"])
    assert torch.equal(grad, before)
    assert communicator.stats.bytes_sent == sum(call.sent for call in ranks.calls)


def test_local_steps_share_an_exchange() -> None:
    common: dict[str, Any] = {"world_size": 4, "network": Network(Link(0.0, 1e6)), "compute": Compute(0.1, 0.06)}
    method = "BlockQuantize(bits=8) + EF + TwoPhase"
    rounds = [bench_plan.predict(method, SHAPES, codec=0.01, every=every, **common) for every in (5, 50)]
    assert rounds[0].exposed == pytest.approx(10 * rounds[1].exposed)
    assert rounds[0].step == pytest.approx(0.1 + rounds[0].exposed)


def test_an_optimizer_that_exchanges_itself_hides_nothing() -> None:
    (bucket,) = plan_case.buckets("DeMo(k=8)", SHAPES, 4, codec=0.01)
    assert bucket.ready == 1.0
    assert [call.kind for call in bucket.calls] == ["all_reduce", "all_gather"]
