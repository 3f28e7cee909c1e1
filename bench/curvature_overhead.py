"""What MKOR adds to a training step, wherever it is trained."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from gradwire.bench.model import ByteTransformer, nats_per_byte, num_parameters
from gradwire.bench.runs import Record
from gradwire.bench.timing import measure
from gradwire.optim import MKOR

LAYERS, WIDTH, HEADS, CONTEXT = 4, 128, 4, 64
"""Of the model of `gradwire train`."""

VARIANTS: dict[str, dict[str, Any]] = {
    "MKOR(AdamW)": {},
    "MKOR(AdamW, state_dtype=torch.bfloat16)": {"state_dtype": torch.bfloat16},
    "MKOR(AdamW, state_dtype=torch.bfloat16, every=10)": {"state_dtype": torch.bfloat16, "every": 10},
}
"""Whose steps are timed."""

_BLOCK = 10


def overhead(batches: Sequence[int], *, blocks: int, device: str = "cpu") -> Record:
    """Whole training steps with MKOR over those of its base alone, blocks of ten in turns.

    Args:
        batches: Numbers of sequences.
        blocks: Of each, >= 1.
        device: Where.
    """
    ratios: dict[str, dict[str, float]] = {}
    base_ms: dict[str, float] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for batch in batches:
            functions = {"AdamW": _block(batch, None, device)} | {
                name: _block(batch, made, device) for name, made in VARIANTS.items()
            }
            seconds = measure(functions, torch.device(device), lambda found: dict.fromkeys(found, blocks))
            medians = {name: sorted(some)[len(some) // 2] for name, some in seconds.items()}
            base_ms[str(batch)] = round(1e3 * medians["AdamW"] / _BLOCK, 2)
            ratios[str(batch)] = {name: round(medians[name] / medians["AdamW"], 3) for name in VARIANTS}
    finally:
        torch.set_num_threads(threads)
    parameters = num_parameters(ByteTransformer(LAYERS, WIDTH, HEADS))
    return {
        "context": CONTEXT,
        "steps": _BLOCK * blocks,
        "parameters": parameters,
        "base_ms": base_ms,
        "ratios": ratios,
    }


def _block(batch: int, settings: dict[str, Any] | None, device: str) -> Callable[[], None]:
    """Ten training steps with AdamW, or with MKOR around it."""
    torch.manual_seed(0)
    model = ByteTransformer(LAYERS, WIDTH, HEADS).to(device)
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    if settings is not None:
        optimizer = MKOR(model, optimizer, **settings)
    tokens = torch.randint(0, 256, (batch, CONTEXT + 1), device=device)

    def run() -> None:
        for _ in range(_BLOCK):
            nats_per_byte(model(tokens[:, :-1]), tokens[:, 1:]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()

    return run
