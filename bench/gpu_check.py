"""`make gpu-check`: everything that needs a CUDA GPU, in one run of a few minutes.

First the tests marked `gpu`, then the speed of every compressor and every optimizer on the device, what each method's
own work adds to a training step, what MKOR adds to one, and how a model trains whose gradients workers compress. Each
is written as JSON into `$OUT` if that is set, else into `bench/results/`, where `gradwire report --write` finds it.
Without a GPU the tests are skipped by their marker and nothing is measured. It needs torch, what torch brings, and
pytest.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from gradwire.bench import compression, gpu_training, machine, optim, plan_measure, plan_models, plan_work
from gradwire.bench.curvature_overhead import overhead
from gradwire.bench.optim_rivals import candidates, missing

_NUMEL = 2**27  # 512 MiB of float32, ten times the cache of the largest GPU
_PARAMETERS, _TOKENS, _RANKS = 15_000_000, 16_384, 8  # of the training step beside which methods work
_METHODS = (
    "Cast(dtype='bfloat16')",
    "BlockQuantize(bits=8) + EF + TwoPhase",
    "BlockQuantize(bits=4) + EF + TwoPhase(second=BlockQuantize(bits=8))",
    "ScaledSign + EF + TwoPhase",
    "ChunkTopK(k=32) + EF",
    "PowerSGD(matrix_rank=4)",
    "DeMo(k=32)",
)
_BATCHES, _BLOCKS = (16, 256), 8  # of 64 tokens, for MKOR


def main() -> int:
    """Run the tests and the benchmark from the root of a checkout; the exit status is that of the tests."""
    pytest = Path(sys.executable).with_name("pytest")
    # Warnings of another torch are no errors here, and pytest's plugins may be missing.
    options = ["-m", "gpu", "-W", "default", "-o", "addopts=--import-mode=importlib"]
    files = sorted(str(path) for path in Path("tests").glob("test_gpu_*.py"))
    command = [str(pytest) if pytest.exists() else "pytest", "-q", *options, *files]
    print("gpu-check:", *command, flush=True)
    status = subprocess.run(command, check=False).returncode
    if not torch.cuda.is_available():
        print("gpu-check: no CUDA GPU here, so the tests were skipped and nothing was measured.")
        return status
    _compressors()
    _optimizers()
    _work()
    _curvature()
    _training()
    return status


def _compressors() -> None:
    results = compression.run(_NUMEL, device="cuda", progress=_say)
    print("Bytes per second as a share of a device-to-device copy's:")
    for result in results:
        shares = "  ".join(f"{stage} {share:.2f}" for stage, share in result.bandwidth.items())
        print(f"  {result.source} {result.name:<48} {shares}")
    _write("compression-cuda.json", compression.record(results, _NUMEL, "cuda"))


def _optimizers() -> None:
    results, failed = optim.run(candidates(), device="cuda", progress=_say)
    print("Step time over that of torch's fused AdamW, over the copy floor, microseconds per tensor, peak memory:")
    for result in results:
        name = f"{result.source} {result.algorithm}, {result.mode}"
        numbers = f"{result.ratio:8.2f} {result.over_floor:8.2f} {result.us_per_tensor:8.1f} {result.peak_share:8.2%}"
        print(f"  {result.case:<8} {name:<40} {numbers}")
    for name, reason in failed.items():
        print(f"gpu-check: not measured: {name}: {reason}")
    steps = optim.training_run(candidates(rivals=()), quick=False, device="cuda", progress=_say)
    kept = optim.record(results, missing() | failed, quick=False, device="cuda") | {"training": steps}
    for line in optim.training_lines(kept):
        print(line)
    _write("optim-cuda.json", kept)


def _work(device: str = "cuda", parameters: int = _PARAMETERS, tokens: int = _TOKENS) -> None:
    """What methods add to a training step, on one rank of several whose collectives send nothing."""
    place = torch.device(device)
    model = plan_models.transformer(parameters, tokens, place)
    _say(f"work beside a training step of a {model.name}")
    compute = plan_measure.compute(model, place)
    found = plan_work.seconds(_METHODS, model, compute, _RANKS, place)
    for method, seconds in found.items():
        print(f"  {method:<70} {1e3 * seconds:8.2f} ms beside {1e3 * compute.step:.2f} ms")
    about = {"benchmark": "plan work", "machine": machine.describe(device), "model": model.name, "tokens": tokens}
    _write("plan-cuda.json", about | {"world_size": _RANKS, "step": compute.step, "work": found})


def _curvature(device: str = "cuda", batches: tuple[int, ...] = _BATCHES, blocks: int = _BLOCKS) -> None:
    """What MKOR adds to a training step."""
    _say("MKOR")
    found = overhead(batches, blocks=blocks, device=device)
    for batch, ratios in found["ratios"].items():
        for variant, ratio in ratios.items():
            print(f"  {variant:<56} {ratio:.2f} times AdamW's step of {int(batch) * found['context']} tokens")
    about = {"benchmark": "curvature", "machine": machine.describe(device), "problems": {}}
    _write("curvature-cuda.json", about | {"overhead": found})


def _training(device: str = "cuda", steps: int = gpu_training.STEPS) -> None:
    """Validation loss of several configurations, with workers simulated on the device."""
    kept = gpu_training.compare(device, steps=steps, progress=_say)
    for run in kept["runs"]:
        print(f"  {run['configuration']:<40} loss {run['validation_loss']} in {run['seconds']:.1f} s")
    _write("train-cuda.json", kept)


def _say(name: str) -> None:
    print("gpu-check: measuring", name, flush=True)


def _write(name: str, content: dict[str, Any]) -> None:
    path = Path(os.environ.get("OUT", "bench/results")) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"gpu-check: written to {path}")


if __name__ == "__main__":
    sys.exit(main())
