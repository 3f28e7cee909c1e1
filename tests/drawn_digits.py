"""Data for tests of `gradwire federate`: a scikit-learn whose digits are drawn here, and a folder of texts."""

import types
from pathlib import Path
from typing import Any

import numpy as np

PARAMETERS = 64 * 32 + 32 + 32 * 10 + 10


class Sklearn(types.ModuleType):
    """Digits that are as many as the real ones, ten noisy pictures."""

    @staticmethod
    def load_digits() -> Any:
        rng = np.random.default_rng(0)
        target = rng.integers(0, 10, 1797)
        pictures = rng.integers(0, 17, (10, 64))
        images = np.clip(pictures[target] + rng.normal(0, 3, (1797, 64)), 0, 16)
        return types.SimpleNamespace(data=images, target=target)


def write_texts(path: Path) -> None:
    """Six clients, each with a text of its own."""
    path.mkdir()
    for number in range(6):
        (path / f"client-{number}.txt").write_text(f"{number}: the quick brown fox jumps over {number} dogs.\n" * 20)
    (path / ".hidden").write_text("x")
