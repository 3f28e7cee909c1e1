"""Claim: MASHA1 and MASHA2 converge linearly on a bilinear saddle, MASHA1 with fewer bytes; plain compression fails."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from gradwire.bench.theory import drawing
from gradwire.bench.theory.claim import Claim, Line, Record
from gradwire.bench.theory.problems import communicator
from gradwire.comm import NoFeedback, Plan, Simulated
from gradwire.compression import DARE, QSGD, Compressor, Identity, RandomK, ScaledSign, TernGrad, TopK
from gradwire.optim import MASHA1, MASHA2
from gradwire.optim.masha import MASHA

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CONSTANT = 165.0  # of the step size proven for MASHA2
_LOST = 1e6


@final
class Saddle:
    """f_m = x'A_m y + a_m'x + b_m'y + mu/2 |x|^2 - mu/2 |y|^2 on M workers, with A_m = (A + G_m) / (2 sqrt(d)).

    Args:
        workers: Number M.
        d: Entries of x, and of y.
        mu: Strong monotonicity. A and G_m have normal entries; the G_m, by which workers differ, add up to zero.
    """

    def __init__(self, workers: int, d: int, mu: float) -> None:
        numbers = torch.Generator().manual_seed(0)
        common, own, a, b = (
            torch.randn(shape, generator=numbers, dtype=torch.float64)
            for shape in ((d, d), (workers, d, d), (workers, d), (workers, d))
        )
        A = (common + own - own.mean(dim=0)) / (2 * math.sqrt(d))
        eye = mu * torch.eye(d, dtype=torch.float64)
        mean = torch.cat([torch.cat([eye, A.mean(dim=0)], 1), torch.cat([-A.mean(dim=0).T, eye], 1)])
        self.workers, self.d, self.mu = workers, d, mu
        self.solution = torch.linalg.solve(mean, torch.cat([-a.mean(dim=0), b.mean(dim=0)]))
        self.smoothness = float(torch.linalg.matrix_norm(mean, 2))
        self.each_smoothness = (torch.linalg.matrix_norm(A, 2).square() + mu**2).sqrt()
        self._A, self._a, self._b = (x.float() for x in (A, a, b))

    def losses(self, x: Tensor, y: Tensor) -> Tensor:
        """Of every worker, `[M]`."""
        ridge = self.mu / 2 * (x.square().sum() - y.square().sum())
        return (self._A @ y + self._a) @ x + self._b @ y + ridge

    def operators(self, x: Tensor, y: Tensor) -> list[Tensor]:
        """Gradients of all workers for x, and with changed sign for y: `[M, d]` each."""
        of_x = self._A @ y + self._a + self.mu * x
        return [of_x, self.mu * y - x @ self._A - self._b]

    def error(self, x: Tensor, y: Tensor) -> float:
        """Squared distance to the solution, 1 at zero."""
        z = torch.cat([x, y]).double()
        return float((z - self.solution).square().sum() / self.solution.square().sum())


class Forgetful(MASHA):
    """MASHA2 without residuals."""

    scales_first = True

    def __init__(self, params: ParamsT, lr: float, *, compressor: Compressor, **options: Any) -> None:
        super().__init__(params, lr, compressor, NoFeedback(), second=None, **options)

    @classmethod
    def kept(cls, compressor: Compressor, numel: int) -> float:
        """As `MASHA2`."""
        return MASHA2.kept(compressor, numel)


def balanced(compressor: Compressor, d: int) -> float:
    """The tau with which as much is sent densely as compressed."""
    return 1 - compressor.payload_bytes((d,), torch.float32) / (4 * d)


def proven(problem: Saddle, compressor: Compressor) -> float:
    """Largest proven step size of MASHA1; errors of workers that draw alike do not average out."""
    alike = compressor.randomness == "shared"
    omega = compressor.omega(problem.d)
    assert omega is not None
    return MASHA1.max_stepsize(
        L=problem.smoothness if alike else float(problem.each_smoothness.square().mean().sqrt()),
        omega=omega,
        workers=1 if alike else problem.workers,
        tau=balanced(compressor, problem.d),
        mu=problem.mu,
    )


def suggested(problem: Saddle, compressor: Compressor, c: float) -> float:
    """Step size of MASHA2."""
    tau = balanced(compressor, problem.d)
    return MASHA2.suggested_stepsize(L=float(problem.each_smoothness.max()), alpha=1.0, tau=tau, c=c)


def masha(
    problem: Saddle,
    cls: Any,
    lr: float,
    compressor: Compressor,
    steps: int,
    target: float,
    *,
    tau: float | None = None,
) -> Record:
    """One run from zero, until the error is on target or lost."""
    x, y = (nn.Parameter(torch.zeros(problem.d)) for _ in range(2))
    optimizer = cls(
        [{"params": [x]}, {"params": [y], "maximize": True}],
        lr,
        compressor=compressor,
        exchange=Simulated(problem.workers),
        tau=balanced(compressor, problem.d) if tau is None else tau,
        full_batch=True,
        plan=Plan(min_ndim=0, min_numel=0),
    )

    def measured() -> Iterator[tuple[float, float]]:
        for _ in range(steps):
            optimizer.step(lambda: problem.losses(x, y))
            yield problem.error(x.detach(), y.detach()), optimizer.communicator.stats.payload_bytes / problem.workers

    return _described(measured(), target)


def extragradient(problem: Saddle, lr: float, compressor: Compressor, steps: int, target: float) -> Record:
    """Extragradient that compresses both of its gradients."""
    average = communicator(compressor, None, problem.workers)

    def measured() -> Iterator[tuple[float, float]]:
        x, y = torch.zeros(problem.d), torch.zeros(problem.d)
        for _ in range(steps):
            u, v = x, y
            for _ in range(2):
                grads = problem.operators(u, v)
                average.average_(grads, ["x", "y"])
                u, v = x - lr * grads[0][0], y - lr * grads[1][0]
            x, y = u, v
            yield problem.error(x, y), average.stats.payload_bytes / problem.workers

    return _described(measured(), target)


def run(quick: bool) -> Record:
    """Errors over steps and bytes of what converges, and of what does not; MASHA1 at its proven step size, too."""
    problem = Saddle(workers=4, d=32, mu=0.3) if quick else Saddle(workers=8, d=64, mu=0.1)
    d, steps, target = problem.d, 250 if quick else 2200, 1e-3 if quick else 1e-8
    top_k, random_k = TopK(ratio=1 / 16), RandomK(k=d // 8, chunk=d)
    unbiased: dict[str, tuple[Compressor, float]] = {
        "MASHA1, RandomK": (random_k, 4.0),
        "MASHA1, DARE": (DARE(drop=0.875, chunk=d), 4.0),
    }
    contractive: dict[str, tuple[Compressor, float]] = {"MASHA2, TopK": (top_k, 1.0 if quick else 0.5)}
    if not quick:
        unbiased["MASHA1, QSGD"] = QSGD(levels=7, bucket=d), 2.0
        unbiased["MASHA1, TernGrad"] = TernGrad(bucket=d), 4.0
        contractive["MASHA2, ScaledSign"] = ScaledSign(width=d), 0.5

    methods = {
        "extragradient, dense": masha(problem, MASHA1, 0.9 / problem.smoothness, Identity(), steps, target, tau=0.0)
    }
    theory = {}
    for name, (compressor, times) in unbiased.items():
        lr = proven(problem, compressor)
        methods[name] = masha(problem, MASHA1, times * lr, compressor, steps, target)
        if isinstance(compressor, RandomK | DARE):
            at_it = masha(problem, MASHA1, lr, compressor, steps // 4, target)
            theory[name] = {"proven": round(1 - lr * problem.mu / 2, 6), "factor": at_it["factor"]}
    for name, (compressor, c) in contractive.items():
        methods[name] = masha(problem, MASHA2, suggested(problem, compressor, c), compressor, steps, target)

    lr = suggested(problem, *contractive["MASHA2, TopK"])
    alpha = top_k.contraction(d)
    assert alpha is not None
    crawl = masha(problem, MASHA2, suggested(problem, top_k, alpha / _CONSTANT), top_k, steps // 4, target)
    return {
        "workers": problem.workers,
        "entries": 2 * d,
        "condition": round(problem.smoothness / problem.mu, 1),
        "target": target,
        "methods": methods,
        "theory": theory,
        "plain": {
            "MASHA2 without residuals, TopK": masha(problem, Forgetful, lr, top_k, steps, target),
            "MASHA2, TopK, at twice its step size": masha(problem, MASHA2, 2 * lr, top_k, steps, target),
            "extragradient, TopK": extragradient(problem, 0.25 / problem.smoothness, top_k, steps // 2, target),
            "extragradient, RandomK": extragradient(problem, 0.25 / problem.smoothness, random_k, steps // 2, target),
        },
        "crawling": {name: crawl[name] for name in ("steps", "last")},
    }


def lines(record: Record) -> list[Line]:
    """Rates, bytes to the target, and what becomes of the others."""
    methods, target = dict(record["methods"]), record["target"]
    dense = methods.pop("extragradient, dense")
    parts = [
        Line(
            f"{name} at the proven step size: squared error per step",
            f"<= {found['proven']:.5f}",
            f"{found['factor']:.5f}",
            found["factor"] <= found["proven"],
        )
        for name, found in record["theory"].items()
    ]
    for name, found in methods.items():
        measured = f"{found['steps']} steps, {found['bytes'] / dense['bytes']:.2f} of dense extragradient's bytes"
        straight = found["last"] <= target and 0.5 < found["bend"] < 2
        parts.append(Line(f"{name}: squared error of {target:.0e}", "linear rate", measured, straight))
    for name, found in record["plain"].items():
        parts.append(Line(f"{name}: squared error", "diverges or stalls", f"{found['last']:.0e}", found["last"] > 0.3))
    crawling = record["crawling"]
    what = f"MASHA2, TopK, at the proven step size: squared error after {crawling['steps']} steps"
    return [*parts, Line(what, "nearly 1", f"{crawling['last']:.3f}", crawling["last"] > 0.95)]


def draw(figure: "Figure", record: Record) -> None:
    """Errors over steps and over bytes; beside them, what does not converge."""
    figure.set_size_inches(15, 4.2)
    ylabel = "squared distance, relative"
    axes = figure.subplots(1, 3)
    for axis, key, label in zip(axes, ("steps", "bytes"), ("step", "bytes sent by each worker"), strict=False):
        for colour, (name, found) in zip(drawing.COLOURS, record["methods"].items(), strict=False):
            axis.plot(found["curve"][key], found["curve"]["values"], color=colour, linewidth=1.5, label=name)
        drawing.tidy(axis, yscale="log", xlabel=label, ylabel=ylabel, title="what converges")
    curves = {name: found["curve"] for name, found in record["plain"].items()}
    drawing.plot(axes[2], curves, ylabel=ylabel, title="what does not")


def _described(measured: Iterator[tuple[float, float]], target: float) -> Record:
    """A run by its last error, steps and bytes up to there, its rate, and its first half's rate as a share of that."""
    errors, sent = [1.0], [0.0]
    for error, total in measured:
        errors.append(error)
        sent.append(total)
        if not target < error < _LOST:
            break
    last = len(errors) - 1
    curve = drawing.curve(errors)
    first_half = math.log(errors[last // 2] / errors[0])
    return {
        "last": drawing.rounded(errors[-1]),
        "steps": last,
        "bytes": round(sent[-1]),
        "factor": round((errors[-1] / errors[0]) ** (1 / last), 6),
        "bend": round(2 * first_half / math.log(errors[-1] / errors[0]), 2),
        "curve": {**curve, "bytes": [round(sent[step]) for step in curve["steps"]]},
    }


CLAIM = Claim(
    "saddle",
    "MASHA1 and MASHA2 converge linearly on a bilinear saddle, where plain compression diverges or stalls",
    run,
    draw,
    lines,
)
