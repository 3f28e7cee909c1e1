"""What a communicator refuses, and that it says what to do instead."""

from collections.abc import Callable
from typing import Any

import networkx
import pytest
import torch
from cases import CommunicatorCase
from steps import ONE_RANK
from threads import Thread, on_threads
from torch import Tensor

from gradwire import comm
from gradwire import compression as C
from gradwire.comm import EF, EF21, Communicator, Plan, Simulated, Warmup

RING = networkx.cycle_graph(3)

every_communicator = pytest.mark.parametrize("case", ONE_RANK, ids=lambda case: case.name)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Communicator(C.ChunkTopK(), exchange=comm.AllReduce()),
            r"AllReduce: expected a compressor whose payloads may be added, got ChunkTopK.*Use AllGather\(\) or Two",
        ),
        (
            lambda: Communicator(C.Identity(), exchange=comm.Hierarchical(2, comm.AllReduce())).average_(
                [torch.ones(64, 64)], ["w"]
            ),
            "Hierarchical: expected inside to divide the world size 1, got inside=2",
        ),
        (
            lambda: Communicator(C.ScaledSign(), exchange=comm.Hierarchical(2, comm.AllReduce())),
            r"AllReduce: .*Use AllGather\(\)",
        ),
        (lambda: comm.Hierarchical(0, comm.AllReduce()), "Hierarchical: expected inside >= 1, got inside=0"),
        (
            lambda: comm.Hierarchical(2, Simulated(2)),
            "expected across to be AllReduce, AllGather or TwoPhase, got Simul",
        ),
        (
            lambda: comm.Hierarchical(2, comm.Hierarchical(2, comm.AllReduce())),
            "expected across to be AllReduce, AllGather or TwoPhase, got Hierarchical",
        ),
        (
            lambda: Communicator(C.ChunkTopK(), exchange=comm.TwoPhase(second=C.BlockQuantize())),
            "TwoPhase: expected a second compressor with rows of 4096 .* got BlockQuantize.* with 256. Set its width",
        ),
        (
            lambda: Communicator(C.RandomK(), exchange=comm.TwoPhase()),
            "TwoPhase: expected a second compressor without shared randomness, got RandomK.* Set second",
        ),
        (
            lambda: Communicator(C.RandomK(), feedback=EF()),
            "EF: expected a compressor that is a contraction, got RandomK.* Set unbiased=False",
        ),
        (
            lambda: Communicator(C.BlockQuantize(bits=2, stochastic=True), feedback=EF21()),
            "EF21: expected a compressor that is a contraction, got BlockQuantize.* or stochastic=False",
        ),
        (
            lambda: Communicator(C.Cast("float16"), feedback=EF()),
            "EF: expected a compressor that is a contraction, got Cast.* Use another, or no feedback",
        ),
        (
            lambda: Communicator(
                C.BlockQuantize(), feedback=EF(), exchange=comm.TwoPhase(C.BlockQuantize(bits=2, stochastic=True))
            ),
            "EF: expected a compressor that is a contraction, got BlockQuantize.bits=2",
        ),
        (
            lambda: Communicator(C.ChunkTopK(), feedback=EF(), exchange=comm.AllGather(merge="contributors")),
            r"EF: expected the mean over all ranks, got AllGather\(merge='contributors'\)\. Use merge='mean'",
        ),
        (
            lambda: Communicator(C.DCTTopK(values="sign"), feedback=EF()),
            r"EF: expected a compressor that is a contraction, got DCTTopK.*values='sign'",
        ),
        (
            lambda: Communicator(C.DCTTopK(), exchange=comm.TwoPhase(second=C.DCTTopK(values="sign"))),
            "TwoPhase: expected a second compressor that keeps sizes, got DCTTopK.* Set second, or use AllGather",
        ),
        (
            lambda: Communicator(C.TopK(), feedback=comm.DIANA()),
            "DIANA: expected an unbiased compressor, got TopK.* Set unbiased=True or stochastic=True, or use EF or",
        ),
        (
            lambda: Communicator(C.QSGD(), feedback=comm.MARINA(), exchange=comm.TwoPhase()),
            r"MARINA: expected an exchange that compresses once, got TwoPhase\(\)\. Use AllGather\(\), or a lossless",
        ),
        (
            lambda: Communicator(C.Identity(), feedback=comm.EF21W((1.0, 2.0))),
            r"EF21W: expected an exchange that can weight ranks, got AllReduce\(\)\. Use AllGather\(\), or EF21",
        ),
        (
            lambda: Communicator(C.TopK(), feedback=comm.EF21W((1.0, 2.0))).connect(),
            "EF21W: expected a smoothness constant for each of 1 workers, got 2",
        ),
        (
            lambda: Communicator(C.TopK(), feedback=EF(), participants=1),
            "EF: expected all ranks to take part, got participants=1. Use EF21, EF21W or no feedback",
        ),
        (
            lambda: Communicator(
                C.TopK(), feedback=EF21(), exchange=comm.Hierarchical(1, comm.AllGather()), participants=1
            ),
            r"Hierarchical.*: expected all ranks to take part, got participants=1\. Use AllGather\(\)",
        ),
        (
            lambda: Communicator(C.TopK(), feedback=EF21(), participants=2).connect(),
            "Communicator: expected 1 <= participants <= 1, got participants=2",
        ),
        (
            lambda: Communicator(C.TopK(), feedback=EF(), exchange=comm.Gossip(RING)),
            r"Gossip.*: expected EF21\(\) or no feedback, got EF\(decay=1\.0\)",
        ),
        (
            lambda: comm.attach(
                torch.nn.Linear(2, 2).named_parameters(), Communicator(C.Identity(), exchange=comm.Gossip(RING))
            ),
            "attach: expected an exchange after which ranks agree, got Gossip; use average_",
        ),
        (
            lambda: Communicator(C.RandomK(), feedback=comm.DecoupledMomentum(0.9)),
            "DecoupledMomentum.*: expected a compressor with which its momentum stays bounded, got RandomK.* by 103 a",
        ),
        (
            lambda: comm.AllGather(merge="median"),
            "AllGather: expected merge 'mean' or 'contributors', got merge='median'",
        ),
        (lambda: Simulated(0), "Simulated: expected workers >= 1, got workers=0"),
        (lambda: Warmup(Communicator(C.Identity()), Communicator(C.Identity()), -1), "Warmup: expected steps >= 0"),
        (
            lambda: Warmup(Communicator(C.Identity()), Communicator(C.Identity(), exchange=Simulated(2)), 1),
            "Warmup: expected equal numbers of workers, got 1 and 2",
        ),
        (
            lambda: comm.attach(
                torch.nn.Linear(2, 2).named_parameters(), Communicator(C.Identity(), exchange=Simulated(2))
            ),
            "attach: expected an exchange between processes, got Simulated; use average_",
        ),
    ],
)
def test_illegal_products_name_the_remedy(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@every_communicator
@pytest.mark.parametrize(
    ("grads", "names", "error", "message"),
    [
        ([torch.ones(2, 2).to_sparse()], ["w"], TypeError, "expected dense .* got torch.float32, torch.sparse_coo"),
        ([torch.ones(2, 2, dtype=torch.int32)], ["w"], TypeError, "expected .* floating-point .* got torch.int32"),
        ([torch.ones(2), torch.ones(2, device="meta")], ["w", "v"], TypeError, "one device, got .* on meta for 'v'"),
        ([torch.ones(2), torch.ones(2)], ["w", "w"], ValueError, "expected each name once"),
    ],
    ids=["sparse", "integer", "device", "duplicate"],
)
def test_refuses_arguments(
    case: CommunicatorCase, grads: list[Tensor], names: list[str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"average_: .*{message}"):
        case.make().average_(grads, names)


def test_refuses_another_shape_under_the_same_name() -> None:
    communicator = Communicator(C.Identity())
    communicator.average_([torch.ones(64, 64)], ["w"])
    with pytest.raises(ValueError, match=r"average_: expected 'w' to stay \(64, 64\), got \(128, 64\)"):
        communicator.average_([torch.ones(128, 64)], ["w"])
    with pytest.raises(RuntimeError, match="an earlier step failed"):
        communicator.average_([torch.ones(64, 64)], ["w"])


@pytest.mark.parametrize(
    ("options", "name", "message"),
    [
        ({"seed": 1}, "w", "ranks differ in seed: rank 0 has 0, rank 1 has 1"),
        ({"feedback": EF()}, "w", r"ranks differ in feedback: rank 0 has NoFeedback\(\), rank 1 has EF\(decay=1.0\)"),
        (
            {"plan": Plan(min_ndim=1)},
            "w",
            r"ranks differ in plan: rank 0 has Plan\(min_ndim=2.*rank 1 has Plan\(min_ndim=1",
        ),
        ({}, "v", r"ranks differ in tensor 0: rank 0 has 'w \(64, 64\) torch.float32', rank 1 has 'v \(64"),
    ],
)
def test_a_mismatch_between_ranks_names_both_values(options: dict[str, Any], name: str, message: str) -> None:
    def work(rank: int, collectives: Thread) -> None:
        communicator = Communicator(C.Identity(), **(options if rank == 1 else {}))
        communicator.join(collectives)  # type: ignore[arg-type]
        with pytest.raises(comm.ConfigurationError, match=message):
            communicator.average_([torch.ones(64, 64)], [name if rank == 1 else "w"])

    on_threads(2, work)
