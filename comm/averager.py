"""`Averager`: what every communicator has in common.

A step is one call of `average_` per bucket, the last one with `last=True`. Until then new state is only staged: if any
rank met a non-finite gradient in any bucket, the step leaves no trace in the state of any rank.
"""

import datetime
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor

import gradwire
from gradwire.comm.collectives import Collectives
from gradwire.comm.errors import CheckpointError, ConfigurationError
from gradwire.comm.exchange.reduce_scatter import Slot
from gradwire.comm.stats import Stats


class Averager(ABC):
    """Makes gradients the mean over ranks, in place.

    Args:
        group: The ranks that take part; all ranks by default.
        seed: Seed of all random draws; equal on all ranks.
        timeout: How long a collective waits for other ranks; the process group's setting by default.
    """

    def __init__(self, group: dist.ProcessGroup | None, seed: int, timeout: datetime.timedelta | None) -> None:
        self.seed = seed
        self.group, self.timeout = group, timeout
        self._ranks: Collectives | None = None
        self._shards: Collectives | None = None
        self._layouts: set[tuple[tuple[str, torch.Size, torch.dtype], ...]] = set()
        self._shapes: dict[str, torch.Size] = {}
        self._step = 0
        self.first_step = 0
        """The step in which it averages for the first time; `Warmup` sets it."""
        self._dense_bytes = 0.0
        self._skipped: Tensor | int = 0
        self._bad: Tensor | None = None
        self._failed: BaseException | None = None
        self.found_inf: Tensor | None = None
        """0-d float32 after a step: 1 if it met a non-finite gradient on any rank, else 0. `GradScaler`'s name."""
        self.loss_scale: Callable[[], Tensor | float] = _no_scale
        """The factor by which gradients are scaled now; `attach(..., scaler=...)` sets it."""
        self.owner: dict[str, str] = {}
        """What its user adds to `config`, as text: also equal on all ranks, and when a checkpoint is loaded."""
        self.attached = False
        """Whether a host brings the gradients; `attach` and `detach` set it."""

    workers: int = 1
    """Workers whose gradients one call brings; more than one only in simulation."""

    consensus: bool = True
    """Whether all ranks end with the same mean."""

    scatters: bool = False
    """Whether every rank ends with the mean of its own shard alone."""

    # What a subclass implements.

    @abstractmethod
    def config(self) -> dict[str, str]:
        """Hyper-parameters by name, as text: equal on all ranks, and equal when a checkpoint is loaded."""

    @abstractmethod
    def _connected(self, ranks: Collectives) -> None:
        """The group is there."""

    @abstractmethod
    def _average(self, grads: Sequence[Tensor], names: Sequence[str]) -> Tensor:
        """Average one bucket and stage new state; returns 0-d bool, equal on all ranks: not finite."""

    @abstractmethod
    def _commit(self, bad: Tensor) -> None:
        """Take staged state over where `bad` is false, else drop it."""

    @abstractmethod
    def _prepare(self, names: Sequence[str], tensors: Sequence[Tensor]) -> None:
        """Create the state of these parameters now."""

    @abstractmethod
    def state_rows(self) -> dict[str, Tensor]:
        """Views of all state tensors: key `state/parameter/first:last` with the range of rows that this rank holds."""

    @abstractmethod
    def load_rows(self, rows: dict[str, Tensor]) -> None:
        """Take over state tensors in the form of `state_rows`; of a wider range than needed, the part that is."""

    @abstractmethod
    def _residual_norm(self) -> float:
        """Norm of this rank's residual."""

    # What users and hosts call.

    @final
    def average_(self, grads: Sequence[Tensor], names: Sequence[str], *, last: bool = True) -> None:
        """Replace each gradient by its mean over ranks, in place; blocks until done (on CUDA: enqueued).

        If a gradient is not finite on any rank, all of this call's gradients become NaN on every rank, so that a
        `GradScaler` or any other check sees it, and the whole step leaves the state untouched.

        Args:
            grads: Dense floating-point gradients on one device.
            names: Their parameters' names: on every rank the same names in the same order.
            last: Whether this is the last bucket of the step.

        Raises:
            ConfigurationError: ranks differ in configuration or layout; every rank raises it.
            RuntimeError: another rank failed; the message is its error.
        """
        if self._failed is not None:
            raise RuntimeError("Communicator: an earlier step failed; restart from a checkpoint.") from self._failed
        try:
            ranks = self.connect()
            if grads:
                self._agree(grads, names)
                bad = self._average(grads, names)
                self._bad = bad if self._bad is None else self._bad | bad
                ring = _ring_bytes(ranks.size) / (2 if self.scatters else 1)
                self._dense_bytes += ring * sum(g.numel() * g.element_size() for g in grads)
            if last:
                self._end_step()
        except BaseException as error:
            self._failed = error
            if self._ranks is not None and not isinstance(error, ConfigurationError):
                self._ranks.fail(error)
            raise

    @final
    def prepare(self, names: Sequence[str], tensors: Sequence[Tensor]) -> None:
        """Compare configurations over ranks and create state now, for tensors like these gradients; hosts call it.

        Raises:
            ConfigurationError: ranks differ in configuration or layout; every rank raises it.
        """
        self.connect()
        if names:
            self._agree(tensors, names)
            self._prepare(names, tensors)

    @final
    def connect(self) -> Collectives:
        """Create the group of this communicator's own, once; every rank must come here at the same point."""
        if self._ranks is None:
            ranks = Collectives(self.group, self.timeout)
            self._compare([], ranks, ranks.device)  # before groups are made that another configuration does not make
            self.join(ranks)
        assert self._ranks is not None
        return self._ranks

    @final
    def join(self, ranks: Collectives) -> None:
        """Use these collectives."""
        self._ranks = ranks
        self._connected(ranks)

    def deal(self, slots: Sequence[Slot]) -> None:
        """Say whose each tensor is, to a communicator that `scatters`; its host does."""
        raise AssertionError(f"{type(self).__name__} does not scatter")

    @property
    def state_bytes(self) -> int:
        """Memory of the state on this rank."""
        return sum(rows.numel() * rows.element_size() for rows in self.state_rows().values())

    @final
    def note(self, bad: Tensor) -> None:
        """Count what is not finite elsewhere (0-d bool) as if a gradient of this step were; its host does."""
        self._bad = bad if self._bad is None else self._bad | bad

    @property
    @final
    def steps_done(self) -> int:
        """Steps so far, skipped ones included; unlike `stats`, reading it waits for nothing."""
        return self._step

    @final
    def join_shards(self, group: dist.ProcessGroup) -> None:
        """Go together with the communicators of `group`, which average other shards of the same parameters.

        A step is then skipped for all shards if it is for one. Every rank of the group must call it at the same point.

        Raises:
            ConfigurationError: ranks of the group differ in configuration; every rank raises it.
        """
        shards = self.connect().beside(group)
        self._compare([], shards, shards.device)
        self._shards = shards

    @property
    @final
    def shards(self) -> int:
        """How many groups like this communicator's make up the world: those of the other shards of its parameters."""
        return self.connect().groups

    @final
    def saved_as(self, rank: int) -> str:
        """The prefix of the state of this rank, and of this group among others, in checkpoints."""
        shard = self._shards.rank if self._shards is not None else self.connect().first
        return f"rank{rank}/" if self.shards == 1 else f"shard{shard}.rank{rank}/"

    @property
    @final
    def stats(self) -> Stats:
        """Totals so far; reading them waits for the device."""
        sent = self._ranks.bytes if self._ranks is not None else None
        return Stats(
            steps=self._step,
            skipped=int(self._skipped),
            payload_bytes=sent.payload if sent else 0,
            uncompressed_bytes=sent.uncompressed if sent else 0,
            bytes_sent=sent.sent if sent else 0.0,
            dense_bytes=self._dense_bytes,
            residual_norm=self._residual_norm(),
        )

    @final
    def state_dict(self) -> dict[str, Any]:
        """This rank's whole state. Every rank must save its own: residuals differ from rank to rank.

        Keys of rank-local tensors carry the rank, so that `torch.distributed.checkpoint` keeps all of them.
        """
        rank, size = self.connect().rank, self.connect().size
        rows = {self.saved_as(rank) + key: value.detach().clone() for key, value in self.state_rows().items()}
        head = {
            "world_size": size,
            "shards": self.shards,
            "step": self._step,
            "skipped": int(self._skipped),
            "config": self._compared(),
        }
        return {"head": json.dumps(head), "rows": rows}

    @final
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` of the same rank of an equally large world gave.

        Raises:
            CheckpointError: another world size (use `gradwire.comm.checkpoint.load`), another rank's state, or a
                hyper-parameter that differs; the message names it and both values.
        """
        rank, size = self.connect().rank, self.connect().size
        head = self.check_head(state_dict["head"])
        if head["world_size"] != size:
            raise CheckpointError(
                f"load_state_dict: expected the state of a world of {size}, got {head['world_size']}. "
                "Use gradwire.comm.checkpoint.load, which keeps the mean of the residuals."
            )
        prefix = self.saved_as(rank)
        rows = {key.removeprefix(prefix): value for key, value in state_dict["rows"].items() if key.startswith(prefix)}
        if not rows and state_dict["rows"]:
            raise CheckpointError(f"load_state_dict: expected the state of rank {rank}, got that of another rank.")
        self.restore(head, rows)

    @final
    def restore(self, head: dict[str, Any], rows: dict[str, Tensor]) -> None:
        """Take over a checked head and state tensors."""
        self.load_rows(rows)
        self._step, self._skipped = head["step"], head["skipped"]

    @final
    def check_head(self, text: str) -> dict[str, Any]:
        """Parse a saved head and compare hyper-parameters.

        Raises:
            CheckpointError: a hyper-parameter differs; names it and both values.
        """
        head: dict[str, Any] = json.loads(text)
        saved, ours = head["config"], self._compared()
        for key in sorted(saved.keys() | ours.keys(), key=lambda key: (key != "communicator", key)):
            if saved.get(key) != ours.get(key):
                raise CheckpointError(
                    f"load: expected {key}={ours.get(key)} as configured now, got {key}={saved.get(key)} in the "
                    "checkpoint. Configure it as saved, or start without the communicator's state."
                )
        if head.get("shards", 1) != self.shards:
            raise CheckpointError(
                f"load: expected the state of {self.shards} shards, got that of {head.get('shards', 1)}. Shard the "
                "model as it was when saved (only the number of replicas may differ), or start without this state."
            )
        return head

    # Inside a step.

    def _agree(self, grads: Sequence[Tensor], names: Sequence[str]) -> None:
        """Compare configuration and layout over ranks, once per layout."""
        layout = tuple((name, grad.shape, grad.dtype) for name, grad in zip(names, grads, strict=True))
        if layout in self._layouts:
            return
        for name, grad in zip(names, grads, strict=True):
            if not grad.is_floating_point() or grad.layout != torch.strided or grad.device != grads[0].device:
                raise TypeError(
                    f"average_: expected dense floating-point gradients on one device, got {grad.dtype}, "
                    f"{grad.layout} on {grad.device} for {name!r}."
                )
        if len(set(names)) != len(names):
            raise ValueError("average_: expected each name once, got duplicates.")
        for name, grad in zip(names, grads, strict=True):
            if self._shapes.setdefault(name, grad.shape) != grad.shape:
                raise ValueError(
                    f"average_: expected {name!r} to stay {tuple(self._shapes[name])}, got {tuple(grad.shape)}. "
                    "Give another tensor another name."
                )
        texts = [f"{name} {tuple(shape)} {dtype}" for name, shape, dtype in layout]
        self._compare(texts, self.connect(), grads[0].device)
        self._layouts.add(layout)

    def _compared(self) -> dict[str, str]:
        return {"communicator": type(self).__name__} | self.config() | self.owner

    def _compare(self, layout: list[str], ranks: Collectives, device: torch.device) -> None:
        """Raise ConfigurationError on every rank, with the first difference, unless all are configured alike."""
        config = {"the version of gradwire": gradwire.__version__} | self._compared()  # any may load a checkpoint
        text = json.dumps({"config": config, "layout": layout})
        digests = ranks.gather_bytes(hashlib.sha256(text.encode()).digest(), device)
        if len(set(digests)) > 1:
            texts = [json.loads(data) for data in ranks.gather_bytes(text.encode(), device)]
            raise ConfigurationError(_difference(texts))

    def _end_step(self) -> None:
        bad = self._bad
        others = self.connect() if self.scatters else self._shards
        if others is not None:  # no rank has seen the shards of all
            mine = bad if bad is not None else torch.zeros((), device=others.device)
            bad = others.all_reduce_(mine.to(torch.float32)) > 0
        if bad is not None:
            self._commit(bad)
            self.found_inf = bad.to(torch.float32)
            self._skipped = self._skipped + bad.to(torch.int64)
        elif self.found_inf is not None:  # a step without gradients
            self.found_inf = torch.zeros_like(self.found_inf)
        self._bad = None
        self._step += 1


def poisoned(scale: Tensor | float, bad: Tensor) -> Tensor | float:
    """The factor for gradients written back: `scale`, or NaN after a non-finite one; a device decides for itself."""
    if bad.device.type == "cpu":
        return torch.nan if bool(bad) else scale
    return torch.where(bad, torch.nan, scale)


def _no_scale() -> float:
    return 1.0


def _ring_bytes(size: int) -> float:
    return 2 * (size - 1) / size


def _difference(texts: list[dict[str, Any]]) -> str:
    """One sentence on the first thing in which ranks differ from rank 0."""
    first = texts[0]
    for rank, other in enumerate(texts):
        for key in sorted(first["config"].keys() | other["config"].keys()):
            ours, theirs = first["config"].get(key), other["config"].get(key)
            if ours != theirs:
                return f"average_: ranks differ in {key}: rank 0 has {ours}, rank {rank} has {theirs}."
        for place in range(max(len(first["layout"]), len(other["layout"]))):
            ours = first["layout"][place] if place < len(first["layout"]) else "nothing"
            theirs = other["layout"][place] if place < len(other["layout"]) else "nothing"
            if ours != theirs:
                return f"average_: ranks differ in tensor {place}: rank 0 has {ours!r}, rank {rank} has {theirs!r}."
    return "average_: ranks differ."
