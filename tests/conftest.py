"""Seeds, thread counts and hypothesis settings shared by all tests."""

import os

import pytest
import torch

try:
    import hypothesis
except ImportError:  # the GPU tests do without it, and so may the machine that runs them
    pass
else:
    hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, max_examples=25)
    hypothesis.settings.load_profile("ci")
os.environ.setdefault("MPLBACKEND", "Agg")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA GPU: run `make gpu-check` on a machine that has one")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)
