"""`make gpu-check`: everything that needs a CUDA GPU, in one run of a few minutes.

First the tests marked `gpu`, then the speed of every compressor and every optimizer on the device, written as JSON into
`$OUT` if that is set, else into `bench/results/`. Without a GPU the tests are skipped by their marker and nothing is
measured. It needs torch, what torch brings, and pytest.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from gradwire.bench import compression, optim
from gradwire.bench.optim_rivals import candidates, missing

_NUMEL = 2**27  # 512 MiB of float32, ten times the cache of the largest GPU


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
    _write("optim-cuda.json", optim.record(results, missing() | failed, quick=False, device="cuda"))


def _say(name: str) -> None:
    print("gpu-check: measuring", name, flush=True)


def _write(name: str, content: dict[str, Any]) -> None:
    path = Path(os.environ.get("OUT", "bench/results")) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"gpu-check: written to {path}")


if __name__ == "__main__":
    sys.exit(main())
