"""`make gpu-check`: everything that needs a CUDA GPU, in one run of a few minutes.

First the tests marked `gpu`, then the speed of every compressor on the device, written as JSON into `$OUT` if that is
set, else into `bench/results/`. Without a GPU the tests are skipped by their marker and nothing is measured. It needs
torch, what torch brings, and pytest.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from gradwire.bench import compression

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
    results = compression.run(
        _NUMEL, device="cuda", progress=lambda name: print("gpu-check: measuring", name, flush=True)
    )
    print("Bytes per second as a share of a device-to-device copy's:")
    for result in results:
        shares = "  ".join(f"{stage} {share:.2f}" for stage, share in result.bandwidth.items())
        print(f"  {result.source} {result.name:<48} {shares}")
    path = Path(os.environ.get("OUT", "bench/results")) / "compression-cuda.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(compression.record(results, _NUMEL, "cuda"), indent=1) + "\n")
    print(f"gpu-check: written to {path}")
    return status


if __name__ == "__main__":
    sys.exit(main())
