"""Text as bytes: the Python standard library's own source, or any files, and batches of it; and images of digits."""

import hashlib
import importlib
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from gradwire.bench.errors import UsageError
from gradwire.compression import counter_rng

_EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_VALIDATION_SHARE = 20  # one part in this many is held out


@final
@dataclass(frozen=True, eq=False)
class Corpus:
    """Bytes to train on and bytes held out.

    Args:
        name: What the text is.
        train: `[n]` uint8.
        validation: `[m]` uint8.
    """

    name: str
    train: Tensor
    validation: Tensor

    @property
    def digest(self) -> str:
        """A hash of both parts: two runs are comparable only on equal text."""
        both = hashlib.blake2b(digest_size=8)
        for part in (self.train, self.validation):
            both.update(part.numpy().tobytes())
        return both.hexdigest()

    def batch(self, seed: int, step: int, rank: int, batch: int, context: int) -> tuple[Tensor, Tensor]:
        """Inputs and next bytes `[batch, context]` int64: a pure function of the arguments, so a resumed run agrees."""
        keys = counter_rng.row_keys(counter_rng.fold("batch", seed, step, rank), batch)
        return self._windows(self.train, keys % (self.train.numel() - context), context)

    def held_out(self, windows: int, context: int, rank: int, world_size: int) -> tuple[Tensor, Tensor]:
        """This rank's share of evenly spaced held-out windows, the same for every run: inputs and next bytes."""
        last = self.validation.numel() - context - 1
        starts = torch.linspace(0, last, windows, dtype=torch.float64).long()
        return self._windows(self.validation, starts[rank::world_size], context)

    @staticmethod
    def _windows(text: Tensor, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
        window = text[starts[:, None] + torch.arange(context + 1)].long()
        return window[:, :-1], window[:, 1:]


def standard_library() -> Corpus:
    """The `*.py` source of the running interpreter's standard library, without its tests.

    A file is held out if a hash of its path says so: about one in 20, the same ones on every machine.
    """
    root = Path(sysconfig.get_path("stdlib"))
    train: list[bytes] = []
    validation: list[bytes] = []
    for path in sorted(python_files(root)):
        name = path.relative_to(root).as_posix()
        held_out = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) % _VALIDATION_SHARE == 0
        (validation if held_out else train).append(path.read_bytes())
    return Corpus("Python standard library", _tensor(train), _tensor(validation))


def files(paths: Sequence[Path], context: int) -> Corpus:
    """Any files; the last twentieth of each, but at least one window, is held out.

    Raises:
        UsageError: a file is missing or too short.
    """
    train, validation = [], []
    for path in paths:
        if not path.is_file():
            raise UsageError(f"--data: expected a file, got {str(path)!r}.")
        text = path.read_bytes()
        cut = len(text) - max(len(text) // _VALIDATION_SHARE, context + 1)
        if cut <= context:
            raise UsageError(
                f"--data: expected at least {2 * context + 2} bytes, got {len(text)} in {str(path)!r}. "
                "Use a smaller --context or join small files."
            )
        train.append(text[:cut])
        validation.append(text[cut:])
    return Corpus(", ".join(path.name for path in paths), _tensor(train), _tensor(validation))


def python_files(root: Path) -> Iterator[Path]:
    """All `*.py` files below a folder, but for tests and packages that were installed."""
    for path in root.iterdir():
        if path.is_dir():
            if path.name not in _EXCLUDED:
                yield from python_files(path)
        elif path.suffix == ".py":
            yield path


def _tensor(texts: Sequence[bytes]) -> Tensor:
    return torch.frombuffer(bytearray(b"".join(texts)), dtype=torch.uint8)


def digits(who: str, instead: str = "") -> tuple[Tensor, Tensor]:
    """scikit-learn's images of digits, `[n, 64]` float32 in [0, 1], and what they show, `[n]` int64.

    Args:
        who: Asks, for the error.
        instead: What can be done without them, for the error.

    Raises:
        UsageError: scikit-learn is not installed.
    """
    try:
        load_digits = importlib.import_module("sklearn.datasets").load_digits
    except ImportError:
        raise UsageError(
            f"{who}: expected scikit-learn for its digits, found none. Install it: pip install scikit-learn{instead}."
        ) from None
    found = load_digits()
    return torch.tensor(found.data, dtype=torch.float32) / 16, torch.tensor(found.target, dtype=torch.int64)
