"""`Buffers`: what becomes of a model's buffers, such as the statistics of BatchNorm, when its clients' are many."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from gradwire.compression import counter_rng
from gradwire.federated.random_state import seed_modules

BufferPolicy = Literal["mean", "pooled", "local", "server"]
"""What becomes of buffers, see `Buffers`."""


@final
@dataclass(frozen=True)
class Recalibrate:
    """After every round the server's running statistics are those of given batches, under its new parameters.

    Args:
        batches: Batches to pass through the model, each a tuple as the loss gets it; gone through once a round.
        forward: `forward(module, *batch)`; by default the module is called with the first of them.

    Example:
        >>> Recalibrate([(torch.zeros(2, 3),)]).forward is None
        True
    """

    batches: Iterable[tuple[Tensor, ...]]
    forward: Callable[..., Any] | None = None


@final
class Buffers:
    """The buffers of a model that are part of its `state_dict`, on the server and at its clients.

    Buffers are no parameters: no optimizer, control variate, compressor or robust rule touches them. Clients begin
    every round from the server's, but with "local". What becomes of those that they end with:

    - "mean": floating-point ones are averaged with the weights of messages, of counters (integers of one entry, such as
      `num_batches_tracked`) the greatest counts. A mean of variances is not the variance of all examples, but never
      negative.
    - "pooled": the same, but running variances become those of all clients' examples together:
      sum_i w_i (var_i + (mean_i - mean)^2) / sum_i w_i.
    - "local": every client keeps its own, among its vectors, as FedBN does with statistics; the server's stay what they
      were at first.
    - "server": they stay what they were at first; clients' are dropped.
    - `Recalibrate(batches)`: clients' are dropped, and the server's are measured anew after every round.

    Other buffers, integers of several entries and booleans, stay the server's.

    Args:
        module: The model.
        policy: As above.

    Shapes:
        A client's message is `[numel]`, float64.

    Cost:
        "mean" and "pooled" send every floating-point buffer in its dtype, and 8 bytes per counter, both ways;
        `Recalibrate` down alone; the others nothing.

    Reference:
        Li, Jiang, Zhang, Kamp, Dou. FedBN. ICLR 2021. arXiv:2102.07623, for "local", which keeps BatchNorm's parameters
        at clients, too.

    Example:
        >>> buffers = Buffers(nn.BatchNorm1d(2), "mean")
        >>> buffers.numel, buffers.sent_counters, buffers.nbytes
        (4, 1, 24)
    """

    message = "buffers"
    """Its name among a client's messages and vectors."""

    def __init__(self, module: nn.Module, policy: BufferPolicy | Recalibrate = "mean") -> None:
        if not isinstance(policy, Recalibrate) and policy not in ("mean", "pooled", "local", "server"):
            raise ValueError(
                f'Buffers: expected "mean", "pooled", "local", "server" or Recalibrate(batches), got {policy!r}.'
            )
        self.module, self.policy = module, policy
        found = _persistent(module)
        self._floats = [value for value in found if value.is_floating_point()]
        self._counters = [v for v in found if v.numel() == 1 and not v.is_floating_point() and v.dtype != torch.bool]
        self._others = [v for v in found if not any(v is own for own in (*self._floats, *self._counters))]
        self._all = [*self._floats, *self._counters, *self._others]
        self._server = [value.clone() for value in self._all]
        self._sizes = [value.numel() for value in self._floats]
        self.numel = sum(self._sizes)
        self._means, self._variances = self._pairs(module)

    @property
    def sends(self) -> bool:
        """Whether clients send theirs."""
        return self.policy in ("mean", "pooled") and bool(self._floats or self._counters)

    @property
    def sent_counters(self) -> int:
        """How many counters each client sends."""
        return len(self._counters) if self.sends else 0

    @property
    def state_size(self) -> int:
        """Entries of what every client keeps, one of them to tell that it is there."""
        return self.numel + len(self._counters) + 1 if self.policy == "local" else 0

    @property
    def nbytes(self) -> int:
        """What a message with all of them takes."""
        return sum(value.numel() * value.element_size() for value in self._floats) + 8 * len(self._counters)

    @property
    def download(self) -> int:
        """What the server sends of them to a client."""
        return self.nbytes if self.sends or isinstance(self.policy, Recalibrate) else 0

    def restore(self, own: Tensor | None = None) -> None:
        """Give the module the server's buffers; or a client's own, if it has kept any."""
        for value, kept in zip(self._all, self._server, strict=True):
            value.copy_(kept)
        if own is not None and float(own[-1]):
            self._put(own[: self.numel])
            for counter, count in zip(self._counters, own[self.numel : -1].tolist(), strict=True):
                counter.fill_(int(count))

    def take(self) -> tuple[Tensor, list[int]]:
        """What a client sends: floating-point buffers `[numel]` in float64, and counters."""
        vector = self._vector(self._floats)
        if self.policy == "pooled" and len(self._means):
            shift = vector[self._means] - self._vector(self._server[: len(self._floats)])[self._means]
            vector[self._variances] += shift.square()
        return vector, [int(counter) for counter in self._counters]

    def own(self) -> Tensor:
        """What a client keeps, `[state_size]`."""
        counts = [float(counter) for counter in self._counters]
        return torch.cat([self._vector(self._floats).cpu(), torch.tensor([*counts, 1.0], dtype=torch.float64)])

    def settle(self, mean: Tensor | None, counters: list[int], seed: int, round: int) -> None:
        """The server's buffers after a round, from what clients sent; the module has them then."""
        self.restore()
        if mean is not None:
            if self.policy == "pooled" and len(self._means):
                shift = mean[self._means] - self._vector(self._floats)[self._means]
                mean[self._variances] = (mean[self._variances] - shift.square()).clamp_(min=0.0)
            self._put(mean)
            for counter, count in zip(self._counters, counters, strict=True):
                counter.fill_(count)
        if isinstance(self.policy, Recalibrate):
            key = counter_rng.fold(seed, "recalibrate", round)
            seed_modules(key, self._all[0].device)
            self._recalibrate(self.policy)
        if mean is not None or isinstance(self.policy, Recalibrate):
            self._server = [value.clone() for value in self._all]

    def state_dict(self) -> dict[str, Any]:
        """The server's buffers."""
        return {"buffers": self._server}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        for kept, value in zip(self._server, saved["buffers"], strict=True):
            kept.copy_(value)
        self.restore()

    @property
    def tensors(self) -> list[Tensor]:
        """The server's buffers, to be changed in place; `restore` follows."""
        return self._server

    def _vector(self, values: list[Tensor]) -> Tensor:
        flat = [value.detach().reshape(-1).double() for value in values]
        return torch.cat(flat) if flat else torch.empty(0, dtype=torch.float64)

    def _put(self, vector: Tensor) -> None:
        for value, part in zip(self._floats, torch.split(vector, self._sizes), strict=True):
            value.copy_(part.view(value.shape))

    def _pairs(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        """Entries of running means, and of the variances that belong to them."""
        first = {id(v): sum(self._sizes[:at]) for at, v in enumerate(self._floats)}
        means: list[Tensor] = []
        variances: list[Tensor] = []
        for part in module.modules():
            mean, variance = (getattr(part, name, None) for name in ("running_mean", "running_var"))
            if isinstance(mean, Tensor) and isinstance(variance, Tensor) and {id(mean), id(variance)} <= first.keys():
                for entries, buffer in ((means, mean), (variances, variance)):
                    entries.append(torch.arange(first[id(buffer)], first[id(buffer)] + buffer.numel()))
        none = torch.empty(0, dtype=torch.int64)
        return (torch.cat(means), torch.cat(variances)) if means else (none, none)

    def _recalibrate(self, policy: Recalibrate) -> None:
        """Measure running statistics anew, as a plain mean over batches."""
        training = {part: part.training for part in self.module.modules()}
        momenta: dict[nn.Module, float | None] = {}
        self.module.eval()
        for part in self.module.modules():
            if isinstance(part, nn.modules.batchnorm._NormBase) and part.track_running_stats:
                part.reset_running_stats()
                momenta[part], part.momentum = part.momentum, None
                part.train()
        try:
            with torch.no_grad():
                for batch in policy.batches:
                    if policy.forward is None:
                        self.module(batch[0])
                    else:
                        policy.forward(self.module, *batch)
        finally:
            for part, momentum in momenta.items():
                part.momentum = momentum  # type: ignore[assignment]
            for part, mode in training.items():
                part.training = mode


def _persistent(module: nn.Module) -> list[Tensor]:
    """Buffers that are part of the `state_dict`, each once."""
    found: dict[int, Tensor] = {}
    for part in module.modules():
        for name, value in part._buffers.items():
            if value is not None and name not in part._non_persistent_buffers_set:
                found[id(value)] = value
    return list(found.values())
