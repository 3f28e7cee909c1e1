"""Mixed precision, accumulation, recomputation and `torch.compile`, on every host: as it trains without gradwire."""

import contextlib
from typing import Any

import hsdp
import pytest
import torch
import torch.distributed as dist
import toy
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from training_hosts import HOSTS, Make, Training, network

from gradwire.comm import EF, AllGather, Communicator, TwoPhase, attach
from gradwire.compression import Cast, ChunkTopK, Identity

every_host = pytest.mark.parametrize("host", HOSTS)
LOSSLESS: dict[str, Make | None] = {
    "host alone": None,
    "dense": lambda **o: Communicator(Identity(), **o),
    "dense, two phases": lambda **o: Communicator(Identity(), feedback=EF(), exchange=TwoPhase(), **o),
}


# Lossless communicators, in every way to train.

_FP16 = MixedPrecisionPolicy(param_dtype=torch.float16, reduce_dtype=torch.float32)
_BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16)  # gradients, too


def _train(host: str, way: str, make: Make | None) -> list[Any]:
    recompute = {"recomputed": False, "recomputed, reentrant": True}.get(way)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2) if way == "float16" else None
    policy = {"float16": _FP16, "bfloat16": _BF16}.get(way)
    training = Training(host, make, network(recompute=recompute), policy=policy, scaler=scaler)
    context: Any = contextlib.nullcontext
    if policy is not None and host != "fsdp2":
        context = lambda: torch.autocast("cpu", dtype=getattr(torch, way))  # noqa: E731
    for step in range(6):
        if way == "accumulated":
            with training.without_sync():
                training.backward(toy.loss(training.module, 100 + step))
            training.with_sync()
        with context():
            loss = toy.loss(training.module, step)
        training.backward(loss)
        training.step()
    if training.communicator is not None:
        assert training.communicator.stats.steps == 6
        assert training.communicator.stats.skipped == 0
    if scaler is not None:
        assert scaler.get_scale() == 2.0**13
    return [p.numpy() for p in training.weights()]


_WAYS = ["plain", "float16", "bfloat16", "accumulated", "recomputed", "recomputed, reentrant"]


_ROUNDED = ("fsdp2", "bfloat16", "dense, two phases")  # sums in float32 what FSDP2 adds in bfloat16


def _lossless(host: str) -> dict[str, dict[str, list[Any]]]:
    return {way: {name: _train(host, way, make) for name, make in LOSSLESS.items()} for way in _WAYS}


@every_host
def test_lossless_equals_the_host_alone_to_the_bit(host: str) -> None:
    """In mixed precision, too, except where the communicator rounds less than the host."""
    first, second = run_ranks(2, _lossless, host)
    for way in _WAYS:
        alone = first[way].pop("host alone")
        for name, ours in first[way].items():
            off = max(float(abs(w - expected).max()) for w, expected in zip(ours, alone, strict=True))
            assert off <= (1e-3 if (host, way, name) == _ROUNDED else 0), (way, name)
            assert _bytes(ours) == _bytes(second[way][name])
    results = {way: _bytes(runs["dense"]) for way, runs in first.items()}
    assert results["recomputed"] == results["recomputed, reentrant"] == results["plain"]
    assert len(set(results.values())) == 4, "the other ways to train are different ones"


def _bytes(arrays: list[Any]) -> bytes:
    return b"".join(array.tobytes() for array in arrays)


# Accumulation.


def _accumulate(host: str, make: Make, parts: int) -> tuple[list[Tensor], int]:
    """Four batches of 8 one after the other, or at once."""
    training = Training(host, make, network(torch.float64))
    for step in range(4):
        batches = [toy.batch(4 * step + part, dist.get_rank()) for part in range(4)]
        if parts == 1:
            batches = [tuple(torch.cat(column) for column in zip(*batches, strict=True))]  # type: ignore[list-item]
        for part, (x, y) in enumerate(batches):
            last = part == parts - 1
            if last:
                training.with_sync()
            with contextlib.nullcontext() if last else training.without_sync():
                loss = nn.functional.mse_loss(training.module(x.double()), y.double()) / parts
                loss.backward()
        training.step()
    assert training.communicator is not None
    return training.weights(), training.communicator.stats.steps


def _sparse(**options: Any) -> Communicator:
    return Communicator(ChunkTopK(k=8, chunk=256), feedback=EF(), **options)


def _accumulate_and_compare(host: str) -> list[str]:
    digests = []
    for make in (LOSSLESS["dense"], _sparse):
        assert make is not None
        (small, steps), (large, expected) = (_accumulate(host, make, parts) for parts in (4, 1))
        assert steps == expected == 4
        for ours, theirs in zip(small, large, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
        digests.append(toy.digest(small))
    return digests


@every_host
def test_accumulation_equals_one_large_batch(host: str) -> None:
    """What is compressed, and kept as a residual, is the accumulated gradient."""
    first, second = run_ranks(2, _accumulate_and_compare, host)
    assert first == second
    assert first[0] != first[1]


# 8-bit floating point on the wire.

_FP8: dict[str, Make] = {
    "e4m3, gathered": lambda **o: Communicator(Cast("float8_e4m3fn"), feedback=EF(), exchange=AllGather(), **o),
    "e4m3, two phases": lambda **o: Communicator(Cast("float8_e4m3fn"), feedback=EF(), exchange=TwoPhase(), **o),
    "e5m2, two phases": lambda **o: Communicator(Cast("float8_e5m2"), feedback=EF(), exchange=TwoPhase(), **o),
}


def _fp8(host: str) -> dict[str, tuple[str, float, float, float, int]]:
    results = {}
    for name, make in {"dense": LOSSLESS["dense"], **_FP8}.items():
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=10**6)
        training = Training(host, make, network(), policy=_FP16, scaler=scaler)
        for step in range(30):
            with torch.autocast("cpu", dtype=torch.float16) if host != "fsdp2" else contextlib.nullcontext():
                loss = toy.loss(training.module, step)
            training.backward(loss)
            training.step()
        assert training.communicator is not None
        stats = training.communicator.stats
        results[name] = (
            toy.digest(training.weights()),
            toy.evaluate(training.module),
            stats.compression_rate,
            stats.uncompressed_bytes / stats.payload_bytes,
            stats.skipped,
        )
    return results


@every_host
def test_8_bit_gradients_train_under_a_loss_scale(host: str) -> None:
    """As 32-bit ones do, in less than a third of the bytes: biases stay dense, and rows of 256 are filled up."""
    first, second = run_ranks(2, _fp8, host)
    _, dense, *_ = first.pop("dense")
    for name, (weights, loss, rate, uncompressed, skipped) in first.items():
        assert second[name][0] == weights
        assert loss == pytest.approx(dense, rel=0.02), name
        assert 3 < rate < 4, name
        assert 0 < uncompressed < 0.1
        assert skipped < 3  # until the scale has come down


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("stochastic", [False, True])
def test_8_bits_make_no_infinity_of_what_is_finite(dtype: Any, stochastic: bool) -> None:
    """Up to the largest number of float32, and beside the smallest; a mean over ranks needs room for their sum."""
    communicator = Communicator(Cast(dtype, stochastic=stochastic), feedback=EF(), exchange=AllGather(), plan=hsdp.ALL)
    largest = torch.finfo(torch.float32).max
    for numbers in (torch.full((256,), largest / 2), torch.randn(256) * 1e37, torch.full((256,), 1e-45)):
        numbers[1::7] = 1e-45
        mean = numbers.clone()
        communicator.average_([mean], ["w"])
        assert mean.isfinite().all()
        assert communicator.found_inf == 0
    cast = Cast(dtype)
    assert cast.decompress(cast.compress(torch.full((256,), largest))).isfinite().all()


def test_a_residual_that_float16_cannot_hold_is_an_overflow() -> None:
    """Sent at last, it may be too large for the gradient, times the loss scale: the scaler must then lower that."""
    communicator = Communicator(ChunkTopK(k=1, chunk=4), feedback=EF(), plan=hsdp.ALL)
    scale, sent, overflows = 2.0**10, torch.zeros(4), 0
    communicator.loss_scale = lambda: scale
    for _ in range(12):
        grad = torch.full((4,), 40 * scale).half()
        residual = communicator.stats.residual_norm
        communicator.average_([grad], ["w"])
        if communicator.found_inf:
            assert grad.isnan().all()
            assert communicator.stats.residual_norm == residual
            scale, overflows = scale / 2, overflows + 1
        else:
            assert grad.isfinite().all()
            sent += grad.float() / scale
    assert overflows == 2
    (kept,) = communicator.state_rows().values()
    assert torch.equal(sent + kept.flatten()[:4], torch.full((4,), 40.0 * (12 - overflows)))


# torch.compile.


class _Graphs:
    """A backend that counts the graphs it is given."""

    def __init__(self, name: str) -> None:
        self.count, self._name = 0, name

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.count += 1
        return torch._dynamo.lookup_backend(self._name)(graph, inputs)


def _compiled(host: str, backend: str) -> dict[str, tuple[str, int]]:
    results = {}
    for name, make in list(LOSSLESS.items())[:2]:
        torch._dynamo.reset()
        graphs, model = _Graphs(backend), network()
        if host == "ddp":
            training = Training(host, make, torch.compile(model, backend=graphs))  # type: ignore[arg-type]
        else:
            for place, block in enumerate(model.blocks):
                model.blocks[place] = torch.compile(block, backend=graphs)  # type: ignore[assignment]
            training = Training(host, make, model)
        for step in range(4):
            training.backward(toy.loss(training.module, step))
            training.step()
        if training.communicator is not None:
            assert training.communicator.stats.steps == 4
            assert training.communicator.stats.bytes_sent > 0
            assert not any("_orig_mod" in key for key in training.communicator.state_rows())
        results[name] = toy.digest(training.weights()), graphs.count
    return results


@pytest.mark.slow
@pytest.mark.parametrize(("host", "backend"), [*((host, "aot_eager") for host in HOSTS), ("ddp", "inductor")])
def test_compiled_models_equal_the_host_alone(host: str, backend: str) -> None:
    """The whole model inside DDP, block by block elsewhere; state is named as without compilation."""
    first, second = run_ranks(2, _compiled, host, backend, timeout_s=110)
    assert first == second
    assert toy.all_equal(weights for weights, _ in first.values())
    for name, (_, graphs) in first.items():
        assert graphs >= (1 if host == "ddp" else 2), name


def _outside_in() -> None:
    model = torch.compile(toy.ddp(network()), backend="eager")
    with pytest.raises(TypeError, match=r"got torch.compile of one.*DDP\(torch\.compile\(model\)\)"):
        attach(model, _sparse())
    sharded: Any = hsdp.shard(toy.model(), hsdp.mesh()["shard"])
    with pytest.raises(TypeError, match=r"expected an FSDP2 model, got torch\.compile of one\. Attach"):
        attach(torch.compile(sharded, backend="eager"), _sparse())


def test_a_host_inside_torch_compile_is_refused_with_the_remedy() -> None:
    run_ranks(2, _outside_in)


# Closures, which Lightning and L-BFGS give to `step`: gradients come to be inside.


def _closures(host: str) -> tuple[list[str], int]:
    training, seen = Training(host, _sparse, network()), []
    for step in range(4):

        def closure(step: int = step) -> Tensor:
            training.optimizer.zero_grad()
            loss = toy.loss(training.module, step)
            (loss * torch.inf if step == 1 and dist.get_rank() == 1 else loss).backward()
            return loss

        training.optimizer.step(closure)
        seen.append(toy.digest(training.weights()))
    assert training.communicator is not None
    return seen, training.communicator.stats.skipped


@every_host
def test_steps_with_a_closure_wait_and_skip_like_others(host: str) -> None:
    first, second = run_ranks(2, _closures, host)
    assert first == second
    seen, skipped = first
    assert skipped == 1
    assert seen[1] == seen[0]
    assert len(set(seen)) == 3
