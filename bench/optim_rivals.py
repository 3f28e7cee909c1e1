"""What `gradwire bench optim` measures: every optimizer of gradwire in every mode, torch's, and other packages.

Other packages are measured where they are installed, each with its own defaults; what is missing is listed by name.
Their dependencies would replace torch, so they are installed without, into a folder of their own:

    pip install --no-deps --target rivals adamp adabelief-pytorch tabulate colorama \
        pytorch-optimizer heavyball opt-einsum timm torch-optimizer pytorch_ranger packaging
    PYTHONPATH=rivals gradwire bench optim
"""

import contextlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import io
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from gradwire import optim

SOURCE = "gradwire"
"""The source of our own optimizers."""

_MODES: dict[str, dict[str, Any]] = {"loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
_OWN_MODES: dict[str, dict[str, Any]] = {"default": {}, "foreach": {"foreach": True}, "fused": {"fused": True}}

_SETTINGS: dict[str, dict[str, Any]] = {
    "SGDP": {"lr": 1e-3, "momentum": 0.9},  # without momentum it would be another algorithm
    "AdaBelief": {"rectify": False},  # packages disagree about the default
}
"""Hyper-parameters that all implementations of an algorithm get; the rest are their own defaults."""

Build = Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Candidate:
    """An optimizer to measure.

    Args:
        source: "gradwire", "torch", or the package's name on PyPI.
        algorithm: As gradwire spells it: candidates of one algorithm do the same work.
        mode: "loop", "foreach", "fused", or "default": what a user gets who says nothing.
        build: Makes one; ImportError where the package does not import.
    """

    source: str
    algorithm: str
    mode: str
    build: Build

    @property
    def name(self) -> str:
        """What a person reads, and no other candidate has."""
        return f"{self.source} {self.algorithm}, {self.mode}"


@dataclass(frozen=True)
class Rival:
    """An optimizer of another package.

    Args:
        package: Its name on PyPI.
        module: Where the class is.
        algorithm: As gradwire spells it.
        attribute: The name of the class, if it is another one.
        options: Keyword arguments that make it the same algorithm.
    """

    package: str
    module: str
    algorithm: str
    attribute: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def installed(self) -> bool:
        """Whether the package is there, which says nothing on whether it imports."""
        return importlib.util.find_spec(self.module.partition(".")[0]) is not None

    def build(self, params: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """Import the class and make one."""
        with contextlib.redirect_stdout(io.StringIO()):  # some greet
            if self.package == "timm":
                _import_timm_without_models()
            cls = getattr(importlib.import_module(self.module), self.attribute or self.algorithm)
            made = cls(params, **_SETTINGS.get(self.algorithm, {}), **self.options)
        assert isinstance(made, torch.optim.Optimizer)
        return made


RIVALS = (
    Rival("adamp", "adamp", "AdamP"),
    Rival("adamp", "adamp", "SGDP"),
    Rival("adabelief-pytorch", "adabelief_pytorch", "AdaBelief", options={"print_change_log": False}),
    Rival("torch-optimizer", "torch_optimizer", "DiffGrad"),
    *(Rival("timm", "timm.optim", name) for name in ("AdamP", "SGDP", "AdaBelief", "Adafactor", "LaProp")),
    *(
        Rival("pytorch-optimizer", "pytorch_optimizer", name)
        for name in ("AdamP", "SGDP", "AdaBelief", "LaProp", "DiffGrad")
    ),
    Rival("pytorch-optimizer", "pytorch_optimizer", "Adafactor", "AdaFactor", {"betas": (None, 0.999)}),
    Rival("torch-optimizer", "torch_optimizer", "LAMB", "Lamb"),
    Rival("timm", "timm.optim", "LAMB", "Lamb", {"max_grad_norm": None}),
    Rival("pytorch-optimizer", "pytorch_optimizer", "LAMB", "Lamb"),
    Rival("heavyball", "heavyball", "LaProp", options={"consume_grad": False}),
    Rival("heavyball", "heavyball", "AdamW", options={"consume_grad": False}),
)
PACKAGES = tuple(dict.fromkeys(rival.package for rival in RIVALS))


def own_classes() -> list[type[optim.Optimizer]]:
    """Every public optimizer of gradwire."""
    public = [getattr(optim, name) for name in optim.__all__]
    return [
        cls
        for cls in public
        if isinstance(cls, type) and issubclass(cls, optim.Optimizer) and not inspect.isabstract(cls)
    ]


def candidates(*, rivals: Sequence[Rival] = RIVALS, fused: bool = True) -> list[Candidate]:
    """torch's, ours and the installed ones of `rivals`; `fused` says whether ours are compiled, too."""
    made = [Candidate("torch", "AdamW", mode, _builder(torch.optim.AdamW, options)) for mode, options in _MODES.items()]
    for cls in own_classes():
        settings = _SETTINGS.get(cls.__name__, {})
        for mode, options in _OWN_MODES.items():
            if fused or mode != "fused":
                made.append(Candidate(SOURCE, cls.__name__, mode, _builder(cls, settings | options)))
    made.append(Candidate("torch", "Adafactor", "foreach", _builder(torch.optim.Adafactor, {"foreach": True})))
    made += [Candidate(rival.package, rival.algorithm, "default", rival.build) for rival in rivals if rival.installed]
    return made


def missing(rivals: Sequence[Rival] = RIVALS) -> dict[str, str]:
    """What cannot be measured, by package, and why."""
    return {rival.package: "not installed" for rival in rivals if not rival.installed}


def versions() -> dict[str, str]:
    """Versions of the packages that are installed."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _builder(cls: Callable[..., torch.optim.Optimizer], options: dict[str, Any]) -> Build:
    return lambda params: cls(params, **options)


def _import_timm_without_models() -> None:
    """`timm.optim` needs nothing of `timm.models`, which imports torchvision, which must fit torch to the digit."""
    if "timm" in sys.modules:
        return
    spec = importlib.util.find_spec("timm")
    assert spec is not None
    sys.modules["timm"] = importlib.util.module_from_spec(spec)  # and not executed
    models = types.ModuleType("timm.models")
    models.group_parameters = None  # type: ignore[attr-defined]  # only its factory calls it
    sys.modules["timm.models"] = models
