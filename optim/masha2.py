"""`MASHA2`: compressed extragradient with contractive compressors and error feedback."""

import datetime
import math
from typing import final

import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import ParamsT

from gradwire.comm import EF, Exchange, Plan
from gradwire.compression import Compressor, TopK
from gradwire.optim.checks import check_range
from gradwire.optim.masha import MASHA


@final
class MASHA2(MASHA):
    """Find a saddle point, or a zero of a monotone operator, through contractive compressors with error feedback.

        z' = tau z + (1 - tau) w - lr F(w)
        p_m = lr (F_m(z') - F_m(w)) + e_m;  c_m = C(p_m);  e_m <- p_m - c_m          (workers)
        p = mean_m c_m + e;  g = C_s(p);  e <- p - g                                 (server, without it g = p)
        z <- z' - g;  with probability 1 - tau:  w <- z, F(w) <- mean_m F_m(w)

    As `MASHA1`, for compressors such as Top-K, which keep the most of a vector and are biased. Without the residuals it
    diverges, on the bilinear problem of `gradwire bench theory` at a step size at which it converges with them.

    Players, closures, ranks and simulated workers are those of `MASHA1`.

    Args:
        params: As in `MASHA1`.
        lr: Step size gamma, >= 0, a number or a 0-d tensor: see `suggested_stepsize`.
        compressor: What workers send, a contraction.
        second: Compresses the mean on its way back, too (C_s, a contraction), through `TwoPhase(second=...)`, which
            keeps its residual.
        exchange: `AllReduce` or `AllGather`, as the compressor allows, unless given.
        tau: Probability that w stays, 0 <= tau < 1. By default 1 - alpha, alpha being the smallest contraction of the
            compressed tensors: a sparsifier then sends as much densely as compressed.
        full_batch: All closures evaluate the same data. Then F_m(w) is kept, and a step evaluates once.
        plan, group, seed, timeout: As in `MASHA1`.

    Shapes:
        Any but complex.

    Cost:
        That of `MASHA1`, and 8 bytes for the residual, as it is before and after a step.

    State:
        step; snapshot: w; snapshot_operator: F(w). Equal on all ranks. The residuals are the communicator's, different
        on every rank: every rank must save its own `state_dict`, or use `gradwire.comm.checkpoint`.

    Example:
        >>> x, y = torch.nn.Parameter(torch.ones(64)), torch.nn.Parameter(torch.ones(64))
        >>> players = [{"params": [x]}, {"params": [y], "maximize": True}]
        >>> optimizer = MASHA2(players, lr=0.2, compressor=TopK(ratio=0.25), plan=Plan(min_ndim=0, min_numel=0))
        >>> for _ in range(500):
        ...     loss = optimizer.step(lambda: x @ y)
        >>> x.data.norm() < 1e-2
        tensor(True)

    Reference:
        Beznosikov, Richtarik, Diskin, Ryabinin, Gasnikov. Distributed Methods with Compressed Communication for Solving
        Variational Inequalities, with Theoretical Guarantees. NeurIPS 2022. arXiv:2110.03313, algorithm 2, with
        mini-batches (VR-MASHA2).

    Differences from the paper:
        Those of `MASHA1`.
    """

    scales_first = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        *,
        compressor: Compressor | None = None,
        second: Compressor | None = None,
        exchange: Exchange | None = None,
        tau: float | None = None,
        full_batch: bool = False,
        plan: Plan | None = None,
        group: dist.ProcessGroup | None = None,
        seed: int = 0,
        timeout: datetime.timedelta | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            TopK(ratio=0.01) if compressor is None else compressor,
            EF(),
            second=second,
            exchange=exchange,
            tau=tau,
            full_batch=full_batch,
            plan=plan,
            group=group,
            seed=seed,
            timeout=timeout,
        )

    @classmethod
    def kept(cls, compressor: Compressor, numel: int) -> float:
        """The contraction alpha."""
        alpha = compressor.contraction(numel)
        if alpha is None:
            remedy = (
                "Set unbiased=False, wrap it in Scaled, or use MASHA1." if compressor.omega(numel) else "Use TopK()."
            )
            raise ValueError(f"MASHA2: expected a compressor that is a contraction, got {compressor!r}. {remedy}")
        return alpha

    @staticmethod
    def suggested_stepsize(*, L: float, alpha: float, tau: float | None = None, c: float = 0.25) -> float:
        """A step size that converges in practice: c sqrt(1 - tau) / L, with c from 0.25 to 0.5.

        The paper proves convergence for sqrt(1 - tau) / (165 L) times the contractions of both compressors, at which
        little moves: on the bilinear problem of `gradwire bench theory` (Top-K, 1/16 kept) 99.5% of the squared error
        is left after 550 steps, where c = 0.5 leaves 1e-8 after 1,523.

        Args:
            L: The largest Lipschitz constant of a worker's operator, > 0.
            alpha: Contraction of the compressor, 0 < alpha <= 1: its `contraction(numel)`.
            tau: As given to the optimizer; by default 1 - alpha.
            c: From 0.25 to 0.5; with 1 it diverges on that problem.

        Raises:
            ValueError: A value is out of range.

        Example:
            >>> MASHA2.suggested_stepsize(L=1.0, alpha=0.25)
            0.125

        Reference:
            The dependence on tau is that of Beznosikov et al. 2022, theorem 2; the constant is measured.
        """
        for name, value in (("L", L), ("alpha", alpha), ("c", c)):
            if not 0 < value < math.inf:
                raise ValueError(f"MASHA2.suggested_stepsize: expected {name} > 0, got {name}={value!r}.")
        tau = 1.0 - alpha if tau is None else tau
        check_range("MASHA2.suggested_stepsize", "tau", tau, below=1.0)
        return c * math.sqrt(1.0 - tau) / L
