"""`DiLoCo` and `LocalSGD` in one process: what a user of `torch.optim` expects, and what is refused."""

from typing import Any

import numpy as np
import pytest
import torch
from optimizing import assert_equal, clones
from reference import diloco as reference
from torch import Tensor, nn

from gradwire.comm import EF, Communicator, Gossip, LocalSGD, Plan, Simulated, checkpoint
from gradwire.compression import BlockQuantize, Chain, ChunkTopK, Identity
from gradwire.optim import DeMo, DiLoCo

SHAPES = [(8, 6), (5,), ()]


def parameters(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in SHAPES]


def gradient(x: Any, step: int, rank: int = 0) -> Any:
    """Of a quadratic and a wave that changes with the step."""
    wave = np.cos(np.arange(x.size).reshape(x.shape) * (rank + 2) + step)
    return (rank + 1) / 2 * x - wave


def train(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], first: int, last: int) -> None:
    for step in range(first, last):
        for p in params:
            p.grad = torch.as_tensor(gradient(p.detach().double().numpy(), step)).to(p.dtype)
        optimizer.step()


def make(params: list[nn.Parameter], every: int = 4, outer: Any = None, **options: Any) -> DiLoCo:
    return DiLoCo(torch.optim.AdamW(params, lr=0.1, weight_decay=0.1), outer, every=every, **options)


@pytest.mark.parametrize("every", [1, 3, 7])
def test_equals_the_reference(every: int) -> None:
    params = parameters()
    starts = [p.detach().numpy().copy() for p in params]
    optimizer = make(params, every)
    train(optimizer, params, 0, 17)
    inner = {"kind": "adamw", "lr": 0.1, "decay": 0.1}
    for p, start in zip(params, starts, strict=True):
        agreed, own = reference.diloco(start, gradient, 1, 17, every, inner)
        np.testing.assert_allclose(p.detach().numpy(), own, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(optimizer.state[p]["agreed"].numpy(), agreed, rtol=1e-10, atol=1e-12)
    assert optimizer.communicator.stats.steps == 17 // every


def test_an_outer_step_of_size_one_is_no_step() -> None:
    """Alone, with all differences sent, local SGD and DiLoCo with SGD(lr=1) are the inner optimizer."""
    params = parameters()
    others, thirds = clones(params), clones(params)
    optimizer = make(params, 3, torch.optim.SGD(params, lr=1.0))
    train(optimizer, params, 0, 10)
    plain = torch.optim.AdamW(others, lr=0.1, weight_decay=0.1)
    train(plain, others, 0, 10)
    averaged = torch.optim.AdamW(thirds, lr=0.1, weight_decay=0.1)
    local_sgd = LocalSGD(averaged, every=3)
    train(averaged, thirds, 0, 10)
    assert_equal(params, others, rtol=1e-12, atol=1e-12)
    assert_equal(thirds, others, rtol=1e-12, atol=1e-12)
    assert local_sgd.communicator.stats.steps == 3


def test_schedulers_act_on_the_inner_groups_and_on_the_outer() -> None:
    params = parameters()
    starts = [p.detach().clone() for p in params]
    inner = torch.optim.SGD(params, lr=1.0)
    outer = torch.optim.SGD(params, lr=1.0)
    optimizer = DiLoCo(inner, outer, every=2)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    per_round = torch.optim.lr_scheduler.StepLR(outer, 1, gamma=0.1)
    for step in range(4):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        schedule.step()
        if step % 2:
            per_round.step()
    assert inner.param_groups[0]["lr"] == 1 / 16
    for p, start in zip(params, starts, strict=True):
        torch.testing.assert_close(p.detach(), start - 1.5 - 0.1 * 0.375)


def test_closures_and_zero_grad() -> None:
    params = parameters()
    optimizer = DiLoCo(torch.optim.LBFGS(params, lr=0.1), torch.optim.SGD(params, lr=1.0), every=2)
    calls = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = sum((p.square().sum() for p in params), torch.zeros(()))
        loss.backward()
        calls.append(loss.item())
        return loss

    first = optimizer.step(closure)
    assert first is not None
    for _ in range(3):
        optimizer.step(closure)
    assert len(calls) > 4  # LBFGS asks more than once
    assert calls[-1] < calls[0] / 10
    params[0].grad = torch.ones_like(params[0])
    optimizer.zero_grad()
    assert params[0].grad is None


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_leaves_out_steps_that_count(fused: bool) -> None:
    """Without the count, the rank that left a step out would wait for the others in another round."""
    params = parameters(torch.float32)
    others = clones(params)
    optimizer = DiLoCo(torch.optim.AdamW(params, lr=0.1, fused=fused), every=3)
    plain = torch.optim.AdamW(others, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1000)
    for step in range(2):
        for p, q in zip(params, others, strict=True):
            g = torch.full_like(p, torch.inf) if step == 0 else torch.as_tensor(gradient(p.detach().numpy(), 1)).float()
            p.grad = scaler.scale(g)
            q.grad = g if step else None
        scaler.step(optimizer)
        scaler.update()
        plain.step()
    assert scaler.get_scale() == 4.0
    assert_equal(params, others, rtol=1e-6, atol=1e-7)
    assert int(optimizer.state[params[0]]["local_step"]) == 2
    assert not hasattr(optimizer.inner, "found_inf")


def test_returned_and_synchronize() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    optimizer = DiLoCo(torch.optim.SGD(model.parameters(), lr=0.5), every=3, buffers=model.named_buffers())

    def step() -> list[Tensor]:
        optimizer.zero_grad()
        model(torch.randn(8, 4)).pow(4).sum().backward()
        before = [x.clone() for name, x in model.state_dict().items() if "num" not in name]
        optimizer.step()
        return before

    def now() -> list[Tensor]:
        return [x.clone() for name, x in model.state_dict().items() if "num" not in name]

    before = step()
    step()
    after = now()
    assert not any(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    with optimizer.returned():
        assert_equal(now(), before)
    assert_equal(now(), after)
    optimizer.synchronize()
    assert optimizer.communicator.stats.steps == 1
    assert_equal(now()[4:], after[4:])  # buffers are their mean over one rank
    optimizer.synchronize()  # no step since
    assert optimizer.communicator.stats.steps == 1
    synchronized = now()
    with optimizer.returned():
        assert_equal(now(), synchronized)


@pytest.mark.parametrize("kind", ["gradient", "parameter"])
def test_a_round_that_is_not_finite_is_lost(kind: str) -> None:
    params = parameters()
    optimizer = make(params, 2)
    train(optimizer, params, 0, 2)
    agreed = clones(params)
    velocity = [optimizer.state[p]["outer_momentum_buffer"].clone() for p in params]
    train(optimizer, params, 2, 3)
    if kind == "gradient":
        params[0].grad = torch.full_like(params[0], torch.nan)
        optimizer.step()
        assert not optimizer.state[params[0]]["exp_avg"].any()
        assert optimizer.state[params[0]]["step"] == 0
        assert optimizer.state[params[1]]["step"] == 4  # where it is finite, it goes on
    else:
        params[0].data[0, 0] = torch.inf
        train(optimizer, params, 3, 4)
        assert optimizer.state[params[1]]["step"] == 4
    assert_equal(params, agreed)
    assert_equal([optimizer.state[p]["outer_momentum_buffer"] for p in params], velocity)
    assert (optimizer.communicator.stats.steps, optimizer.communicator.stats.skipped) == (2, 1)
    train(optimizer, params, 4, 8)
    assert all(bool(p.isfinite().all()) for p in params)
    assert not torch.equal(params[0], agreed[0])


def test_resume_in_the_middle_of_a_round_is_exact(tmp_path: Any) -> None:
    """Also into an optimizer with other groups outside, and with a scheduler's learning rates."""
    params = parameters()
    sparse = {"feedback": EF(decay=0.95), "plan": Plan(min_ndim=0, min_numel=0)}
    chain = Chain(ChunkTopK(k=2, chunk=16), BlockQuantize(bits=2))
    optimizer = make(params, communicator=Communicator(chain, **sparse))
    optimizer.outer.param_groups[0]["lr"] = 0.5
    optimizer.param_groups[0]["lr"] = 0.05
    train(optimizer, params, 0, 6)
    torch.save([optimizer.state_dict(), [p.data for p in params]], tmp_path / "state.pt")
    train(optimizer, params, 6, 13)

    fresh = parameters()
    resumed = make(fresh, communicator=Communicator(chain, **sparse))
    state, values = torch.load(tmp_path / "state.pt", weights_only=True)
    for p, value in zip(fresh, values, strict=True):
        p.data.copy_(value)
    resumed.load_state_dict(state)
    assert (resumed.outer.param_groups[0]["lr"], resumed.inner.param_groups[0]["lr"]) == (0.5, 0.05)
    train(resumed, fresh, 6, 13)
    assert_equal(fresh, params)
    assert_equal([resumed.state[p]["agreed"] for p in fresh], [optimizer.state[p]["agreed"] for p in params])


def test_checkpoint_before_the_first_step(tmp_path: Any) -> None:
    """Torch initialises an empty optimizer with a step of its own, which must not count here."""
    model, other = nn.Linear(3, 3), nn.Linear(3, 3)
    optimizer = DiLoCo(torch.optim.AdamW(model.parameters()), every=1)
    checkpoint.save(tmp_path / "start", model=model, optimizer=optimizer)
    resumed = DiLoCo(torch.optim.AdamW(other.parameters()), every=1)
    checkpoint.load(tmp_path / "start", model=other, optimizer=resumed)
    assert resumed.communicator.stats.steps == 0
    for m, o in ((model, optimizer), (other, resumed)):
        m(torch.ones(2, 3)).sum().backward()
        o.step()
    assert_equal(list(model.parameters()), list(other.parameters()))
    assert_equal([resumed.state[other.weight]["agreed"]], [other.weight])


def test_a_state_of_another_model_or_loop_is_refused() -> None:
    params = parameters()
    optimizer = make(params)
    state = optimizer.state_dict()
    with pytest.raises(ValueError, match="DiLoCo: expected a state of 1 parameters, got 3"):
        make(parameters()[:1]).load_state_dict(state)
    others = [nn.Parameter(torch.zeros(4)) for _ in params]
    with pytest.raises(ValueError, match=r"DiLoCo: expected agreed of shape \(4,\), got \(8, 6\)"):
        make(others).load_state_dict(state)
    local_sgd = LocalSGD(torch.optim.SGD(params, lr=0.1), every=2)
    saved = {**local_sgd.state_dict(), "agreed": {}}
    with pytest.raises(ValueError, match="LocalSGD: expected a state of"):
        local_sgd.load_state_dict(saved)


def test_groups_may_be_added() -> None:
    params, later = parameters(), [nn.Parameter(torch.ones(3, dtype=torch.float64))]
    optimizer = make(params, 2)
    train(optimizer, params, 0, 3)
    optimizer.add_param_group({"params": later, "lr": 0.5})
    train(optimizer, params + later, 3, 6)
    assert [len(group["params"]) for group in optimizer.outer.param_groups] == [3, 1]
    assert optimizer.state[later[0]]["agreed"].equal(later[0])
    optimizer.inner.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    with pytest.raises(RuntimeError, match="DiLoCo: the optimizer got parameters that nobody averages"):
        train(optimizer, params, 6, 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_of_16_bits(dtype: torch.dtype) -> None:
    params = parameters(dtype)
    optimizer = DiLoCo(torch.optim.SGD(params, lr=0.1), torch.optim.SGD(params, lr=1.0), every=2)
    others = clones(params)
    train(optimizer, params, 0, 4)
    train(torch.optim.SGD(others, lr=0.1), others, 0, 4)
    assert_equal(params, others, rtol=0, atol=4 * torch.finfo(dtype).eps)


def test_detached_local_sgd_leaves_the_optimizer_alone() -> None:
    params = parameters()
    optimizer = torch.optim.SGD(params, lr=0.1)
    local_sgd = LocalSGD(optimizer, every=2)
    train(optimizer, params, 0, 3)
    local_sgd.detach()
    assert local_sgd.communicator.stats.steps == 2
    train(optimizer, params, 3, 6)
    assert local_sgd.communicator.stats.steps == 2
    assert not local_sgd.communicator.attached


def _given(case: str) -> Any:
    params = parameters()
    inner = torch.optim.SGD(params, lr=0.1)
    options: dict[str, Any] = {"every": 2}
    outer: Any = None
    if case == "every":
        options["every"] = 0
    elif case == "inner":
        inner = params  # type: ignore[assignment]
    elif case == "twice":
        outer = inner
    elif case == "exchanging":
        inner = DeMo(params)
    elif case == "others":
        outer = torch.optim.SGD(parameters(), lr=1.0)
    elif case == "communicator":
        options["communicator"] = EF()
    elif case == "gossip":
        options["communicator"] = Communicator(Identity(), exchange=Gossip([[0.5, 0.5], [0.5, 0.5]]))
    elif case == "simulated":
        options["communicator"] = Communicator(Identity(), exchange=Simulated(2))
    elif case == "attached":
        options["communicator"] = Communicator(Identity())
        DiLoCo(torch.optim.SGD(params, lr=0.1), **options)
    elif case == "bucket":
        options["bucket_mb"] = 0
    elif case == "complex":
        inner = torch.optim.SGD([nn.Parameter(torch.ones(1, dtype=torch.complex64))], lr=0.1)
    return DiLoCo(inner, outer, **options)


@pytest.mark.parametrize(
    ("case", "error", "message"),
    [
        ("every", ValueError, "DiLoCo: expected an integer every >= 1, got every=0"),
        ("inner", TypeError, "DiLoCo: expected an optimizer as inner, got"),
        ("twice", ValueError, "DiLoCo: expected two optimizers, got one twice"),
        ("exchanging", ValueError, "DiLoCo: expected an inner optimizer that sends nothing, got DeMo"),
        ("others", ValueError, "DiLoCo: expected outer to have the 3 parameters of inner"),
        ("communicator", TypeError, "DiLoCo: expected a communicator, got EF"),
        ("gossip", ValueError, "DiLoCo: expected an exchange after which ranks agree"),
        ("simulated", ValueError, "DiLoCo: expected an exchange after which ranks agree"),
        ("attached", ValueError, "DiLoCo: expected a communicator that is attached to nothing else"),
        ("bucket", ValueError, "DiLoCo: expected bucket_mb > 0, got bucket_mb=0"),
        ("complex", ValueError, "DiLoCo: expected real parameters, got torch.complex64"),
    ],
)
def test_refuses(case: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _given(case)
