"""`make gpu-check`: everything that needs a CUDA GPU, in one run of a few minutes.

First the tests marked `gpu`, then the speed of every compressor on the device, written as JSON into `$OUT` if that is
set, else into `bench/results/`. Without a GPU the tests are skipped by their marker and nothing is measured.
"""

import os
import subprocess
import sys
from pathlib import Path

import torch

from gradwire.bench.compression import main as measure_compression

_NUMEL = 2**27  # 512 MiB of float32, ten times the cache of the largest GPU


def main() -> int:
    """Run the tests and the benchmark from the root of a checkout; the exit status is that of the tests."""
    pytest = Path(sys.executable).with_name("pytest")
    # Warnings of another torch are no errors here, and pytest's plugins may be missing.
    options = ["-m", "gpu", "-W", "default", "-o", "addopts=--import-mode=importlib"]
    command = [str(pytest) if pytest.exists() else "pytest", "-q", *options, "tests"]
    print("gpu-check:", *command, flush=True)
    status = subprocess.run(command, check=False).returncode
    if not torch.cuda.is_available():
        print("gpu-check: no CUDA GPU here, so the tests were skipped and nothing was measured.")
        return status
    folder = Path(os.environ.get("OUT", "bench/results"))
    measure_compression(_NUMEL, output=folder / "compression-cuda.json", device="cuda")
    return status


if __name__ == "__main__":
    sys.exit(main())
