"""Every optimizer against implementations by others: 50 steps in float64, kept in tests/golden/*.npz."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import OPTIMIZERS
from golden.make_golden import LR, RUNS, Run, follow, problem

from gradwire import optim

GOLDEN = Path(__file__).parent / "golden"
Array = np.ndarray[Any, Any]


def runs(*, deviating: bool) -> list[Any]:
    return [
        pytest.param(algorithm, number, id=f"{algorithm}-{number}-{run.oracle}")
        for algorithm, some in RUNS.items()
        for number, run in enumerate(some)
        if bool(run.deviates) == deviating
    ]


def golden(algorithm: str, number: int) -> tuple[Run, list[Array]]:
    with np.load(GOLDEN / f"{algorithm.lower()}.npz") as kept:
        run = RUNS[algorithm][number]
        return run, [kept[f"{number}_{i}"] for i in range(len(problem(run)[0]))]


def ours(algorithm: str, run: Run, *, foreach: bool) -> list[Array]:
    """Decaying first and stepping then is stepping first and decaying then, begun one decay later."""
    cls: Callable[..., Any] = getattr(optim, algorithm)
    kwargs = run.kwargs if run.ours is None else run.ours
    kept = 1 - run.decays_last
    final = follow(run, lambda params: cls(params, lr=LR, foreach=foreach, **kwargs), start=1 / kept)
    return [w * kept for w in final]


def errors(run: Run, actual: list[Array], expected: list[Array]) -> list[float]:
    """Greatest differences, relative to the way that the weights went."""
    pairs = zip(actual, expected, problem(run)[0], strict=True)
    return [np.abs(a - e).max() / np.abs(e - start).max() for a, e, start in pairs]


@pytest.mark.parametrize("foreach", [False, True], ids=["loop", "foreach"])
@pytest.mark.parametrize(("algorithm", "number"), runs(deviating=False))
def test_equals_the_package(algorithm: str, number: int, foreach: bool) -> None:
    run, expected = golden(algorithm, number)
    actual = ours(algorithm, run, foreach=foreach)
    assert max(errors(run, actual, expected)) < 1e-11


@pytest.mark.parametrize(("algorithm", "number"), runs(deviating=True))
def test_equals_the_reference_where_the_package_deviates(algorithm: str, number: int) -> None:
    run, deviating = golden(algorithm, number)
    actual = ours(algorithm, run, foreach=False)
    weights, gradients, lrs = problem(run)
    reference = next(case.reference for case in OPTIMIZERS if case.cls.__name__ == algorithm)
    kwargs = run.kwargs if run.ours is None else run.ours
    expected = [
        reference(w, list(g), lrs, **kwargs) for w, g in zip(weights, zip(*gradients, strict=True), strict=True)
    ]
    assert max(errors(run, actual, expected)) < 1e-11
    assert max(errors(run, deviating, expected)) > 1e-6, run.deviates


def test_every_algorithm_is_compared() -> None:
    elsewhere = {"Adafactor"}  # tests/test_adafactor.py
    assert {case.cls.__name__ for case in OPTIMIZERS} == RUNS.keys() | elsewhere
