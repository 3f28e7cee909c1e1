"""States: saved, loaded, copied, changed, and refused."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import OptimizerCase
from optimizing import assert_equal, clones, every_case, every_class, make, parameters, train
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from gradwire.optim import AdamP


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


@every_class
@pytest.mark.parametrize("options", [{}, {"foreach": True}], ids=str)
def test_state_may_be_changed_between_steps(case: OptimizerCase, options: dict[str, Any]) -> None:
    """Its tensors in place, its entries, one parameter's whole, or everything: what stands there counts."""
    params = parameters(torch.float32)
    optimizer = make(case, params, **options)
    train(optimizer, params, 2)
    optimizer.state[params[0]]["step"] += 3
    optimizer.state[params[1]]["step"] = torch.tensor(7.0)
    optimizer.state[params[2]] = {name: x.clone() for name, x in optimizer.state[params[3]].items()} | {
        name: torch.ones_like(x) for name, x in optimizer.state[params[2]].items()
    }
    train(optimizer, params, 1)
    assert [optimizer.state[p]["step"].item() for p in params[:3]] == [6.0, 8.0, 2.0]
    fresh = clones(params)
    other = make(case, fresh, **options)
    optimizer.state.clear()
    train(optimizer, params, 2)
    train(other, fresh, 2)
    assert_equal(params, fresh)


@every_class
def test_step_counts_are_saved_one_by_one(case: OptimizerCase) -> None:
    """Though they are counted together, and some parameters have gradients in some steps only."""
    params = parameters(torch.float32)
    optimizer = make(case, params)
    for step in range(6):
        for i, p in enumerate(params):
            p.grad = torch.ones_like(p) if step % (i + 1) == 0 else None
        optimizer.step()
    saved = save_and_load(optimizer.state_dict())
    assert [saved["state"][i]["step"].item() for i in range(len(params))] == [6.0, 3.0, 2.0, 2.0, 2.0]


@every_class
def test_parameters_may_step_together_and_alone_in_turns(case: OptimizerCase) -> None:
    params = parameters(torch.float32)
    plain = clones(params)
    optimizer, other = make(case, params), make(case, plain)
    for _ in range(3):
        train(optimizer, params, 1)
        train(other, plain, 1)
        for p in (params[1], params[0]):
            optimizer.step_parameter(p)
        for q in plain[2:]:
            q.grad = None
        other.step()
        assert [optimizer.state[p]["step"].item() for p in params] == [other.state[q]["step"].item() for q in plain]
    assert_equal(params, plain)


@every_class
def test_what_is_prepared_for_a_step_is_kept(case: OptimizerCase) -> None:
    """Also where each parameter steps alone, as during the backward pass."""
    params = [p for p in parameters(torch.float32) if p.ndim]
    optimizer = make(case, params)
    train(optimizer, params, 1)
    for p in params:
        optimizer.step_parameter(p)
    kept = list(optimizer._buckets.values())
    for p in params:
        optimizer.step_parameter(p)
    assert all(any(bucket is old for old in kept) for bucket in optimizer._buckets.values())
