"""Every optimizer against its reference and against what torch asks of an optimizer."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import OPTIMIZERS, OptimizerCase
from optimizing import assert_equal, clones, eager, every_case, every_class, make, parameters, train
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from gradwire.optim import AdamP, base, kernels


def tangent_gradient(p: Tensor, gradient: Tensor, step: int) -> Tensor:
    """Orthogonal to the weight by rows, as a whole, or not at all, in turns."""
    if p.ndim < 2 or step % 3 == 2:
        return gradient
    w, g = (x.reshape(len(p) if step % 3 == 0 else 1, -1) for x in (p.detach(), gradient))
    return (g - w * ((w * g).sum(1, keepdim=True) / (w * w).sum(1, keepdim=True))).reshape(p.shape)


# The mathematics.


@every_case
@eager
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e-8])
def test_equals_the_reference(case: OptimizerCase, foreach: bool, scale: float) -> None:
    params = parameters()
    before = [p.detach().numpy().copy() for p in params]
    optimizer = make(case, params, foreach=foreach)
    grads: list[list[Any]] = [[] for _ in params]
    lrs = [1e-2 * 0.97**step for step in range(50)]
    for step, lr in enumerate(lrs):
        for i, p in enumerate(params):
            p.grad = None if i == 2 and step < 7 else tangent_gradient(p, torch.randn_like(p) * scale, step)
            grads[i].append(None if p.grad is None else p.grad.numpy().copy())
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
    for p, start, gradients in zip(params, before, grads, strict=True):
        expected = case.reference(start, gradients, lrs, **case.kwargs)
        rounding = 1e-14 * np.abs(start).max()  # of weights that hardly move
        assert np.abs(p.detach().numpy() - expected).max() <= 1e-12 * np.abs(expected - start).max() + rounding


@eager
def test_adamp_without_projection_is_adamw(foreach: bool) -> None:
    params = parameters()
    others = clones(params)
    train(AdamP(params, lr=1e-2, weight_decay=0.1, delta=0.0, foreach=foreach), params, 20)
    train(torch.optim.AdamW(others, lr=1e-2, weight_decay=0.1), others, 20)
    assert_equal(params, others, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dims", [1, 0], ids=["rows", "matrix"])
def test_adamp_moves_scale_invariant_weights_along_the_tangent(dims: int) -> None:
    weight = nn.Parameter(torch.randn(8, 16, dtype=torch.float64))
    optimizer = AdamP([weight], lr=1e-2)
    for step in range(5):
        before = weight.detach().clone()
        weight.grad = tangent_gradient(weight, torch.randn_like(weight), 1 - dims)
        optimizer.step()
        radial = (before * (weight.detach() - before)).flatten(1)
        assert radial.sum(1).abs().max() < 1e-9 if dims else radial.sum().abs() < 1e-9
        assert radial.abs().sum() > 1e-3, step


def test_adamp_decays_scale_invariant_weights_less() -> None:
    weight, vector = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    optimizer = AdamP([weight, vector], lr=0.1, weight_decay=0.5, wd_ratio=0.1)
    weight.grad, vector.grad = torch.zeros(2, 2), torch.zeros(2)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((2, 2), 0.995))
    torch.testing.assert_close(vector.detach(), torch.full((2,), 0.95))


@every_case
def test_foreach_equals_loop(case: OptimizerCase, monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters(torch.float32)
    in_one, in_chunks, in_cache, in_pieces = (clones(params) for _ in range(4))
    train(make(case, params, foreach=False), params)
    train(make(case, in_one, foreach=True), in_one)
    train(make(case, in_cache), in_cache)
    monkeypatch.setattr(base, "CHUNK", 40)
    train(make(case, in_chunks, foreach=True), in_chunks)
    monkeypatch.setattr(kernels, "PIECE", 7)
    train(make(case, in_pieces, foreach=False), in_pieces)
    for others in (in_one, in_chunks, in_cache):
        assert_equal(others, params)
    assert_equal(in_pieces, params, rtol=1e-6, atol=1e-7)  # a sigmoid's last bit depends on its place in a vector


@every_case
@eager
def test_numbers_may_stay_on_the_device(case: OptimizerCase, foreach: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an accelerator: one 0-d tensor per parameter where the host would read floats."""

    def unread(value: Any, start: int, stop: int) -> Any:
        return list(value[start:stop].unbind()) if isinstance(value, Tensor) and value.ndim else value

    params = parameters(torch.float32)
    others = clones(params)
    train(make(case, params), params)
    monkeypatch.setattr(kernels, "_numbers", unread)
    train(make(case, others, foreach=foreach), others)
    assert_equal(others, params, rtol=1e-6, atol=1e-6)


@every_class
def test_descends_rosenbrock(case: OptimizerCase) -> None:
    xy = nn.Parameter(torch.tensor([-1.5, 1.5]))
    optimizer = make(case, [xy], lr=case.rosenbrock_lr)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (1 - xy[0]) ** 2 + 100 * (xy[1] - xy[0] ** 2) ** 2
        loss.backward()
        return loss

    first = closure().item()
    for _ in range(300):
        optimizer.step(closure)
    assert closure().item() < 0.2 * first


# Construction and groups.


@pytest.mark.parametrize(
    ("case", "kwargs", "message"), [(case, *error) for case in OPTIMIZERS for error in case.errors], ids=str
)
def test_refuses(case: OptimizerCase, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        case.cls([nn.Parameter(torch.ones(2))], **kwargs)
    optimizer = case.cls([nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], **kwargs})
    assert len(optimizer.param_groups) == 1


@every_class
def test_refuses_what_torch_refuses(case: OptimizerCase) -> None:
    with pytest.raises(TypeError, match="weight_deacy"):
        case.cls([nn.Parameter(torch.ones(2))], weight_deacy=0.1)
    with pytest.raises(ValueError, match="empty parameter list"):
        case.cls([])
    with pytest.raises(TypeError, match="iterable of Tensors"):
        case.cls(torch.ones(2))
    with pytest.raises(ValueError, match="non-leaf"):
        case.cls([nn.Parameter(torch.ones(2)) * 2])


@every_class
def test_takes_tensors_names_and_groups(case: OptimizerCase) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    by_name, by_group = copy.deepcopy(model), copy.deepcopy(model)
    train(make(case, model.parameters()), list(model.parameters()))
    train(make(case, by_name.named_parameters()), list(by_name.parameters()))
    groups = [{"params": by_group[0].parameters(), "lr": 1e-2}, {"params": by_group[1].parameters()}]
    optimizer = make(case, groups, lr=1.0)
    optimizer.param_groups[1]["lr"] = 1e-2
    train(optimizer, list(by_group.parameters()))
    assert_equal(list(by_name.parameters()), list(model.parameters()))
    assert_equal(list(by_group.parameters()), list(model.parameters()))


@every_class
def test_group_options_and_added_groups(case: OptimizerCase) -> None:
    first, second = parameters(), parameters()
    together, alone_1, alone_2 = clones(first), clones(first), clones(second)
    optimizer = make(case, together)
    optimizer.add_param_group({"params": second, "lr": 0.5, "maximize": True})
    train(optimizer, [*together, *second])
    generator_params = [*alone_1, *alone_2]
    one, two = make(case, alone_1), make(case, alone_2, lr=0.5, maximize=True)

    class Both:
        def step(self) -> None:
            one.step()
            two.step()

    train(Both(), generator_params)
    assert_equal([*together, *second], generator_params)


# The step.


@every_class
def test_closure_comes_first_with_gradients_enabled(case: OptimizerCase) -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = make(case, [p])

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        assert torch.equal(p, torch.ones(3))
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure).item() == 3.0
    assert (p < 1).all()
    assert optimizer.step() is None


@every_class
@eager
def test_maximize_leaves_gradients_alone(case: OptimizerCase, foreach: bool) -> None:
    up, down = parameters(), []
    down = clones(up)
    grads = [torch.randn_like(p) for p in up]
    ascend, descend = make(case, up, maximize=True, foreach=foreach), make(case, down, foreach=foreach)
    for _ in range(3):
        for p, q, g in zip(up, down, grads, strict=True):
            p.grad, q.grad = g.clone(), -g
        ascend.step()
        descend.step()
        assert_equal([p.grad for p in up], grads)
    assert_equal(up, down)


@every_class
def test_keeps_no_reference_to_gradients(case: OptimizerCase) -> None:
    params = parameters()
    optimizer = make(case, params)
    train(optimizer, params, 1)
    kept = [x for state in optimizer.state.values() for x in state.values()]
    assert not {p.grad.untyped_storage().data_ptr() for p in params} & {x.untyped_storage().data_ptr() for x in kept}


@every_class
def test_counts_steps_by_parameter_and_skips_those_without_gradient(case: OptimizerCase) -> None:
    early, late, never = (nn.Parameter(torch.ones(3)) for _ in range(3))
    optimizer = make(case, [early, late, never])
    for step in range(4):
        early.grad = torch.ones(3)
        late.grad = torch.ones(3) if step == 3 else None
        optimizer.step()
    assert optimizer.state[early]["step"].item() == 4
    assert optimizer.state[late]["step"].item() == 1
    assert never not in optimizer.state
    assert torch.equal(never, torch.ones(3))


@every_class
@eager
def test_lr_as_tensor_and_schedulers(case: OptimizerCase, foreach: bool) -> None:
    params = parameters(torch.float32)
    others = clones(params)
    number = make(case, params, lr=0.1, foreach=foreach)
    tensor = make(case, others, lr=torch.tensor(0.1), foreach=foreach)
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6) for optimizer in (number, tensor)]
    for step in range(5):
        train(number, params, 1, seed=step)
        train(tensor, others, 1, seed=step)
        for schedule in schedules:
            schedule.step()
    assert isinstance(tensor.param_groups[0]["lr"], Tensor)
    assert_equal(others, params, rtol=1e-5, atol=1e-6)


@every_class
def test_lr_zero_changes_nothing(case: OptimizerCase) -> None:
    params = parameters(torch.float32)
    before = clones(params)
    train(make(case, params, lr=0.0), params)
    assert_equal(params, before)


@every_class
def test_sparse_gradients_are_refused_by_name(case: OptimizerCase) -> None:
    embedding = nn.Embedding(10, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"sparse_coo for parameter weight of shape \(10, 3\)"):
        make(case, embedding.named_parameters()).step()
    with pytest.raises(RuntimeError, match=r"parameter 0 of shape \(10, 3\)"):
        make(case, embedding.parameters()).step()


@every_class
@eager
def test_complex_parameters_are_their_real_view(case: OptimizerCase, foreach: bool) -> None:
    values = [torch.randn(shape, dtype=torch.complex128) for shape in [(3, 4), (5,), ()]]
    params = [nn.Parameter(x.clone()) for x in values]
    if not case.cls.supports_complex:
        with pytest.raises(ValueError, match=r"expected real parameters, got torch.complex128 of shape \(3, 4\)"):
            make(case, params)
        return
    views = [nn.Parameter(torch.view_as_real(x).clone()) for x in values]
    optimizer, other = make(case, params, foreach=foreach), make(case, views, foreach=foreach)
    for _ in range(5):
        for p, v in zip(params, views, strict=True):
            p.grad = torch.randn_like(p)
            v.grad = torch.view_as_real(p.grad).clone()
        optimizer.step()
        other.step()
    assert_equal([torch.view_as_real(p.detach()) for p in params], views)
    assert any(x.dtype == torch.complex128 for x in optimizer.state[params[0]].values())


@every_class
@eager
def test_any_memory_layout(case: OptimizerCase, foreach: bool) -> None:
    def layouts() -> list[nn.Parameter]:
        conv = torch.randn(4, 3, 5, 2)
        return [
            nn.Parameter(conv.to(memory_format=torch.channels_last)),
            nn.Parameter(torch.randn(5, 6).t()),
            nn.Parameter(torch.randn(4, 3, 5, 2).permute(3, 2, 1, 0)),
            nn.Parameter(torch.randn(8, 10)[::2, ::2]),
            nn.Parameter(torch.tensor(2.0).expand(())),
            nn.Parameter(torch.empty(0, 3)),
            nn.Parameter(torch.empty(3, 0)),
        ]

    params = layouts()
    strides = [p.stride() for p in params]
    plain = [nn.Parameter(p.detach().clone(memory_format=torch.contiguous_format)) for p in params]
    train(make(case, params, foreach=foreach), params)
    train(make(case, plain, foreach=foreach), plain)
    assert_equal(params, plain, rtol=1e-6, atol=1e-6)
    assert [p.stride() for p in params] == strides


@every_class
def test_memory_layout_may_change_between_steps(case: OptimizerCase) -> None:
    p = nn.Parameter(torch.randn(4, 3, 5, 2))
    plain = clones([p])
    optimizer, other = make(case, [p]), make(case, plain)
    for seed in range(3):
        train(optimizer, [p], 1, seed=seed)
        train(other, plain, 1, seed=seed)
        p.data = p.data.to(memory_format=torch.channels_last)
    states = [list(o.state[q].values()) for o, q in ((optimizer, p), (other, plain[0]))]
    assert_equal([p, *states[0]], [plain[0], *states[1]], rtol=1e-6, atol=1e-6)


@every_class
@eager
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_rounded_once(case: OptimizerCase, foreach: bool, dtype: torch.dtype) -> None:
    params = parameters(dtype)
    wide = clones(params, torch.float32)
    optimizer, other = make(case, params, foreach=foreach), make(case, wide, foreach=foreach)
    for seed in range(3):
        for p, w in zip(params, wide, strict=True):
            w.data.copy_(p.data)
        generator = torch.Generator().manual_seed(seed)
        for p, w in zip(params, wide, strict=True):
            p.grad = torch.randn(p.shape, generator=generator).to(dtype)
            w.grad = p.grad.float()
        optimizer.step()
        other.step()
        assert_equal(params, [w.detach().to(dtype) for w in wide])
    for p, w in zip(params, wide, strict=True):
        assert {x.dtype for x in optimizer.state[p].values()} == {torch.float32}
        assert_equal(list(optimizer.state[p].values()), list(other.state[w].values()))


@every_class
def test_autograd_notices_the_change(case: OptimizerCase) -> None:
    p = nn.Parameter(torch.ones(3))
    loss = (p**2).sum()
    train(make(case, [p]), [p], 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_class
def test_hooks(case: OptimizerCase) -> None:
    calls: list[str] = []
    params = parameters()
    optimizer = make(case, params)
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    train(optimizer, params, 1)
    assert calls == ["before", "after"]


# Mixed precision and skipped steps.


@every_class
@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler(case: OptimizerCase, unscale: bool) -> None:
    params = parameters(torch.float32)
    plain = clones(params)
    optimizer, other = make(case, params), make(case, plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(4):
        for p, q in zip(params, plain, strict=True):
            q.grad = torch.randn_like(p)
            p.grad = q.grad * scaler.scale(torch.tensor(1.0))
        if step == 2:
            before = [p.detach().clone() for p in params]
            params[0].grad[0] = torch.inf
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if step == 2:
            assert_equal(params, before)
        else:
            other.step()
    assert_equal(params, plain)
    assert scaler.get_scale() == 512.0
    assert {optimizer.state[p]["step"].item() for p in params} == {3.0}


@every_class
@eager
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_skipped_on_the_device_changes_nothing(
    case: OptimizerCase, foreach: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "_on_host", lambda x: False)
    params = parameters(dtype)
    others = clones(params)
    optimizer, other = make(case, params, foreach=foreach), make(case, others, foreach=foreach)
    for step in range(5):
        optimizer.found_inf = torch.tensor(float(step in (0, 3)))
        before = [x.detach().clone() for p in params for x in (p, *optimizer.state[p].values())]
        for p, q in zip(params, others, strict=True):
            q.grad = torch.randn_like(q)
            p.grad = torch.full_like(p, torch.nan) if optimizer.found_inf else q.grad.clone()
        optimizer.step()
        if not optimizer.found_inf:
            other.step()
        elif step:
            assert_equal([x for p in params for x in (p, *optimizer.state[p].values())], before)
    assert_equal(params, others)


@every_class
def test_found_inf_on_the_host_skips_the_step(case: OptimizerCase) -> None:
    params = parameters(torch.float32)
    before = clones(params)
    optimizer = make(case, params)
    optimizer.found_inf = torch.tensor(1.0)
    train(optimizer, params, 1)
    assert_equal(params, before)
    optimizer.found_inf = torch.tensor(0.0)
    train(optimizer, params, 1)
    assert not torch.equal(params[0], before[0])


# State.


def save_and_load(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@every_case
def test_resumes_bit_exact_from_a_file_of_tensors(case: OptimizerCase) -> None:
    params = parameters()
    optimizer = make(case, params)
    train(optimizer, params, 3)
    restored = clones(params)
    other = make(case, restored, lr=1.0)
    other.load_state_dict(state_dict=save_and_load(optimizer.state_dict()))
    train(optimizer, params, 3, seed=1)
    train(other, restored, 3, seed=1)
    assert_equal(restored, params)
    for state in optimizer.state_dict()["state"].values():
        assert all(isinstance(value, Tensor) for value in state.values())
        assert state["step"].dtype == torch.float32
        assert state["step"].shape == ()


def test_adamp_state_is_spelled_as_in_torch() -> None:
    params = parameters()
    ours, theirs = AdamP(params), torch.optim.AdamW(params)
    train(ours, params, 1)
    train(theirs, params, 1)
    keys = ours.state_dict()["state"][0].keys()
    assert keys == theirs.state_dict()["state"][0].keys() == {"step", "exp_avg", "exp_avg_sq"}


@every_class
@pytest.mark.parametrize(
    ("saved", "loaded"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str
)
def test_loading_keeps_the_dtype_of_the_state(case: OptimizerCase, saved: torch.dtype, loaded: torch.dtype) -> None:
    params = parameters(saved)
    optimizer = make(case, params)
    train(optimizer, params, 3)
    others = clones(params, loaded)
    other = make(case, others)
    other.load_state_dict(save_and_load(optimizer.state_dict()))
    for p, q in zip(params, others, strict=True):
        for name, value in optimizer.state[p].items():
            assert other.state[q][name].dtype == torch.float32
            assert torch.equal(other.state[q][name], value)
    train(other, others, 1)


@every_class
def test_loading_copies(case: OptimizerCase) -> None:
    params = parameters()
    optimizer = make(case, params)
    train(optimizer, params, 2)
    others = clones(params)
    other = make(case, others)
    other.load_state_dict(optimizer.state_dict())
    before = copy.deepcopy(optimizer.state_dict()["state"])
    train(other, others, 2)
    for i, state in optimizer.state_dict()["state"].items():
        assert_equal(list(state.values()), list(before[i].values()))


@every_class
def test_load_hooks_see_the_state_in_its_turn(case: OptimizerCase) -> None:
    params = parameters(torch.bfloat16)
    optimizer = make(case, params)
    train(optimizer, params, 2)
    other = make(case, clones(params))
    seen: list[torch.dtype] = []

    def count_two_more(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        state = {i: {**s, "step": s["step"] + 2} for i, s in state_dict["state"].items()}
        return {**state_dict, "state": state}

    other.register_load_state_dict_pre_hook(count_two_more)
    other.register_load_state_dict_post_hook(
        lambda o: seen.extend(x.dtype for s in o.state.values() for x in s.values())
    )
    other.load_state_dict(optimizer.state_dict())
    assert set(seen) == {torch.float32}
    assert {state["step"].item() for state in other.state.values()} == {4.0}


@every_class
def test_loads_older_and_foreign_states(case: OptimizerCase) -> None:
    """A step count that is a number, as other packages keep it, and groups that lack an option."""
    params = parameters()
    optimizer = make(case, params)
    train(optimizer, params, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["step"] = 2
    del saved["param_groups"][0]["maximize"]
    others = clones(params)
    other = make(case, others)
    other.load_state_dict(saved)
    train(optimizer, params, 1)
    train(other, others, 1)
    assert_equal(others, params)


@every_class
def test_refuses_the_state_of_another_model(case: OptimizerCase) -> None:
    params = [nn.Parameter(torch.ones(3, 4))]
    optimizer = make(case, params)
    train(optimizer, params, 1)
    other = make(case, [nn.Parameter(torch.ones(4, 3))])
    with pytest.raises(ValueError, match=r"expected \w+ of shape \(.*\), got \(.*\)\. It belongs to another model"):
        other.load_state_dict(optimizer.state_dict())


@every_class
def test_refuses_the_state_of_another_optimizer(case: OptimizerCase) -> None:
    params = [nn.Parameter(torch.ones(3))]
    other = torch.optim.Rprop(params, lr=0.1)
    train(other, params, 1)
    with pytest.raises(ValueError, match=r"expected a state of \[.*'step'.*\], got \['prev', 'step', 'step_size'\]"):
        make(case, params).load_state_dict(other.state_dict())


def test_adamp_takes_over_from_adamw() -> None:
    params = parameters()
    adamw = torch.optim.AdamW(params)
    train(adamw, params, 2)
    optimizer = AdamP(params)
    optimizer.load_state_dict(adamw.state_dict())
    assert optimizer.param_groups[0]["delta"] == 0.1
    train(optimizer, params, 1)
    assert {state["step"].item() for state in optimizer.state.values()} == {3.0}


@every_class
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_go_on_alike(case: OptimizerCase, copied: Callable[[Any], Any]) -> None:
    params = parameters()
    optimizer = make(case, params)
    train(optimizer, params, 2)
    others, other = copied((params, optimizer))
    train(optimizer, params, 2, seed=1)
    train(other, others, 2, seed=1)
    assert_equal(others, params)


@every_class
def test_distributed_checkpoint_into_a_fresh_optimizer(case: OptimizerCase) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    options = {"weight_decay": 0.1} if "weight_decay" in make(case, model.parameters()).defaults else {}
    optimizer = make(case, model.parameters(), **options)
    train(optimizer, list(model.parameters()), 3)
    restored = copy.deepcopy(model)
    for p in restored.parameters():
        p.grad = None
    other = make(case, restored.parameters(), **options)
    set_optimizer_state_dict(restored, other, get_optimizer_state_dict(model, optimizer))
    assert_equal(list(restored.parameters()), list(model.parameters()))
    train(optimizer, list(model.parameters()), 2, seed=1)
    train(other, list(restored.parameters()), 2, seed=1)
    assert_equal(list(restored.parameters()), list(model.parameters()))
