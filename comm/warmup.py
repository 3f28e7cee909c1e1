"""`Warmup`: one communicator for the first steps, another from then on."""

import datetime
from collections.abc import Sequence
from typing import final

from torch import Tensor

from gradwire.comm.averager import Averager
from gradwire.comm.collectives import Collectives
from gradwire.comm.exchange.reduce_scatter import Slot


@final
class Warmup(Averager):
    """Use `first` for some steps and `then` afterwards.

    Early gradients are large and change quickly, which is when compression hurts most; a dense start of a few percent
    of the steps is cheap. Steps that are skipped count.

    Args:
        first: Communicator of the first steps, usually dense.
        then: Communicator of all later steps.
        steps: Number of first steps, >= 0.
        timeout: How long a collective waits for other ranks; that of `then` by default.

    Cost:
        That of the one in use; state of both is created at the start.

    State:
        That of both.

    Example:
        >>> from gradwire.comm import EF, Communicator
        >>> from gradwire.compression import Identity
        >>> Warmup(Communicator(Identity()), Communicator(Identity(), feedback=EF()), steps=100).stats.steps
        0

    Reference:
        Tang et al. 1-bit Adam. ICML 2021. arXiv:2102.02888, section 4 (a dense first phase).
    """

    def __init__(
        self, first: Averager, then: Averager, steps: int, *, timeout: datetime.timedelta | None = None
    ) -> None:
        if steps < 0:
            raise ValueError(f"Warmup: expected steps >= 0, got steps={steps}.")
        if first.workers != then.workers:
            raise ValueError(f"Warmup: expected equal numbers of workers, got {first.workers} and {then.workers}.")
        super().__init__(then.group, then.seed, timeout if timeout is not None else then.timeout)
        self.first, self.then, self.steps = first, then, steps
        self.workers = then.workers
        self.consensus = first.consensus and then.consensus
        if first.scatters != then.scatters:
            raise ValueError(
                "Warmup: expected exchange=ReduceScatter() in both communicators or in none, got it in one. Set it in "
                "the other, too."
            )
        self.scatters = then.scatters
        then.first_step = steps

    def config(self) -> dict[str, str]:
        """Hyper-parameters of both, and the number of steps."""
        return (
            {f"first.{key}": value for key, value in self.first.config().items()}
            | {f"then.{key}": value for key, value in self.then.config().items()}
            | {"warmup_steps": str(self.steps)}
        )

    def deal(self, slots: Sequence[Slot]) -> None:
        """Hand them to both."""
        self.first.deal(slots)
        self.then.deal(slots)

    @property
    def state_bytes(self) -> int:
        """That of both."""
        return self.first.state_bytes + self.then.state_bytes

    def _connected(self, ranks: Collectives) -> None:
        for part in (self.first, self.then):
            part.loss_scale = lambda: self.loss_scale()
            part.join(ranks)

    def _average(self, grads: Sequence[Tensor], names: Sequence[str]) -> Tensor:
        active = self.first if self._step < self.steps else self.then
        active._step = self._step
        return active._average(grads, names)

    def _commit(self, bad: Tensor) -> None:
        self.first._commit(bad)
        self.then._commit(bad)

    def _prepare(self, names: Sequence[str], tensors: Sequence[Tensor]) -> None:
        self.first._prepare(names, tensors)
        self.then._prepare(names, tensors)

    def state_rows(self) -> dict[str, Tensor]:
        """State of both, with a prefix."""
        return {f"first.{key}": value for key, value in self.first.state_rows().items()} | {
            f"then.{key}": value for key, value in self.then.state_rows().items()
        }

    def load_rows(self, rows: dict[str, Tensor]) -> None:
        """Hand each its own."""
        for prefix, part in (("first.", self.first), ("then.", self.then)):
            part.load_rows({key.removeprefix(prefix): value for key, value in rows.items() if key.startswith(prefix)})

    def _residual_norm(self) -> float:
        return self.then._residual_norm()
