"""`Communicator`: compressor x feedback x exchange x plan, the path of a gradient."""

import copy
import datetime
import functools
import math
from collections.abc import Sequence
from typing import final

import torch
import torch.distributed as dist
from torch import Tensor

from gradwire.comm.averager import Averager, poisoned
from gradwire.comm.bucket import Bucket, Section, unflatten
from gradwire.comm.buckets import Buckets
from gradwire.comm.collectives import Collectives
from gradwire.comm.encoder import Encoder, encode_kernel, is_bad
from gradwire.comm.exchange import AllGather, AllReduce, Exchange, ReduceScatter
from gradwire.comm.exchange.base import Bundle
from gradwire.comm.exchange.reduce_scatter import Slot
from gradwire.comm.feedback import ErrorFeedback, NoFeedback
from gradwire.comm.legality import check
from gradwire.comm.participation import Cohort
from gradwire.comm.plan import Plan
from gradwire.comm.row_matrix import RowMatrix
from gradwire.comm.row_state import RowState
from gradwire.compression import counter_rng
from gradwire.compression.base import Compressor
from gradwire.compression.identity import Identity
from gradwire.compression.tiles import Tile

_DENSE = Identity(width=16)
"""What the plan sends dense, where it travels with the payloads."""


@final
class Communicator(Averager):
    """Average gradients over ranks through a compressor, error feedback and an exchange.

        x = transform(rows(g_i));  p_i = feedback.compensate(x);  payload_i = compressor.compress(p_i)
        mean = exchange(payloads of all ranks);  g_i <- transform^-1(feedback.estimate(mean))

    Args:
        compressor: What is sent of each row.
        feedback: How what is not sent is remembered; none by default.
        exchange: How payloads become their mean; `AllReduce` where payloads may be added, else `AllGather`.
        plan: What is compressed and what is sent dense.
        participants: How many of the ranks (or simulated workers) take part in a step, drawn anew in each; all by
            default. The others send zeros, so that bytes are saved in simulation only.
        group: The ranks that take part; all ranks by default.
        seed: Seed of all random draws; equal on all ranks.
        fused: Compile compensation, compression and the state's update into one kernel with `torch.compile`, once per
            row width (10 to 20 s on a CPU). Without it the same code runs eagerly.
        timeout: How long a collective waits for other ranks; the process group's setting by default.

    Raises:
        ValueError: the product is not legal; the message says what to change.

    Cost:
        Memory: the feedback's state, and while a bucket is averaged about three float32 copies of that bucket.
        Communication: at most one collective for what is dense and those of the exchange, per bucket.

    State:
        That of feedback and exchange, keyed by parameter name and range of rows.

    Example:
        >>> from gradwire.comm import EF
        >>> from gradwire.compression import Identity
        >>> communicator = Communicator(Identity(), feedback=EF())
        >>> grad = torch.ones(64, 64)
        >>> communicator.average_([grad], ["weight"])
        >>> communicator.stats.steps
        1

    Reference:
        The decomposition is that of Xu et al. GRACE. ICDCS 2021, with legality checked.
    """

    def __init__(
        self,
        compressor: Compressor,
        *,
        feedback: ErrorFeedback | None = None,
        exchange: Exchange | None = None,
        plan: Plan | None = None,
        participants: int | None = None,
        group: dist.ProcessGroup | None = None,
        seed: int = 0,
        fused: bool = False,
        timeout: datetime.timedelta | None = None,
    ) -> None:
        super().__init__(group, seed, timeout)
        self.compressor = compressor
        self.feedback = feedback if feedback is not None else NoFeedback()
        default = AllReduce() if compressor.reduction == "sum" else AllGather()
        self.exchange = copy.deepcopy(exchange) if exchange is not None else default  # its own: it will be connected
        self.plan = plan or Plan()
        self.participants = participants
        check(compressor, self.feedback, self.exchange, participants)
        self.feedback = self.feedback.fit(compressor)
        self.exchange.weights = self.feedback.weights
        self.workers, self.consensus = self.exchange.workers, self.exchange.consensus
        self.scatters = self.exchange.scatters
        self._buckets: Buckets[Bucket] = Buckets()
        self._kernel = encode_kernel(compressor, self.feedback, fused=fused)
        self._fused = fused
        self._weights: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def config(self) -> dict[str, str]:
        """Hyper-parameters by name, as text."""
        return {
            "compressor": repr(self.compressor),
            "feedback": repr(self.feedback),
            "exchange": repr(self.exchange),
            "plan": repr(self.plan),
            "seed": str(self.seed),
        } | ({} if self.participants is None else {"participants": str(self.participants)})

    def __repr__(self) -> str:
        return "Communicator(" + ", ".join(f"{key}={value}" for key, value in self.config().items()) + ")"

    # The path of a gradient.

    def _average(self, grads: Sequence[Tensor], names: Sequence[str]) -> Tensor:
        bucket = self._buckets.get(names, lambda: self._new_bucket(grads, names))
        scale = self.loss_scale()
        cohort = self._cohort(grads[0].device)
        dense, bad = self._reduce_dense(bucket, grads, cohort)

        anew = self.feedback.sends_dense(self._step - self.first_step, self.seed)
        restarted = [section for section in bucket.sections if anew and not section.planned]
        estimates, bad = self._restart(restarted, grads, scale, bad)
        others, bad = self._compress(bucket.sections[len(restarted) :], grads, scale, cohort, bad)
        matrices = [section.matrix for section in bucket.sections]
        estimates, bad = self.exchange.leave(matrices, estimates + others, bad)

        for matrix, estimate in zip(matrices, estimates, strict=True):
            half = matrix.dtype == torch.float16  # whose range a residual can leave that is sent at last
            bad = bad | is_bad((estimate * scale).half() if half else estimate)
        for matrix, estimate in zip(matrices, estimates, strict=True):
            self.exchange.kept(matrix).store(estimate, grads, poisoned(scale, bad))
        for mean, members in zip(dense, bucket.dense.values(), strict=True):
            unflatten(mean * poisoned(1.0, bad), grads, members)
        return bad

    def _compress(
        self,
        sections: Sequence[Section],
        grads: Sequence[Tensor],
        scale: Tensor | float,
        cohort: Cohort | None,
        bad: Tensor,
    ) -> tuple[list[Tensor], Tensor]:
        """Compensate, compress, exchange, estimate."""
        bundles = []
        for section in sections:
            matrix, state, compressor = section.matrix, section.state, section.compressor
            held = self.exchange.held(matrix)
            x = self.exchange.enter(matrix, matrix.load(grads, 1.0 / scale))
            if section.feedback.weights is not None:
                x = x / self._own_weights(x)
            keys = self._keys(held)
            present = None if cohort is None else cohort.of_rows(held.rows)
            parts, not_finite = section.encoder.encode(x, keys, state.feedback, state.begin(), present)
            if not (compressor.preserves_zero or compressor.changes_basis):
                state.clear_padding()
            dense = compressor if section.planned else None
            bundles.append(Bundle(held, parts, keys, state.exchange, dense))
            bad = bad | not_finite

        means, bad = self._exchange(sections, bundles, bad)
        estimates = []
        for mean, section in zip(means, sections, strict=True):
            if cohort is not None and section.feedback.absence == "left out":
                mean.div_(cohort.share)
            estimate, replicated = section.feedback.estimate(mean, section.state.feedback)
            section.state.stage(replicated)
            estimates.append(section.compressor.inverse_transform_rows(estimate, section.matrix.tile))
        return estimates, bad

    def _restart(
        self, sections: Sequence[Section], grads: Sequence[Tensor], scale: Tensor | float, bad: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """Average as they are the gradients that feedback begins with."""
        estimates = []
        for section in sections:
            matrix, state = section.matrix, section.state
            x = self.exchange.enter(matrix, matrix.load(grads, 1.0 / scale))
            x = self.compressor.transform_rows(x, matrix.tile)
            mean, bad = self.exchange.dense_mean(self.exchange.held(matrix), x, bad)
            if self.feedback.weights is not None:
                x = x / self._own_weights(x)
            own, replicated = self.feedback.restart(x, mean)
            for name, value in state.begin().items():
                value.copy_(own[name])
            state.stage(replicated)
            state.stage_exchange({name: torch.zeros_like(value) for name, value in state.exchange.items()})
            estimates.append(self.compressor.inverse_transform_rows(mean, matrix.tile))
        return estimates, bad

    def _exchange(
        self, sections: Sequence[Section], bundles: Sequence[Bundle], bad: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        if not bundles:
            return [], bad
        outcome = self.exchange.mean(self.compressor, bundles, bad)
        for section, new in zip(sections, outcome.states, strict=True):
            section.state.stage_exchange(new)
        return outcome.means, outcome.bad

    def _reduce_dense(
        self, bucket: Bucket, grads: Sequence[Tensor], cohort: Cohort | None
    ) -> tuple[list[Tensor], Tensor]:
        """Average over those that take part what the plan sends dense, in its own dtype."""
        any_bad = torch.zeros((), dtype=torch.bool, device=grads[0].device)
        means = []
        for members in bucket.dense.values():
            flat = torch.cat([grads[position].reshape(self.workers, -1) for position in members], dim=1)
            if cohort is not None:
                flat = flat * cohort.present[:, None] / cohort.share
            flat = flat.mean(dim=0) if self.workers > 1 else flat[0]
            total = self.connect().all_reduce_(flat, uncompressed=flat.numel())
            any_bad = any_bad | is_bad(total)  # of any rank, since inf and NaN survive addition; or of the sum itself
            means.append(total / self.connect().size)
        return means, any_bad

    def _cohort(self, device: torch.device) -> Cohort | None:
        """Who takes part in this step, among this process's workers."""
        if self.participants is None:
            return None
        ranks = self.connect()
        key = counter_rng.fold("cohort", self.seed, self._step)
        return Cohort.draw(key, self.participants, ranks.size * self.workers, ranks.rank, self.workers, device)

    def _own_weights(self, x: Tensor) -> Tensor:
        """The weights of this process's workers, one for each of their rows: `[rows, 1]`."""
        if (own := self._weights.get((x.dtype, x.device))) is None:  # once: copying to a device would wait for it
            assert self.feedback.weights is not None
            first = self.connect().rank * self.workers
            mine = self.feedback.weights[first : first + self.workers]
            own = self._weights[x.dtype, x.device] = torch.tensor(mine, dtype=x.dtype, device=x.device)
        return own.repeat_interleave(x.shape[0] // self.workers, output_size=x.shape[0])[:, None]

    def _keys(self, held: RowMatrix) -> Tensor | None:
        """Random keys of this step's rows: equal on all ranks if randomness is shared, else each rank its own."""
        second = self.exchange.second
        rounds = any(tensor.dtype == torch.bfloat16 for tensor in self.feedback.state_tensors)
        if not rounds and self.compressor.randomness == "none" and (second is None or second.randomness == "none"):
            return None
        keys = counter_rng.at_step(held.keys, counter_rng.fold(self.seed, self._step))
        workers = self.workers
        if self.compressor.randomness == "shared":
            return keys.repeat(workers)
        first = self.connect().rank * workers
        own = counter_rng.row_keys(counter_rng.fold("worker"), workers, keys.device, first=first)
        return counter_rng.at_step(keys, own[:, None]).flatten()

    # State.

    def _new_bucket(self, grads: Sequence[Tensor], names: Sequence[str]) -> Bucket:
        shapes = [grad.shape[1:] if self.workers > 1 else grad.shape for grad in grads]
        dense: dict[torch.dtype, list[int]] = {}
        rows: dict[tuple[bool, torch.dtype, Tile], list[int]] = {}
        self.connect()
        owners = self.exchange.owners(names)
        for position, (name, grad, shape) in enumerate(zip(names, grads, shapes, strict=True)):
            if shape.numel() == 0:
                continue
            planned = self.plan.why_dense(*self.exchange.planned_as(name, shape)) is not None
            if planned and not self.scatters:
                dense.setdefault(grad.dtype, []).append(position)
            else:
                tile = (_DENSE if planned else self.compressor).tile(shape)
                rows.setdefault((planned, grad.dtype, tile), []).append(position)
        sections = []
        for (planned, dtype, tile), members in sorted(rows.items(), key=lambda item: item[0][0]):
            matrix = RowMatrix(
                names,
                shapes,
                members,
                dtype,
                tile,
                shards=self.exchange.shards,
                owners=owners,
                workers=self.workers,
                device=grads[0].device,
            )
            sections.append(self._new_section(matrix, planned))
        return Bucket(sections, dense)

    def _new_section(self, matrix: RowMatrix, planned: bool) -> Section:
        compressor, feedback = (_DENSE, NoFeedback()) if planned else (self.compressor, self.feedback)
        held = self.exchange.held(matrix)
        averaged, owned = self.exchange.averaged(held), self.exchange.owned(held)
        state = RowState(held, feedback.state_tensors, owned, self.exchange.state, averaged=averaged)
        transform = functools.partial(compressor.transform_rows, tile=held.tile)
        encoder = Encoder(
            self._kernel if not planned else encode_kernel(compressor, feedback, fused=False),
            compressor.layout(held.width, held.dtype),
            held.workers * held.rows,
            held.width,
            held.dtype,
            held.device,
            fused=self._fused,
            transform=transform if compressor.changes_basis else None,
        )
        return Section(matrix, planned, compressor, feedback, state, encoder)

    def _prepare(self, names: Sequence[str], tensors: Sequence[Tensor]) -> None:
        self._buckets.get(names, lambda: self._new_bucket(tensors, names))

    def state_rows(self) -> dict[str, Tensor]:
        """Views of all state tensors `[workers, rows, width]`."""
        return self._buckets.rows()

    @torch.no_grad()
    def read_state(self, name: str, tensors: Sequence[Tensor], names: Sequence[str]) -> None:
        """Copy a state tensor of the feedback, in entries again, into tensors like the gradients of one bucket.

        Zero where it keeps none: before the first step, and for what is sent dense.
        """
        bucket = self._buckets.get(names, lambda: self._new_bucket(tensors, names))
        for tensor in tensors:
            tensor.zero_()
        for section in bucket.sections:
            if (matrix := section.state.layout(name)) is None:
                continue
            rows = section.compressor.inverse_transform_rows(section.state.feedback[name], matrix.tile)
            matrix.store_each(rows.view(-1, matrix.rows, matrix.width), tensors)

    def load_rows(self, rows: dict[str, Tensor]) -> None:
        """Take over state tensors; those of parameters not seen yet wait for them."""
        if isinstance(self.exchange, ReduceScatter):
            rows = self.exchange.recut(rows, self.compressor)
        self._buckets.load(rows)

    def deal(self, slots: Sequence[Slot]) -> None:
        """Tell the exchange whose each tensor is."""
        assert isinstance(self.exchange, ReduceScatter)
        self.exchange.deal(slots)

    @property
    def state_bytes(self) -> int:
        """Memory of the state on this rank, with the coming values of a step that has not ended."""
        return sum(section.state.nbytes for bucket in self._buckets for section in bucket.sections)

    def _connected(self, ranks: Collectives) -> None:
        workers = ranks.size * self.workers
        if self.feedback.weights is not None and len(self.feedback.weights) != workers:
            raise ValueError(
                f"{type(self.feedback).__name__}: expected a smoothness constant for each of {workers} workers, got "
                f"{len(self.feedback.weights)}."
            )
        if self.participants is not None:
            if not 1 <= self.participants <= workers:
                raise ValueError(
                    f"Communicator: expected 1 <= participants <= {workers}, got participants={self.participants}."
                )
            self.exchange.participation = self.participants / workers
        self.exchange.connect(ranks, feedback=bool(self.feedback.state))

    def _commit(self, bad: Tensor) -> None:
        self._buckets.commit(bad)

    def _residual_norm(self) -> float:
        states = [section.state.feedback for bucket in self._buckets for section in bucket.sections]
        kept = [state[name] for state in states for name in ("residual", "momentum_buffer") if name in state]
        squares = [float(residual.square().sum()) for residual in kept]
        return math.sqrt(sum(squares))
