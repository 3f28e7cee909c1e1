"""What `gradwire bench optim` steps: lists of parameters, and one candidate on them in a process of its own.

A process of its own has two uses: its first step compiles whatever the disk cache does not hold, and the high-water
mark of its memory is that of the candidate alone.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gradwire.bench.optim_rivals import RIVALS, Candidate, candidates

_COPIED = 1 << 25  # entries at most, of the copy whose speed is the floor
_PASSES = {"AdamP": 8, "SGDP": 8, "Adafactor": 12, "LAMB": 12, "OneBitLAMB": 12}
_TIMEOUT = 900  # seconds


@dataclass(frozen=True)
class Case:
    """A list of parameters to step.

    Args:
        title: What a person reads.
        shapes: Of the parameters.
    """

    title: str
    shapes: tuple[tuple[int, ...], ...]

    @property
    def numel(self) -> int:
        """Entries of all parameters."""
        return sum(torch.Size(shape).numel() for shape in self.shapes)


def _gpt2(layers: int, width: int, vocabulary: int, context: int) -> tuple[tuple[int, ...], ...]:
    """A GPT-2 whose output layer shares the embedding's weight."""

    def linear(inputs: int, outputs: int) -> list[tuple[int, ...]]:
        return [(outputs, inputs), (outputs,)]

    norm: list[tuple[int, ...]] = [(width,), (width,)]
    attention = [*linear(width, 3 * width), *linear(width, width)]
    mlp = [*linear(width, 4 * width), *linear(4 * width, width)]
    return ((vocabulary, width), (context, width), *(norm + attention + norm + mlp) * layers, *norm)


CASES = {
    "matrix": Case("4096x4096", ((4096, 4096),)),
    "gpt2": Case("GPT-2 small", _gpt2(12, 768, 50257, 1024)),
    "small": Case("300 of 4096", ((4096,),) * 150 + ((64, 64),) * 150),
}
QUICK_CASES = {
    "matrix": Case("64x64", ((64, 64),)),
    "gpt2": Case("tiny GPT-2", _gpt2(1, 32, 64, 16)),
    "small": Case("4 of 64", ((64,),) * 2 + ((8, 8),) * 2),
}


@final
class Workload:
    """Parameters and gradients of one case, which all optimizers share, torch's fused AdamW, and a copy.

    Args:
        case: The shapes.
        device: Where.
    """

    def __init__(self, case: Case, device: str) -> None:
        self.case = case
        self.device = torch.device(device)
        generator = torch.Generator(device).manual_seed(0)

        def tensors(scale: float) -> list[Tensor]:
            return [torch.randn(shape, generator=generator, device=device) * scale for shape in case.shapes]

        self._weights, self._grads = tensors(0.1), tensors(0.01)
        self._from, self._to = torch.ones(2, min(case.numel, _COPIED), device=device).unbind()  # zeros have no memory
        self.reference = torch.optim.AdamW(self.parameters(), fused=True)

    def parameters(self) -> list[nn.Parameter]:
        """New parameters with gradients, in the memory that all share."""
        params = [nn.Parameter(weight) for weight in self._weights]
        for param, grad in zip(params, self._grads, strict=True):
            param.grad = grad
        return params

    def copy(self) -> None:
        """Copy memory to memory."""
        self._to.copy_(self._from)

    @property
    def copied(self) -> int:
        """Bytes that a copy reads and writes."""
        return 2 * self._to.nbytes


def moved_bytes(algorithm: str, optimizer: torch.optim.Optimizer) -> int:
    """Bytes that a step must move at least: gradients read, weights and state read and written.

    What depends on a sum over a whole row or tensor needs a second pass: AdamP and SGDP read weights and gradients
    again; Adafactor reads gradients three times and weights twice; LAMB reads weights and moments again.
    """
    weights = _weight_bytes(optimizer)
    return 3 * weights + 2 * state_bytes(optimizer) + _PASSES.get(algorithm, 0) * weights // 4


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all state tensors, each counted once; with those of the communicator of an optimizer that has one."""
    communicator = getattr(optimizer, "communicator", None)
    kept = dict(optimizer.state), communicator.state_rows() if communicator is not None else {}
    tensors = [leaf for leaf in tree_leaves(kept) if isinstance(leaf, Tensor)]
    return sum({(x.data_ptr(), x.nbytes): x.nbytes for x in tensors}.values())


def _weight_bytes(optimizer: torch.optim.Optimizer) -> int:
    weights: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
    return sum(p.nbytes for p in weights)


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Bytes allocated at the peak of a call, above what was allocated before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status("VmRSS")
    function()
    return _status("VmHWM") - before


def peak_share(optimizer: torch.optim.Optimizer, device: torch.device) -> float:
    """Peak of a step above weights, gradients and state, as a share of them."""
    peak = peak_bytes(optimizer.step, device)
    return peak / (2 * _weight_bytes(optimizer) + state_bytes(optimizer))


def step_alone(
    candidate: Candidate, case: str, *, quick: bool, device: str, cache: str | None = None
) -> dict[str, float]:
    """Step a candidate in a process of its own.

    Args:
        candidate: What to step; the process finds it by its name.
        case: A name in `CASES`.
        quick: Take `QUICK_CASES`.
        device: Where.
        cache: A folder for what the compiler keeps, in place of the usual one.

    Returns:
        `first_step_s` and `peak_share`.

    Raises:
        RuntimeError: The process failed; with the last line that it printed.
    """
    said = {"name": candidate.name, "case": case, "quick": quick, "device": device, "threads": torch.get_num_threads()}
    # With a fixed threshold the C library gives memory back as soon as it is freed, so that the mark is exact.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    if cache is not None:
        environment |= {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": f"{cache}/triton"}
    command = [sys.executable, "-P", "-m", __name__, json.dumps(said)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    if done.returncode != 0:
        raise RuntimeError(lines[-1] if lines else f"ended with {done.returncode}")
    result: dict[str, float] = json.loads(lines[-1])
    return result


def _alone(said: dict[str, Any], among: Sequence[Candidate]) -> dict[str, float]:
    """What `step_alone` asks of its process."""
    torch.set_num_threads(said["threads"])
    (candidate,) = [candidate for candidate in among if candidate.name == said["name"]]
    work = Workload((QUICK_CASES if said["quick"] else CASES)[said["case"]], said["device"])
    optimizer = candidate.build(work.parameters())
    start = time.perf_counter()
    optimizer.step()
    if work.device.type == "cuda":
        torch.cuda.synchronize(work.device)
    first_step_s = time.perf_counter() - start
    optimizer.step()
    return {"first_step_s": first_step_s, "peak_share": peak_share(optimizer, work.device)}


def _status(name: str) -> int:
    """A size in /proc/self/status, in bytes."""
    match = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1]) * 1024


if __name__ == "__main__":
    print(json.dumps(_alone(json.loads(sys.argv[1]), candidates(rivals=RIVALS))))
