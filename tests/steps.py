"""Steps of a communicator in one process: gradients of awkward shapes, and averaging them through any buckets."""

import torch
from cases import COMMUNICATORS
from torch import Tensor

from gradwire.comm import Averager, Plan

ALL = Plan(min_ndim=0, min_numel=0)
ONE_RANK = [case for case in COMMUNICATORS if case.inside == 1]
COMPOSED = [case for case in ONE_RANK if case.composed]

SHAPES = {
    "a.weight": (37, 41),
    "norm": (300,),
    "b.weight": (64, 48),
    "conv": (16, 9, 3, 5),
    "scale": (),
    "none": (0, 3),
}


def gradients(step: int, workers: int | None = None, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Gradients of one step by name; no shape is a multiple of a row."""
    generator = torch.Generator().manual_seed(step)
    lead = () if workers is None else (workers,)
    return {name: torch.randn((*lead, *shape), generator=generator).to(dtype) for name, shape in SHAPES.items()}


def run_step(communicator: Averager, grads: dict[str, Tensor], *buckets: list[str]) -> dict[str, Tensor]:
    """One step through these buckets of names, or all in one; returns the averaged gradients."""
    averaged = {name: grad.clone() for name, grad in grads.items()}
    for names in buckets or (list(grads),):
        communicator.average_([averaged[name] for name in names], names, last=names is (buckets or (names,))[-1])
    return averaged


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Same keys, same bits."""
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def snapshot(communicator: Averager) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in communicator.state_rows().items()}
