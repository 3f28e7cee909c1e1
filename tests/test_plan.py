"""What is compressed, what is sent dense, and why."""

import pytest
import torch

from gradwire.comm import Communicator, Plan, Simulated
from gradwire.compression import ChunkTopK


@pytest.mark.parametrize(
    ("plan", "name", "shape", "why"),
    [
        (Plan(), "w", (32, 32), None),
        (Plan(), "norm.weight", (4096,), "ndim 1 < 2"),
        (Plan(), "scale", (), "ndim 0 < 2"),
        (Plan(), "w", (31, 33), "numel 1023 < 1024"),
        (Plan(dense=("embed*",)), "embedding.weight", (64, 64), "name matches 'embed*'"),
        (Plan(dense=("embed*",)), "Embedding.weight", (64, 64), None),
        (Plan(dense=("*",), compress=("head.*",)), "head.bias", (3,), None),
        (Plan(min_ndim=0, min_numel=0), "scale", (), None),
        (Plan(min_ndim=1, min_numel=5), "bias", (4,), "numel 4 < 5"),
    ],
)
def test_reason(plan: Plan, name: str, shape: tuple[int, ...], why: str | None) -> None:
    assert plan.why_dense(name, torch.Size(shape)) == why


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_ndim": -1}, "Plan: expected min_ndim >= 0, got min_ndim=-1"),
        ({"min_numel": -1}, "Plan: expected min_numel >= 0, got min_numel=-1"),
        ({"dense": "bias"}, "Plan: expected a tuple of patterns for dense, got the string 'bias'"),
        ({"compress": "bias"}, "Plan: expected a tuple of patterns for compress, got the string 'bias'"),
    ],
)
def test_refuses(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        Plan(**arguments)  # type: ignore[arg-type]


def test_the_communicator_follows_the_plan() -> None:
    compressor = ChunkTopK(k=1, chunk=64)
    communicator = Communicator(compressor, exchange=Simulated(2), plan=Plan(min_numel=64, dense=("skip",)))
    names, shapes = ["w", "bias", "tiny", "skip"], [(8, 8), (64,), (7, 7), (8, 8)]
    grads = [torch.randn(2, *shape) for shape in shapes]
    means = [grad.mean(dim=0) for grad in grads]
    communicator.average_(grads, names)
    for name, shape, grad, mean in zip(names, shapes, grads, means, strict=True):
        dense = communicator.plan.why_dense(name, torch.Size(shape)) is not None
        assert dense == (name != "w")
        assert torch.equal(grad[0], mean) == dense
    assert (grads[0][0] != 0).sum() <= 2  # one entry of each worker
