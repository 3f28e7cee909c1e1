"""`fused=True`: equal to the loop, compiled once, and the loop itself where there is no compiler."""

import contextlib
import copy
import warnings
from typing import Any

import pytest
import torch
from cases import OPTIMIZERS, OptimizerCase
from torch import Tensor, nn

from gradwire.optim import base
from gradwire.optim import compiled as compilation

pytestmark = [
    pytest.mark.timeout(400),  # a cold compilation on a busy machine
    # Inductor's own
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]


@pytest.fixture(autouse=True)
def _small_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Full ones take longer to compile and show nothing more."""
    monkeypatch.setattr(compilation, "_PACKS", {True: 2, False: 2})


every_class = pytest.mark.parametrize(
    "case", list({case.cls: case for case in reversed(OPTIMIZERS)}.values()), ids=lambda case: case.cls.__name__
)
SHAPES = [(12, 10), (7, 6, 2), (40,), (300, 120), (0, 3)]


def pair(
    case: OptimizerCase, dtype: torch.dtype = torch.float32, shapes: Any = SHAPES, **options: Any
) -> tuple[Any, ...]:
    """Parameters and a fused optimizer, then equal ones and a loop."""
    params = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    others = copy.deepcopy(params)
    made = [case.cls(p, **{**case.kwargs, **options}, fused=f) for p, f in ((params, True), (others, False))]
    return params, made[0], others, made[1]


def give_gradients(params: list[nn.Parameter], others: list[nn.Parameter], scale: float = 0.1) -> None:
    for p, q in zip(params, others, strict=True):
        p.grad = torch.randn_like(p) * scale
        q.grad = p.grad.clone()


def assert_close(params: list[nn.Parameter], others: list[nn.Parameter], **tolerance: Any) -> None:
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, **tolerance)


@every_class
def test_equals_the_loop_and_never_recompiles_for_a_number(
    case: OptimizerCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, fused, others, loop = pair(case, lr=1e-2)
    with contextlib.ExitStack() as afterwards:
        for step in range(6):
            _step_alike(params, fused, others, loop, step)
            afterwards.enter_context(torch._dynamo.config.patch(error_on_recompile=True))
            monkeypatch.setattr(compilation, "_kernel", _no_new_kernel(compilation._kernel))


def _step_alike(params: list[nn.Parameter], fused: Any, others: list[nn.Parameter], loop: Any, step: int) -> None:
    """One step of each, with other numbers than in the step before."""
    give_gradients(params, others)
    for optimizer in (fused, loop):
        group = optimizer.param_groups[0]
        group["lr"] = 1e-2 / (step + 1) if step < 4 else torch.tensor(2e-3)
        if "betas" in group:
            group["betas"] = (0.9 - 0.01 * step, 0.99)
        if "weight_decay" in group:
            group["weight_decay"] = 0.1 * step
    fused.step()
    loop.step()
    assert_close(params, others, rtol=1e-5, atol=1e-6)
    for p, q in zip(params, others, strict=True):
        assert fused.state[p].keys() == loop.state[q].keys()
        for name, value in fused.state[p].items():
            torch.testing.assert_close(value, loop.state[q][name], rtol=1e-5, atol=1e-6)


def _no_new_kernel(cached: Any) -> Any:
    """The cache of kernels, closed."""

    def lookup(*key: Any) -> Any:
        before = getattr(cached, "cache_info", lambda: None)()
        kernel = cached(*key)
        assert before is None or cached.cache_info().misses == before.misses
        return kernel

    return lookup


@every_class
def test_grad_scaler_and_low_precision(case: OptimizerCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unscaling, float32 arithmetic, the skipped step and the rounding are all in the kernel."""
    params, fused, others, loop = pair(case, torch.bfloat16, [(12, 10), (40,), (0, 3)], lr=1e-2)
    for step in range(3):
        give_gradients(params, others)
        for p in params:
            p.grad *= 4
        fused.grad_scale = torch.tensor(4.0)
        fused.step()
        loop.step()
        assert_close(params, others, rtol=1.6e-2, atol=1e-5)
        assert fused.state[params[0]]["step"].item() == step + 1
    before = [x.clone() for p in params for x in (p.detach(), *fused.state[p].values())]
    monkeypatch.setattr(base, "_on_host", lambda x: False)
    fused.found_inf = torch.tensor(1.0)
    for p in params:
        p.grad.fill_(torch.inf)
    fused.step()
    for x, y in zip([x for p in params for x in (p.detach(), *fused.state[p].values())], before, strict=True):
        assert torch.equal(x, y)


@every_class
@pytest.mark.parametrize("compiled", [0, 1])
def test_without_a_compiler_it_warns_once_and_runs_the_loop(
    case: OptimizerCase, compiled: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the first kernels still came from a cache."""
    compiles: list[Any] = []

    def backend(graph: Any, inputs: list[Tensor]) -> Any:
        compiles.append(graph)
        if len(compiles) > compiled:
            raise RuntimeError("no C++ compiler")
        return graph

    compile_with = torch.compile
    compilation._kernel.cache_clear()
    monkeypatch.setattr(torch, "compile", lambda f, **_: compile_with(f, backend=backend, fullgraph=True, dynamic=True))
    monkeypatch.setattr(compilation, "_uncompilable", set())
    params, fused, others, loop = pair(case)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            for _ in range(3):
                give_gradients(params, others)
                fused.step()
                loop.step()
    finally:
        compilation._kernel.cache_clear()
    raised = [w for w in caught if "torch.compile failed" in str(w.message)]
    assert len(raised) == 1
    assert "no C++ compiler" in str(raised[0].message)
    assert raised[0].filename == __file__
    assert len(compiles) == compiled + 1
    assert_close(params, others, rtol=1e-6, atol=1e-7)
    assert {fused.state[p]["step"].item() for p in params} == {3.0}
