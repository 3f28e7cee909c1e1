"""`MKORH`: MKOR until second order stops paying, then its base optimizer alone."""

import logging
from collections.abc import Iterable, Mapping
from typing import Unpack, final

import torch
from torch import Tensor, nn

from gradwire.optim.checks import check_range
from gradwire.optim.mkor import MKOR, Settings

_log = logging.getLogger("gradwire")

_RECORD = "mkorh_record"


@final
class MKORH(MKOR):
    """MKOR that watches how fast the loss falls, and hands over to its base optimizer for good when it hardly does.

        fast <- fast + (loss - fast) / min(t, n_fast),    slow <- slow + (loss - slow) / min(t, n_slow)
        rate  = (slow - fast) / (n_slow - n_fast) / |slow| check_every

    loss is the mean over ranks at step t. The slow average lags behind the fast one by n_slow - n_fast steps, so that
    rate is the share of the loss that goes in check_every steps. It is looked at every check_every steps from
    `min_steps` on. Each time that it is below `threshold` counts; one above twice the threshold makes the count start
    again, and one between them leaves it as it is, so that noise about the threshold neither switches nor prevents it.
    At `patience` counts all ranks switch at the same step: hooks are removed, factors freed, and the logger "gradwire"
    says so, with step and rate.

    The loss comes from `step(closure)`, or from `observe(loss)` before each `step()`. A step without one, and one whose
    loss is not finite on some rank, leaves the averages alone.

    Args:
        model: As for `MKOR`.
        base: As for `MKOR`.
        windows: n_fast and n_slow, steps, 1 <= n_fast < n_slow.
        check_every: Steps between two looks at the rate, >= 1; each waits for the device.
        threshold: Least share of the loss that pays, >= 0.
        patience: Looks that decide, >= 1.
        min_steps: Steps that are MKOR's whatever happens, >= 0; n_slow at least.
        settings: All other arguments of `MKOR`.

    Shapes:
        As for `MKOR`.

    Cost:
        Until the switch that of `MKOR`, and a collective of 4 bytes more per step. From then on the base's.

    State:
        That of `MKOR` until the switch; under the first layer's weight, mkorh_record: `[6]` float64 with t, both
        averages, losses taken, the count, and whether it has switched. `load_state_dict` brings either phase back. What
        `torch.distributed.checkpoint` loads into has to be of the saved phase: call `switch()` before loading the
        second.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> base = torch.optim.SGD(model.parameters(), lr=0.01)
        >>> optimizer = MKORH(model, base, windows=(1, 2), check_every=5, patience=2, min_steps=0)
        >>> for step in range(10):
        ...     loss = (model(torch.ones(4, 2)) * 0 + 1).mean()  # as good as it gets
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.observe(loss)
        ...     optimizer.step()
        >>> optimizer.switched
        True

    Reference:
        Mozaffari, Li, Zhang, Mehri Dehnavi. MKOR: Momentum-Enabled Kronecker-Factor-Based Optimizer Using Rank-1
        Updates. NeurIPS 2023. arXiv:2306.01685. Section 3 (the hybrid, MKOR-H).

    Differences from the paper: it says that the switch follows the rate at which the loss falls, and gives neither
    formula nor threshold; both are ours.
    """

    def __init__(
        self,
        model: nn.Module | Iterable[tuple[str, nn.Module]],
        base: torch.optim.Optimizer,
        *,
        windows: tuple[int, int] = (20, 200),
        check_every: int = 100,
        threshold: float = 0.01,
        patience: int = 3,
        min_steps: int = 500,
        **settings: Unpack[Settings],
    ) -> None:
        if not 1 <= windows[0] < windows[1]:
            raise ValueError(f"MKORH: expected windows (fast, slow) with 1 <= fast < slow, got {windows!r}.")
        for name, value, least in (("check_every", check_every, 1), ("patience", patience, 1)):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"MKORH: expected an integer {name} >= {least}, got {name}={value!r}.")
        for name, number in (("threshold", threshold), ("min_steps", min_steps)):
            check_range("MKORH", name, number)
        self._windows, self._check_every, self._threshold = windows, check_every, threshold
        self._patience, self._min_steps = patience, max(min_steps, windows[1])
        self._observed: list[Tensor] = []
        self._seen, self._count = 0, 0
        super().__init__(model, base, **settings)
        device = self.layers[0].weight.device
        self._averages = torch.zeros(3, dtype=torch.float64, device=device)  # t, fast, slow

    @property
    def switched(self) -> bool:
        """Whether the base is alone."""
        return not self._hooks

    def observe(self, loss: Tensor | float) -> None:
        """Take this rank's loss of the step to come; of several, as with micro-batches, the mean."""
        if self._hooks:
            self._observed.append(torch.as_tensor(loss).detach().to(torch.float32).reshape(()))

    def switch(self) -> None:
        """Go on with the base alone, for good; on every rank."""
        self._observed.clear()
        self.detach()

    def _precondition(self, loss: float | Tensor | None) -> None:
        if loss is not None:
            self.observe(loss)
        super()._precondition(None)
        if self._step == self._check_every and not self._seen:
            _log.warning(
                "MKORH: got no loss in %d steps, and never switches without. Call observe(loss) before step().",
                self._step,
            )
        if self._seen and self._seen % self._check_every == 0 and self._seen >= self._min_steps:
            self._check_rate()

    def _average(self, vectors: dict[str, Tensor]) -> None:
        """Add the loss to what is averaged, and its mean to the averages."""
        if not self._observed:
            super()._average(vectors)
            return
        loss = torch.stack([one.to(self._averages.device) for one in self._observed]).mean()
        self._observed.clear()
        super()._average(vectors | {"loss": loss})
        follow_(self._averages, loss, self._windows)
        self._seen += 1

    def _check_rate(self) -> None:
        """Look at the rate, count, and switch at the last count."""
        _, fast, slow = self._averages.tolist()
        lag = self._windows[1] - self._windows[0]
        rate = (slow - fast) / lag / max(abs(slow), 1e-30) * self._check_every
        if rate < self._threshold:
            self._count += 1
        elif rate > 2 * self._threshold:
            self._count = 0
        if self._count >= self._patience:
            freed = 0 if self._factors is None else self._factors.nbytes
            _log.info(
                "MKORH: step %d: the loss falls by %.3g %% in %d steps, the %s time below %.3g %%; "
                "%s goes on alone, and %.1f MB of factors are freed.",
                *(self._seen, 100 * rate, self._check_every, _ordinal(self._count), 100 * self._threshold),
                *(type(self.base).__name__, freed / 1e6),
            )
            self.switch()

    # State.

    def _own_state(self) -> dict[Tensor, dict[str, Tensor]]:
        own = super()._own_state()
        if self._stepped:
            numbers = torch.tensor([self._seen, self._count, self.switched], dtype=torch.float64)
            record = torch.cat([self._averages.cpu(), numbers])
            own.setdefault(self.layers[0].weight, {})[_RECORD] = record
        return own

    def _load_own_state(self, saved: Mapping[Tensor, Mapping[str, Tensor]]) -> None:
        zeros = torch.zeros(6, dtype=torch.float64)
        record = saved.get(self.layers[0].weight, {}).get(_RECORD, zeros).to(zeros)
        self._averages = record[:3].to(self.layers[0].weight.device)
        self._seen, self._count, switched = (int(number) for number in record[3:])
        self._observed.clear()
        if switched:
            self.switch()
            self._stepped = True
        else:
            self.attach()
            super()._load_own_state(saved)

    @staticmethod
    def _own_names() -> tuple[str, ...]:
        return (*MKOR._own_names(), _RECORD)


def follow_(averages: Tensor, loss: Tensor, windows: tuple[int, int]) -> None:
    """Add a loss to both averages and to their number, unless it is not finite.

    Args:
        averages: `[3]` float64: how many losses, fast average, slow average.
        loss: 0-d.
        windows: Of the fast and the slow one.
    """
    known = torch.isfinite(loss)
    averages[0] += known
    for i, window in enumerate(windows, 1):
        weight = 1 / averages[0].clamp(1, window)
        averages[i] += torch.where(known, (loss - averages[i]) * weight, 0.0)


def _ordinal(number: int) -> str:
    return {1: "1st", 2: "2nd", 3: "3rd"}.get(number, f"{number}th")
