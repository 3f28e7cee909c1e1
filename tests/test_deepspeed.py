"""DeepSpeed engines, with the real package between gloo processes where it is installed, and what needs no engine."""

import copy
import importlib.util
import os
import pickle
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import deepspeed_averaging  # noqa: F401
import deepspeed_commands  # noqa: F401
import deepspeed_optimizers  # noqa: F401
import pytest
import torch
from deepspeed_training import CHECKS
from torch import nn

from gradwire import comm, optim
from gradwire.compression import Identity

_installed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed: make test-deepspeed installs it"
)


_ON_FOUR_RANKS = [
    "lossless_is_plain_at_stage_0",
    "sparse_gradients_with_ef21_train",
    "int8_gradients_with_two_phases_train",
    "inf_on_one_rank_skips_the_step_on_all",
]


@_installed
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("ranks", "checks"),
    [(2, list(CHECKS)), (4, _ON_FOUR_RANKS)],
    ids=["two-ranks", "four-ranks"],
)
def test_engines(ranks: int, checks: list[str], tmp_path: Path) -> None:
    assert checks
    here = Path(__file__).parent
    env = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", "PYTHONPATH": str(here)}
    env["TORCH_EXTENSIONS_DIR"] = str(tmp_path / "extensions")  # a lock of a run that was killed would stop this one
    launcher = Path(sys.executable).parent / "torchrun"
    command = [launcher, "--standalone", f"--nproc-per-node={ranks}", here / "deepspeed_runs.py", tmp_path, *checks]
    with subprocess.Popen(
        list(map(str, command)), env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as job:
        try:
            printed, _ = job.communicate(timeout=280)
        finally:
            job.terminate()  # torchrun ends its workers, too; does nothing to what has ended
    failures = [f"{path.name}:\n{path.read_text()}" for path in tmp_path.glob("*.failed.*")]
    assert not failures, "\n".join(failures)
    assert [name for name in checks if not (tmp_path / f"{name}.passed").exists()] == [], printed
    assert job.returncode == 0, printed


def test_the_library_does_not_import_it() -> None:
    assert "deepspeed" not in sys.modules


class _Engine(nn.Module):
    pass


def test_other_versions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    package: Any = types.ModuleType("deepspeed")
    package.DeepSpeedEngine, package.__version__ = _Engine, "0.20.1"
    monkeypatch.setitem(sys.modules, "deepspeed", package)
    engine: Any = _Engine()
    with pytest.raises(ValueError, match=r"expected deepspeed>=0\.19,<0\.20, got 0\.20\.1"):
        comm.attach(engine, comm.Communicator(Identity()))


# What ZeRO does to an optimizer, without ZeRO: flat partitions in the place of its parameters.


def _partition(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        flat = torch.cat([p.detach().flatten() for p in group["params"]]).chunk(2)[0].requires_grad_()
        flat.grad = torch.ones_like(flat)
        group["params"] = [flat]


def _weights() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(8, 6)), nn.Parameter(torch.ones(8))]


@pytest.mark.parametrize("cls", [optim.AdamP, optim.SGDP, optim.Adafactor, optim.LAMB])
@pytest.mark.parametrize("restore", [lambda x: x, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_partitions_are_refused_by_optimizers_of_whole_tensors(cls: Any, restore: Any) -> None:
    optimizer = restore(cls(_weights(), lr=1e-3))
    _partition(optimizer)
    before = optimizer.param_groups[0]["params"][0].detach().clone()
    with pytest.raises(RuntimeError, match=rf"{cls.__name__}: expected parameters of the shapes .* got one of \(28,\)"):
        optimizer.step()
    assert torch.equal(optimizer.param_groups[0]["params"][0], before)


def test_partitions_are_refused_after_a_state_is_loaded() -> None:
    optimizer = optim.AdamP(_weights(), lr=1e-3)
    saved = optim.AdamP(_weights()[1:], lr=1e-3).state_dict()
    _partition(optimizer)
    optimizer.load_state_dict(saved)
    with pytest.raises(RuntimeError, match=r"AdamP: expected parameters of the shapes"):
        optimizer.step()


@pytest.mark.parametrize("cls", [optim.AdaBelief, optim.DiffGrad, optim.LaProp])
def test_partitions_suit_elementwise_optimizers(cls: Any) -> None:
    whole, parts = cls(_weights(), lr=1e-3), cls(_weights(), lr=1e-3)
    _partition(parts)
    for p in whole.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    whole.step()
    parts.step()
    (flat,) = parts.param_groups[0]["params"]
    torch.testing.assert_close(flat, torch.cat([p.flatten() for p in whole.param_groups[0]["params"]])[:28])


def test_masters_suit_every_optimizer() -> None:
    """In 16 bits hosts put float32 copies in the place of parameters."""
    optimizer = optim.AdamP(_weights(), lr=1e-3)
    for group in optimizer.param_groups:
        group["params"] = [p.detach().clone().requires_grad_() for p in group["params"]]
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.param_groups[0]["params"][0].max() < 1.0
