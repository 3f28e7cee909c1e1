"""`Clients`: the examples of all clients of a simulation."""

from collections.abc import Iterator, Sequence
from typing import final

import torch
from torch import Tensor

_GATHERED = 8
"""Shuffled batches that are copied out at once: a call per batch costs more, a whole epoch leaves the cache."""


@final
class Clients:
    """Tensors whose rows are dealt to clients.

    Rows are sorted by client once, so that a client's examples are one slice, without a copy.

    Args:
        tensors: Inputs, targets, … of equal length n; handed to the loss in this order, batch by batch.
        partition: Row numbers of every client, as the functions of `gradwire.federated.partition` give them. A row may
            belong to several clients, or to none.

    Cost:
        One copy of the rows that belong to clients.

    Raises:
        ValueError: tensors differ in length, a row number is out of range, or there is no client.

    Example:
        >>> clients = Clients((torch.arange(4.0), torch.arange(4)), [[0, 3], [2]])
        >>> clients.num_examples, clients.examples(0)[0]
        ([2, 1], tensor([0., 3.]))
    """

    def __init__(self, tensors: Sequence[Tensor], partition: Sequence[Sequence[int] | Tensor]) -> None:
        lengths = {tensor.shape[0] for tensor in tensors}
        if len(lengths) != 1:
            raise ValueError(f"Clients: expected tensors of equal length, got {sorted(lengths)}.")
        if not partition:
            raise ValueError("Clients: expected at least one client, got none.")
        (length,) = lengths
        rows = [torch.as_tensor(part, dtype=torch.int64).flatten() for part in partition]
        order = torch.cat(rows)
        if order.numel() and not 0 <= int(order.min()) <= int(order.max()) < length:
            raise ValueError(f"Clients: expected row numbers from 0 to {length - 1}, got others.")
        self.num_examples = [len(part) for part in rows]
        self._tensors = tuple(tensor[order.to(tensor.device)] for tensor in tensors)
        self._bounds = torch.tensor([0, *self.num_examples]).cumsum(0).tolist()

    def __len__(self) -> int:
        return len(self.num_examples)

    def to(self, device: torch.device | str) -> "Clients":
        """The same clients with their examples on a device."""
        moved: Clients = object.__new__(Clients)
        moved.num_examples, moved._bounds = self.num_examples, self._bounds
        moved._tensors = tuple(tensor.to(device) for tensor in self._tensors)
        return moved

    def examples(self, client: int) -> tuple[Tensor, ...]:
        """All examples of a client: views `[num_examples[client], …]`."""
        first, last = self._bounds[client], self._bounds[client + 1]
        return tuple(tensor[first:last] for tensor in self._tensors)

    def batches(
        self,
        client: int,
        batch_size: int | None,
        *,
        steps: int | None,
        epochs: int,
        generator: torch.Generator | None,
    ) -> Iterator[tuple[Tensor, ...]]:
        """Batches of a client's examples, shuffled in every epoch.

        Args:
            client: 0 <= client < len(self).
            batch_size: Examples in a batch, the last one of an epoch may have fewer; None for all at once.
            steps: How many batches; epochs follow one another until it is reached. None for `epochs` whole ones.
            epochs: Passes over the examples, if `steps` is None.
            generator: Shuffles; in the order of the rows if None.
        """
        begin, end = self._bounds[client], self._bounds[client + 1]
        count = end - begin
        size = count if batch_size is None else batch_size
        left = steps if steps is not None else epochs * -(-count // size) if count else 0
        while left > 0 and count:
            if generator is None:
                for first in range(begin, min(end, begin + left * size), size):
                    rows = slice(first, min(first + size, end))
                    yield tuple([tensor[rows] for tensor in self._tensors])
            else:
                order = torch.randperm(count, generator=generator)[: left * size].add_(begin)
                for chosen in torch.split(order.to(self._tensors[0].device), _GATHERED * size):
                    yield from zip(*[torch.split(tensor[chosen], size) for tensor in self._tensors], strict=True)
            left -= -(-count // size)
