"""`Cohort`: who takes part in a step."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from gradwire.compression import counter_rng


@final
@dataclass(frozen=True)
class Cohort:
    """The workers of one process that take part in one step.

    Args:
        present: `[workers]` bool.
        share: Of all workers of all processes, the share that takes part.
    """

    present: Tensor
    share: float

    @classmethod
    def draw(cls, key: int, count: int, total: int, rank: int, workers: int, device: torch.device) -> "Cohort":
        """Draw `count` of `total` workers, all sets being equally likely; the same on every rank for equal keys.

        Args:
            key: Of the step.
            count: Workers that take part.
            total: Workers of all ranks.
            rank: This process, which holds workers rank * workers, ..., (rank + 1) * workers - 1.
            workers: Of this process.
            device: Where the result lives.

        Example:
            >>> Cohort.draw(key=1, count=1, total=3, rank=0, workers=3, device=torch.device("cpu")).present
            tensor([ True, False, False])
        """
        order = counter_rng.row_keys(key, total, device).argsort()
        present = torch.zeros(total, dtype=torch.bool, device=device).index_fill_(0, order[:count], True)
        return cls(present[rank * workers : (rank + 1) * workers], count / total)

    def of_rows(self, rows: int) -> Tensor:
        """The same for `rows` rows of each worker: `[workers * rows, 1]`."""
        return self.present.repeat_interleave(rows, output_size=rows * len(self.present))[:, None]
