"""Claim: where workers' functions differ, EF stalls at a distance, and EControl comes down to SGD's noise floor."""

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradwire.bench.theory import drawing
from gradwire.bench.theory.claim import Claim, Line, Record
from gradwire.bench.theory.problems import Gradients, communicator, descend
from gradwire.comm import EF, EF21, EControl, ErrorFeedback
from gradwire.compression import ChunkTopK, Compressor, Identity

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LRS, QUICK_LRS = (8e-3, 4e-3, 2e-3), (3e-2, 1.5e-2, 7.5e-3)
NOISE, HETEROGENEITY = 0.5, 1000.0
"""Standard deviation of each gradient entry, and the root of the mean of |grad f_i|^2 at the minimum."""

_WORKERS = 10
_SHARES = {"delta/400": 1 / 400, "delta/10": 0.1, "delta/4": 0.25, "delta/2": 0.5, "delta": 1.0, "2 delta": 2.0}
_QUICK = ("delta/400", "delta")
_TOO_MUCH, _TOO_MANY_STEPS = 4, 400


def gradients(d: int, noise: Tensor) -> Gradients:
    """Of f_i(x) = |x|^2 / 2 + <b_i, x>, the b_i adding up to 0; each run with its own noise, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    slopes = torch.randn(_WORKERS, 1, d, generator=generator, dtype=torch.float64)
    slopes -= slopes.mean(dim=0)
    slopes *= HETEROGENEITY / slopes.square().sum(dim=-1).mean().sqrt()
    drawn = (_WORKERS, len(noise), d)
    return lambda x: x + slopes + noise * torch.randn(drawn, generator=generator, dtype=torch.float64)


def run(quick: bool) -> Record:
    """Descend with and without noise from the minimum, at every step size at once."""
    d, kept, steps, lrs = (40, 10, 500, QUICK_LRS) if quick else (200, 20, 4000, LRS)
    delta, sparse = kept / d, ChunkTopK(k=kept, chunk=d)
    methods: dict[str, tuple[Compressor, ErrorFeedback | None]] = {
        "SGD": (Identity(), None),
        "EF": (sparse, EF()),
        "EF21": (sparse, EF21()),
    }
    for name in _QUICK if quick else _SHARES:
        methods[name] = (sparse, EControl(eta=_SHARES[name] * delta))
    record: Record = {"quick": quick, "dimension": d, "delta": delta, "steps": steps, "lrs": list(lrs)}
    record |= {"floors": {}, "exact": {}, "curves": {}}
    for name, (compressor, feedback) in methods.items():
        errors = _errors(compressor, feedback, d, lrs, steps)
        record["floors"][name] = _floats(errors[len(errors) // 3 :, : len(lrs)].mean(dim=0))
        record["exact"][name] = _floats(errors[-(len(errors) // 10) :, len(lrs) :].mean(dim=0))
        if name in ("SGD", "EF", "EF21", "delta"):
            record["curves"][name] = drawing.curve(_averaged(errors[1:, len(lrs) - 1], 50), every=50)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of an eta that can diverge, which it is to do
        errors = _errors(sparse, EControl(eta=_TOO_MUCH * delta), d, lrs, min(steps, _TOO_MANY_STEPS))
    record["too_much"] = [drawing.rounded(errors[place, len(lrs)]) for place in (len(errors) // 2, -1)]
    return record


def lines(record: Record) -> list[Line]:
    """What is left, over what SGD leaves."""
    floors, exact, sgd = record["floors"], record["exact"], record["floors"]["SGD"]
    halved = [low / high for high, low in zip(exact["EF"], exact["EF"][1:], strict=False)]
    stalled = floors["EF"][-1] / sgd[-1]
    reached = [floor / least for floor, least in zip(floors["delta"], sgd, strict=True)]
    noisy = floors["delta/400"][-1] / floors["EF21"][-1]
    later, last = record["too_much"]
    highest, spread = (1.4, 0.5) if record["quick"] else (1.25, 0.2)
    return [
        Line(
            "no noise: error of EF after halving the step size",
            "0.25 times",
            ", ".join(f"{ratio:.3f}" for ratio in halved),
            all(abs(ratio - 0.25) < 0.02 for ratio in halved),
        ),
        Line("no noise: error of EControl", "0", f"{exact['delta'][0]:.0e}", exact["delta"][0] < _nothing(record)),
        Line(f"noise: EF over SGD, step size {record['lrs'][-1]:g}", "far above 1", f"{stalled:.0f}", stalled > 20),
        Line(
            f"noise: EControl over SGD, step sizes {', '.join(f'{lr:g}' for lr in record['lrs'])}",
            "falls to 1",
            ", ".join(f"{ratio:.2f}" for ratio in reached),
            reached[0] > reached[-1] and 1 / 1.1 < reached[-1] < highest,
        ),
        Line(
            "noise: EControl with eta = delta/400 over EF21",
            "near 1",
            f"{noisy:.2f}",
            abs(noisy - 1) < spread,
        ),
        Line(
            f"no noise: EControl with eta = {_TOO_MUCH} delta",
            "diverges",
            f"{later:.0e}, then {last:.0e}",
            last > 10 * later > floors["delta"][0],
        ),
    ]


def draw(figure: "Figure", record: Record) -> None:
    """Errors over steps, and the effect of eta."""
    figure.set_size_inches(11, 4.2)
    over_steps, over_eta = figure.subplots(1, 2)
    labels = {"SGD": "SGD, nothing compressed", "delta": "EControl, eta = delta"}
    curves = {labels.get(name, name): line for name, line in record["curves"].items()}
    drawing.plot(over_steps, curves, ylabel="squared distance", title=f"With noise, step size {record['lrs'][-1]:g}")
    shares = [name for name in _SHARES if name in record["floors"]]
    for place, (lr, colour) in enumerate(zip(record["lrs"], drawing.COLOURS, strict=False)):
        sgd = record["floors"]["SGD"][place]
        ratios = [record["floors"][name][place] / sgd for name in shares]
        over_eta.plot([_SHARES[name] for name in shares], ratios, marker="o", color=colour, label=f"step size {lr:g}")
        over_eta.axhline(record["floors"]["EF21"][place] / sgd, color=colour, linestyle=":", linewidth=1)
    over_eta.axhline(1, color=drawing.COLOURS[7], linewidth=0.8)
    title = f"EControl; dotted: EF21. At {_TOO_MUCH} delta it diverges"
    drawing.tidy(over_eta, xscale="log", yscale="log", xlabel="eta / delta", ylabel="error over SGD's", title=title)


def _errors(compressor: Compressor, feedback: ErrorFeedback | None, d: int, lrs: Sequence[float], steps: int) -> Tensor:
    """Squared distances `[1 + steps, runs]`: every step size with noise, then without."""
    lr = torch.tensor([*lrs, *lrs], dtype=torch.float64)[:, None]
    noise = torch.tensor([NOISE] * len(lrs) + [0.0] * len(lrs), dtype=torch.float64)[:, None]
    average = communicator(compressor, feedback, _WORKERS)
    start = torch.zeros(len(lr), d, dtype=torch.float64)
    return descend(average, gradients(d, noise), start, lr, steps, lambda x: x.square().sum(dim=1))[1]


def _nothing(record: Record) -> float:
    """Below which an error counts as none: ten times what plain descent leaves of the first steps' error."""
    lr, steps = record["lrs"][0], record["steps"]
    return float(max(1e-18, 10 * (1 - lr) ** (2 * 0.9 * steps) * HETEROGENEITY**2))


def _averaged(values: Tensor, window: int) -> Tensor:
    return values[: len(values) // window * window].view(-1, window).mean(dim=1)


def _floats(values: Tensor | Sequence[float]) -> list[float]:
    return [drawing.rounded(value) for value in values]


CLAIM = Claim("econtrol", "EControl reaches the noise floor of SGD where EF stalls", run, draw, lines)
