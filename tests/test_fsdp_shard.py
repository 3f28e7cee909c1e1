"""`attach` on FSDP2 without replicas: a compressed reduce-scatter for every module."""

from typing import Any

import hsdp
import numpy as np
import pytest
import torch
import torch.distributed as dist
import toy
from ranks import run_ranks
from scattering import EXCHANGE, MAKERS, check_equal, flat, weights_of
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from gradwire.comm import EF, Communicator, Plan, attach
from gradwire.compression import Compressor, Identity, TopK

# Lossless.


class _Odd(nn.Module):
    """What is frozen, tied, sharded by columns, of one row (most shards are empty), unused in odd steps, compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(37, 48, dtype=torch.float64)
        self.second, self.third = (nn.Linear(48, 48, dtype=torch.float64) for _ in range(2))
        self.third.weight = self.second.weight
        self.spare = nn.Linear(48, 48, dtype=torch.float64)
        self.head = nn.Linear(48, 23, dtype=torch.float64)
        self.scale = nn.Linear(23, 1, dtype=torch.float64)
        self.head.bias.requires_grad_(False)
        self.used = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.third(self.second(self.first(x).tanh()).tanh()).tanh()
        if self.used:
            x = x + self.spare(x)
        x = self.head(x)
        return x + self.scale(x)  # type: ignore[no-any-return]


def _odd(policy: MixedPrecisionPolicy) -> Any:
    from torch.distributed.tensor import Shard

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = _Odd()
    options = {"mesh": flat(), "mp_policy": policy}
    torch._dynamo.reset()
    model.first.compile(backend="aot_eager")
    fully_shard(model.first, **options)
    fully_shard([model.second, model.third], **options, shard_placement_fn=lambda p: Shard(p.ndim - 1))
    for module in (model.spare, model.head, model.scale, model):
        fully_shard(module, **options)
    model.set_reduce_scatter_unused_params(True)
    return model


def _lossless(name: str, divide: str = "") -> tuple[list[np.ndarray], int]:
    """Five steps without gradwire, if there is no name, or with."""
    model = _odd(MixedPrecisionPolicy(reduce_dtype=torch.float32) if divide else MixedPrecisionPolicy())
    if divide == "sum":
        model.set_force_sum_reduction_for_comms(True)
    elif divide == "premultiplied sum":
        model.set_gradient_divide_factor(3.0)
        model.set_force_sum_reduction_for_comms(not name)  # gloo itself does not know it
    communicator = MAKERS[name]() if name else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    if communicator is not None:
        attach(model, communicator, optimizer=optimizer)
    for step in range(5):
        optimizer.zero_grad()
        model.used = step % 2 == 0
        toy.loss(model, step).backward()
        optimizer.step()
    return weights_of(model), communicator.stats.steps if communicator is not None else 0


@pytest.mark.parametrize("world_size", [2, 4])
def test_lossless_equals_fsdp2_without_gradwire(world_size: int) -> None:
    ((expected, _), *_) = run_ranks(world_size, _lossless, "")
    for weights, steps in run_ranks(world_size, _lossless, "dense-EF"):
        check_equal(weights, expected)
        assert steps == 5


@pytest.mark.parametrize("divide", ["average", "sum", "premultiplied sum"])
def test_reduces_as_fsdp2_asks(divide: str) -> None:
    """In float32, as `reduce_dtype` says, by each operation that FSDP2 passes."""
    ((expected, _), *_) = run_ranks(2, _lossless, "", divide)
    for weights, _ in run_ranks(2, _lossless, "dense", divide):
        check_equal(weights, expected, atol=1e-7)


def _ways(way: str, attached: bool) -> list[np.ndarray]:
    """Two batches a step, in bfloat16 reduction for the last way."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    dtype = torch.float32 if way == "bfloat16" else torch.float64
    model: Any = toy.model(dtype=dtype)
    if way == "recomputed":
        model = nn.Sequential(*(_Recomputed(layer) for layer in model))
    model = hsdp.shard(model, flat(), mp_policy=policy if way == "bfloat16" else MixedPrecisionPolicy())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if attached:
        attach(model, MAKERS["dense"](), optimizer=optimizer)
    for step in range(3):
        optimizer.zero_grad()
        for part in range(2):
            model.set_requires_gradient_sync(way != "without" or part == 1)
            loss = toy.loss(model, 2 * step + part)
            (loss + toy.loss(model, 99) if way == "twice" else loss).backward()
        optimizer.step()
    return weights_of(model)


class _Recomputed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize("way", ["without", "with", "twice", "recomputed", "bfloat16"])
def test_accumulated_repeated_recomputed_and_in_16_bits(way: str) -> None:
    """In 16 bits our sum is rounded once, from float32; with two ranks FSDP2's is, too."""
    expected, _ = run_ranks(2, _ways, way, False)
    for weights in run_ranks(2, _ways, way, True):
        check_equal(weights, expected, atol=1e-4 if way == "bfloat16" else 1e-12)


# Compressed.


def _compressed(names: list[str]) -> dict[str, tuple[str, float, float, Any, int, int]]:
    results = {}
    for name in names:
        model = hsdp.shard(toy.model(), flat())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        communicator = MAKERS[name]()
        handle = attach(model, communicator, optimizer=optimizer)
        before = toy.evaluate(model)
        hsdp.train(model, optimizer, 0, 40)
        declared = _declared(communicator, model) if isinstance(communicator, Communicator) else 0
        digest = toy.digest(hsdp.whole(model))
        results[name] = digest, before, toy.evaluate(model), communicator.stats, declared, handle.residual_bytes
    return results


def _declared(communicator: Communicator, model: nn.Module) -> int:
    """Bytes that a rank hands over in a step by what compressors declare: row for row, with aligned parts and flags."""
    size, total, align = dist.get_world_size(), 0, lambda count: -(-count // 16) * 16
    for name, module in model.named_modules():
        parameters = list(module.named_parameters(recurse=False))
        for owner in range(size if parameters else 0):
            rows: dict[Any, int] = {}
            for own, p in parameters:
                assert isinstance(p, DTensor)
                most = -(-p.shape[0] // size)
                shape = torch.Size([max(0, min(most, p.shape[0] - owner * most)), *p.shape[1:]])
                plan = communicator.plan.why_dense(f"{name}.{own}", p.shape)
                key: Compressor = communicator.compressor if plan is None else Identity(width=16)
                width = key.row_width(shape) if shape.numel() else 1
                rows[key, width] = rows.get((key, width), 0) + -(-shape.numel() // width)
            for (compressor, width), count in rows.items():
                for part in compressor.layout(width, torch.float32):
                    total += align(count * part.columns * part.dtype.itemsize)
            total += 16
    return total + 4  # the flag of the step


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_compressed_trains_with_the_bytes_that_it_declares(world_size: int) -> None:
    names = ["chunk-EF", "chunk-EF-bf16", "topk-EF", "dct-EF", "int8", "warmup"]
    ranks = run_ranks(world_size, _compressed, names, timeout_s=100)
    for name in names:
        assert toy.all_equal(result[name][0] for result in ranks), name
        _, before, after, stats, declared, _ = ranks[0][name]
        assert after < 0.75 * before, name
        assert stats.skipped == 0
        assert stats.compression_rate > 2.5, name  # rows are longer than some shards
        if name not in ("dct-EF", "warmup", "topk-EF"):
            assert stats.payload_bytes == 40 * declared, name
    assert ranks[0]["int8"][5] == 0
    assert 0 < ranks[0]["chunk-EF-bf16"][5] * 2 == ranks[0]["chunk-EF"][5]


def _conserved(name: str) -> tuple[float, float, bool]:
    """What was applied plus what all ranks keep, against the sum of the gradients, in float64."""
    model = hsdp.shard(toy.model(dtype=torch.float64), flat())
    attach(model, (communicator := MAKERS[name]()))
    exact = toy.model(dtype=torch.float64)
    applied = [torch.zeros(p.shape, dtype=torch.float64) for p in exact.parameters()]
    due = [torch.zeros_like(sum) for sum in applied]
    size = dist.get_world_size()
    for step in range(20):
        model.zero_grad()
        exact.zero_grad()
        toy.loss(model, step).backward()
        sum(toy.loss(exact, step, rank) for rank in range(size)).div(size).backward()  # type: ignore[union-attr]
        for p, whole, done, wanted in zip(model.parameters(), exact.parameters(), applied, due, strict=True):
            done += p.grad.full_tensor()
            wanted += whole.grad  # type: ignore[operator, arg-type]
    names = [name for name, _ in exact.named_parameters()]
    kept = {name: torch.zeros_like(wanted) for name, wanted in zip(names, due, strict=True)}
    for key, rows in communicator.state_rows().items():
        parameter, _, place = key.split("/", 1)[1].rpartition("/")[0].rpartition("[")
        owner = int(place.partition("/")[0])
        whole = kept[parameter]
        most = -(-whole.shape[0] // size)
        own = whole[owner * most : (owner + 1) * most]
        total = rows.double().clone()
        dist.all_reduce(total)
        own += total.flatten()[: own.numel()].view(own.shape) / size
    gap = max(float((d + k - w).abs().max()) for d, k, w in zip(applied, kept.values(), due, strict=True))
    return gap, max(float(k.abs().max()) for k in kept.values()), bool(communicator.stats.residual_norm)


def test_conserves_what_is_not_sent() -> None:
    for world_size in (2, 3):
        for gap, kept, has_norm in run_ranks(world_size, _conserved, "chunk-EF"):
            assert gap < 1e-12
            assert kept > 1e-3
            assert has_norm
    for gap, _, _ in run_ranks(2, _conserved, "chunk-EF-bf16"):
        assert 1e-12 < gap < 5e-3  # up to 2^-8 of a residual is rounded away in each step


def test_residual_in_16_bits_forgets_nothing_in_the_mean() -> None:
    """Gradients a thousand times smaller than their residuals, which rounding to the nearest would lose for good."""
    from gradwire.comm import Simulated

    size, steps = 1 << 12, 2000
    made = Communicator(
        TopK(ratio=1 / size), feedback=EF(dtype="bfloat16"), exchange=Simulated(1), plan=Plan(min_ndim=0, min_numel=0)
    )
    grads, sent = torch.full((size,), 1e-3), torch.zeros(size, dtype=torch.float64)
    grads[0] = 1e4  # takes the one place in each step
    for _ in range(steps):
        made.average_([grad := grads.clone()], ["x"])
        sent += grad
    (residual,) = made.state_rows().values()
    assert residual.dtype == torch.bfloat16
    kept = (sent + residual.double().flatten())[1:]
    assert kept.mean().item() == pytest.approx(steps * 1e-3, rel=0.01)
    with pytest.raises(ValueError, match="EF: expected dtype 'bfloat16' or None, got dtype='int8'"):
        EF(dtype="int8")  # type: ignore[arg-type]


# Non-finite gradients.


def _non_finite(name: str, scaled: bool, accumulated: bool) -> list[tuple[str, str, int]]:
    """The last rank meets an inf in step 2: in the last of two backward passes, or in the first."""
    model = hsdp.shard(toy.model(), flat())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if scaled else None
    communicator = MAKERS[name]()
    attach(model, communicator, optimizer=optimizer, scaler=scaler)
    seen = []
    for step in range(5):
        optimizer.zero_grad()
        for part in range(2 if accumulated else 1):
            loss = toy.loss(model, 2 * step + part)
            if step == 2 and part == 0 and dist.get_rank() == dist.get_world_size() - 1:
                loss = loss * torch.inf
            (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        seen.append((toy.digest(hsdp.whole(model)), toy.state_digest(communicator), communicator.stats.skipped))
    if scaler is not None:
        assert scaler.get_scale() == 2.0**9
    return seen


@pytest.mark.parametrize(
    ("name", "scaled", "accumulated"),
    [
        ("chunk-EF", False, False),
        ("chunk-EF", True, False),
        ("chunk-EF21", True, False),
        ("topk-EF", False, True),
        ("chunk-EF-bf16", True, True),
    ],
)
def test_inf_on_one_rank_skips_everywhere(name: str, scaled: bool, accumulated: bool) -> None:
    ranks = run_ranks(2, _non_finite, name, scaled, accumulated)
    for seen in ranks:
        weights, states, skipped = zip(*seen, strict=True)
        assert skipped == (0, 0, 1, 1, 1)
        assert weights[2] == weights[1]
        assert len(set(weights)) == 4
        assert accumulated or states[2] == states[1]
    assert toy.all_equal([weights for weights, _, _ in seen] for seen in ranks)


def _one_entry() -> tuple[str, str, int]:
    """The gradients of one entry, which belongs to rank 0, are finite on both ranks, and their sum is not."""
    model: Any = nn.Linear(4, 4, bias=False)
    nn.init.ones_(model.weight)
    fully_shard(model, mesh=flat())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    communicator = Communicator(Identity(), exchange=EXCHANGE, plan=hsdp.ALL)
    attach(model, communicator, optimizer=optimizer)
    start = toy.digest(hsdp.whole(model))
    (model(torch.tensor([[3e38, 0.0, 0.0, 0.0]]))[0, 0]).backward()
    optimizer.step()
    return start, toy.digest(hsdp.whole(model)), communicator.stats.skipped


def test_ranks_that_do_not_see_it_skip_too() -> None:
    for start, end, skipped in run_ranks(2, _one_entry):
        assert (start, skipped) == (end, 1)
