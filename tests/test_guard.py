"""A gradient that is not finite on any rank: the step is seen, skipped, and leaves no trace."""

from collections.abc import Callable

import pytest
import torch
from cases import CommunicatorCase
from steps import ALL, COMPOSED, ONE_RANK, equal, gradients, run_step, snapshot
from threads import Thread, on_threads

from gradwire import comm
from gradwire import compression as C
from gradwire.comm import EF, EF21, Communicator, Plan, PowerSGD, Simulated

every_communicator = pytest.mark.parametrize("case", ONE_RANK, ids=lambda case: case.name)
every_composed = pytest.mark.parametrize("case", COMPOSED, ids=lambda case: case.name)


@every_communicator
def test_a_bad_step_leaves_no_trace(case: CommunicatorCase) -> None:
    buckets = ["a.weight", "norm"], ["b.weight", "scale"], ["conv", "none"]
    for name, value in (("b.weight", torch.inf), ("scale", torch.nan), ("conv", -torch.inf), ("a.weight", torch.nan)):
        plan = Plan(dense=("scale",), min_ndim=0, min_numel=0)
        communicator, twin = case.make(plan=plan), case.make(plan=plan)
        for step in range(3):
            assert equal(run_step(communicator, gradients(step), *buckets), run_step(twin, gradients(step), *buckets))
        before = snapshot(communicator)
        grads = gradients(3)
        grads[name].view(-1)[-1] = value
        averaged = run_step(communicator, grads, *buckets)
        (together,) = [names for names in buckets if name in names]
        for other, grad in averaged.items():
            assert grad.isnan().all() if other in together else grad.isfinite().all()
        assert communicator.found_inf == 1
        assert (communicator.stats.steps, communicator.stats.skipped) == (4, 1)
        assert equal(snapshot(communicator), before)

        twin.average_([], [])  # a step without gradients: the random numbers of both stay in step
        assert twin.found_inf == 0
        for step in (4, 5):
            assert equal(run_step(communicator, gradients(step), *buckets), run_step(twin, gradients(step), *buckets))
            assert communicator.found_inf == 0
        assert communicator.stats.skipped == 1


@every_composed
def test_one_bad_worker_spoils_the_step_for_all(case: CommunicatorCase) -> None:
    communicator = case.make(plan=ALL, exchange=Simulated(3))
    run_step(communicator, gradients(0, 3))
    before = snapshot(communicator)
    grads = gradients(1, 3)
    grads["conv"][1, 0, 0, 0, 0] = torch.nan
    assert all(grad.isnan().all() for grad in run_step(communicator, grads).values())
    assert communicator.found_inf == 1
    assert equal(snapshot(communicator), before)


@pytest.mark.parametrize("exchange", [comm.AllReduce, comm.AllGather, comm.TwoPhase])
def test_overflow_of_the_format_counts_as_not_finite(exchange: Callable[[], comm.Exchange]) -> None:
    communicator = Communicator(C.Cast("float16"), exchange=exchange())
    for largest, skipped in ((6e4, 0), (7e4, 1), (6e4, 1)):
        grad = torch.full((64, 64), largest)
        communicator.average_([grad], ["w"])
        assert bool(grad.isnan().all()) == (largest > 65504)
        assert communicator.stats.skipped == skipped


@pytest.mark.parametrize("feedback", [EF(), EF21()], ids=repr)
@pytest.mark.parametrize("compressor", [C.Cast("bfloat16"), C.ScaledSign(width=256)], ids=repr)
def test_overflow_poisons_no_state(compressor: C.Compressor, feedback: comm.ErrorFeedback) -> None:
    """Finite gradients whose payload is infinite: near the largest float32, bfloat16 rounds up and a sum overflows."""
    communicator = Communicator(compressor, feedback=feedback, exchange=comm.AllGather())
    communicator.average_([torch.ones(64, 64)], ["w"])
    before = snapshot(communicator)
    communicator.average_([torch.full((64, 64), 3.4e38)], ["w"])
    assert communicator.found_inf == 1
    assert equal(snapshot(communicator), before)
    grad = torch.ones(64, 64)
    communicator.average_([grad], ["w"])
    assert torch.equal(grad, torch.ones(64, 64))


@pytest.mark.parametrize("make", [lambda: Communicator(C.Identity()), PowerSGD], ids=["Communicator", "PowerSGD"])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_dense_tensors_report_other_ranks(make: Callable[[], comm.Averager], value: float) -> None:
    """A vector that is not finite on one rank spoils the step on both, although no payload says so."""

    def work(rank: int, collectives: Thread) -> None:
        communicator = make()
        communicator.join(collectives)  # type: ignore[arg-type]
        communicator.average_([torch.ones(64, 64), torch.ones(64)], ["w", "b"])
        before = snapshot(communicator)
        grads = [torch.ones(64, 64), torch.full((64,), value if rank == 1 else 1.0)]
        communicator.average_(grads, ["w", "b"])
        assert all(grad.isnan().all() for grad in grads)
        assert (communicator.found_inf, communicator.stats.skipped) == (1, 1)
        assert equal(snapshot(communicator), before)

    on_threads(2, work)


def test_a_sum_that_overflows_is_seen() -> None:
    """Gradients that are finite on every rank but whose float16 sum is not."""

    def work(rank: int, collectives: Thread) -> None:
        communicator = Communicator(C.Identity())
        communicator.join(collectives)  # type: ignore[arg-type]
        grad = torch.full((64,), 4e4, dtype=torch.float16)
        communicator.average_([grad], ["b"])
        assert grad.isnan().all()
        assert communicator.found_inf == 1

    on_threads(2, work)
