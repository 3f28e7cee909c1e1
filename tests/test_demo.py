"""`DeMo` in one process: against its reference, and what a user of `torch.optim` expects."""

import copy
import logging
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from cases import EXCHANGING, OptimizerCase
from optimizing import assert_equal, clones, eager, train
from torch import Tensor, nn

from gradwire.comm import CheckpointError, Plan
from gradwire.optim import DeMo, in_backward

# Inductor's own
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

ALL = Plan(min_ndim=0, min_numel=0)
SHAPES = [(16, 32), (48,), (8, 4, 2, 2), (), (48, 16)]  # sides of a power of two: no coefficient's wave has a zero
FORMS = ["2024", "2026", "overlapped"]

every_form = pytest.mark.parametrize("form", FORMS)


def parameters(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in SHAPES]


def make(params: Any, **options: Any) -> DeMo:
    return DeMo(params, **{"lr": 1e-2, "k": 8, "chunk": 16, "plan": ALL, **options})


@pytest.mark.parametrize(
    ("case", "mode"),
    [(case, {"foreach": foreach}) for case in EXCHANGING for foreach in (False, True)]
    + [(EXCHANGING[i], {"fused": True}) for i in (0, 4)],
    ids=str,
)
def test_equals_the_reference(case: OptimizerCase, mode: dict[str, bool]) -> None:
    params = parameters()
    before = [p.detach().numpy().copy() for p in params]
    optimizer = DeMo(params, lr=1e-2, **case.kwargs, **mode)
    lrs = [1e-2 * 0.97**step for step in range(30)]
    grads: list[list[Any]] = [[] for _ in params]
    for lr in lrs:
        for p, seen in zip(params, grads, strict=True):
            p.grad = torch.randn_like(p)
            seen.append(p.grad.numpy().copy())
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
    for p, start, seen in zip(params, before, grads, strict=True):
        expected = case.reference(start, seen, lrs, **case.kwargs)
        np.testing.assert_allclose(p.detach().numpy(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("transform", ["dct", "none"])
def test_all_coefficients_on_one_rank_are_sign_sgd_on_the_decayed_sum(transform: str) -> None:
    """What is sent is taken out, so with everything sent the decayed sum is the gradient."""
    params = parameters()
    others = clones(params)
    optimizer = make(params, k=256, values="fp32", transform=transform, weight_decay=0.1)
    for _ in range(10):
        for p, q in zip(params, others, strict=True):
            p.grad = torch.randn_like(p)
            q.data = q.data - 1e-2 * 0.1 * q.data - 1e-2 * p.grad.sign()
        optimizer.step()
    assert_equal(params, others, rtol=0, atol=1e-15)


def test_what_is_sent_dense_has_the_momentum_of_what_is_compressed_whole() -> None:
    for alpha in (1.0, 0.3):
        params = parameters()
        others = clones(params)
        options: dict[str, Any] = {"form": "2026", "momentum": 0.9, "alpha": alpha, "base": "identity"}
        train(make(params, plan=Plan(dense=("*",)), **options), params, 20)
        train(make(others, k=256, values="fp32", **options), others, 20)
        assert_equal(params, others, rtol=1e-10, atol=1e-12)


def test_orthogonalized_matrices() -> None:
    case = next(case for case in EXCHANGING if case.kwargs.get("form") == "2026")
    kwargs = {**case.kwargs, "base": "orthogonalized", "k": 256}
    weight, wide, vector = (nn.Parameter(torch.randn(s, dtype=torch.float64)) for s in ((24, 16), (8, 4, 2, 2), (5,)))
    before = [p.detach().numpy().copy() for p in (weight, wide, vector)]
    optimizer = DeMo([weight, wide, vector], lr=1e-2, **{**kwargs, "plan": Plan(min_numel=0)})
    grads = []
    for _ in range(5):
        for p in (weight, wide, vector):
            p.grad = torch.randn_like(p)
        grads.append([p.grad.numpy().copy() for p in (weight, wide, vector)])
        optimizer.step()
    for i, p in enumerate((weight, wide)):
        expected = case.reference(before[i], [step[i] for step in grads], [1e-2] * 5, **kwargs)
        np.testing.assert_allclose(p.detach().numpy(), expected, rtol=0, atol=1e-4)
    expected = case.reference(before[2], [step[2] for step in grads], [1e-2] * 5, **{**kwargs, "base": "sign"})
    np.testing.assert_allclose(vector.detach().numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("kwargs", "message"), EXCHANGING[0].errors)
def test_refuses(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeMo([nn.Parameter(torch.ones(2))], **kwargs)


def test_refuses_what_belongs_to_all_groups_in_one() -> None:
    with pytest.raises(ValueError, match="DeMo: expected 'momentum' for all groups together, got it in one"):
        DeMo([{"params": [nn.Parameter(torch.ones(2))], "momentum": 0.5}])
    with pytest.raises(ValueError, match="DeMo: expected real parameters"):
        DeMo([nn.Parameter(torch.ones(2, dtype=torch.complex64))])


@every_form
def test_sparse_gradients_are_refused(form: str) -> None:
    embedding = nn.Embedding(8, 4, sparse=True)
    optimizer = make(embedding.parameters(), form=form)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"DeMo: expected dense gradients, got torch\.sparse_coo"):
        optimizer.step()


def test_single_parameters_are_not_stepped() -> None:
    model = nn.Linear(3, 2)
    in_backward(model, lambda params: make(params))
    with pytest.raises(RuntimeError, match=r"DeMo: expected step\(\), got a step of single parameters"):
        model(torch.ones(1, 3)).sum().backward()


def test_groups_have_their_own_lr_and_decay() -> None:
    params = parameters()
    others = clones(params)
    both = make([{"params": params[:2], "lr": 1e-3, "weight_decay": 0.1}, {"params": params[2:]}])
    apart = [make(others[:2], lr=1e-3, weight_decay=0.1), make(others[2:])]
    for step in range(5):
        train(both, params, 1, seed=step)
        for p, q in zip(params, others, strict=True):
            q.grad = p.grad.clone()
        for optimizer in apart:
            optimizer.step()
    assert_equal(params, others)


@every_form
def test_closure_comes_first(form: str) -> None:
    params = parameters()
    others = clones(params)
    optimizer, other = make(params, form=form), make(others, form=form)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        grads = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in params]
        for p, q, grad in zip(params, others, grads, strict=True):
            p.grad, q.grad = torch.full_like(p, 7.0), grad

        def closure(grads: list[Tensor] = grads) -> Tensor:
            assert torch.is_grad_enabled()
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad
            return torch.tensor(3.0)

        assert optimizer.step(closure) == 3.0
        other.step()
    assert_equal(params, others)


@every_form
def test_a_missing_gradient_is_zero(form: str) -> None:
    params = parameters()
    others = clones(params)
    optimizer, other = make(params, form=form), make(others, form=form)
    for step in range(4):
        for i, (p, q) in enumerate(zip(params, others, strict=True)):
            q.grad = torch.zeros_like(q) if i == step % 3 else torch.randn_like(q)
            p.grad = None if i == step % 3 else q.grad.clone()
        optimizer.step()
        other.step()
    assert_equal(params, others)


@every_form
def test_frozen_parameters_stay_and_take_part_again_later(form: str) -> None:
    params = parameters()
    params[0].requires_grad_(False)
    before = params[0].detach().clone()
    optimizer = make(params, form=form)
    for step in range(6):
        for p in params:
            p.grad = torch.randn_like(p) if p.requires_grad else None
        optimizer.step()
        optimizer.synchronize()
        assert torch.equal(params[0], before) == (step < 3)
        params[0].requires_grad_(step >= 2)


@every_form
@pytest.mark.parametrize("base", ["sign", "orthogonalized"])
def test_nothing_to_exchange_and_groups_without_gradients(form: str, base: str) -> None:
    frozen = nn.Parameter(torch.ones(16, 16), requires_grad=False)
    optimizer = make([frozen], form=form, base=base)
    optimizer.step()
    optimizer.synchronize()
    assert torch.equal(frozen, torch.ones(16, 16))
    weight = nn.Parameter(torch.zeros(16, 16))
    optimizer.add_param_group({"params": [weight]})
    for _ in range(2):
        weight.grad = torch.ones(16, 16)
        optimizer.step()
    optimizer.synchronize()
    assert torch.equal(frozen, torch.ones(16, 16))
    assert weight.any()


@every_form
def test_gradients_are_left_as_they_are(form: str) -> None:
    params = parameters(torch.float32)
    optimizer = make(params, form=form)
    train(optimizer, params, 2)
    grads = [p.grad for p in params]
    kept = [grad.clone() for grad in grads]
    optimizer.step()
    assert all(p.grad is grad for p, grad in zip(params, grads, strict=True))
    assert_equal(grads, kept)


@every_form
def test_maximize_goes_the_other_way(form: str) -> None:
    params = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    others = clones(params)
    train(make(params, form=form, maximize=True), params, 5)
    train(make(others, form=form), others, 5)
    assert_equal(params, [-q.detach() for q in others])
    assert all(p.any() for p in params)


@eager
@every_form
def test_lr_may_be_a_tensor(form: str, foreach: bool) -> None:
    params = parameters(torch.float32)
    others = clones(params)
    train(make(params, form=form, lr=torch.tensor(0.25), foreach=foreach), params, 4)
    train(make(others, form=form, lr=0.25), others, 4)
    assert_equal(params, others)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_form
def test_narrow_parameters_are_exchanged_in_float32(form: str, dtype: torch.dtype) -> None:
    params = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in SHAPES]
    others = clones(params, torch.float32)
    optimizer, other = make(params, form=form, lr=2.0**-6), make(others, form=form, lr=2.0**-6)
    for _ in range(4):
        for p, q in zip(params, others, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.float()
        optimizer.step()
        other.step()
    assert_equal([p.float() for p in params], others)  # steps of 2^-6 round in neither


@every_form
def test_a_bad_gradient_leaves_no_trace(form: str, caplog: pytest.LogCaptureFixture) -> None:
    params = parameters()
    others = clones(params)
    optimizer, other = make(params, form=form), make(others, form=form)
    for step in range(6):
        for p, q in zip(params, others, strict=True):
            q.grad = torch.randn_like(q)
            p.grad = q.grad.clone()
        if step == 2:
            params[0].grad[3] = torch.inf
        with caplog.at_level(logging.WARNING, "gradwire"):
            optimizer.step()
            optimizer.synchronize()
        if step != 2:
            other.step()
            other.synchronize()
    assert_equal(params, others)
    assert optimizer.communicator.stats.skipped == 1
    assert [record.message for record in caplog.records if "not finite" in record.message] == [
        "DeMo: a gradient is not finite on some rank: the step is skipped on all ranks."
    ]


@every_form
@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler(form: str, unscale: bool) -> None:
    params = parameters(torch.float32)
    plain = clones(params)
    optimizer, other = make(params, form=form), make(plain, form=form)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(5):
        for p, q in zip(params, plain, strict=True):
            q.grad = torch.randn_like(p)
            p.grad = q.grad * scaler.scale(torch.tensor(1.0))
        if step == 2:
            params[0].grad[0] = torch.inf
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert not {"grad_scale", "found_inf"} & vars(optimizer).keys()
        if step != 2:
            other.step()
    optimizer.synchronize()
    other.synchronize()
    assert_equal(params, plain)
    assert scaler.get_scale() == 512.0


# The overlapped form.


def test_overlapped_applies_the_same_updates_one_step_late() -> None:
    params = parameters()
    before = [p.detach().numpy().copy() for p in params]
    optimizer = make(params, form="overlapped", momentum=0.9)
    grads: list[list[Any]] = [[] for _ in params]
    for _ in range(12):
        for p, seen in zip(params, grads, strict=True):
            p.grad = torch.randn_like(p)
            seen.append(p.grad.numpy().copy())
        optimizer.step()
    optimizer.synchronize()
    reference = EXCHANGING[0].reference
    kwargs: dict[str, Any] = {"k": 8, "chunk": 16, "momentum": 0.9, "values": "sign"}
    for p, start, seen in zip(params, before, grads, strict=True):
        expected = reference(start, seen, [1e-2] * 12, **kwargs)
        np.testing.assert_allclose(p.detach().numpy(), expected, rtol=1e-10, atol=1e-12)


def test_overlapped_looks_ahead_along_its_own_momentum() -> None:
    weight = nn.Parameter(torch.randn(16, 16, dtype=torch.float64))
    start = weight.detach().clone()
    optimizer = make([weight], form="overlapped", momentum=0.5, k=256, values="fp32")
    weight.grad = first = torch.randn_like(weight)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), start - 1e-2 * first.sign())  # nothing has arrived yet
    weight.grad = second = torch.randn_like(weight)
    optimizer.step()  # everything of the first was sent, so the momentum is the second
    arrived = start - 1e-2 * first.sign()
    torch.testing.assert_close(weight.detach(), arrived - 1e-2 * second.sign())
    optimizer.synchronize()
    torch.testing.assert_close(weight.detach(), arrived - 1e-2 * second.sign())
    optimizer.synchronize()  # once
    torch.testing.assert_close(weight.detach(), arrived - 1e-2 * second.sign())


def test_evaluating_in_between_changes_nothing() -> None:
    params = parameters()
    others, bare = clones(params), clones(params)
    optimizer, other, plain = make(params, form="overlapped"), make(others, form="overlapped"), make(bare)
    with optimizer.returned():
        assert_equal(params, bare)  # nothing has happened
    for step in range(5):
        for one, some in ((optimizer, params), (other, others)):
            train(one, some, 1, seed=step)
        with optimizer.returned():
            ahead = max((p - q).abs().max().item() for p, q in zip(params, others, strict=True))
            assert ahead == pytest.approx(1e-2)
    assert_equal(params, others)
    plain.synchronize()
    plain.wait()  # the other forms have nothing in flight
    train(plain, bare, 1)
    before = clones(bare)
    with plain.returned():
        assert_equal(bare, before)
    optimizer.synchronize()
    with optimizer.returned():
        other.synchronize()
        assert_equal(params, others)


# State.


def steps(optimizer: DeMo, params: list[nn.Parameter], first: int, last: int) -> None:
    for step in range(first, last):
        train(optimizer, params, 1, seed=step)


@pytest.mark.parametrize(("form", "fused"), [("2024", False), ("2026", False), ("overlapped", False), ("2026", True)])
def test_resume_is_exact(form: str, fused: bool) -> None:
    params = parameters(torch.float32)
    plan = Plan(min_numel=0)  # vectors are dense
    optimizer = make(params, form=form, plan=plan, fused=fused)
    steps(optimizer, params, 0, 4)
    saved = pickle.loads(pickle.dumps(optimizer.state_dict()))
    others = clones(params)
    other = make(others, form=form, plan=plan, fused=fused, lr=0.5)
    other.load_state_dict(saved)
    steps(optimizer, params, 4, 8)
    steps(other, others, 4, 8)
    optimizer.synchronize()
    other.synchronize()
    assert_equal(others, params)
    assert optimizer.communicator.stats.steps == other.communicator.stats.steps
    assert_equal(*(list(one.communicator.state_rows().values()) for one in (other, optimizer)))


def test_a_state_without_the_momenta_is_refused() -> None:
    params = parameters()
    optimizer = make(params)
    train(optimizer, params, 3)
    saved = optimizer.state_dict()
    del saved["communicator"]
    others = clones(params)
    other = make(others)
    other.load_state_dict(saved)
    with pytest.raises(
        CheckpointError, match="DeMo: expected the momenta of every rank with the loaded state, got none"
    ):
        train(other, others, 1)


def test_other_hyper_parameters_are_named() -> None:
    params = parameters()
    optimizer = make(params)
    train(optimizer, params, 1)
    other = make(clones(params), momentum=0.5)
    with pytest.raises(CheckpointError, match=r"decay=0\.999.*decay=0\.5|decay=0\.5.*decay=0\.999"):
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def test_one_rank_is_told_once_that_nothing_is_saved(caplog: pytest.LogCaptureFixture) -> None:
    params = parameters()
    with caplog.at_level(logging.WARNING, "gradwire"):
        train(make(params), params, 3)
    assert [record.message for record in caplog.records] == [
        "DeMo: there is one rank, so nothing is exchanged: it saves communication, not steps."
    ]
