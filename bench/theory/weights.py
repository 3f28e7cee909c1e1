"""Claim: weighting workers by their smoothness lets EF21 step farther, by the ratio of a quadratic to a plain mean."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradwire.bench.theory import drawing
from gradwire.bench.theory.claim import Claim, Line, Record
from gradwire.bench.theory.problems import Logistic, Quadratic, classes, communicator, dealt, descend
from gradwire.comm import EF21, EF21W, ErrorFeedback
from gradwire.compression import ChunkTopK

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TITLES = {
    "breast cancer": "Breast cancer, raw features, sorted by size",
    "x100": "50 quadratics, one times 100",
    "x10000": "1000 quadratics, one times 10,000",
}
_TOLERANCES = {"breast cancer": 0.1, "x100": 1e-6, "x10000": 1e-6}
"""Of |gradient|^2, relative to the start."""

_MOST_ROUNDS, _EQUAL_ROUNDS, _EQUAL = 20000, 100, 1e-12
_MARGIN = 0.15


def problem(name: str, workers: int, d: int) -> tuple[Any, Tensor]:
    """Functions of all workers, and where to start, `[d]`."""
    if name == "breast cancer":
        features, labels = classes("breast_cancer")
        signed = features * (2.0 * labels[:, None] - 1)
        found = Logistic(*dealt(signed, torch.linalg.vector_norm(features, dim=1), workers), rough=0.1)
        return found, torch.zeros(features.shape[1], dtype=features.dtype)
    generator = torch.Generator().manual_seed(0)
    curvature = 0.5 + 0.5 * torch.rand(workers, d, generator=generator, dtype=torch.float64)
    curvature[0] *= float(name.removeprefix("x"))
    slope = torch.randn(workers, d, generator=generator, dtype=torch.float64)
    return Quadratic(curvature, slope), torch.ones(d, dtype=torch.float64)


def run(quick: bool) -> Record:
    """Rounds of EF21 with either step size to the same accuracy; and both algorithms with the same step size."""
    if quick:
        return {"problems": {"x100": _compare("x100", 12, 8)}}
    workers = {"breast cancer": 50, "x100": 50, "x10000": 1000}
    return {"problems": {name: _compare(name, workers[name], 10) for name in _TITLES}}


def lines(record: Record) -> list[Line]:
    """Steps, rounds and equality."""
    parts = []
    for name, found in record["problems"].items():
        means, step = found["quadratic_mean"] / found["mean"], found["lr"]["EF21W"] / found["lr"]["EF21"]
        fewer = found["rounds"]["EF21"] / found["rounds"]["EF21W"]
        title = _TITLES[name].lower()
        parts += [
            Line(
                f"{title}: step size over EF21's of 2021", f"{means:.3g}", f"{step:.3g}", abs(step / means - 1) < 0.05
            ),
            Line(
                f"{title}: rounds of EF21 over EF21-W's", f"{step:.3g}", f"{fewer:.3g}", abs(fewer / step - 1) < _MARGIN
            ),
        ]
    differ = max(found["difference"] for found in record["problems"].values())
    parts.append(
        Line("Top-1, equal step sizes: EF21-W against EF21", "the same", f"differ by {differ:.0e}", differ < _EQUAL)
    )
    return parts


def draw(figure: "Figure", record: Record) -> None:
    """Gradients over rounds, at both step sizes."""
    problems = record["problems"]
    figure.set_size_inches(1 + 4 * len(problems), 4)
    for axis, (name, found) in zip(figure.subplots(1, len(problems), squeeze=False)[0], problems.items(), strict=True):
        labels = {"EF21": "EF21, quadratic mean of L", "EF21W": "EF21-W, arithmetic mean of L"}
        curves = {labels[method]: line for method, line in found["curves"].items()}
        drawing.plot(axis, curves, xlabel="round", ylabel="squared gradient, relative", title=_TITLES[name])


def _compare(name: str, workers: int, d: int) -> Record:
    functions, start = problem(name, workers, d)
    start = start[None]
    each, d = functions.each_smoothness, start.shape[1]
    mean, quadratic_mean = float(each.mean()), float(each.square().mean().sqrt())
    compressor = ChunkTopK(k=1, chunk=d)
    constants = {"L": functions.smoothness, "alpha": 1 / d}
    weighted = EF21W(smoothness=tuple(each.tolist()))
    feedbacks: dict[str, ErrorFeedback] = {"EF21": EF21(), "EF21W": weighted}
    lrs = {
        "EF21": EF21.max_stepsize(**constants, L_mean=quadratic_mean),
        "EF21W": EF21W.max_stepsize(**constants, L_mean=mean),
    }

    def squares(x: Tensor) -> Tensor:
        mean: Tensor = functions.gradients(x).mean(dim=0)
        return mean.square().sum(dim=1)

    found: Record = {"mean": mean, "quadratic_mean": quadratic_mean, "lr": lrs, "rounds": {}, "curves": {}}
    target = _TOLERANCES[name] * float(squares(start))
    for method, feedback in feedbacks.items():
        average = communicator(compressor, feedback, workers)
        _, sizes = descend(average, functions.gradients, start, lrs[method], _MOST_ROUNDS, squares, target=target)
        found["rounds"][method] = len(sizes) - 1
        found["curves"][method] = drawing.curve(sizes[:, 0] / sizes[0, 0])
    ends = []
    for feedback in feedbacks.values():
        average = communicator(compressor, feedback, workers)
        ends.append(descend(average, functions.gradients, start, lrs["EF21W"], _EQUAL_ROUNDS, squares)[0])
    found["difference"] = float((ends[0] - ends[1]).norm() / ends[0].norm())
    return found


CLAIM = Claim(
    "weights",
    "EF21-W steps farther than EF21 by the ratio of the quadratic to the arithmetic mean of the L_i",
    run,
    draw,
    lines,
    data=True,
)
