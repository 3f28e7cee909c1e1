"""What a method's own work adds to a training step on this machine, as the method itself runs, with nothing sent."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from gradwire.bench import specs
from gradwire.bench.plan_measure import averager, exchanges_itself, is_late, now
from gradwire.bench.plan_models import Model
from gradwire.comm import attach
from gradwire.comm.planner import Compute
from gradwire.comm.planner_rehearsal import Rehearsal, Shapes, rehearse

_ENTRIES = 2_000_000  # of a model whose training steps are short enough on a CPU, and of gradients alone
_STEPS, _WARM = 35, 5


def seconds(
    methods: Sequence[str],
    model: Model,
    compute: Compute,
    world_size: int,
    device: torch.device,
    together: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """Seconds that each method works in a step on one of so many ranks, beside the network; 0 for plain averaging.

    A small model, on a GPU any that is measured whole, is trained with the method in its place. Of a larger one
    gradients alone are compressed, of a share of the rows of every tensor. Ranks wait for each other, so all do the
    same.

    Args:
        methods: Configurations, or `PLAIN`.
        model: What is trained.
        compute: Its step.
        world_size: Ranks.
        device: Where.
        together: Waits for all others that measure on this machine, as collectives do.
    """
    in_place = len(model.parts) == 1 and (model.parameters <= _ENTRIES or device.type == "cuda")
    found = {}
    for method in methods:
        if averager(method) is None:
            found[method] = 0.0
        elif in_place:
            with training(model, method, world_size, device, together) as step:
                found[method] = compute.step * added(step, model, device, together)
        else:
            found[method] = of_gradients(method, model.shapes, world_size, device, together)
    return found


def added(step: Callable[[], object], model: Model, device: torch.device, together: Callable[[], object]) -> float:
    """By what share a training step is longer than one with AdamW that sends nothing, both taken in turns.

    Args:
        step: A step of a model with the same shapes.
        model: What AdamW trains.
        device: Where.
        together: Called before every step.
    """
    spans: list[tuple[float, float]] = []
    with training(model, None, 1, device, together) as plain:
        for _ in range(_STEPS):
            both = []
            for run in (plain, step):
                together()
                start = now(device)
                run()
                both.append(now(device) - start)
            spans.append((both[0], both[1]))
    short, long = (statistics.median(some) for some in zip(*spans[_WARM:], strict=True))
    return float(max(0.0, long / short - 1))


@contextmanager
def training(
    model: Model, method: str | None, world_size: int, device: torch.device, together: Callable[[], object]
) -> Iterator[Callable[[], None]]:
    """A training step in a plain loop, by AdamW alone or with a method whose collectives send nothing.

    Args:
        model: With one part.
        method: A configuration.
        world_size: Ranks that it pretends to be among.
        device: Where.
        together: Called in every collective. Those beside the next step keep nobody waiting.
    """
    ((make, _),) = model.parts
    module, loss_of = make()
    named = list(module.named_parameters())
    optimizer: torch.optim.Optimizer = torch.optim.AdamW([p for _, p in named if p.requires_grad], fused=True)
    handle = None
    if method is not None:
        ranks = Rehearsal(world_size, together=_nobody if is_late(method) else together)
        if exchanges_itself(method):
            optimizer = specs.parse(method).optimizer(named, lr=1e-3)
            own = specs.own_communicator(optimizer)
            assert own is not None
            own.join(ranks)
        elif (communicator := averager(method)) is not None:
            communicator.join(ranks)
            handle = attach(named, communicator, optimizer=optimizer, overlap=False)

    def step() -> None:
        loss_of().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        settle()
        optimizer.zero_grad()

    settle = getattr(optimizer, "wait", _nobody)  # what runs beside the next step is work of this one
    try:
        yield step
    finally:
        if handle is not None:
            handle.detach()


def of_gradients(
    method: str, shapes: Shapes, world_size: int, device: torch.device, together: Callable[[], object]
) -> float:
    """Seconds of compression of random gradients, from a share of them where they are many."""
    total = sum(torch.Size(shape).numel() for _, shape in shapes)
    share = min(1.0, _ENTRIES / total)
    some = [
        (name, (max(1, round(shape[0] * share)), *shape[1:]) if len(shape) > 1 else shape) for name, shape in shapes
    ]
    communicator = averager(method)
    assert communicator is not None
    ((_, spans),) = rehearse(
        communicator,
        [list(reversed(some))],
        world_size,
        steps=_STEPS,
        device=device,
        clock=lambda: now(device),
        together=together,
    )
    measured = sum(torch.Size(shape).numel() for _, shape in some)
    return float(total / measured * statistics.median(spans[_WARM:]))


def _nobody() -> None:
    """Wait for none."""
