"""`Communicator`: compressor x feedback x exchange x plan, the path of a gradient."""

import copy
import datetime
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
import torch.distributed as dist
from torch import Tensor

from gradwire.comm.averager import Averager, poisoned
from gradwire.comm.buckets import Buckets
from gradwire.comm.collectives import Collectives
from gradwire.comm.encoder import Encoder, encode_kernel, is_bad
from gradwire.comm.exchange import AllGather, AllReduce, Exchange
from gradwire.comm.exchange.base import Bundle
from gradwire.comm.feedback import ErrorFeedback, NoFeedback
from gradwire.comm.legality import check
from gradwire.comm.participation import Cohort
from gradwire.comm.plan import Plan
from gradwire.comm.row_matrix import RowMatrix
from gradwire.comm.row_state import RowState
from gradwire.compression import counter_rng
from gradwire.compression.base import Compressor
from gradwire.compression.tiles import Tile


@dataclass
class _Bucket:
    """The tensors of one `average_` call: compressed ones as row matrices, the others' positions by dtype."""

    matrices: list[RowMatrix]
    states: list[RowState]
    encoders: list[Encoder]
    dense: dict[torch.dtype, list[int]]

    def rows(self) -> dict[str, Tensor]:
        return {key: value for state in self.states for key, value in state.rows().items()}

    def fill(self, known: Mapping[str, Tensor]) -> None:
        for state in self.states:
            state.fill(known)

    def commit(self, bad: Tensor) -> None:
        for state in self.states:
            state.commit(bad)


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
        self._buckets: Buckets[_Bucket] = Buckets()
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

        if self.feedback.sends_dense(self._step - self.first_step, self.seed):
            estimates, bad = self._restart(bucket, grads, scale, bad)
        else:
            estimates, bad = self._compress(bucket, grads, scale, cohort, bad)
        estimates, bad = self.exchange.leave(bucket.matrices, estimates, bad)

        for estimate in estimates:
            bad = bad | is_bad(estimate)
        for matrix, estimate in zip(bucket.matrices, estimates, strict=True):
            matrix.store(estimate, grads, poisoned(scale, bad))
        for mean, members in zip(dense, bucket.dense.values(), strict=True):
            _unflatten(mean * poisoned(1.0, bad), grads, members)
        return bad

    def _compress(
        self, bucket: _Bucket, grads: Sequence[Tensor], scale: Tensor | float, cohort: Cohort | None, bad: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """Compensate, compress, exchange, estimate."""
        bundles = []
        for matrix, state, encoder in zip(bucket.matrices, bucket.states, bucket.encoders, strict=True):
            held = self.exchange.held(matrix)
            x = self.exchange.enter(matrix, matrix.load(grads, 1.0 / scale))
            if self.feedback.weights is not None:
                x = x / self._own_weights(x)
            keys = self._keys(held)
            present = None if cohort is None else cohort.of_rows(held.rows)
            parts, not_finite = encoder.encode(x, keys, state.feedback, state.begin(), present)
            if not (self.compressor.preserves_zero or self.compressor.changes_basis):
                state.clear_padding()
            bundles.append(Bundle(held, parts, keys, state.exchange))
            bad = bad | not_finite

        means, bad = self._exchange(bucket, bundles, bad)
        estimates = []
        for mean, matrix, state in zip(means, bucket.matrices, bucket.states, strict=True):
            if cohort is not None and self.feedback.absence == "left out":
                mean.div_(cohort.share)
            estimate, replicated = self.feedback.estimate(mean, state.feedback)
            state.stage(replicated)
            estimates.append(self.compressor.inverse_transform_rows(estimate, matrix.tile))
        return estimates, bad

    def _restart(
        self, bucket: _Bucket, grads: Sequence[Tensor], scale: Tensor | float, bad: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """Average as they are the gradients that feedback begins with."""
        estimates = []
        for matrix, state in zip(bucket.matrices, bucket.states, strict=True):
            x = self.exchange.enter(matrix, matrix.load(grads, 1.0 / scale))
            x = self.compressor.transform_rows(x, matrix.tile)
            mean, bad = self.exchange.dense_mean(x, bad)
            if self.feedback.weights is not None:
                x = x / self._own_weights(x)
            own, replicated = self.feedback.restart(x, mean)
            for name, value in state.begin().items():
                value.copy_(own[name])
            state.stage(replicated)
            state.stage_exchange({name: torch.zeros_like(value) for name, value in state.exchange.items()})
            estimates.append(self.compressor.inverse_transform_rows(mean, matrix.tile))
        return estimates, bad

    def _exchange(self, bucket: _Bucket, bundles: Sequence[Bundle], bad: Tensor) -> tuple[list[Tensor], Tensor]:
        if not bundles:
            return [], bad
        outcome = self.exchange.mean(self.compressor, bundles, bad)
        for state, new in zip(bucket.states, outcome.states, strict=True):
            state.stage_exchange(new)
        return outcome.means, outcome.bad

    def _reduce_dense(
        self, bucket: _Bucket, grads: Sequence[Tensor], cohort: Cohort | None
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
        if self.compressor.randomness == "none" and (second is None or second.randomness == "none"):
            return None
        keys = counter_rng.at_step(held.keys, counter_rng.fold(self.seed, self._step))
        workers = self.workers
        if self.compressor.randomness == "shared":
            return keys.repeat(workers)
        first = self.connect().rank * workers
        own = counter_rng.row_keys(counter_rng.fold("worker"), workers, keys.device, first=first)
        return counter_rng.at_step(keys, own[:, None]).flatten()

    # State.

    def _new_bucket(self, grads: Sequence[Tensor], names: Sequence[str]) -> _Bucket:
        workers = self.workers
        shapes = [grad.shape[1:] if workers > 1 else grad.shape for grad in grads]
        dense: dict[torch.dtype, list[int]] = {}
        compressed: dict[tuple[torch.dtype, Tile], list[int]] = {}
        for position, (name, grad, shape) in enumerate(zip(names, grads, shapes, strict=True)):
            if shape.numel() == 0:
                continue
            if self.plan.why_dense(name, shape) is not None:
                dense.setdefault(grad.dtype, []).append(position)
            else:
                compressed.setdefault((grad.dtype, self.compressor.tile(shape)), []).append(position)
        self.connect()
        matrices = [
            RowMatrix(
                names,
                shapes,
                members,
                dtype,
                tile,
                shards=self.exchange.shards,
                workers=workers,
                device=grads[0].device,
            )
            for (dtype, tile), members in compressed.items()
        ]
        states, encoders = [], []
        for matrix in matrices:
            held = self.exchange.held(matrix)
            states.append(RowState(held, self.feedback.state, self.exchange.owned(held), self.exchange.state))
            encoders.append(self._encoder(held))
        return _Bucket(matrices, states, encoders, dense)

    def _encoder(self, held: RowMatrix) -> Encoder:
        layout = self.compressor.layout(held.width, held.dtype)
        rows = held.workers * held.rows
        transform = functools.partial(self.compressor.transform_rows, tile=held.tile)
        return Encoder(
            self._kernel,
            layout,
            rows,
            held.width,
            held.dtype,
            held.device,
            fused=self._fused,
            transform=transform if self.compressor.changes_basis else None,
        )

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
        for matrix, state in zip(bucket.matrices, bucket.states, strict=True):
            rows = self.compressor.inverse_transform_rows(state.feedback[name], matrix.tile)
            matrix.store_each(rows.view(-1, matrix.rows, matrix.width), tensors)

    def load_rows(self, rows: dict[str, Tensor]) -> None:
        """Take over state tensors; those of parameters not seen yet wait for them."""
        self._buckets.load(rows)

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
        states = [state.feedback for bucket in self._buckets for state in bucket.states]
        kept = [state[name] for state in states for name in ("residual", "momentum_buffer") if name in state]
        squares = [float(residual.square().sum()) for residual in kept]
        return math.sqrt(sum(squares))


def _unflatten(flat: Tensor, grads: Sequence[Tensor], members: Sequence[int]) -> None:
    """Copy the runs of `flat` into the gradients at these positions (of every worker)."""
    shapes = [grads[position].shape for position in members]
    workers = sum(shape.numel() for shape in shapes) // max(1, flat.numel())
    runs = torch.split(flat, [shape.numel() // workers for shape in shapes])
    for position, run in zip(members, runs, strict=True):
        grads[position].copy_(run.view(grads[position].shape[1:] if workers > 1 else grads[position].shape))
