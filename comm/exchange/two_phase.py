"""`TwoPhase`: scatter, average, compress again, gather."""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor
from torch.nn.functional import pad

from gradwire.comm.encoder import is_bad
from gradwire.comm.exchange.base import Bundle, Exchange, Outcome, decompress_mean
from gradwire.comm.exchange.message import MessageLayout
from gradwire.comm.exchange.scatter import scatter
from gradwire.comm.feedback.base import StateTensor
from gradwire.comm.row_matrix import RowMatrix
from gradwire.compression import counter_rng
from gradwire.compression.base import Compressor


@final
class TwoPhase(Exchange):
    """Every rank averages one shard of the rows and sends it, compressed again, to all.

        phase 1 (all-to-all):  rank s receives C(p_i)[shard s] from every rank i;  m_s = mean_i
        phase 2 (all-gather):  rank s sends C2(m_s + e_s);  e_s <- m_s + e_s - C2(m_s + e_s)

    The volume does not grow with the number of ranks, sums are taken in float32, and a value is quantised at most twice
    however many ranks there are (a ring that quantises at every hop does so n times).

    Args:
        second: Compressor of phase 2; that of phase 1 by default. The second loss is shared by all ranks and does
            not average out, so spend more bits here. It needs rows of the same width.

    Cost:
        One all-to-all and one all-gather per bucket. Sends (n-1)/n of the first payload's bytes plus (n-1)/n of the
        second's from each rank; decompresses one payload of each.

    State:
        `second_residual` (e_s) for the rows that this rank owns, if the communicator has feedback.

    Example:
        >>> TwoPhase()
        TwoPhase()

    Reference:
        Tang, Gan, Awan, Rajbhandari, Li, Lian, Liu, Zhang, He. 1-bit Adam. ICML 2021. arXiv:2102.02888, figure 3;
        the error feedback of phase 2 is that of Tang, Yu, Lian, Zhang, Liu. DoubleSqueeze. ICML 2019.
        arXiv:1905.05957, algorithm 1.
    """

    weighs = True
    compresses_twice = True

    def __init__(self, second: Compressor | None = None) -> None:
        self.second = second

    def __repr__(self) -> str:
        return "TwoPhase()" if self.second is None else f"TwoPhase(second={self.second!r})"

    @property
    def shards(self) -> int:
        """One shard per rank."""
        return self.ranks.size

    @property
    def state(self) -> tuple[StateTensor, ...]:
        """The residual of phase 2."""
        return (StateTensor("second_residual"),) if self.feedback else ()

    def owned(self, held: RowMatrix) -> RowMatrix:
        """This rank's shard."""
        return held.owners(self.ranks.rank, self.ranks.rank + 1)

    def check(self, compressor: Compressor) -> None:
        """The second compressor must know rows of the first one's width, and be allowed to err."""
        second = self.second or compressor
        shape = torch.Size([1 << 20])
        if second.row_width(shape) != compressor.row_width(shape):
            raise ValueError(
                f"TwoPhase: expected a second compressor with rows of {compressor.row_width(shape)} entries like "
                f"{compressor!r}, got {second!r} with {second.row_width(shape)}. Set its width, block or chunk."
            )
        if not second.keeps_size:
            raise ValueError(
                f"TwoPhase: expected a second compressor that keeps sizes, got {second!r}. Set second, or use "
                "AllGather."
            )
        if second.randomness == "shared":
            raise ValueError(
                f"TwoPhase: expected a second compressor without shared randomness, got {second!r}. Set second."
            )

    def mean(self, compressor: Compressor, bundles: Sequence[Bundle], bad: Tensor) -> Outcome:
        """Phase 1, the mean of the own shard, phase 2."""
        second = self.second or compressor
        shards, bad = scatter(self.ranks, bundles, bad)
        parts: list[tuple[Tensor, ...]] = []
        states: list[dict[str, Tensor]] = []
        for bundle, received in zip(bundles, shards, strict=True):
            own, keys = self.owned(bundle.matrix), None
            if bundle.keys is not None:
                keys = bundle.keys[bundle.matrix.block(self.ranks.rank)]
            target = decompress_mean(compressor, received, own, keys, weights=self.weights)
            if not (compressor.preserves_zero or compressor.changes_basis):
                own.clear_padding_(target)
            if self.feedback:
                target += bundle.state["second_residual"]
            if not second.carries_non_finite:
                bad = bad | is_bad(target)
            keys = None if keys is None else counter_rng.at_step(keys, counter_rng.fold("second"))
            if self.feedback:
                made, sent = second.compress_rows_with_sent(target, own.dtype, keys)
                if not (second.preserves_zero or compressor.changes_basis):
                    own.clear_padding_(sent)
                states.append({"second_residual": target.sub_(sent)})
            else:
                made = second.compress_rows(target, own.dtype, keys)
                states.append({})
            parts.append(made)
        return self._gather(second, bundles, parts, states, bad)

    def _gather(
        self,
        second: Compressor,
        bundles: Sequence[Bundle],
        parts: list[tuple[Tensor, ...]],
        states: list[dict[str, Tensor]],
        bad: Tensor,
    ) -> Outcome:
        """Send the own shard, filled up to the largest shard's rows, to all; shards in rank order make the matrix."""
        sizes = [
            [bundle.matrix.block(r).stop - bundle.matrix.block(r).start for r in range(self.ranks.size)]
            for bundle in bundles
        ]
        filled = [
            tuple(pad(part, (0, 0, 0, max(rows) - part.shape[0])) for part in group)
            for group, rows in zip(parts, sizes, strict=True)
        ]
        layout = MessageLayout(filled)
        gathered = self.ranks.all_gather(layout.pack(filled, bad))
        means = []
        for bundle, stacked, rows in zip(bundles, layout.unpack(gathered), sizes, strict=True):
            whole = tuple(torch.cat([part[r, : rows[r]] for r in range(self.ranks.size)]) for part in stacked)
            means.append(second.decompress_rows(whole, bundle.matrix.width))
        return Outcome(means, layout.bad(gathered), states)
