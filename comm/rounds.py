"""`Rounds`: steps without communication, then one exchange of what they moved."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from gradwire.comm.averager import Averager
from gradwire.comm.communicator import Communicator
from gradwire.comm.errors import CheckpointError, ConfigurationError
from gradwire.comm.rank_state import Contents
from gradwire.compression import Identity
from gradwire.compression.base import compute_dtype


@final
class Rounds:
    """Parameters that every rank moves on its own, and the last point on which ranks agreed.

    At the end of a round the differences from that point, agreed - local, are averaged, and `move` makes a new point of
    the old one and their mean. Where a difference is not finite on any rank, all ranks go back to the old one. The
    optimizer's state of a parameter for which it is not finite, either, is set to zero then, as before its first step,
    on the rank that has it: else one infinite gradient would make all later rounds fail.

    Args:
        who: Its name in errors.
        optimizer: What moves the parameters.
        every: Steps of a round, >= 1.
        communicator: What averages; plain averaging by default.
        buffers: `(name, tensor)` pairs, of which floating-point ones become their mean, too.
        bucket_bytes: Most bytes of a bucket, unless one parameter alone has more.
        settings: What else must be equal on all ranks, by name.
    """

    def __init__(
        self,
        who: str,
        optimizer: torch.optim.Optimizer,
        every: int,
        communicator: Averager | None,
        buffers: Iterable[tuple[str, Tensor]] = (),
        bucket_bytes: int = 25 * 2**20,
        settings: Callable[[], dict[str, str]] = dict,
    ) -> None:
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"{who}: expected an integer every >= 1, got every={every!r}.")
        if communicator is None:
            communicator = Communicator(Identity())
        if not isinstance(communicator, Averager):
            raise TypeError(f"{who}: expected a communicator, got {type(communicator).__name__}.")
        if communicator.workers != 1 or not communicator.consensus:
            raise ValueError(f"{who}: expected an exchange after which ranks agree, got {communicator!r}.")
        if communicator.attached:
            raise ValueError(f"{who}: expected a communicator that is attached to nothing else. Make one of its own.")
        communicator.attached = True
        self._who, self._optimizer, self.every, self.communicator = who, optimizer, every, communicator
        self.steps = 0
        """Steps since the ranks agreed."""
        self.started = self._compared = self._joined = False
        self._settings = settings
        self.params: dict[str, Tensor] = {}
        self.agreed: dict[str, Tensor] = {}
        self._buckets: list[list[str]] = []
        self._bucket_bytes = bucket_bytes
        self._buffers = {name: b for name, b in buffers if b.is_floating_point() and b.numel()}
        self.agreed_buffers = {name: b.detach().clone() for name, b in self._buffers.items()}
        self.grow()

    def grow(self) -> None:
        """Take in the optimizer's parameters that are not known yet."""
        new = {name: p for name, p in named_parameters(self._optimizer).items() if name not in self.params}
        for name, p in new.items():
            if p.is_complex() or not p.is_floating_point():
                raise ValueError(f"{self._who}: expected real parameters, got {p.dtype} for {name!r}.")
            if isinstance(p, DTensor) and self.communicator.group is None:
                raise ValueError(
                    f"{self._who}: expected the group across which sharded parameters are replicated, got group=None. "
                    "Give the communicator group=mesh['replicate'].get_group()."
                )
            if isinstance(p, DTensor) and any(placement.is_replicate() for placement in p.placements):
                raise ValueError(
                    f"{self._who}: expected parameters that are only sharded, got placements {p.placements}. "
                    "Give fully_shard mesh['shard'] alone."
                )
        self.params |= new
        self.agreed |= {name: p.detach().clone() for name, p in new.items()}
        self._buckets = list(self._cut())
        if self.started:
            self._start(new)

    def _cut(self) -> Iterator[list[str]]:
        """Names of the parameters, bucket by bucket."""
        bucket, size, device = list[str](), 0, None
        for name, p in self.params.items():
            held = local(p)
            nbytes = held.numel() * compute_dtype(held.dtype).itemsize
            if bucket and (device != held.device or size + nbytes > self._bucket_bytes):
                yield bucket
                bucket, size = [], 0
            if nbytes:
                bucket.append(name)
                size, device = size + nbytes, held.device
        if bucket:
            yield bucket

    def connect(self) -> None:
        """Connect the communicator, on shards with those of the other shards: a round counts for all or for none."""
        self.communicator.connect()
        meshes = {p.device_mesh for p in self.params.values() if isinstance(p, DTensor)}
        if meshes and not self._joined:
            mesh, *others = meshes
            if others or mesh.ndim > 1:
                raise ValueError(f"{self._who}: expected shards over one dimension of one mesh, got {meshes}.")
            if mesh.size() > 1:
                self.communicator.join_shards(mesh.get_group())
            self._joined = True

    # A round.

    @torch.no_grad()
    def begin(self) -> None:
        """Before the first step: compare settings; at the very first, take rank 0's parameters and buffers."""
        if not self._compared:
            self.connect()
            self._compare()
            self._compared = True
        if not self.started:
            self._start(self.params)
            for name, buffer in self._buffers.items():
                self._broadcast(buffer)
                self.agreed_buffers[name].copy_(buffer)
            self.started = True

    def _compare(self) -> None:
        """Raise ConfigurationError on every rank unless all count and move alike."""
        mine = self._settings() | {"every": str(self.every), "steps since the ranks agreed": str(self.steps)}
        ranks = self.communicator.connect()
        gathered = ranks.gather_bytes(json.dumps(mine).encode(), ranks.device)
        first, *others = [json.loads(data) for data in gathered]
        for rank, other in enumerate(others, start=1):
            for key, value in first.items():
                if other.get(key) != value:
                    raise ConfigurationError(
                        f"{self._who}: ranks differ in {key}: rank 0 has {value}, rank {rank} has {other.get(key)}."
                    )

    def _start(self, params: Mapping[str, Tensor]) -> None:
        for name, p in params.items():
            self._broadcast(local(p.detach()))
            self.agreed[name].copy_(p.detach())

    def _broadcast(self, tensor: Tensor) -> None:
        message = tensor.detach().clone(memory_format=torch.contiguous_format)
        self.communicator.connect().broadcast_(message, 0, count=False)
        tensor.copy_(message)

    @torch.no_grad()
    def step(self, move: Callable[[dict[str, Tensor]], None]) -> None:
        """Count a step, and end the round if it was the last."""
        self.steps += 1
        if self.steps == self.every:
            self.end(move)

    @torch.no_grad()
    def end(self, move: Callable[[dict[str, Tensor]], None]) -> None:
        """Average what ranks have moved and let `move` change the parameters along it, from the point agreed on.

        Args:
            move: Takes the mean pseudo-gradients by name: agreed - local, which points uphill.
        """
        if len(self.params) != sum(len(group["params"]) for group in self._optimizer.param_groups):
            raise RuntimeError(f"{self._who}: the optimizer got parameters that nobody averages; add them here.")
        for p in self.params.values():
            p.grad = None  # what was used; its memory serves the differences
        pseudo_gradients = {
            name: self.agreed[name].to(dtype := compute_dtype(p.dtype)) - p.detach().to(dtype)
            for name, p in self.params.items()
        }
        for i, names in enumerate(self._buckets, start=1):
            tensors = [local(pseudo_gradients[name]) for name in names]
            self.communicator.average_(tensors, names, last=i == len(self._buckets))
        if not self._buckets:  # this rank's shards are empty; the others wait for its word
            self.communicator.average_([], [])
        found_inf = self.communicator.found_inf
        skipped = found_inf is not None and bool(found_inf)
        for name, p in self.params.items():
            p.detach().copy_(self.agreed[name])
        if skipped:
            self._forget_non_finite()
        else:
            move(pseudo_gradients)
            for name, p in self.params.items():
                self.agreed[name].copy_(p.detach())
        self._end_buffers(skipped=skipped)
        self.steps = 0

    def _forget_non_finite(self) -> None:
        """Start anew the optimizer's state of those parameters for which it holds inf or NaN."""
        for state in self._optimizer.state.values():
            tensors = [local(value) for value in state.values() if isinstance(value, Tensor)]
            if not all(bool(tensor.isfinite().all()) for tensor in tensors):
                for tensor in tensors:
                    tensor.zero_()

    def _end_buffers(self, *, skipped: bool) -> None:
        """Make buffers their means; those that are not finite, and all after a skipped round, as they were."""
        if not self._buffers:
            return
        if not skipped:
            flat = torch.cat([buffer.reshape(-1).float() for buffer in self._buffers.values()])
            ranks = self.communicator.connect()
            mean = ranks.all_reduce_(flat, uncompressed=flat.numel()) / ranks.size
            runs = torch.split(mean, [buffer.numel() for buffer in self._buffers.values()])
            for agreed, run in zip(self.agreed_buffers.values(), runs, strict=True):
                new = run.view(agreed.shape).to(agreed.dtype)
                agreed.copy_(torch.where(new.isfinite(), new, agreed))
        for name, buffer in self._buffers.items():
            buffer.copy_(self.agreed_buffers[name])

    @contextmanager
    def returned(self) -> Iterator[None]:
        """Inside, parameters and buffers are those that all ranks agreed on; afterwards each rank's own again."""
        pairs = [(p.detach(), self.agreed[name]) for name, p in self.params.items()]
        pairs += [(buffer, self.agreed_buffers[name]) for name, buffer in self._buffers.items()]
        own = [tensor.clone() for tensor, _ in pairs]
        with torch.no_grad():
            for tensor, agreed in pairs:
                tensor.copy_(agreed)
        try:
            yield
        finally:
            with torch.no_grad():
                for (tensor, _), kept in zip(pairs, own, strict=True):
                    tensor.copy_(kept)

    # State.

    def state_dict(self) -> dict[str, Any]:
        """The points agreed on, and where the round stands."""
        agreed = {name: value.clone() for name, value in self.agreed.items()}
        buffers = {name: value.clone() for name, value in self.agreed_buffers.items()}
        return {"agreed": agreed, "agreed_buffers": buffers, "local_steps": self.steps, "started": self.started}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Copy what `state_dict` gave."""
        for own, saved in ((self.agreed, state_dict["agreed"]), (self.agreed_buffers, state_dict["agreed_buffers"])):
            if own.keys() != saved.keys():
                names = sorted(own.keys() ^ saved.keys())
                raise ValueError(f"{self._who}: expected a state of {sorted(own)}; it differs in {names}.")
            for name, value in own.items():
                value.copy_(saved[name])
        self.steps, self.started = state_dict["local_steps"], state_dict["started"]

    def read(self) -> Contents:
        """This rank's parameters, buffers and optimizer state, and the points agreed on."""
        self.connect()
        tensors = {f"local/{name}": local(p.detach()) for name, p in self.params.items()}
        tensors |= {f"agreed/{name}": local(value) for name, value in self.agreed.items()}
        tensors |= {f"local_buffer/{name}": buffer for name, buffer in self._buffers.items()}
        tensors |= {f"agreed_buffer/{name}": buffer for name, buffer in self.agreed_buffers.items()}
        numbers: dict[str, Any] = {}
        read_state(self._optimizer, self.params, "state.", tensors, numbers)
        return tensors, {"steps": self.steps, "started": self.started, "numbers": numbers}

    def write(self, tensors: Mapping[str, Tensor], others: Mapping[str, Any]) -> None:
        """Take over what `read` gave."""
        for name, p in self.params.items():
            local(p.detach()).copy_(self._saved(tensors, f"local/{name}", local(p)))
            local(self.agreed[name]).copy_(self._saved(tensors, f"agreed/{name}", local(p)))
        for name, buffer in self._buffers.items():
            buffer.copy_(self._saved(tensors, f"local_buffer/{name}", buffer))
            self.agreed_buffers[name].copy_(self._saved(tensors, f"agreed_buffer/{name}", buffer))
        write_state(self._optimizer, saved_state(self.params, {**tensors, **others["numbers"]}, "state."))
        self.steps, self.started = others["steps"], others["started"]

    def _saved(self, tensors: Mapping[str, Tensor], key: str, like: Tensor) -> Tensor:
        if key not in tensors or tensors[key].shape != like.shape:
            found = tuple(tensors[key].shape) if key in tensors else "none"
            raise CheckpointError(f"load: expected {key!r} of shape {tuple(like.shape)} for {self._who}, got {found}.")
        return tensors[key]


def read_state(
    optimizer: torch.optim.Optimizer,
    params: Mapping[str, Tensor],
    prefix: str,
    tensors: dict[str, Tensor],
    numbers: dict[str, Any],
) -> None:
    """Add an optimizer's state, as `prefix key/name`, to these two."""
    for name, p in params.items():
        for key, value in optimizer.state.get(p, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{prefix}{key}/{name}"] = local(value)
            else:
                numbers[f"{prefix}{key}/{name}"] = value


def write_state(
    optimizer: torch.optim.Optimizer,
    state: Mapping[Tensor, Mapping[str, Any]],
    groups: Sequence[Mapping[str, Any]] | None = None,
) -> None:
    """Replace an optimizer's state by this of its parameters, and its hyper-parameters by those of these groups."""
    own = optimizer.state_dict()["param_groups"]
    groups = own if groups is None else groups
    if len(groups) != len(own):
        raise ValueError(f"{type(optimizer).__name__}: expected {len(own)} parameter groups, got {len(groups)}.")
    ids = [i for group in own for i in group["params"]]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.load_state_dict(
        {
            "state": {i: dict(state[p]) for i, p in zip(ids, params, strict=True) if state.get(p)},
            "param_groups": [{**saved, "params": group["params"]} for saved, group in zip(groups, own, strict=True)],
        }
    )


def saved_state(params: Mapping[str, Tensor], saved: Mapping[str, Any], prefix: str) -> dict[Tensor, dict[str, Any]]:
    """By parameter, what is saved as `prefix key/name`."""
    state: dict[Tensor, dict[str, Any]] = {}
    for path, value in saved.items():
        key, _, name = path.partition("/")
        if key.startswith(prefix):
            p = params[name]
            if isinstance(p, DTensor) and isinstance(value, Tensor) and value.shape == local(p).shape:
                value = DTensor.from_local(value, p.device_mesh, p.placements, shape=p.shape, stride=p.stride())
            state.setdefault(p, {})[key.removeprefix(prefix)] = value
    return state


def named_parameters(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's parameters by name, or by number if it was given none."""
    named: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        names: Sequence[str] = group.get("param_names") or [
            str(i) for i in range(len(named), len(named) + len(group["params"]))
        ]
        named |= dict(zip(names, group["params"], strict=True))
    return named


def local(x: Tensor) -> Tensor:
    """What this process holds of a `DTensor`; any other tensor as it is."""
    return x.to_local() if isinstance(x, DTensor) else x
