"""`MKOR` in one process: inverses, whole runs against the reference, what is gathered, state, and what is refused."""

import copy
import io
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from reference import mkor as reference
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recompute

from gradwire.comm import checkpoint
from gradwire.optim import LAMB, MKOR, AdamP
from gradwire.optim.kronecker_factors import Rule, sherman_morrison_

LR = 0.05


def perceptron(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 9, bias=False), nn.Tanh(), nn.Linear(9, 3)).to(dtype)


def make(model: nn.Module, momentum: float = 0.9, **settings: Any) -> MKOR:
    base = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR, momentum=momentum)
    return MKOR(model, base, **{"vector_dtype": None, **settings})


def batches(steps: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    draw = [[torch.randn(8, n, generator=generator, dtype=torch.float64) for n in (6, 3)] for _ in range(steps)]
    return [(x.to(dtype), target.to(dtype)) for x, target in draw]


def train(model: nn.Module, optimizer: Any, some: list[tuple[Tensor, Tensor]]) -> None:
    for x, target in some:
        optimizer.zero_grad()
        F.mse_loss(model(x), target).backward()
        optimizer.step()


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def inverses(optimizer: MKOR) -> list[Tensor]:
    names = ("output_inverse", "input_inverse")
    return [optimizer.state[layer.weight][name].clone() for layer in optimizer.layers for name in names]


def assert_equal(actual: list[Tensor], expected: list[Tensor], **tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, **(tolerance or {"rtol": 0.0, "atol": 0.0}))


# Inverses.


def test_the_exact_inverse_is_that_of_the_averaged_factor() -> None:
    rng = np.random.default_rng(0)
    factors = [np.eye(7), np.eye(7)]
    kept = torch.eye(7, dtype=torch.float64).repeat(2, 1, 1)
    for _ in range(100):
        vectors = rng.standard_normal((2, 7)) * [[1.0], [30.0]]
        factors = [0.95 * factor + 0.05 * np.outer(v, v) for factor, v in zip(factors, vectors, strict=True)]
        sherman_morrison_(kept, torch.tensor(vectors), Rule(decay=0.95, weight=0.05, keep=0.9, above=1e9))
        for inverse, factor in zip(kept.numpy(), factors, strict=True):
            expected = np.linalg.inv(factor)
            assert np.abs(inverse - expected).max() < 1e-10 * np.abs(expected).max()
    assert torch.equal(kept, kept.mT)


def test_the_rule_of_the_authors_code() -> None:
    """Its inverse is mixed with the identity, then corrected with unit weight; no entry ever exceeds 1."""
    rng = np.random.default_rng(0)
    expected, kept = np.eye(5), torch.eye(5, dtype=torch.float64)[None]
    for _ in range(100):
        v = rng.standard_normal(5) * 10
        mixed = 0.95 * expected + 0.05 * np.eye(5)
        expected = mixed - np.outer(mixed @ v, mixed @ v) / (1 + v @ mixed @ v)
        sherman_morrison_(kept, torch.tensor(v)[None], Rule(decay=1.0, weight=1.0, keep=0.95, above=0.0))
        assert np.abs(kept[0].numpy() - expected).max() < 1e-12
        assert torch.linalg.eigvalsh(kept).min() > 0
        assert kept.max() <= 1


def test_the_stabiliser_bounds_directions_that_no_vector_has() -> None:
    kept = torch.eye(3)[None]
    largest = 0.0
    for _ in range(500):
        sherman_morrison_(kept, torch.tensor([[1.0, 0.0, 0.0]]), Rule(decay=0.95, weight=0.05, keep=0.9, above=10.0))
        largest = max(largest, float(kept.abs().max()))
    assert 9.0 < largest < 10.0 / 0.95
    torch.testing.assert_close(kept[0, 0, 0], torch.tensor(1.0), rtol=0.1, atol=0.0)


@pytest.mark.parametrize(
    "rule", [Rule(0.95, 0.05, 0.9, 10.0), Rule(0.95, 0.05, 0.9, 1e3), Rule(1.0, 1.0, 0.95, 0.0)], ids=str
)
def test_factors_stay_positive_definite_in_float32(rule: Rule) -> None:
    """For vectors of all lengths along one direction, of very uneven entries, and of one length only."""
    generator = torch.Generator().manual_seed(0)
    kept = torch.eye(16).repeat(3, 1, 1)
    direction = torch.randn(16, generator=generator)
    for _ in range(1000):
        length = 10 ** torch.empty(()).uniform_(-6, 6, generator=generator)
        uneven = torch.randn(16, generator=generator) * torch.logspace(-3, 3, 16)
        sherman_morrison_(kept, torch.stack([length * direction, uneven, 100 * direction]), rule)
    assert torch.linalg.eigvalsh(kept.double()).min() > 0
    assert kept.max() <= max(1.0, rule.above / rule.decay)


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf"), 1e30], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_vector_that_is_zero_or_not_finite_changes_nothing(bad: float, dtype: torch.dtype) -> None:
    """Nor one so large that its square overflows; the other factors of the stack go on."""
    kept = torch.eye(4, dtype=dtype).repeat(2, 1, 1)
    vectors = torch.tensor([[bad] * 4, [1.0] * 4])
    sherman_morrison_(kept, vectors, Rule(decay=0.95, weight=0.05, keep=0.9, above=0.0))
    assert torch.equal(kept[0], torch.eye(4, dtype=dtype))
    assert not torch.equal(kept[1], torch.eye(4, dtype=dtype))


def test_half_precision_inverses_stay_close() -> None:
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16):
        for rule in (Rule(0.95, 0.05, 0.9, 10.0), Rule(1.0, 1.0, 0.95, 0.0)):
            exact, half = torch.eye(16)[None], torch.eye(16, dtype=dtype)[None]
            for _ in range(300):
                v = torch.randn(1, 16, generator=generator) * torch.linspace(0.1, 3, 16)
                sherman_morrison_(exact, v, rule)
                sherman_morrison_(half, v, rule)
            assert half.dtype == dtype
            assert (half - exact).norm() < 0.25 * exact.norm()


# Whole runs.


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"inverse": "reference"},
        {"every": 3},
        {"rescale": False, "decay": 0.9, "zeta": 0.7, "max_norm": 1.5},
        {"inverse": "reference", "rescale": False, "decay": 0.8, "every": 2},
    ],
    ids=str,
)
def test_equals_the_reference(kwargs: dict[str, Any]) -> None:
    model = perceptron()
    layers = [(m.weight, m.bias) for m in model if isinstance(m, nn.Linear)]
    start = [(w.detach().numpy().copy(), None if b is None else b.detach().numpy().copy()) for w, b in layers]
    some = batches(100)
    train(model, make(model, **kwargs), some)
    pairs = [(x.numpy(), target.numpy()) for x, target in some]
    expected = reference.mkor(start, pairs, lr=LR, momentum=0.9, **kwargs)
    flat = [torch.tensor(x) for layer in expected for x in layer if x is not None]
    assert_equal(weights(model), flat, rtol=1e-9, atol=1e-10)


def test_with_factors_that_stay_identities_it_is_its_base() -> None:
    model, other = perceptron(), perceptron()
    optimizer = make(model, decay=1.0)
    train(model, optimizer, batches(10))
    train(other, torch.optim.SGD(other.parameters(), lr=LR, momentum=0.9), batches(10))
    assert_equal(weights(model), weights(other))
    assert all(torch.equal(x, torch.eye(len(x), dtype=x.dtype)) for x in inverses(optimizer))


@pytest.mark.parametrize("base", [torch.optim.AdamW, LAMB, AdamP], ids=lambda cls: cls.__name__)
def test_any_base_goes(base: Callable[..., torch.optim.Optimizer]) -> None:
    model = perceptron(torch.float32)
    optimizer = MKOR(model, base(model.parameters(), lr=0.02))
    some = batches(1, torch.float32) * 60
    first = F.mse_loss(model(some[0][0]), some[0][1])
    train(model, optimizer, some)
    assert F.mse_loss(model(some[0][0]), some[0][1]) < 0.3 * first


def test_every_layer_keeps_the_norm_of_its_gradient() -> None:
    model = perceptron()
    optimizer = make(model)
    for x, target in batches(5):
        optimizer.zero_grad()
        F.mse_loss(model(x), target).backward()
        before = [[p.grad.clone() for p in m.parameters()] for m in model if isinstance(m, nn.Linear)]
        optimizer.step()
        after = [[p.grad for p in m.parameters()] for m in model if isinstance(m, nn.Linear)]
        for old, new in zip(before, after, strict=True):
            norms = [torch.cat([g.flatten() for g in grads]).norm() for grads in (old, new)]
            torch.testing.assert_close(norms[0], norms[1])
            assert not torch.allclose(old[0], new[0])


# What is gathered.


def statistics(model: nn.Module, run: Callable[[], Any], **settings: Any) -> list[Tensor]:
    """The mean input and the sum of output gradients of every layer."""
    optimizer = make(model, **settings)
    run()
    return [x for layer in optimizer.layers for x in (torch.cat(layer.input_parts()), layer.output_sum())]


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize(
    "kwargs",
    [
        {"padding": 1},
        {"stride": 2, "dilation": 2, "bias": False},
        {"padding": "same", "kernel_size": (3, 5)},
        {"padding": (1, 2), "padding_mode": "circular"},
    ],
    ids=str,
)
def test_of_a_convolution(kwargs: dict[str, Any], batched: bool) -> None:
    """Its patches and output gradients, taken from an unfolded layer that computes the same."""
    conv = nn.Conv2d(2, 3, **{"kernel_size": 3, **kwargs}).double()
    x = torch.randn(*([4] if batched else []), 2, 7, 8, dtype=torch.float64)
    coefficients = torch.randn_like(conv(x))
    found = statistics(conv, lambda: (conv(x) * coefficients).sum().backward())

    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    padded = F.pad(x if batched else x[None], conv._reversed_padding_repeated_twice, mode=mode)
    patches = F.unfold(padded, conv.kernel_size, conv.dilation, 0, conv.stride)
    output = (conv.weight.flatten(1) @ patches).reshape(-1, *conv(x).shape[-3:])
    expected_output = conv(x) if conv.bias is None else conv(x) - conv.bias[:, None, None]
    torch.testing.assert_close(output.reshape(conv(x).shape), expected_output)
    inputs = patches.mean((0, 2))
    if conv.bias is not None:
        inputs = torch.cat([inputs, inputs.new_ones(1)])
    outputs = coefficients.reshape(-1, *coefficients.shape[-3:]).mean((2, 3)).sum(0)
    assert_equal(found, [inputs, outputs], rtol=1e-12, atol=1e-12)


def test_of_a_linear_layer_every_row_is_a_sample() -> None:
    layer = nn.Linear(3, 2).double()
    x, coefficients = (torch.randn(4, 5, n, dtype=torch.float64) for n in (3, 2))
    found = statistics(layer, lambda: (layer(input=x) * coefficients).sum().backward())
    expected = [torch.cat([x.mean((0, 1)), torch.ones(1).double()]), coefficients.sum((0, 1))]
    assert_equal(found, expected, rtol=1e-12, atol=1e-12)


def _in_halves(model: nn.Module, x: Tensor, target: Tensor) -> None:
    for half, its in zip(x.chunk(2), target.chunk(2), strict=True):
        (F.mse_loss(model(half), its) / 2).backward()


def _recomputed(model: nn.Module, x: Tensor, target: Tensor) -> None:
    F.mse_loss(recompute(model, x, use_reentrant=False), target).backward()


def _with_idle_passes(model: nn.Module, x: Tensor, target: Tensor) -> None:
    with torch.no_grad():
        model(x * 2)
    model(x * 3)  # no backward pass follows
    model.eval()
    model(x * 4).sum().backward()
    model.train()
    for p in model.parameters():
        p.grad = None
    F.mse_loss(model(x), target).backward()


def _compiled(model: nn.Module, x: Tensor, target: Tensor) -> None:
    F.mse_loss(torch.compile(model, backend="eager")(x), target).backward()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of torch.compile
@pytest.mark.parametrize("run", [_in_halves, _recomputed, _with_idle_passes, _compiled], ids=lambda run: run.__name__)
def test_equals_one_plain_batch(run: Callable[[nn.Module, Tensor, Tensor], None]) -> None:
    ((x, target),) = batches(1)
    model, other = perceptron(), perceptron()
    optimizer, plain = make(model), make(other)
    run(model, x, target)
    F.mse_loss(other(x), target).backward()
    optimizer.step()
    plain.step()
    assert_equal(inverses(optimizer), inverses(plain), rtol=1e-10, atol=1e-12)
    assert_equal(weights(model), weights(other), rtol=1e-10, atol=1e-12)


def test_zero_grad_drops_what_was_gathered() -> None:
    (dropped, kept) = batches(2)
    model, other = perceptron(), perceptron()
    optimizer, plain = make(model), make(other)
    F.mse_loss(model(dropped[0]), dropped[1]).backward()
    loss = F.mse_loss(model(kept[0]), kept[1])
    optimizer.zero_grad()  # between forward and backward pass, as some do
    loss.backward()
    optimizer.step()
    train(other, plain, [kept])
    assert_equal(inverses(optimizer), inverses(plain))


class _Shared(nn.Module):
    """One layer used twice, by itself or through a second module with its parameters."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 4).double()
        self.second = nn.Linear(4, 4).double() if tied else self.first
        if tied:
            self.second.weight, self.second.bias = self.first.weight, self.first.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize("tied", [False, True])
def test_every_use_of_a_shared_layer_counts(tied: bool) -> None:
    model = _Shared(tied)
    x = torch.randn(6, 4, dtype=torch.float64)
    found = statistics(model, lambda: model(x).sum().backward())
    hidden = torch.tanh(model.first(x))
    inputs = torch.cat([(x.mean(0) + hidden.mean(0)) / 2, torch.ones(1).double()])
    back = (torch.ones_like(hidden) @ model.first.weight) * (1 - hidden**2)
    outputs = torch.full((4,), 6.0).double() + back.sum(0)
    assert_equal(found, [inputs, outputs], rtol=1e-12, atol=1e-12)


def test_no_factor_moves_for_a_layer_that_is_not_used() -> None:
    model = nn.ModuleDict({"used": nn.Linear(3, 3), "idle": nn.Linear(3, 3)})
    optimizer = make(model)
    before = weights(model["idle"])
    for _ in range(3):
        model["used"](torch.ones(2, 3)).sum().backward()
        optimizer.step()
    identity = torch.eye(3)
    assert torch.equal(optimizer.state[model["idle"].weight]["output_inverse"], identity)
    assert not torch.equal(optimizer.state[model["used"].weight]["output_inverse"], identity)
    assert_equal(weights(model["idle"]), before)


def test_layers_frozen_at_first_or_later(caplog: pytest.LogCaptureFixture) -> None:
    model = perceptron()
    model[0].requires_grad_(False)
    with caplog.at_level(logging.INFO, "gradwire"):
        optimizer = make(model)
    assert caplog.messages == ["MKOR: left to the base optimizer: 0 (it is frozen)."]
    assert [layer.name for layer in optimizer.layers] == ["2", "4"]
    train(model, optimizer, batches(2))
    model[4].requires_grad_(False)
    before = inverses(optimizer)
    train(model, optimizer, batches(2))
    assert_equal(inverses(optimizer)[2:], before[2:])
    assert not torch.equal(inverses(optimizer)[0], before[0])


def test_what_is_left_to_the_base(caplog: pytest.LogCaptureFixture) -> None:
    shared = nn.Linear(4, 4)
    other = nn.Linear(4, 4)
    other.weight = shared.weight
    modules = {
        "grouped": nn.Conv2d(4, 4, 3, groups=2),
        "wide": nn.Linear(64, 4),
        "named": nn.Linear(4, 4),
        "shared": shared,
        "other": other,
        "computed": nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
        "norm": nn.LayerNorm(4),
        "layer": nn.Linear(4, 4),
    }
    model = nn.ModuleDict(modules)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    with caplog.at_level(logging.INFO, "gradwire"):
        optimizer = MKOR(model, base, skip=("nam*",), max_dim=63)
    assert [layer.name for layer in optimizer.layers] == ["layer"]
    (message,) = caplog.messages
    for part in (
        "grouped (it has 2 groups)",
        "wide (a side of 65 exceeds max_dim=63)",
        "named (its name matches 'nam*')",
        "shared (it shares its weight, but not its bias, with other)",
        "other (it shares its weight, but not its bias, with shared)",
        "computed (its weight is computed from others)",
    ):
        assert part in message
    expected = {name: p.detach() - 0.1 for name, p in model.named_parameters() if not name.startswith("layer")}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    for name, value in expected.items():
        assert torch.equal(model.get_parameter(name).detach(), value)


# Mixed precision.


def test_autocast_adds_in_float32() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    x = torch.full((4096, 4), 1.0)

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            model(x.bfloat16()).float().sum().backward()

    inputs, outputs = statistics(model, run)
    assert inputs.dtype == outputs.dtype == torch.float32
    assert_equal([inputs, outputs], [torch.ones(5), torch.full((3,), 4096.0)])


@pytest.mark.parametrize("unscaled", [False, True])
def test_the_loss_scale_changes_nothing(unscaled: bool) -> None:
    model, other = perceptron(torch.float32), perceptron(torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer, plain = make(model, scaler=scaler), make(other)
    for x, target in batches(5, torch.float32):
        optimizer.zero_grad()
        scaler.scale(F.mse_loss(model(x), target)).backward()
        if unscaled:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    train(other, plain, batches(5, torch.float32))
    assert_equal(inverses(optimizer), inverses(plain))  # a power of two
    assert_equal(weights(model), weights(other))


def test_a_step_that_the_scaler_skips_leaves_the_factors_alone() -> None:
    model, other = perceptron(torch.float32), perceptron(torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer, plain = make(model, scaler=scaler), make(other)
    (first, second, third) = batches(3, torch.float32)
    for x, target in (first, (second[0] * float("inf"), second[1]), third):
        optimizer.zero_grad()
        scaler.scale(F.mse_loss(model(x), target)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 512.0
    train(other, plain, [first, third])
    assert_equal(inverses(optimizer), inverses(plain))


def test_a_batch_that_is_not_finite_leaves_the_factors_alone() -> None:
    model = perceptron(torch.float32)
    optimizer = make(model, momentum=0.0, vector_dtype=torch.bfloat16)
    train(model, optimizer, batches(3, torch.float32))
    before = inverses(optimizer)
    (x, target) = batches(1, torch.float32)[0]
    F.mse_loss(model(x * float("nan")), target).backward()
    optimizer.base.zero_grad()  # what a check of gradients would do
    optimizer.step()
    assert_equal(inverses(optimizer), before)
    assert optimizer.communicator.stats.skipped == 1
    train(model, optimizer, batches(1, torch.float32))
    assert not torch.equal(inverses(optimizer)[0], before[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1e-9])
def test_half_precision_inverses_precondition_alike(dtype: torch.dtype, scale: float) -> None:
    """Also gradients that are too small for float16."""
    found = []
    for state_dtype in (dtype, None):
        model = perceptron(torch.float32)
        optimizer = make(model, state_dtype=state_dtype)
        for x, target in batches(5, torch.float32):
            optimizer.zero_grad()
            F.mse_loss(model(x), target).backward()
            for p in model.parameters():
                p.grad *= scale
            optimizer.step()
        assert inverses(optimizer)[0].dtype == (state_dtype or torch.float32)
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert (found[0] - found[1]).norm() < 0.03 * found[1].norm()


# Groups, state, hooks.


def test_shares_its_groups_with_the_base() -> None:
    model = perceptron()
    optimizer = make(model)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(one, 0.5) for one in (optimizer, optimizer.base)]
    train(model, optimizer, batches(1))
    for scheduler in schedulers:
        scheduler.step()
    assert optimizer.param_groups is optimizer.base.param_groups
    assert optimizer.param_groups[0]["lr"] == LR / 4
    extra = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer.add_param_group({"params": [extra], "lr": 1.0})
    extra.grad = torch.ones_like(extra)
    optimizer.step()
    assert torch.equal(extra.detach(), torch.zeros(2).double())
    assert len(optimizer.base.param_groups) == 2


def test_takes_a_closure() -> None:
    model, other = perceptron(), perceptron()
    optimizer, plain = make(model), make(other)
    for x, target in batches(3):

        def closure(x: Tensor = x, target: Tensor = target) -> Tensor:
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), target)
            loss.backward()
            return loss

        expected = F.mse_loss(other(x), target)
        plain.zero_grad()
        expected.backward()
        plain.step()
        assert torch.equal(optimizer.step(closure), expected)
    assert_equal(weights(model), weights(other))


def test_hooks_can_be_removed() -> None:
    model, other = perceptron(), perceptron()
    optimizer = make(model, momentum=0.0)
    optimizer.detach()
    assert not any(module._forward_hooks for module in model.modules())
    train(model, optimizer, batches(3))
    train(other, torch.optim.SGD(other.parameters(), lr=LR), batches(3))
    assert_equal(weights(model), weights(other))
    assert not optimizer.state
    optimizer.attach()
    train(model, optimizer, batches(3))
    assert not torch.equal(weights(model)[0], weights(other)[0])


def test_nothing_is_gathered_between_corrections() -> None:
    model = perceptron()
    optimizer = make(model, every=3)
    found = []
    for x, target in batches(7):
        F.mse_loss(model(x), target).backward()
        found.append(bool(optimizer.layers[0].output_sum().any()))
        optimizer.step()
    assert found == [True, False, False, True, False, False, True]
    assert optimizer.communicator.stats.steps == 3


@pytest.mark.gpu
def test_a_step_waits_for_no_accelerator() -> None:
    model, other = perceptron(torch.float32).cuda(), perceptron(torch.float32)
    optimizer = make(model, vector_dtype=torch.bfloat16)
    some = batches(8, torch.float32)
    on_device = [(x.cuda(), target.cuda()) for x, target in some]
    train(model, optimizer, on_device[:3])
    torch.cuda.set_sync_debug_mode("error")
    try:
        train(model, optimizer, on_device[3:])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    train(other, make(other, vector_dtype=torch.bfloat16), some)
    assert_equal([w.cpu() for w in weights(model)], weights(other), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("how", ["state_dict", "checkpoint"])
def test_resumes_bit_for_bit(how: str, tmp_path: Any) -> None:
    some = batches(12, torch.float32)
    model, other = perceptron(torch.float32), perceptron(torch.float32)
    optimizer = make(model, every=2, vector_dtype=torch.bfloat16)
    train(model, optimizer, some[:5])
    resumed = make(other, every=2, vector_dtype=torch.bfloat16)
    if how == "state_dict":
        buffer = io.BytesIO()
        torch.save([model.state_dict(), optimizer.state_dict()], buffer)
        buffer.seek(0)
        saved = torch.load(buffer, weights_only=True)
        untouched = copy.deepcopy(saved[1])
        other.load_state_dict(saved[0])
        resumed.load_state_dict(saved[1])
        assert saved[1]["state"].keys() == untouched["state"].keys()
    else:
        checkpoint.save(tmp_path / "saved", model=model, optimizer=optimizer)
        checkpoint.load(tmp_path / "saved", model=other, optimizer=resumed)
    train(model, optimizer, some[5:])
    train(other, resumed, some[5:])
    assert_equal(inverses(resumed), inverses(optimizer))
    assert_equal(weights(other), weights(model))


def test_takes_over_from_its_base() -> None:
    model, other = perceptron(), perceptron()
    base = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    train(model, base, batches(3))
    other.load_state_dict(model.state_dict())
    optimizer = make(other, decay=1.0)
    optimizer.load_state_dict(copy.deepcopy(base.state_dict()))
    train(model, base, batches(3))
    train(other, optimizer, batches(3))
    assert_equal(weights(other), weights(model))


def test_hooks_on_state_dicts_are_called() -> None:
    model = perceptron()
    optimizer = make(model)
    train(model, optimizer, batches(1))
    calls: list[str] = []
    optimizer.register_state_dict_post_hook(lambda *_: calls.append("saved"))
    optimizer.register_load_state_dict_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("after"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["saved", "before", "after"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decay": 0.0}, r"MKOR: expected 0 < decay <= 1, got decay=0\.0"),
        ({"zeta": 1.5}, r"expected 0 < zeta <= 1, got zeta=1\.5"),
        ({"zeta": 0.95}, r"expected zeta < decay, got zeta=0\.95 and decay=0\.95"),
        ({"every": 0}, "expected an integer every >= 1, got every=0"),
        ({"max_dim": 2.5}, r"expected an integer max_dim >= 1, got max_dim=2\.5"),
        ({"max_norm": 0.5}, r"expected max_norm >= 1, the identity's, got 0\.5"),
        ({"inverse": "printed"}, "expected inverse 'exact' or 'reference', got 'printed'"),
        ({"vector_dtype": torch.int8}, "expected vector_dtype torch.bfloat16, torch.float16 or None, got torch.int8"),
        ({"state_dtype": torch.int8}, "expected a floating-point state_dtype"),
        ({"skip": ("*",)}, "expected a model with Linear or Conv2d layers to precondition, got none"),
    ],
)
def test_refuses_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(perceptron(), **settings)


def test_refuses_wrong_models_bases_and_states() -> None:
    model = perceptron()
    base = torch.optim.SGD(model.parameters(), lr=LR)
    with pytest.raises(TypeError, match="expected a base optimizer such as"):
        MKOR(model, model.parameters())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected a base optimizer such as"):
        MKOR(model, MKOR(model, base))
    with pytest.raises(TypeError, match=r"unexpected keyword arguments \['gamma'\]"):
        MKOR(model, base, gamma=0.9)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="expected a tuple of patterns for skip, got the string 'head'"):
        MKOR(model, base, skip="head")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"expected a module or \(name, module\) pairs, got Linear among them"):
        MKOR(list(model), base)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected a base optimizer of all parameters of '0', got one without some"):
        MKOR(model, torch.optim.SGD(model[2:].parameters(), lr=LR))
    optimizer = make(model)
    train(model, optimizer, batches(1))
    saved = optimizer.state_dict()
    saved["state"][0]["input_inverse"] = torch.eye(3)
    with pytest.raises(ValueError, match=r"expected input_inverse of shape \(7, 7\) for '0', got \(3, 3\)"):
        optimizer.load_state_dict(saved)
