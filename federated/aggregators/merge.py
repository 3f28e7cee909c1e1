"""`merge`: aggregators outside of a simulation, on vectors or state dicts."""

from collections.abc import Mapping, Sequence
from typing import overload

import torch
from torch import Tensor

from gradwire.federated.aggregators.base import Aggregator

StateDict = Mapping[str, Tensor]


@overload
def merge(
    aggregator: Aggregator,
    vectors: Sequence[Tensor],
    weights: Sequence[float | Tensor] | None = None,
    *,
    base: Tensor | None = None,
) -> Tensor: ...


@overload
def merge(
    aggregator: Aggregator,
    vectors: Sequence[StateDict],
    weights: Sequence[float | StateDict] | None = None,
    *,
    base: StateDict | None = None,
) -> dict[str, Tensor]: ...


def merge(
    aggregator: Aggregator,
    vectors: Sequence[Tensor] | Sequence[StateDict],
    weights: Sequence[float | Tensor | StateDict] | None = None,
    *,
    base: Tensor | StateDict | None = None,
) -> Tensor | dict[str, Tensor]:
    """Make one model of several.

        base - aggregate of (base - vector_i), or the aggregate of the vectors themselves

    Args:
        aggregator: How.
        vectors: Tensors of equal shape, or state dicts with the same names and shapes.
        weights: Of each, >= 0; or, with `WeightedMean(by_entry=True)`, tensors or state dicts like them, such as
            their diagonal Fisher information or masks. All alike by default.
        base: What they all started from. `TIES`, and rules that clip norms, mean differences from it.

    Returns:
        A tensor or state dict like them. In state dicts, floating-point entries are merged as one vector of the whole
        model; of others, such as counters, the largest is taken.

    Raises:
        ValueError: nothing to merge, names, shapes or numbers of weights differ, or an entry is inf or NaN.

    Example:
        >>> from gradwire.federated import CoordinateMedian, WeightedMean
        >>> merge(CoordinateMedian(), [torch.tensor([1.0, 5.0]), torch.tensor([2.0, 6.0]), torch.tensor([9.0, 0.0])])
        tensor([2., 5.])
        >>> models = [{"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 4.0])}]
        >>> fisher = [{"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([3.0, 1.0])}]
        >>> merge(WeightedMean(by_entry=True), models, fisher)
        {'w': tensor([2.5000, 4.0000])}
    """
    if not vectors:
        raise ValueError("merge: expected at least one vector or state dict, got none.")
    if weights is None:
        weights = [1.0] * len(vectors)
    if len(weights) != len(vectors):
        raise ValueError(f"merge: expected {len(vectors)} weights, one for each, got {len(weights)}.")
    models = [_named(vector) for vector in vectors]
    first = models[0]
    start = None if base is None else _flat(_named(base), first, "base")
    started = False
    for number, (model, weight) in enumerate(zip(models, weights, strict=True)):
        message = _flat(model, first, f"number {number}")
        if not bool(torch.isfinite(message).all()):
            raise ValueError(f"merge: expected finite numbers, got inf or NaN in number {number}. Leave it out.")
        if start is not None:
            message = start - message
        if not started:
            aggregator.reset(message.numel(), message.dtype, message.device)
            started = True
        if isinstance(weight, (int, float)):
            aggregator.add(message, weight)
        else:
            aggregator.add(message, _flat(_named(weight), first, f"weight {number}"))
    result = aggregator.result()
    if start is not None:
        result = start - result
    merged: dict[str, Tensor] = {}
    offset = 0
    for name, value in first.items():
        if value.is_floating_point():
            part = result[offset : offset + value.numel()]
            merged[name] = part.view(value.shape).to(value.dtype, copy=True)
            offset += value.numel()
        else:
            merged[name] = torch.stack([model[name] for model in models]).amax(0)
    return merged[""] if isinstance(vectors[0], Tensor) else merged


def _named(value: Tensor | StateDict) -> StateDict:
    return {"": value} if isinstance(value, Tensor) else value


def _flat(model: StateDict, like: StateDict, who: str) -> Tensor:
    """All floating-point entries in one vector, in the order of `like`."""
    if model.keys() != like.keys():
        raise ValueError(f"merge: expected names {sorted(like)}, got {sorted(model)} in {who}.")
    parts = []
    for name, value in like.items():
        if model[name].shape != value.shape:
            raise ValueError(
                f"merge: expected {name or 'shape'} of {list(value.shape)}, got {list(model[name].shape)} in {who}."
            )
        if value.is_floating_point():
            parts.append(model[name].detach().reshape(-1))
    if not parts:
        raise ValueError("merge: expected floating-point entries, got none.")
    return torch.cat(parts)
