"""Every communicator in one process: what it computes, and what it must never depend on."""

from collections.abc import Callable

import pytest
import torch
from cases import CommunicatorCase
from steps import ALL, COMPOSED, ONE_RANK, SHAPES, equal, gradients, run_step, snapshot
from threads import Thread, on_threads
from torch import Tensor

from gradwire import comm
from gradwire import compression as C
from gradwire.comm import (
    EF,
    EF21,
    Communicator,
    EControl,
    ErrorFeedback,
    NoFeedback,
    Plan,
    PowerSGD,
    Simulated,
    TwoPhase,
    Warmup,
)

every_communicator = pytest.mark.parametrize("case", ONE_RANK, ids=lambda case: case.name)
every_composed = pytest.mark.parametrize("case", COMPOSED, ids=lambda case: case.name)

# Lossless averaging.


def strided(workers: int) -> dict[str, Tensor]:
    """Gradients `[workers, ...]` of all dtypes, shapes and strides."""
    return {
        "fp32": torch.randn(workers, 33, 7),
        "bf16": torch.randn(workers, 40, 5).bfloat16(),
        "fp16": torch.randn(workers, 9, 9).half(),
        "fp64": torch.randn(workers, 8, 16, dtype=torch.float64),
        "transposed": torch.randn(workers, 5, 31).transpose(1, 2),
        "channels_last": torch.randn(workers, 4, 5, 6, 3).permute(0, 1, 4, 2, 3),
        "sliced": torch.randn(workers, 90)[:, ::3],
        "expanded_bf16": torch.randn(workers, 3, 50).bfloat16()[:, 1:],
        "0-d": torch.randn(workers),
        "empty": torch.randn(workers, 0, 4),
    }


@pytest.mark.parametrize("plan", [ALL, Plan(), Plan(dense=("*",))], ids=["compressed", "mixed", "dense"])
@pytest.mark.parametrize("feedback", [NoFeedback(), EF(), EF21()], ids=repr)
def test_lossless_is_the_mean(plan: Plan, feedback: comm.ErrorFeedback) -> None:
    communicator = Communicator(C.Identity(width=8), feedback=feedback, exchange=Simulated(4), plan=plan)
    for _ in range(2):
        grads = strided(4)
        strides = {name: grad.stride() for name, grad in grads.items()}
        expected = {}
        for name, grad in grads.items():
            wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
            expected[name] = (wide[0] + wide[1] + wide[2] + wide[3]) / 4
        communicator.average_(list(grads.values()), list(grads))
        for name, grad in grads.items():
            assert grad.stride() == strides[name]
            ulp = 0 if not isinstance(feedback, EF21) else 4 * torch.finfo(grad.dtype).eps  # h + (g - h) rounds
            for worker in grad:
                torch.testing.assert_close(worker, expected[name].to(grad.dtype), rtol=0, atol=ulp)


@pytest.mark.parametrize("exchange", [comm.AllReduce, comm.AllGather, comm.TwoPhase])
def test_lossless_on_one_rank_changes_nothing(exchange: Callable[[], comm.Exchange]) -> None:
    communicator = Communicator(C.Identity(width=8), exchange=exchange(), plan=ALL)
    grads = {name: grad[0] for name, grad in strided(1).items()}
    before = {name: grad.clone() for name, grad in grads.items()}
    communicator.average_(list(grads.values()), list(grads))
    assert equal(grads, before)
    assert communicator.found_inf == 0


@every_communicator
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_and_shape_stay(case: CommunicatorCase, dtype: torch.dtype) -> None:
    communicator = case.make(plan=ALL)
    for step in range(3):
        averaged = run_step(communicator, gradients(step, dtype=dtype))
        for name, grad in averaged.items():
            assert (grad.dtype, tuple(grad.shape)) == (dtype, SHAPES[name])
            assert grad.isfinite().all()
    assert communicator.stats.skipped == 0


@every_communicator
def test_mixed_dtypes_in_one_call(case: CommunicatorCase) -> None:
    """A tensor's result does not depend on the dtypes around it."""
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float16]
    grads = {
        f"{name}.{dtype}": grad.to(dtype) for name, grad in gradients(0).items() if grad.numel() for dtype in dtypes
    }
    together = run_step(case.make(plan=ALL), grads)
    for dtype in dtypes:
        alone = run_step(case.make(plan=ALL), {name: grad for name, grad in grads.items() if grad.dtype == dtype})
        for name, grad in alone.items():
            assert_same(case, grad, together[name])


# Independence of buckets.


def assert_same(case: CommunicatorCase, one: Tensor, other: Tensor) -> None:
    """The same bits; PowerSGD's batched products may round differently in batches of other sizes."""
    if isinstance(case.make(), PowerSGD):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    else:
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("case", "workers"),
    [(case, workers) for case in ONE_RANK for workers in (None, 3) if case.composed or workers is None],
    ids=lambda value: value.name if isinstance(value, CommunicatorCase) else f"{value or 1}",
)
def test_result_does_not_depend_on_buckets(case: CommunicatorCase, workers: int | None) -> None:
    """All tensors in one bucket; each alone; and buckets that change from step to step, as DDP's do."""
    names = list(SHAPES)
    plans = [
        [[names]] * 4,
        [[[name] for name in names]] * 4,
        [[names[::-1]], [names[:2], names[2:]], [names[3:], names[:3]], [names[1::2], names[::2]]],
    ]
    results, states = [], []
    for plan in plans:
        exchange = {} if workers is None else {"exchange": Simulated(workers)}
        communicator = case.make(plan=ALL, seed=5, **exchange)
        results.append([run_step(communicator, gradients(step, workers), *plan[step]) for step in range(4)])
        states.append(snapshot(communicator))
    for result, state in zip(results[1:], states[1:], strict=True):
        for step, expected in zip(result, results[0], strict=True):
            for name, grad in step.items():
                assert_same(case, grad, expected[name])
        assert state.keys() == states[0].keys()
        for key, value in state.items():
            assert_same(case, value, states[0][key])


@pytest.mark.parametrize(
    "case",
    [case for case in COMPOSED if not case.make().compressor.changes_basis],  # type: ignore[attr-defined]
    ids=lambda case: case.name,
)
def test_padding_holds_nothing(case: CommunicatorCase) -> None:
    """What a rank keeps of its own lies in entries of the tensor only, so padding never enters a payload."""
    communicator = case.make(plan=ALL)
    replicated = {tensor.name for tensor in communicator.feedback.state if tensor.replicated}
    for step in range(3):
        run_step(communicator, gradients(step))
    for key, rows in communicator.state_rows().items():
        state, _, rest = key.partition("/")
        entries = torch.Size(SHAPES[rest.rpartition("/")[0]]).numel()
        assert state in replicated or not rows.flatten(1)[:, entries:].any(), key


# Conservation.

STATES = ("residual", "second_residual", "local")
KEEPING = [case for case in COMPOSED if case.make().feedback in (EF(), EF21())]  # type: ignore[attr-defined]


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("case", KEEPING, ids=lambda case: case.name)
def test_what_came_in_was_sent_or_is_kept(case: CommunicatorCase, n: int) -> None:
    """In the mean over ranks, and whatever the exchange loses in a second compression.

    EF: all gradients = all estimates + residual.  EF21: what is tracked = the last estimate + residual of the exchange.
    """
    shapes = {name: shape for name, shape in SHAPES.items() if name != "none"}
    came = {name: torch.zeros(shape) for name, shape in shapes.items()}
    sent, kept, last = ([dict[str, Tensor]()] * n for _ in range(3))

    def work(rank: int, collectives: Thread) -> None:
        communicator = case.make(plan=ALL)
        communicator.join(collectives)  # type: ignore[arg-type]
        total = {name: torch.zeros(shape) for name, shape in shapes.items()}
        for step in range(10):
            grads = gradients(step, n)
            averaged = run_step(communicator, {name: grads[name][rank] for name in shapes})
            for name, grad in averaged.items():
                total[name] += grad
        sent[rank], last[rank], kept[rank] = total, averaged, snapshot(communicator)

    on_threads(n, work)
    for step in range(10):
        for name in shapes:
            came[name] += gradients(step, n)[name].mean(dim=0)
    assert all(equal(other, sent[0]) for other in sent)
    # Sums on the way are rounded to bfloat16 there, which no feedback can see.
    atol = 0.05 if case.name == "chain-random-k-bf16-EF" and n > 1 else 1e-4
    for name, shape in shapes.items():
        compressor = case.make().compressor  # type: ignore[attr-defined]
        tile = compressor.tile(torch.Size(shape))
        rows_of = {state: torch.zeros(tile.rows(torch.Size(shape)), tile.numel) for state in STATES}
        for rows in kept:
            for key, value in rows.items():
                state, _, rest = key.partition("/")
                owner, _, span = rest.rpartition("/")
                if owner == name and state in rows_of:
                    start, stop = map(int, span.split(":"))
                    share = 1 if state == "second_residual" else n  # each row of it has one owner
                    rows_of[state][start:stop] += value[0] / share
        held = {
            state: tile.join(compressor.inverse_transform_rows(rows, tile), torch.Size(shape))
            for state, rows in rows_of.items()
        }
        out = sent[0] if case.make().feedback == EF() else last[0]  # type: ignore[attr-defined]
        into = came[name] if case.make().feedback == EF() else held["local"]  # type: ignore[attr-defined]
        torch.testing.assert_close(out[name] + held["residual"] + held["second_residual"], into, rtol=0, atol=atol)


# Loss scale.


@every_communicator
@pytest.mark.parametrize("scale", [1024.0, torch.tensor(1024.0)], ids=["float", "tensor"])
def test_residuals_are_kept_unscaled(case: CommunicatorCase, scale: Tensor | float) -> None:
    plain, scaled = case.make(plan=Plan()), case.make(plan=Plan())
    for step in range(3):
        factor = scale if step else 1.0  # changes between steps, as GradScaler's does
        scaled.loss_scale = lambda factor=factor: factor
        expected = run_step(plain, gradients(step))
        averaged = run_step(scaled, {name: grad * factor for name, grad in gradients(step).items()})
        assert equal(averaged, {name: grad * factor for name, grad in expected.items()})
        assert equal(snapshot(scaled), snapshot(plain))


# Randomness: a function of (seed, step, name, worker).

RANDOM = [case for case in COMPOSED if case.make().compressor.randomness != "none"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("case", RANDOM, ids=lambda case: case.name)
def test_randomness_is_a_function_of_seed_step_and_name(case: CommunicatorCase) -> None:
    def draw(seed: int, name: str, step: int = 0) -> Tensor:
        communicator = case.make(seed=seed, feedback=None)
        for _ in range(step):
            communicator.average_([], [])
        grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
        communicator.average_([grad], [name])
        return grad

    first = draw(0, "w")
    torch.manual_seed(123)
    assert torch.equal(draw(0, "w"), first)
    assert not torch.equal(draw(1, "w"), first)
    assert not torch.equal(draw(0, "v"), first)
    assert not torch.equal(draw(0, "w", step=1), first)
    assert torch.equal(draw(0, "w", step=1), draw(0, "w", step=1))


def test_shared_randomness_is_equal_for_all_workers() -> None:
    communicator = Communicator(C.RandomK(k=8, chunk=256, unbiased=False), exchange=Simulated(3), plan=ALL)
    grad = torch.rand(3, 16, 256) + 1
    mean = grad.mean(dim=0)
    communicator.average_([grad], ["w"])
    kept = grad[0] != 0
    assert (kept.sum(dim=1) == 8).all()
    torch.testing.assert_close(grad[0][kept], mean[kept])


def test_private_randomness_differs_between_workers() -> None:
    communicator = Communicator(
        C.BlockQuantize(bits=8, block=256, stochastic=True), feedback=EF(), exchange=Simulated(3), plan=ALL
    )
    grad = torch.randn(16, 256).expand(3, 16, 256).clone()
    communicator.average_([grad], ["w"])
    (residual,) = communicator.state_rows().values()
    for one, other in ((0, 1), (1, 2), (2, 0)):
        differs = (residual[one] != residual[other]).float().mean()
        assert 0.2 < differs < 0.5  # E 2 p (1 - p) = 1/3 for a fraction p uniform on [0, 1)


# Warm-up.


def test_warmup_is_dense_first() -> None:
    compressor = C.RandomK(k=8, chunk=256, unbiased=False)  # its draws show whether both count the same steps
    warm = Warmup(Communicator(C.Identity(), plan=ALL), Communicator(compressor, feedback=EF(), plan=ALL), steps=2)
    cold = Communicator(compressor, feedback=EF(), plan=ALL)
    for step in range(2):
        assert equal(run_step(warm, gradients(step)), gradients(step))
        cold.average_([], [])
    assert warm.stats.residual_norm == 0
    for step in range(2, 4):
        assert equal(run_step(warm, gradients(step)), run_step(cold, gradients(step)))
    assert warm.stats.residual_norm == cold.stats.residual_norm > 0


# Bytes.


@every_composed
def test_payload_bytes_are_those_of_the_compressor(case: CommunicatorCase) -> None:
    communicator = case.make(plan=ALL, exchange=Simulated(3))
    while communicator.feedback.sends_dense(communicator.stats.steps, communicator.seed):
        run_step(communicator, gradients(0, 3))
        assert communicator.stats.payload_bytes == communicator.stats.uncompressed_bytes
    before = communicator.stats.payload_bytes
    run_step(communicator, gradients(0, 3))
    expected = sum(communicator.compressor.payload_bytes(shape, torch.float32) for shape in SHAPES.values())
    assert communicator.stats.payload_bytes - before == (communicator.participants or 3) * expected


@every_composed
def test_a_message_adds_alignment_and_a_flag(case: CommunicatorCase) -> None:
    compressor = case.make().compressor
    shapes = [torch.Size(shape) for shape in SHAPES.values() if torch.Size(shape).numel()]
    parts = [
        compressor.compress_rows(
            compressor.to_rows(torch.randn(shape)), torch.float32, torch.arange(compressor.num_rows(shape))
        )
        for shape in shapes
    ]
    layout = comm.exchange.message.MessageLayout(parts)
    payload = sum(compressor.payload_bytes(shape, torch.float32) for shape in shapes)
    assert payload + 16 <= layout.nbytes <= payload + 16 + 15 * sum(map(len, parts))
    for bad in (False, True):
        message = layout.pack(parts, torch.tensor(bad))
        assert (message.dtype, message.numel()) == (torch.uint8, layout.nbytes)
        stack = torch.stack([layout.pack(parts, torch.tensor(False)), message])
        assert layout.bad(stack) == bad
        for sent, received in zip(parts, layout.unpack(stack), strict=True):
            for one, both in zip(sent, received, strict=True):
                assert both.dtype == one.dtype
                assert torch.equal(both.view(torch.uint8), torch.stack([one, one]).view(torch.uint8))


# Compiled.


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # Inductor's own
@pytest.mark.parametrize(
    ("compressor", "feedback", "workers"),
    [(C.ChunkTopK(k=8, chunk=256), EControl(), 1), (C.ScaledSign(width=256), EF(), 3)],
    ids=repr,
)
def test_fused_equals_eager(compressor: C.Compressor, feedback: ErrorFeedback, workers: int) -> None:
    def make(fused: bool) -> Communicator:
        exchange = Simulated(workers) if workers > 1 else None
        return Communicator(compressor, feedback=feedback, exchange=exchange, plan=ALL, fused=fused)

    fused, eager = make(True), make(False)
    for step in range(3):
        grads = gradients(step, workers if workers > 1 else None)
        averaged, expected = run_step(fused, grads), run_step(eager, grads)
        for name, grad in averaged.items():
            torch.testing.assert_close(grad, expected[name], rtol=1e-6, atol=1e-6)
    for key, value in fused.state_rows().items():
        torch.testing.assert_close(value, eager.state_rows()[key], rtol=1e-6, atol=1e-6)


def test_communicators_may_be_given_one_exchange() -> None:
    """Each connects a copy, so that they do not share groups, counters or second residuals."""
    exchange = TwoPhase(second=C.BlockQuantize(bits=8))
    one = Communicator(C.BlockQuantize(bits=8), feedback=EF(), exchange=exchange)
    other = Communicator(C.BlockQuantize(bits=4), exchange=exchange)
    one.average_([torch.randn(64, 64)], ["w"])
    other.average_([torch.randn(64, 64)], ["w"])
    assert one.exchange is not other.exchange
    assert one.exchange.feedback
    assert not other.exchange.feedback
    one.average_([torch.randn(64, 64)], ["w"])
    assert any(key.startswith("second_residual/") for key in one.state_rows())
    assert not other.state_rows()
