"""Claim: the iterate of token SGD varies less the more its walk avoids where it has been, as much less as predicted."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import networkx
import numpy as np
from numpy.typing import NDArray

from gradwire.bench.theory import drawing
from gradwire.bench.theory.claim import Claim, Line, Record
from gradwire.comm.random_walk import (
    MarkovChain,
    WalkEnsemble,
    iterate_covariance,
    mean_squared_error,
    measure_covariance,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = NDArray[np.float64]

ALPHAS = (0.0, 1.0, 2.0, 5.0, 10.0, 20.0)
EXPONENT = 0.8
"""Of gamma, the step size of the walk's measure."""

STEP_EXPONENTS = (0.9, 0.8, 0.6)
"""Of the optimizer's step sizes: falling faster than gamma, alike, and more slowly."""

_DIMENSION, _POINTS = 10, 40
_MARGINS = {"full": 0.15, "quick": 0.3}
"""By how much measured variances may differ from the linear model's, relatively."""

_INDEPENDENT = "independent draws"


def problem() -> tuple[MarkovChain, Array]:
    """The Metropolis-Hastings chain on Zachary's karate club, and each member's data b_i: f_i(x) = |x - b_i|^2 / 2."""
    chain = MarkovChain.metropolis_hastings(networkx.karate_club_graph())
    data = np.random.default_rng(0).standard_normal((chain.nodes, _DIMENSION))
    return chain, data - data.mean(axis=0)


def independent(nodes: int) -> MarkovChain:
    """The chain that forgets where it is: every node alike, at every step."""
    everywhere = np.arange(nodes)
    return MarkovChain("independent", (everywhere,) * nodes, (np.full(nodes, 1 / nodes),) * nodes, np.ones(nodes))


def run(quick: bool) -> Record:
    """Walk with every alpha at once; on every walk, SGD with each decay of its step sizes."""
    alphas = ALPHAS[:4:3] if quick else ALPHAS
    runs, steps = (100, 3000) if quick else (200, 40_000)
    chain, data = problem()
    walks = WalkEnsemble(chain, np.repeat(alphas, runs), EXPONENT, seeds=[*range(runs)] * len(alphas))
    draws = np.random.default_rng(1).integers(chain.nodes, size=(steps, runs))
    labels = [*(f"alpha = {alpha:g}" for alpha in alphas), _INDEPENDENT]
    points = np.unique(np.geomspace(1, steps, _POINTS).round().astype(int))
    late = np.arange(steps // 2, steps + 1, max(1, steps // 1000))

    exponents = np.array(STEP_EXPONENTS)
    x = np.zeros((len(exponents), len(labels) * runs, _DIMENSION))
    curves = np.zeros((len(points), len(labels)))
    errors, spread = np.zeros((len(exponents), len(labels))), np.zeros(len(alphas))
    for step in range(1, steps + 1):
        rates = (step + 1.0) ** -exponents
        node = np.concatenate([walks.step(), draws[step - 1]])
        x += rates[:, None, None] * (data[node] - x)
        if step in points:
            curves[np.searchsorted(points, step)] = _mean_squares(x[0], runs)
        if step in late:
            errors += np.stack([_mean_squares(each, runs) for each in x]) / rates[:, None] / len(late)
            away = walks.measure - chain.target
            spread += _mean_squares(away, runs) * (step + 1.0) ** EXPONENT / len(late)

    record: Record = {"alphas": list(alphas), "runs": runs, "steps": steps, "labels": labels, "sgd": {}}
    for exponent, measured in zip(STEP_EXPONENTS, errors, strict=True):
        record["sgd"][f"{exponent:g}"] = {"measured": _floats(measured)} | _predict(alphas, exponent, steps, late)
    limits = [np.trace(measure_covariance(chain, alpha, EXPONENT)) for alpha in alphas]
    record["measure"] = {"measured": _floats(spread), "limit": _floats(limits)}
    record["curves"] = {
        label: {"steps": points.tolist(), "values": _floats(values)}
        for label, values in zip(labels, curves.T, strict=True)
    }
    return record


def _predict(alphas: tuple[float, ...], step_exponent: float, steps: int, late: NDArray[np.int64]) -> Record:
    """The same means by the linear model, and their limits."""
    chain, data = problem()
    predicted: list[float] = []
    limits: list[float] = []
    for base, several in ((chain, alphas), (independent(chain.nodes), (0.0,))):
        setting = (base, -data, np.eye(_DIMENSION))
        errors = mean_squared_error(*setting, several, EXPONENT, step_exponent, steps)[:, late - 1]
        predicted += (errors * (late + 1.0) ** step_exponent).mean(axis=1).tolist()
        limits += [np.trace(iterate_covariance(*setting, alpha, EXPONENT, step_exponent)) for alpha in several]
    return {"predicted": _floats(predicted), "limit": _floats(limits)}


def _mean_squares(x: Array, runs: int) -> Array:
    """Mean over the runs of each group of |x|^2."""
    squares: Array = (x * x).sum(axis=1).reshape(-1, runs).mean(axis=1)
    return squares


def _floats(values: Iterable[float]) -> list[float]:
    return [drawing.rounded(value) for value in values]


def lines(record: Record) -> list[Line]:
    """Variances over the base chain's, against the linear model at the same number of steps."""
    margin = _MARGINS["full" if len(record["alphas"]) == len(ALPHAS) else "quick"]
    alphas = ", ".join(f"{alpha:g}" for alpha in record["alphas"][1:])
    result = []
    for exponent, found in record["sgd"].items():
        measured, predicted = found["measured"], found["predicted"]
        result.append(
            Line(
                f"step sizes n^-{exponent}: variance over the base chain's, alpha = {alphas}",
                _ratios(predicted),
                _ratios(measured),
                _agree(measured, predicted, margin),
            )
        )
    first = record["sgd"][f"{STEP_EXPONENTS[0]:g}"]
    predicted, measured = (_first_to_beat_draws(record["alphas"], first[kind]) for kind in ("predicted", "measured"))
    result.append(Line("the same: independent draws are beaten from", predicted, measured, predicted == measured))
    measured, limit = record["measure"]["measured"], record["measure"]["limit"]
    what = f"variance of the measure of visits over gamma, alpha = 0, {alphas}"
    result.append(Line(what, _list(limit), _list(measured), _agree(measured, limit, margin)))
    return result


def draw(figure: "Figure", record: Record) -> None:
    """Errors over steps, and variances over alpha."""
    figure.set_size_inches(11, 4.2)
    over_steps, over_alpha = figure.subplots(1, 2)
    title = f"Karate club, step sizes n^-{STEP_EXPONENTS[0]:g}, {record['runs']} runs"
    drawing.plot(over_steps, record["curves"], xscale="log", ylabel="mean squared distance", title=title)
    places = range(len(record["alphas"]))
    for (exponent, found), colour in zip(record["sgd"].items(), drawing.COLOURS, strict=False):
        over_alpha.plot(places, found["predicted"][: len(places)], color=colour, linewidth=1)
        over_alpha.plot(places, found["measured"][: len(places)], "o", color=colour, label=f"step sizes n^-{exponent}")
        over_alpha.axhline(found["predicted"][-1], color=colour, linestyle=":", linewidth=1)
    over_alpha.set_xticks(places, [f"{alpha:g}" for alpha in record["alphas"]])
    drawing.tidy(
        over_alpha,
        yscale="log",
        xlabel="alpha",
        ylabel="mean squared distance over step size",
        title="Dots: measured; lines: predicted; dotted: independent draws",
    )


def _ratios(values: list[float]) -> str:
    """Of all alphas but the first, over the first; the last value is that of independent draws."""
    return _list([value / values[0] for value in values[1:-1]])


def _list(values: Iterable[float]) -> str:
    return ", ".join(f"{value:.2g}" for value in values)


def _agree(measured: list[float], expected: list[float], margin: float) -> bool:
    return all(abs(one / other - 1) < margin for one, other in zip(measured, expected, strict=True))


def _first_to_beat_draws(alphas: list[float], values: list[float]) -> str:
    better = [alpha for alpha, value in zip(alphas, values, strict=False) if value < values[-1]]
    return f"alpha = {better[0]:g}" if better else "none"


CLAIM = Claim(
    "walk",
    "The iterate of token SGD varies less the more its walk avoids where it has been, as predicted",
    run,
    draw,
    lines,
)
