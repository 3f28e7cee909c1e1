"""`PowerSGD`: low-rank averaging in two rounds."""

import datetime
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
import torch.distributed as dist
from torch import Tensor

from gradwire.comm.averager import Averager, poisoned
from gradwire.comm.buckets import Buckets
from gradwire.comm.collectives import Collectives
from gradwire.comm.encoder import is_bad
from gradwire.comm.orthogonalize import cholesky_qr, newton_schulz
from gradwire.comm.plan import Plan
from gradwire.compression import counter_rng
from gradwire.compression.base import compute_dtype

Orthogonalization = Literal["cholesky", "newton_schulz"]


@dataclass
class _Batch:
    """Matrices of one shape, stacked: `residual [batch, m, n]`, `q [batch, n, r]`, and their staged new values."""

    names: list[str]
    positions: list[int]
    residual: Tensor
    q: Tensor
    staged: tuple[Tensor, Tensor] | None = None


@dataclass
class _Bucket:
    """The tensors of one `average_` call: batches of matrices, and the positions of what is sent dense."""

    batches: list[_Batch]
    dense: list[int]

    def rows(self) -> dict[str, Tensor]:
        rows = {}
        for batch in self.batches:
            for i, name in enumerate(batch.names):
                rows[f"residual/{name}/0:{batch.residual.shape[1]}"] = batch.residual[i : i + 1]
                rows[f"q/{name}/0:{batch.q.shape[1]}"] = batch.q[i : i + 1]
        return rows

    def fill(self, known: Mapping[str, Tensor]) -> None:
        for key, value in self.rows().items():
            if key in known:
                value.copy_(known[key])

    def commit(self, bad: Tensor) -> None:
        for batch in self.batches:
            if batch.staged is None:
                continue
            residual, q = batch.staged
            if bad.device.type != "cpu":  # without asking the host
                torch.where(bad, batch.residual, residual, out=batch.residual)
                torch.where(bad, batch.q, q, out=batch.q)
            elif not bool(bad):
                batch.residual, batch.q = residual, q
            batch.staged = None


@final
class PowerSGD(Averager):
    """Average matrices by one step of power iteration, with error feedback and a warm start.

        M_i = G_i + E_i;  P = mean_i M_i Q;  P <- orthonormal(P);  Q_i = M_i^T P;  Q = mean_i Q_i
        estimate = P Q^T;  E_i <- M_i - P Q_i^T;  next Q = the columns of Q over their norms

    A tensor of more than two dimensions is the matrix of its first dimension against the rest. What is not worth it
    travels dense in the first round's buffer.

    Args:
        matrix_rank: Rank r of the approximation, >= 1.
        min_compression_rate: Matrices for which m n / (r (m + n)) is less are sent dense, > 0.
        orthogonalization: "cholesky" (two passes of Cholesky-QR) or "newton_schulz" (products only).
        plan: What else is sent dense.
        group: The ranks that take part; all ranks by default.
        seed: Seed of the first Q; equal on all ranks.
        timeout: How long a collective waits for other ranks; the process group's setting by default.

    Cost:
        Two all-reduces per bucket, of r m and r n float32 per matrix; three products of 2 m n r operations. All
        matrices of one shape are one batch.

    State:
        `residual` [m, n], this rank's own, and `q` [n, r], equal on all ranks.

    Example:
        >>> communicator = PowerSGD(matrix_rank=1)
        >>> grad = torch.outer(torch.arange(64.0), torch.ones(64))
        >>> expected = grad.clone()
        >>> communicator.average_([grad], ["weight"])
        >>> torch.allclose(grad, expected, rtol=1e-4)
        True

    Reference:
        Vogels, Karimireddy, Jaggi. PowerSGD: Practical Low-Rank Gradient Compression for Distributed Optimization.
        NeurIPS 2019. arXiv:1905.13727, algorithms 1 and 2.

    Differences from the paper:
        Orthogonalisation by Cholesky-QR or Newton-Schulz in float32 in place of Gram-Schmidt; both span the same
        columns. The warm start keeps directions only: columns of unit length, and where a column is zero the last one.
        Otherwise one gradient of zeros, or of a lower rank than r, would leave columns of Q at zero for good.
    """

    def __init__(
        self,
        matrix_rank: int = 4,
        *,
        min_compression_rate: float = 2.0,
        orthogonalization: Orthogonalization = "cholesky",
        plan: Plan | None = None,
        group: dist.ProcessGroup | None = None,
        seed: int = 0,
        timeout: datetime.timedelta | None = None,
    ) -> None:
        super().__init__(group, seed, timeout)
        if matrix_rank < 1:
            raise ValueError(f"PowerSGD: expected matrix_rank >= 1, got matrix_rank={matrix_rank}.")
        if min_compression_rate <= 0:
            raise ValueError(
                f"PowerSGD: expected min_compression_rate > 0, got min_compression_rate={min_compression_rate}."
            )
        if orthogonalization not in ("cholesky", "newton_schulz"):
            raise ValueError(
                "PowerSGD: expected orthogonalization 'cholesky' or 'newton_schulz', "
                f"got orthogonalization={orthogonalization!r}."
            )
        self.matrix_rank = matrix_rank
        self.min_compression_rate = min_compression_rate
        self.orthogonalization = orthogonalization
        self.plan = plan or Plan()
        self._buckets: Buckets[_Bucket] = Buckets()

    def config(self) -> dict[str, str]:
        """Hyper-parameters by name, as text."""
        return {
            "matrix_rank": str(self.matrix_rank),
            "min_compression_rate": str(self.min_compression_rate),
            "orthogonalization": self.orthogonalization,
            "plan": repr(self.plan),
            "seed": str(self.seed),
        }

    def __repr__(self) -> str:
        return f"PowerSGD(matrix_rank={self.matrix_rank})"

    def _average(self, grads: Sequence[Tensor], names: Sequence[str]) -> Tensor:
        bucket = self._buckets.get(names, lambda: self._new_bucket(grads, names))
        scale = self.loss_scale()
        orthonormal = cholesky_qr if self.orthogonalization == "cholesky" else newton_schulz
        targets = []
        for batch in bucket.batches:
            target = torch.stack([grads[i].reshape(batch.residual.shape[1:]) for i in batch.positions])
            target = target.to(batch.residual.dtype)  # a new tensor, and all that follows is in place
            targets.append(_scale_(target, 1.0 / scale).add_(batch.residual))
        dense = [grads[position] for position in bucket.dense]
        first = [target @ batch.q for target, batch in zip(targets, bucket.batches, strict=True)]
        means, bad = self._mean(first, dense)
        bases = [orthonormal(p) for p in means[: len(first)]]
        second = [target.mT @ basis for target, basis in zip(targets, bases, strict=True)]
        factors, overflow = self._mean(second, [])

        bad = bad | overflow
        for batch, target, basis, own, factor in zip(bucket.batches, targets, bases, second, factors, strict=True):
            batch.staged = (target.baddbmm_(basis, own.mT, alpha=-1), _directions(factor, batch.q))
            estimate = _scale_(basis @ factor.mT, poisoned(scale, bad))
            for position, matrix in zip(batch.positions, estimate, strict=True):
                grads[position].copy_(matrix.view(grads[position].shape))
        for position, mean in zip(bucket.dense, means[len(first) :], strict=True):
            grads[position].copy_(_scale_(mean, poisoned(1.0, bad)))
        return bad

    def _mean(self, factors: Sequence[Tensor], dense: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """All-reduce the tensors in one buffer: means in the tensors' shapes, and whether any entry is not finite.

        What is not finite on any rank is not finite in the sum: inf and NaN survive products with Q and addition.
        """
        tensors = [*factors, *dense]
        if not tensors:
            return [], torch.zeros((), dtype=torch.bool)
        dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)
        message = torch.cat([tensor.reshape(-1).to(dtype) for tensor in tensors])
        total = self.connect().all_reduce_(message, uncompressed=sum(tensor.numel() for tensor in dense))
        runs = torch.split(total / self.connect().size, [tensor.numel() for tensor in tensors])
        means = [run.view(tensor.shape).to(tensor.dtype) for run, tensor in zip(runs, tensors, strict=True)]
        return means, is_bad(total)

    # State.

    def _new_bucket(self, grads: Sequence[Tensor], names: Sequence[str]) -> _Bucket:
        shapes: dict[tuple[int, int, torch.dtype], list[int]] = {}
        dense = []
        for position, (name, grad) in enumerate(zip(names, grads, strict=True)):
            if grad.numel() == 0:
                continue
            m = grad.shape[0] if grad.ndim else 1
            n = grad.numel() // m
            rate = m * n / (self.matrix_rank * (m + n))
            if grad.ndim < 2 or rate < self.min_compression_rate or self.plan.why_dense(name, grad.shape) is not None:
                dense.append(position)
            else:
                shapes.setdefault((m, n, compute_dtype(grad.dtype)), []).append(position)
        batches = []
        for (m, n, dtype), positions in shapes.items():
            device = grads[positions[0]].device
            start = [self._first_q(names[position], n, device).to(dtype) for position in positions]
            residual = torch.zeros((len(positions), m, n), dtype=dtype, device=device)
            batches.append(_Batch([names[position] for position in positions], positions, residual, torch.stack(start)))
        return _Bucket(batches, dense)

    def _first_q(self, name: str, n: int, device: torch.device) -> Tensor:
        """Gaussian `[n, r]` from (seed, name), by the Box-Muller transform."""
        keys = counter_rng.row_keys(counter_rng.fold(self.seed, name), n, device)
        u = counter_rng.uniform(keys, 2 * self.matrix_rank, torch.float64)
        radius = torch.sqrt(-2 * torch.log1p(-u[:, : self.matrix_rank]))
        return radius * torch.cos(2 * torch.pi * u[:, self.matrix_rank :])

    def _prepare(self, names: Sequence[str], tensors: Sequence[Tensor]) -> None:
        self._buckets.get(names, lambda: self._new_bucket(tensors, names))

    def state_rows(self) -> dict[str, Tensor]:
        """Views of all state tensors, `[1, m, n]` and `[1, n, r]`."""
        return self._buckets.rows()

    def load_rows(self, rows: dict[str, Tensor]) -> None:
        """Take over state tensors; those of parameters not seen yet wait for them."""
        self._buckets.load(rows)

    def _connected(self, ranks: Collectives) -> None:
        """Needs nothing but the collectives."""

    def _commit(self, bad: Tensor) -> None:
        self._buckets.commit(bad)

    def _residual_norm(self) -> float:
        squares = [float(batch.residual.square().sum()) for bucket in self._buckets for batch in bucket.batches]
        return math.sqrt(sum(squares))


def _scale_(x: Tensor, factor: Tensor | float) -> Tensor:
    """Multiply in place, unless by one."""
    return x if isinstance(factor, float) and factor == 1.0 else x.mul_(factor)


def _directions(factor: Tensor, last: Tensor) -> Tensor:
    """Columns of `factor [batch, n, r]` of unit length, those of `last` where a column is zero."""
    norm = torch.linalg.vector_norm(factor, dim=-2, keepdim=True)
    return torch.where(norm > 0, factor / norm, last)
