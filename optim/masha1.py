"""`MASHA1`: compressed extragradient with unbiased compressors."""

import datetime
import math
from typing import final

import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import ParamsT

from gradwire.comm import Exchange, NoFeedback, Plan
from gradwire.compression import Compressor, RandomK
from gradwire.optim.checks import check_range
from gradwire.optim.masha import MASHA
from gradwire.optim.players import Prox


@final
class MASHA1(MASHA):
    """Find a saddle point, or a zero of a monotone operator, through unbiased compressors: it converges linearly.

        z' = prox(tau z + (1 - tau) w - lr F(w))
        u = Q_s(mean_m Q(F_m(z') - F_m(w)))
        z <- prox(tau z + (1 - tau) w - lr F(w) - lr u);  with probability 1 - tau:  w <- z, F(w) <- mean_m F_m(w)

    F_m holds the gradients of worker m's loss, with the sign changed for parameters of groups with `maximize=True`: one
    group for each player. What is compressed vanishes as z and w approach each other, so nothing has to be remembered.
    The coin is one for all ranks, drawn from seed and step.

    The step's closure is this rank's loss on one batch; it is evaluated at z' and at w, on the same batch. Gradients
    must be local: in a plain loop that is so; under `DistributedDataParallel` register `gradwire.comm.keep_local(ddp)`.

        optimizer = MASHA1([{"params": model.parameters()}, {"params": [shift], "maximize": True}], lr=0.05)
        optimizer.step(lambda: loss(batch), full_closure=lambda: loss(everything))

    With `exchange=Simulated(M)` one process is M workers, and closures return M losses.

    Args:
        params: Tensors, `(name, tensor)` pairs or groups of them: on every rank the same, in the same order. Those that
            require no gradient are left out for good; those without one take part with zero.
        lr: Step size gamma, >= 0, a number or a 0-d tensor: see `max_stepsize`.
        compressor: What workers send, unbiased.
        second: Compresses the mean on its way back, too (Q_s, unbiased), through `TwoPhase(second=...)`.
        exchange: `AllReduce` or `AllGather`, as the compressor allows, unless given.
        tau: Probability that w stays, 0 <= tau < 1. By default 1 - 1 / (1 + omega), omega being the largest of the
            compressed tensors: a sparsifier then sends as much densely as compressed, which costs the least bytes in
            all. For that a quantiser needs 1 - tau to be its payload's share of the dense bytes.
        full_batch: All closures evaluate the same data. Then F_m(w) is kept, and a step evaluates once.
        prox: A function (tensor, lr) that makes the tensor its proximal point, in place, such as a projection; by
            default none. A group may bring its own.
        participants: How many of the ranks (or simulated workers) take part in a step; all by default. Dense
            evaluations are always of all.
        plan: What is sent dense, by default vectors and tensors under 1024 entries.
        group: The ranks that exchange; all by default.
        seed: Of the coin and the communicator.
        timeout: How long a collective waits for other ranks.

    Shapes:
        Any but complex.

    Cost:
        8 bytes of state per parameter, 12 with full_batch; in a step five copies more. A step evaluates the closure
        twice (once with full_batch), and once more, on all data, where w moves. Sends the compressor's payload, and 4
        bytes per parameter with probability 1 - tau. In simulation one backward pass is batched over M losses, which
        costs as much as M passes of their sum.

    State:
        step; snapshot: w; snapshot_operator: F(w). Equal on all ranks. The communicator's is part of `state_dict` and
        of `gradwire.comm.checkpoint`. `.grad` is None after a step.

    Example:
        >>> x, y = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
        >>> optimizer = MASHA1([{"params": [x]}, {"params": [y], "maximize": True}], lr=0.5)
        >>> for _ in range(100):
        ...     loss = optimizer.step(lambda: x @ y)  # descent and ascent would run in circles
        >>> x.data.norm() < 1e-4
        tensor(True)

    Reference:
        Beznosikov, Richtarik, Diskin, Ryabinin, Gasnikov. Distributed Methods with Compressed Communication for Solving
        Variational Inequalities, with Theoretical Guarantees. NeurIPS 2022. arXiv:2110.03313, algorithm 1, with
        mini-batches (VR-MASHA1) and partial participation (PP-MASHA1).

    Differences from the paper:
        w moves at the beginning of the step after the coin, so that a step's closures see its own data. What the server
        compresses is done by all ranks, each for one shard. A gradient that is not finite on any rank makes all ranks
        skip the step.
    """

    scales_first = False

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
        prox: Prox | None = None,
        participants: int | None = None,
        plan: Plan | None = None,
        group: dist.ProcessGroup | None = None,
        seed: int = 0,
        timeout: datetime.timedelta | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            RandomK() if compressor is None else compressor,
            NoFeedback(),
            second=second,
            exchange=exchange,
            tau=tau,
            full_batch=full_batch,
            prox=prox,
            participants=participants,
            plan=plan,
            group=group,
            seed=seed,
            timeout=timeout,
        )

    @classmethod
    def kept(cls, compressor: Compressor, numel: int) -> float:
        """1 / (1 + omega)."""
        omega = compressor.omega(numel)
        if omega is None:
            raise ValueError(
                f"MASHA1: expected an unbiased compressor, got {compressor!r}. Use RandomK(), unbiased=True or "
                "stochastic=True, or MASHA2."
            )
        return 1.0 / (1.0 + omega)

    @staticmethod
    def max_stepsize(
        *,
        L: float,
        omega: float,
        workers: int,
        tau: float | None = None,
        mu: float = 0.0,
        second_omega: float = 0.0,
    ) -> float:
        """Largest step size for which convergence is proven.

            min(sqrt(1 - tau) / (2 C), (1 - tau) / (2 mu)),   C^2 = (1 + omega_s) (omega + n) / n L^2

        If mu > 0, tau |z - z*|^2 + |w - z*|^2 then shrinks by the factor 1 - lr mu / 2 or more a step, in expectation.
        In practice 4 times as much is often stable.

        Args:
            L: Quadratic mean of the workers' Lipschitz constants, > 0; with mini-batches, of the samples' ones.
            omega: Of the compressor, its `omega(numel)`, >= 0.
            workers: Their number n, or that of `participants`; 1 if all ranks draw alike (`RandomK`), for then errors
                do not average out.
            tau: As given to the optimizer; by default 1 - 1 / (1 + omega).
            mu: Constant of strong monotonicity of the mean operator; 0 if there is none.
            second_omega: That of the second compressor.

        Raises:
            ValueError: A value is out of range.

        Example:
            >>> MASHA1.max_stepsize(L=1.0, omega=3.0, workers=1)
            0.125

        Reference:
            Beznosikov et al. 2022, theorem 1, with q = 1 + omega. E|u|^2 <= C^2 |z' - w|^2 is all it asks of the
            compressors, also with partial participation, for which the paper has b in place of n.
        """
        check_stepsize("MASHA1.max_stepsize", L=L, workers=workers)
        for name, value in (("omega", omega), ("mu", mu), ("second_omega", second_omega)):
            check_range("MASHA1.max_stepsize", name, value)
        tau = 1.0 - 1.0 / (1.0 + omega) if tau is None else tau
        check_range("MASHA1.max_stepsize", "tau", tau, below=1.0)
        C = L * math.sqrt((1.0 + second_omega) * (omega + workers) / workers)
        bound = math.sqrt(1.0 - tau) / (2.0 * C)
        return bound if mu == 0 else min(bound, (1.0 - tau) / (2.0 * mu))


def check_stepsize(who: str, **values: float) -> None:
    """Raise ValueError unless every value is a finite number above 0."""
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{who}: expected {name} > 0, got {name}={value!r}.")
