"""`gradwire bench compression`: the speed of every compressor with feedback, against a copy of the same memory.

Encoding is what a communicator does before it sends: add the residual, compress, keep what is lost. Decoding rebuilds
the tensor from a payload. Both write to buffers that exist already, since on a CPU the first touch of fresh memory
costs several times more than the arithmetic. Encoding is the communicator's own code. Times are medians of rounds in
which all forms take turns with the copy.
"""

import functools
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, final

import torch
from torch import Tensor

from gradwire.bench import machine
from gradwire.bench.compression_rivals import Candidate, Functions, candidates
from gradwire.bench.timing import measure
from gradwire.comm import EF
from gradwire.comm.encoder import Encoder, encode_kernel
from gradwire.compression import (
    DARE,
    QSGD,
    BlockQuantize,
    Cast,
    Chain,
    ChunkTopK,
    Compressor,
    DAREx,
    DCTTopK,
    Identity,
    NaturalCompression,
    RandomDithering,
    RandomK,
    Scaled,
    ScaledSign,
    TernGrad,
    ThresholdTopK,
    TopK,
    counter_rng,
)
from gradwire.compression.fused import fuse

if TYPE_CHECKING:
    from rich.table import Table  # `make gpu-check` measures without it

_DENSITY = 1 / 128  # of every sparsifier, so that they compare
COMPRESSORS: tuple[Compressor, ...] = (
    Identity(),
    Cast("bfloat16"),
    Cast("float16"),
    Cast("bfloat16", stochastic=True),
    Cast("float8_e4m3fn"),
    Cast("float8_e5m2"),
    BlockQuantize(bits=8),
    BlockQuantize(bits=8, stochastic=True),
    BlockQuantize(bits=4),
    BlockQuantize(bits=2),
    QSGD(),
    RandomDithering(),
    TernGrad(),
    NaturalCompression(),
    Scaled(TernGrad()),
    ScaledSign(),
    TopK(_DENSITY),
    ThresholdTopK(_DENSITY),
    ChunkTopK(k=32, chunk=4096),
    RandomK(k=32, chunk=4096, unbiased=False),
    DARE(drop=1 - _DENSITY),
    DAREx(drop=1 - _DENSITY),
    DCTTopK(k=32),
    DCTTopK(k=32, values="sign"),
    Chain(ChunkTopK(k=32, chunk=4096), BlockQuantize(bits=8, block=32)),
)
_FEEDBACK = EF()
_EAGER_BLOCK = 1 << 18  # entries that are decoded at a time
_ROUNDS = 7
_TABLE_WIDTH = 110
_COLUMNS = 4096  # of the matrix that the tensor is to those which look at its shape
_SLOW = 0.5  # seconds from which a candidate gets two rounds only


@dataclass(frozen=True)
class Result:
    """The speed of one candidate.

    Args:
        name: A compressor, or what of torch it is.
        source: "gradwire" or "torch".
        compression_rate: Bytes of the float32 tensor over bytes of the payload.
        copy_s: Seconds of the copy measured in the same rounds.
        seconds: Seconds by stage and form: "encode eager", "decode fused", ...
        bandwidth: Share of the copy's bytes per second that the stage attains, counting what it must read and write.
    """

    name: str
    source: str
    compression_rate: float
    copy_s: float
    seconds: dict[str, float]
    bandwidth: dict[str, float]

    def ratio(self, stage: str) -> float | None:
        """Throughput as a ratio to the copy's; both take the same input."""
        return self.copy_s / self.seconds[stage] if stage in self.seconds else None


def run(
    numel: int = 2**24,
    *,
    fused: bool = True,
    device: str = "cpu",
    compressors: Sequence[Compressor] = COMPRESSORS,
    rivals: bool = True,
    progress: Callable[[str], None] = lambda name: None,
) -> list[Result]:
    """Measure on `numel` Gaussian float32 entries.

    Args:
        numel: Entries of the tensor, >= 1.
        fused: Measure the compiled form, too.
        device: Where.
        compressors: What to measure.
        rivals: Measure torch's own equivalents and PowerSGD, too.
        progress: Called with the name of what is measured next.
    """
    x = torch.randn(numel, device=device, generator=torch.Generator(device).manual_seed(0))
    results = []
    for compressor in compressors:
        progress(label(compressor))
        functions: Functions = {}
        for form in ("fused", "eager") if fused else ("eager",):
            subject = Subject(compressor, x, fused=form == "fused")
            functions |= {f"encode {form}": subject.encode, f"decode {form}": subject.decode}
        nbytes = compressor.payload_bytes(x.shape, x.dtype)
        results.append(_result(Candidate(label(compressor), "gradwire", nbytes, functions), x))
    if rivals:
        with candidates(x, _DENSITY) as others:
            for other in others:
                progress(other.name)
                results.append(_result(other, x))
    return results


def main(numel: int = 2**24, fused: bool = True, output: Path | None = None, device: str = "cpu") -> None:
    """Measure, print a table, and write JSON to `output` if given."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:  # a file has no width; the table has
        console = Console(width=_TABLE_WIDTH)
    with console.status("starting") as status:

        def progress(name: str) -> None:
            status.update(f"measuring {name}")
            if not console.is_terminal:
                console.print(f"measuring {name}", markup=False)

        results = run(numel, fused=fused, device=device, progress=progress)
    console.print(table(results, numel))
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(record(results, numel, device), indent=1) + "\n")
        console.print(f"written to {output}")


def record(results: Sequence[Result], numel: int, device: str) -> dict[str, Any]:
    """The JSON form of a measurement."""
    return {
        "benchmark": "compression",
        "machine": machine.describe(device),
        "numel": numel,
        "results": [vars(result) | {"ratio": {s: result.ratio(s) for s in result.seconds}} for result in results],
    }


def table(results: Sequence[Result], numel: int) -> "Table":
    """Throughput over that of a copy, for a terminal."""
    from rich.table import Table

    copy_s = statistics.median(result.copy_s for result in results)
    rendered = Table(
        title=f"{numel:,} float32 entries: throughput relative to a copy ({4 * numel / copy_s / 1e9:.1f} GB/s)",
        caption="encode: add residual, compress, keep what is lost. torch's quantisation and bf16 keep no residual.",
    )
    rendered.add_column("compressor", min_width=36)
    rendered.add_column("rate", justify="right")
    stages = ("encode fused", "encode eager", "decode fused", "decode eager")
    for stage in stages:
        rendered.add_column(stage, justify="right")
    for result in results:
        name = result.name if result.source == "gradwire" else f"[dim]torch:[/dim] {result.name}"
        ratios = [result.ratio(stage) for stage in stages]
        cells = ["" if ratio is None else f"{ratio:.3f}" for ratio in ratios]
        rendered.add_row(name, f"{result.compression_rate:.1f}", *cells)
    return rendered


def label(compressor: Compressor) -> str:
    """The repr without what is at its default, but for the first argument."""
    values = []
    for position, field in enumerate(fields(cast(Any, compressor))):
        value = getattr(compressor, field.name)
        if position == 0 or value != field.default:
            values.append(label(value) if isinstance(value, Compressor) else f"{field.name}={value!r}")
    return f"{type(compressor).__name__}({', '.join(values)})"


@final
class Subject:
    """A compressor bound to a tensor: encoding and decoding from and to buffers that exist already.

    Args:
        compressor: What is measured.
        x: The tensor.
        fused: Compile.
    """

    def __init__(self, compressor: Compressor, x: Tensor, *, fused: bool) -> None:
        if compressor.changes_basis and x.numel() % _COLUMNS == 0:
            x = x.view(-1, _COLUMNS)  # a vector would be transformed along its lines alone
        tile = compressor.tile(x.shape)
        self.rows = compressor.to_rows(x)
        self.residual, self.new_residual, self.out = (torch.zeros_like(self.rows) for _ in range(3))
        count, width = self.rows.shape
        self.keys = None if compressor.randomness == "none" else counter_rng.row_keys(0, count, x.device)
        kernel = encode_kernel(compressor, _FEEDBACK, fused=fused)
        layout = compressor.layout(width, x.dtype)
        transform = self._inverse = None
        if compressor.changes_basis:
            transform = functools.partial(compressor.transform_rows, tile=tile)
            self._inverse = functools.partial(compressor.inverse_transform_rows, tile=tile)
        self._encoder = Encoder(kernel, layout, count, width, x.dtype, x.device, fused=fused, transform=transform)
        self.parts = self.encode()

        def decode(parts: Sequence[Tensor], keys: Tensor | None, out: Tensor) -> None:
            out.copy_(compressor.decompress_rows(tuple(parts), width, keys))

        self._decode = fuse(decode) if fused else decode
        whole = fused or x.device.type != "cpu"  # eager, a block's temporaries stay in the cache
        step = count if whole else max(1, _EAGER_BLOCK // width)
        self._blocks = [slice(start, start + step) for start in range(0, count, step)]

    def encode(self) -> tuple[Tensor, ...]:
        """Rows and residual to parts and new residual, as a communicator does it."""
        state, new = {"residual": self.residual}, {"residual": self.new_residual}
        parts, _ = self._encoder.encode(self.rows, self.keys, state, new)
        return parts

    def decode(self) -> None:
        """Parts to `out`."""
        for block in self._blocks:
            keys = None if self.keys is None else self.keys[block]
            self._decode([part[block] for part in self.parts], keys, self.out[block])
            if self._inverse is not None:
                self.out[block].copy_(self._inverse(self.out[block]))


def _result(candidate: Candidate, x: Tensor) -> Result:
    copied = torch.empty_like(x)
    functions = {"copy": lambda: copied.copy_(x), **candidate.functions}
    seconds = {name: statistics.median(spans) for name, spans in measure(functions, x.device, _rounds).items()}
    copy_s = seconds.pop("copy")
    dense = 4 * x.numel()
    moved = {"encode": 3 * dense + candidate.nbytes, "decode": dense + candidate.nbytes}  # encode: x, residual, new one
    bandwidth = {stage: moved[stage.split()[0]] / time_s * copy_s / (2 * dense) for stage, time_s in seconds.items()}
    return Result(candidate.name, candidate.source, dense / candidate.nbytes, copy_s, seconds, bandwidth)


def _rounds(seconds: dict[str, float]) -> dict[str, int]:
    return {name: _ROUNDS if value < _SLOW else 2 for name, value in seconds.items()}
