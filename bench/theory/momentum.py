"""Claim: with small batches EF21 keeps an error that no step size removes, and a momentum removes it."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradwire.bench.theory import drawing
from gradwire.bench.theory.claim import Claim, Line, Record
from gradwire.bench.theory.network import Network
from gradwire.bench.theory.problems import Gradients, communicator, descend
from gradwire.comm import EF21, EF21SGDM, EControl, ErrorFeedback
from gradwire.compression import ChunkTopK, Compressor, Identity

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LRS, QUICK_LRS = (1e-2, 3e-3, 1e-3), (3e-2, 1e-2, 3e-3)
NETWORK_LRS, QUICK_NETWORK_LRS = (0.2, 0.1, 0.05), (0.5, 0.2)
VARIANCE = 1.0
"""Of the noise below."""

_NOISE = ((2.0, 0.0), (0.0, 1.0), (-2.0, -1.0))  # drawn evenly, times sqrt(0.3)
_RUNS, _WORKERS, _BATCH = 32, 10, 4
_MOMENTUM = {"EF21SGDM, eta = 0.1": EF21SGDM(eta=0.1), "EF21SGDM, eta = 0.01": EF21SGDM(eta=0.01)}
_TOP_1: dict[str, ErrorFeedback] = {"EF21": EF21(), **_MOMENTUM, "EControl": EControl(eta=0.25)}
_TOP_PERCENT: dict[str, ErrorFeedback] = {"EF21": EF21(), "EF21SGDM, eta = 0.1": EF21SGDM(eta=0.1)}


def gradients(rows: int) -> Gradients:
    """Of f(x) = |x|^2 / 2 in two dimensions, each row with its own noise of three points; one worker."""
    generator = torch.Generator().manual_seed(0)
    noise = 0.3**0.5 * torch.tensor(_NOISE, dtype=torch.float64)
    return lambda x: x + noise[torch.randint(len(noise), (rows,), generator=generator)]


def run(quick: bool) -> Record:
    """The example, all step sizes at once; and a network on digits, all step sizes at once."""
    lrs, steps = (QUICK_LRS, 500) if quick else (LRS, 5000)
    record: Record = {"quick": quick, "lrs": list(lrs), "steps": steps, "floors": {}}
    for name, feedback in ({"SGD": None} | _TOP_1).items():
        record["floors"][name] = _floors(feedback, lrs, steps)
    network_lrs, network_steps, hidden = (QUICK_NETWORK_LRS, 120, 16) if quick else (NETWORK_LRS, 1500, 32)
    network = Network(_WORKERS, _BATCH, hidden)
    record |= {"network_lrs": list(network_lrs), "network_steps": network_steps, "losses": {}, "curves": {}}
    for name, feedback in ({"SGD": None} | _TOP_PERCENT).items():
        losses = _train(network, feedback, network_lrs, network_steps)
        record["losses"][name] = [drawing.rounded(loss) for loss in losses[-len(losses) // 8 :].mean(dim=0)]
        record["curves"][name] = [drawing.curve(losses[:, run], every=20) for run in range(len(network_lrs))]
    record["parameters"] = network.parameters
    return record


def lines(record: Record) -> list[Line]:
    """Floors and losses over those of SGD, which compresses nothing."""
    lrs, floors, losses = record["lrs"], record["floors"], record["losses"]
    full = not record["quick"]
    theory = lrs[0] * VARIANCE / (2 - lrs[0])
    first = floors["SGD"][0] / theory
    over = {name: [floor / least for floor, least in zip(floors[name], floors["SGD"], strict=True)] for name in floors}
    parts = [
        Line(
            f"squared gradient of SGD over lr sigma^2 / (2 - lr), lr = {lrs[0]:g}",
            "1",
            f"{first:.2f}",
            abs(first - 1) < (0.1 if full else 0.2),
        ),
        Line(
            f"EF21 over SGD, lr = {', '.join(f'{lr:g}' for lr in lrs)}",
            "grows as lr falls",
            _listed(over["EF21"]),
            over["EF21"] == sorted(over["EF21"]) and over["EF21"][-1] > (8 if full else 2),
        ),
    ]
    for name, bound in (("EF21SGDM, eta = 0.01", 1.1 if full else 1.3), ("EControl", 1.1)):
        parts.append(
            Line(f"{name}, over SGD", "1", _listed(over[name]), all(1 / bound < x < bound for x in over[name]))
        )
    for name, expected, low, high in (
        ("EF21", "far above 1", 10, float("inf")),
        ("EF21SGDM, eta = 0.1", "near 1", 0.8, 1.25 if full else 2.5),
    ):
        found = [loss / least for loss, least in zip(losses[name], losses["SGD"], strict=True)]
        holds = low < max(found) and (high == float("inf") or all(low < ratio < high for ratio in found))
        what = f"digits, loss of {name} over SGD, lr = {', '.join(f'{lr:g}' for lr in record['network_lrs'])}"
        parts.append(Line(what, expected, _listed(found), holds))
    return parts


def draw(figure: "Figure", record: Record) -> None:
    """Floors over step sizes; losses over steps."""
    figure.set_size_inches(11, 4.2)
    floors, digits = figure.subplots(1, 2)
    for colour, (name, values) in zip(drawing.COLOURS, record["floors"].items(), strict=False):
        floors.plot(record["lrs"], values, marker="o", markersize=4, color=colour, label=name)
    scales = {"xscale": "log", "yscale": "log"}
    drawing.tidy(
        floors,
        **scales,
        xlabel="step size",
        ylabel="squared gradient that is left",
        title="Two dimensions, Top-1, batch 1",
    )
    drawing.plot(
        digits,
        {name: curves[0] for name, curves in record["curves"].items()},
        ylabel="loss on all digits",
        title=f"Digits dealt by label, {record['parameters']:,} weights, Top-1 %, batch {_BATCH}, "
        f"lr = {record['network_lrs'][0]:g}",
    )


def _floors(feedback: ErrorFeedback | None, lrs: tuple[float, ...], steps: int) -> list[float]:
    """Mean |grad f|^2 of the second half of all runs, for every step size."""
    lr = torch.tensor(lrs, dtype=torch.float64).repeat_interleave(_RUNS)[:, None]
    compressor: Compressor = Identity() if feedback is None else ChunkTopK(k=1, chunk=2)
    average, start = communicator(compressor, feedback, workers=1), torch.zeros(len(lr), 2, dtype=torch.float64)
    _, errors = descend(average, gradients(len(lr)), start, lr, steps, lambda x: x.square().sum(dim=1), every=10)
    means = errors[len(errors) // 2 :].mean(dim=0).view(len(lrs), _RUNS).mean(dim=1)
    return [drawing.rounded(mean) for mean in means]


def _train(network: Network, feedback: ErrorFeedback | None, lrs: tuple[float, ...], steps: int) -> Tensor:
    """Losses every 20 steps, `[1 + steps // 20, runs]`."""
    d = network.parameters
    compressor: Compressor = Identity() if feedback is None else ChunkTopK(k=max(1, d // 100), chunk=d)
    average = communicator(compressor, feedback, _WORKERS)
    start = network.start().expand(len(lrs), d)
    lr = torch.tensor(lrs, dtype=start.dtype)[:, None]
    return descend(average, network.gradients(), start, lr, steps, network.loss, every=20)[1]


def _listed(ratios: list[float]) -> str:
    return ", ".join(f"{ratio:.3g}" for ratio in ratios)


CLAIM = Claim(
    "momentum", "With small batches EF21 stalls at any step size; EF21SGDM follows SGD", run, draw, lines, data=True
)
