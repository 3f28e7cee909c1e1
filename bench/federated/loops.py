"""Federated averaging written by hand: as lean as PyTorch allows, and as tutorials have it; and with gradwire."""

from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from gradwire.bench.federated.work import Work, flat

Gate = Callable[[], None]
"""Is called before every round and after the last one; returns when the next one may begin."""


def lean(work: Work, gate: Gate) -> Tensor:
    """One model for all clients, slices of tensors, and updates of all parameters at once."""
    module = work.module()
    parameters = list(module.parameters())
    start = [parameter.detach().clone() for parameter in parameters]
    sums = [torch.zeros_like(value) for value in start]
    values = [parameter.detach() for parameter in parameters]
    schedule, size = work.schedule, work.batch_size
    for cohort in schedule:
        gate()
        total = 0
        torch._foreach_zero_(sums)
        for client in cohort:
            images, labels = work.examples_of(client)
            count = len(labels)
            torch._foreach_copy_(values, start)
            for first in range(0, count, size):
                loss = F.cross_entropy(module(images[first : first + size]), labels[first : first + size])
                torch._foreach_add_(values, torch.autograd.grad(loss, parameters), alpha=-work.lr)
            torch._foreach_add_(sums, values, alpha=count)
            total += count
        torch._foreach_div_(sums, total)
        torch._foreach_copy_(start, sums)
    gate()
    return flat(start)


def naive(work: Work, gate: Gate) -> Tensor:
    """A copy of the model, a DataLoader and an optimizer for every client."""
    server = work.module()
    schedule = work.schedule
    datasets = [TensorDataset(*work.examples_of(client)) for client in range(work.clients)]
    for cohort in schedule:
        gate()
        weights, states = [], []
        for client in cohort:
            module = deepcopy(server)
            optimizer = torch.optim.SGD(module.parameters(), lr=work.lr)
            for images, labels in DataLoader(datasets[client], batch_size=work.batch_size):
                optimizer.zero_grad()
                F.cross_entropy(module(images), labels).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            weights.append(len(datasets[client]))
            states.append(module.state_dict())
        mean = {
            name: sum(weight * state[name] for weight, state in zip(weights, states, strict=True)) / sum(weights)
            for name in states[0]
        }
        server.load_state_dict(mean)
    gate()
    return flat(list(server.parameters()))


def gradwire(work: Work, gate: Gate) -> Tensor:
    """`Simulation`, as it is by default."""
    simulation = work.simulation()
    for _ in range(work.rounds):
        gate()
        simulation.step()
    gate()
    return flat(list(simulation.module.parameters()))
