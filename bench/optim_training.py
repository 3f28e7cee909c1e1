"""What an optimizer's step adds to a whole training step, at two numbers of tokens."""

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from gradwire.bench import data
from gradwire.bench.model import ByteTransformer, nats_per_byte, num_parameters
from gradwire.bench.optim_rivals import Candidate

TOKENS = (65_536, 4_096)
"""Of a step: what a large run gives each worker, and what a small one does."""

QUICK_TOKENS = (128, 64)

_LAYERS, _WIDTH, _HEADS, _CONTEXT = 4, 128, 4, 64  # the model of `gradwire train`
_MICRO_TOKENS = 4_096  # of one forward and backward pass; the rest accumulates
_ROUNDS = 5


def training_steps(
    subjects: Sequence[Candidate], reference: Candidate, *, quick: bool = False, device: str = "cpu"
) -> list[dict[str, Any]]:
    """Time forward, backward and the steps of all candidates in turns, on one model.

    Args:
        subjects: What to measure.
        reference: What a training step with them is compared with.
        quick: A tiny model, two rounds.
        device: Where.

    Returns:
        For each candidate and number of tokens: `tokens`, `parameters`, `backward_s` (forward and backward, the
        median), `step_s` (of the optimizer, the median), `ratio` (of a training step to one with the reference, the
        median over rounds), with `source`, `algorithm` and `mode`.
    """
    width, layers = (16, 1) if quick else (_WIDTH, _LAYERS)
    torch.manual_seed(0)
    model = ByteTransformer(layers, width, _HEADS).to(device)
    corpus = data.standard_library()
    made = {candidate: candidate.build(list(model.parameters())) for candidate in (reference, *subjects)}
    results = []
    for tokens in QUICK_TOKENS if quick else TOKENS:
        backwards: list[float] = []
        steps: dict[Candidate, list[float]] = {candidate: [] for candidate in made}
        for turn in range(-1, 2 if quick else _ROUNDS):  # the first one compiles and warms up
            model.zero_grad()
            backward = _seconds(functools.partial(_accumulate, model, corpus, tokens, device), device)
            spans = {candidate: _seconds(optimizer.step, device) for candidate, optimizer in made.items()}
            if turn >= 0:
                backwards.append(backward)
                for candidate, span in spans.items():
                    steps[candidate].append(span)
        for candidate in subjects:
            pairs = zip(backwards, steps[candidate], steps[reference], strict=True)
            results.append(
                {
                    "source": candidate.source,
                    "algorithm": candidate.algorithm,
                    "mode": candidate.mode,
                    "tokens": tokens,
                    "parameters": num_parameters(model),
                    "backward_s": statistics.median(backwards),
                    "step_s": statistics.median(steps[candidate]),
                    "ratio": statistics.median((back + own) / (back + its) for back, own, its in pairs),
                }
            )
    return results


def _accumulate(model: torch.nn.Module, corpus: data.Corpus, tokens: int, device: str) -> None:
    """Gradients of the mean loss over so many tokens."""
    micro = min(tokens, _MICRO_TOKENS)
    for step in range(tokens // micro):
        inputs, targets = corpus.batch(0, step, 0, micro // _CONTEXT, _CONTEXT)
        loss = nats_per_byte(model(inputs.to(device)), targets.to(device))
        (loss * (micro / tokens)).backward()  # type: ignore[no-untyped-call]


def _seconds(work: Callable[[], object], device: str) -> float:
    """Seconds of a call, to its end on the device."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
