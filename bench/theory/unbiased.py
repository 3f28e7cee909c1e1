"""Claim: where workers differ, unbiased compression alone stalls, and DIANA and MARINA converge linearly."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradwire.bench.theory import drawing
from gradwire.bench.theory.claim import Claim, Line, Record
from gradwire.bench.theory.problems import Logistic, classes, communicator, dealt, descend, standardised
from gradwire.comm import DIANA, MARINA
from gradwire.compression import DARE, QSGD, Compressor, RandomK

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WORKERS, _RUNS = 10, 8
_ROUNDING = 1e-20
"""Errors below are those of float64."""


def problem(name: str, condition: float) -> Logistic:
    """Logistic regression, dealt to workers by label; `condition` is its smoothness over its ridge.

    On diabetes it tells those beyond the median from the others.
    """
    features, labels = classes(name)
    positive = labels > (labels.median() if name == "diabetes" else 0)
    signed = standardised(features) * (2.0 * positive[:, None] - 1)
    dealt_out = dealt(signed, labels, _WORKERS)
    return Logistic(*dealt_out, ridge=Logistic(*dealt_out).smoothness / condition)


def run(quick: bool) -> Record:
    """Distance to the minimum with each compressor: alone at two step sizes, in DIANA, in MARINA."""
    condition, steps = (5, 200) if quick else (20, 2500)
    cancer = problem("breast_cancer", condition)
    d = cancer.features.shape[2]
    record: Record = {"workers": _WORKERS, "steps": steps, "methods": {}}
    if quick:
        record["methods"]["QSGD"] = _compare(cancer, QSGD(levels=3, bucket=d), steps)
    else:
        diabetes = problem("diabetes", condition)
        record["methods"]["QSGD"] = _compare(cancer, QSGD(levels=1, bucket=d), steps)
        record["methods"]["DARE"] = _compare(cancer, DARE(drop=0.8, chunk=d), steps)
        record["methods"]["QSGD on diabetes"] = _compare(diabetes, QSGD(levels=1, bucket=10), steps)
    alike = RandomK(k=d // 5, chunk=d)
    omega = alike.omega(d)
    assert omega is not None
    lr = 1 / (cancer.smoothness * (1 + omega))
    record["alike"] = _described(_errors(cancer, alike, None, [lr], steps)[:, 0], lr * cancer.ridge)
    return record


def _compare(functions: Logistic, compressor: Compressor, steps: int) -> Record:
    largest, mu = float(functions.each_smoothness.max()), functions.ridge
    rough = float(functions.each_smoothness.square().mean().sqrt()) * 2**0.5  # linear rates cost MARINA a root of two
    omega = compressor.omega(functions.features.shape[2])
    assert omega is not None
    diana = DIANA.max_stepsize(L=largest, omega=omega, workers=_WORKERS)
    marina = MARINA.max_stepsize(L=functions.smoothness, omega=omega, workers=_WORKERS, L_mean=rough)
    alone = _errors(functions, compressor, None, [diana] * _RUNS + [diana / 2] * _RUNS, steps)
    whole, half = alone[:, :_RUNS].mean(dim=1), alone[:, _RUNS:].mean(dim=1)
    return {
        "omega": drawing.rounded(omega),
        "alone": _described(whole, diana * mu),
        "half": _described(half, diana * mu / 2),
        "DIANA": _described(_errors(functions, compressor, DIANA(), [diana], steps)[:, 0], diana * mu),
        "MARINA": _described(_errors(functions, compressor, MARINA(), [marina], steps)[:, 0], marina * mu),
    }


def _errors(
    functions: Logistic, compressor: Compressor, feedback: DIANA | MARINA | None, lrs: list[float], steps: int
) -> Tensor:
    """Squared distances from the minimum, relative to its own square, `[1 + steps, len(lrs)]`."""
    minimum = functions.minimum()
    lr = torch.tensor(lrs, dtype=minimum.dtype)[:, None]
    start = torch.zeros(len(lrs), len(minimum), dtype=minimum.dtype)

    def error(x: Tensor) -> Tensor:
        return (x - minimum).square().sum(dim=1) / minimum.square().sum()

    return descend(communicator(compressor, feedback, _WORKERS), functions.gradients, start, lr, steps, error)[1]


def lines(record: Record) -> list[Line]:
    """Floors of compression alone; factors per step of the others, against what is proven."""
    parts = []
    for name, found in record["methods"].items():
        halved, least = found["half"]["floor"] / found["alone"]["floor"], found["DIANA"]["last"]
        stalls = found["alone"]["floor"] > 10 * max(least, found["MARINA"]["last"])
        parts.append(
            Line(
                f"{name} alone: error after halving the step size",
                "0.5 times",
                f"{halved:.2f} of {found['alone']['floor']:.0e}",
                stalls and abs(halved - 0.5) < 0.15,
            )
        )
        parts += [_rate(f"{name}, {method}: error per step", found[method]) for method in ("DIANA", "MARINA")]
    parts.append(_rate("RandomK alone, the same entries on all ranks: error per step", record["alike"]))
    return parts


def draw(figure: "Figure", record: Record) -> None:
    """Distances over steps."""
    methods = record["methods"]
    figure.set_size_inches(1.5 + 5 * len(methods), 4.2)
    labels = {"alone": "alone", "half": "alone, half the step size", "DIANA": "DIANA", "MARINA": "MARINA"}
    for axis, (name, found) in zip(figure.subplots(1, len(methods), squeeze=False)[0], methods.items(), strict=True):
        curves = {text: found[key]["curve"] for key, text in labels.items()}
        curves["RandomK alone, alike on all ranks"] = record["alike"]["curve"]
        drawing.plot(axis, curves, ylabel="squared distance, relative", title=f"{name}, omega = {found['omega']:.2g}")


def _described(errors: Tensor, gain: float) -> Record:
    """A run, with the factor per step that is proven for it."""
    falling = errors[: int((errors > _ROUNDING).sum())]
    second = falling[len(falling) // 2 :]
    return {
        "floor": drawing.rounded(errors[len(errors) // 2 :].mean()),
        "last": drawing.rounded(errors[-1]),
        "factor": round(float(second[-1] / second[0]) ** (1 / (len(second) - 1)), 6),
        "proven": round(1 - gain, 6),
        "curve": drawing.curve(errors),
    }


def _rate(what: str, found: Record) -> Line:
    return Line(what, f"<= {found['proven']:.4f}", f"{found['factor']:.4f}", found["factor"] <= found["proven"])


CLAIM = Claim(
    "unbiased",
    "DIANA and MARINA converge linearly where unbiased compression alone stalls",
    run,
    draw,
    lines,
    data=True,
)
