"""What the lab compares: no communication, what torch and others offer, and gradwire's."""

from dataclasses import dataclass
from typing import Literal, final

from gradwire.bench import specs
from gradwire.bench.errors import UsageError

Kind = Literal["none", "DDP", "torch bf16", "torch PowerSGD", "rounds", "gradwire"]
Host = Literal["ddp", "loop"]

TORCH_RANK = 2
"""Of torch's PowerSGD hook."""


@final
@dataclass(frozen=True)
class Method:
    """One way to train on several hosts.

    Args:
        name: What the table calls it.
        kind: Who averages; "rounds" are those of DiLoCo.
        text: Configuration as for `gradwire train`; for "rounds" the communicator of the pseudo-gradients.
        host: "ddp" for `DistributedDataParallel`, "loop" for a plain loop.
        lr: Peak learning rate.
        every: Steps from one exchange to the next, >= 1.
        outer_lr: Of the outer SGD, for "rounds".
        outer_momentum: Its Nesterov momentum.
        bucket_mb: Size of a gradient bucket in MiB.
    """

    name: str
    kind: Kind
    text: str = ""
    host: Host = "loop"
    lr: float = 4e-3
    every: int = 1
    outer_lr: float = 0.7
    outer_momentum: float = 0.9
    bucket_mb: float = 25.0

    @property
    def ours(self) -> bool:
        """Whether it is gradwire's."""
        return self.kind in ("gradwire", "rounds")


NONE = Method("none", "none")
DDP = Method("DDP", "DDP", host="ddp")
POWER_SGD_HOOK = Method(f"torch PowerSGD hook, rank {TORCH_RANK}", "torch PowerSGD", host="ddp", bucket_mb=100.0)


def _ours(text: str, host: Host = "loop", lr: float = 4e-3) -> Method:
    return Method(text if host == "loop" else f"{text}, DDP", "gradwire", text, host, lr)


CATALOGUE = {
    method.name: method
    for method in (
        NONE,
        DDP,
        Method("torch bf16 hook", "torch bf16", host="ddp"),
        POWER_SGD_HOOK,
        _ours("Cast(dtype='bfloat16')", "ddp"),
        _ours("BlockQuantize(bits=8) + EF + TwoPhase", "ddp"),
        _ours("BlockQuantize(bits=4) + EF + TwoPhase"),
        _ours("ChunkTopK(k=32) + EF"),
        _ours("ChunkTopK(k=32) + EF21", lr=2e-3),
        _ours("PowerSGD(matrix_rank=1)"),
        _ours("PowerSGD(matrix_rank=1)", "ddp"),
        _ours("ScaledSign + EF + TwoPhase"),
        _ours("DeMo(k=32)", lr=3e-3),
        _ours("DeMo(form='overlapped', k=32)", lr=3e-3),
        Method("DiLoCo(every=15), int8", "rounds", "BlockQuantize(bits=8) + EF + TwoPhase", every=15),
        Method(
            "SparseLoCo(every=15)",
            "rounds",
            "Chain(ChunkTopK(k=64), BlockQuantize(bits=2)) + EF(decay=0.95)",
            every=15,
            outer_lr=1.0,
            outer_momentum=0.0,
        ),
    )
}
"""By name: the floor first, then the baseline."""

NOT_MEASURED = {
    "hivemind": "its averager speaks through a libp2p daemon and a scheme of its own, not through torch.distributed",
}
"""Other packages, and why they are not in the catalogue."""

QUICK = (NONE.name, DDP.name, POWER_SGD_HOOK.name, "PowerSGD(matrix_rank=1)", "DiLoCo(every=15), int8")


def find(name: str) -> Method:
    """A method of the catalogue, or any configuration that `gradwire train` takes, in a plain loop.

    Raises:
        UsageError: it is neither.
    """
    if name in CATALOGUE:
        return CATALOGUE[name]
    try:
        specs.parse(name)
    except UsageError as error:
        raise UsageError(
            f"--methods: expected one of {', '.join(map(repr, CATALOGUE))} or a configuration, got {name!r}: {error}"
        ) from None
    return _ours(name)
