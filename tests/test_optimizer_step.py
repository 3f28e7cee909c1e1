"""What torch asks of an optimizer: construction, groups, closures, schedulers, layouts and hooks."""

import copy
from typing import Any

import pytest
import torch
from cases import OptimizerCase
from optimizing import CASES, assert_equal, clones, eager, every_class, make, parameters, train
from torch import Tensor, nn


@pytest.mark.parametrize(
    ("case", "kwargs", "message"), [(case, *error) for case in CASES for error in case.errors], ids=str
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
