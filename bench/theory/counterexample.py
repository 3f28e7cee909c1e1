"""Claim: Top-1 without feedback can climb where gradient descent falls; with feedback it falls as fast."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradwire.bench.theory import drawing
from gradwire.bench.theory.claim import Claim, Line, Record
from gradwire.bench.theory.problems import communicator, descend
from gradwire.comm import EF, EF21, EControl, ErrorFeedback
from gradwire.compression import ChunkTopK

if TYPE_CHECKING:
    from matplotlib.figure import Figure

L, MU, L_MEAN, ALPHA = 103 / 6, 7 / 6, 34.5, 1 / 3
"""Smoothness and strong convexity of the mean, mean smoothness of the workers, contraction of Top-1 of 3 entries."""

_ETA = ALPHA / (1 + (1 - ALPHA) ** 0.5) ** 2  # EControl's critical damping, were Top-1 to send a share of everything
_FEEDBACKS: dict[str, ErrorFeedback | None] = {
    "none": None,
    "EF": EF(),
    "EF21": EF21(),
    "EControl": EControl(eta=_ETA),
}
_FIRST, _TOLERANCE, _EXACT = 200, 2e-4, 1e-9


def gradients(x: Tensor) -> Tensor:
    """Of f_i(x) = <a_i, x>^2 + |x|^2 / 4 with a_i = (-3, 2, 2) and its two rotations."""
    a = torch.full((3, 3), 2.0, dtype=x.dtype).fill_diagonal_(-3)
    return 2 * (x @ a)[..., None].transpose(0, 1) * a[:, None] + x / 2


def run(quick: bool) -> Record:
    """Descend from (1, 1, 1) at the largest step size that is proven for EF21."""
    steps = 600 if quick else 3000
    lr = EF21.max_stepsize(L=L, alpha=ALPHA, L_mean=L_MEAN)
    factors, curves = {}, {}
    for name, feedback in _FEEDBACKS.items():
        start = torch.ones(1, 3, dtype=torch.float64)
        average = communicator(ChunkTopK(k=1, chunk=3), feedback, workers=3)
        _, norms = descend(average, gradients, start, lr, steps, lambda x: torch.linalg.vector_norm(x, dim=1))
        factors[name] = float(norms[-1] / norms[_FIRST]) ** (1 / (steps - _FIRST))
        curves[name] = drawing.curve(norms[:, 0])
    return {"lr": lr, "steps": steps, "factors": factors, "curves": curves}


def lines(record: Record) -> list[Line]:
    """Factors per step."""
    grows, shrinks = 1 + 11 * record["lr"] / 6, 1 - record["lr"] * MU
    found = record["factors"]
    parts = [Line("error per step, Top-1 alone", f"{grows:.6f}", f"{found['none']:.6f}", _near(found["none"], grows))]
    for name in ("EF", "EF21", "EControl"):
        holds = abs(found[name] - shrinks) < _TOLERANCE
        parts.append(Line(f"error per step, with {name}", f"{shrinks:.4f}", f"{found[name]:.4f}", holds))
    return parts


def draw(figure: "Figure", record: Record) -> None:
    """Distance to the minimum over steps, with gradient descent's."""
    figure.set_size_inches(6.5, 4.2)
    axis = figure.subplots()
    ends = (0, record["steps"])
    exact = [3**0.5 * (1 - record["lr"] * MU) ** step for step in ends]
    axis.plot(ends, exact, color=drawing.COLOURS[7], linewidth=4, alpha=0.3, label="gradient descent")
    labels = {"none": "Top-1 alone"} | {name: f"Top-1 + {name}" for name in ("EF", "EF21", "EControl")}
    curves = {labels[name]: line for name, line in record["curves"].items()}
    drawing.plot(axis, curves, ylabel="distance to the minimum")


def _near(value: float, expected: float) -> bool:
    return abs(value - expected) < _EXACT


CLAIM = Claim("counterexample", "Three workers on whose functions Top-1 without feedback diverges", run, draw, lines)
