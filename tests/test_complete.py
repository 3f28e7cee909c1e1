"""Every public class has a case, a reference and an executed example."""

import doctest
import importlib
import inspect
import pkgutil
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import cases
import pytest
import torch

from gradwire import comm, compression, federated, optim
from gradwire.optim.masha import MASHA


@dataclass(frozen=True)
class Family:
    """A package's public classes of one base, `(class, reference)` of every case, and what their docstrings hold."""

    package: ModuleType
    base: type
    cases: list[tuple[type, Any]]
    sections: tuple[str, ...]

    def classes(self) -> list[type]:
        public = [getattr(self.package, name) for name in self.package.__all__]
        members = [cls for cls in public if isinstance(cls, type) and issubclass(cls, self.base)]
        return [cls for cls in members if not inspect.isabstract(cls)]


FAMILIES = [
    Family(
        compression,
        compression.Compressor,
        [(type(case.compressor), case.reference) for case in cases.COMPRESSORS],
        ("Args:", "Shapes:", "Cost:", "State:", "Example:", "Reference:"),
    ),
    Family(
        comm,
        comm.ErrorFeedback,
        [(type(case.feedback), case.reference) for case in cases.FEEDBACKS],
        ("State:", "Example:", "Reference:"),
    ),
    Family(
        optim,
        optim.Optimizer,
        [(case.cls, case.reference) for case in cases.OPTIMIZERS + cases.EXCHANGING + cases.ONE_BIT],
        ("Args:", "Shapes:", "Cost:", "State:", "Example:", "Reference:"),
    ),
    Family(
        optim,
        optim.MKOR,
        list(cases.PRECONDITIONERS),
        ("Args:", "Shapes:", "Cost:", "State:", "Example:", "Reference:"),
    ),
    Family(
        optim,
        MASHA,
        list(cases.GAMES),
        ("Args:", "Shapes:", "Cost:", "State:", "Example:", "Reference:"),
    ),
    Family(
        optim,
        optim.DiLoCo,
        list(cases.OUTER_LOOPS),
        ("Args:", "Shapes:", "Cost:", "State:", "Example:", "Reference:"),
    ),
    Family(
        comm,
        comm.LocalSGD,
        list(cases.OUTER_LOOPS),
        ("Args:", "Cost:", "State:", "Example:", "Reference:"),
    ),
    Family(
        federated,
        federated.Algorithm,
        [(type(case.algorithm), case.reference) for case in cases.ALGORITHMS],
        ("Args:", "Shapes:", "Cost:", "State:", "Example:", "Reference:"),
    ),
    Family(
        federated,
        federated.AsyncPolicy,
        list(cases.ASYNCHRONOUS),
        ("Args:", "Cost:", "State:", "Example:", "Reference:"),
    ),
    Family(
        federated,
        federated.Aggregator,
        [(type(case.aggregator), case.reference) for case in cases.AGGREGATORS],
        ("Args:", "Shapes:", "Cost:", "State:", "Example:", "Reference:"),
    ),
    Family(
        federated,
        optim.Optimizer,
        [(case.cls, case.reference) for case in cases.SERVER_OPTIMIZERS],
        ("Args:", "Shapes:", "Cost:", "State:", "Example:", "Reference:"),
    ),
]
PACKAGES = [compression, comm, optim, federated]  # their examples are executed

every_class = pytest.mark.parametrize(
    ("family", "cls"),
    [pytest.param(family, cls, id=cls.__name__) for family in FAMILIES for cls in family.classes()],
)


def modules(package: ModuleType) -> list[Any]:
    names = [info.name for info in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
    return [pytest.param(importlib.import_module(name), id=name) for name in names]


@every_class
def test_has_a_case_with_a_reference_from_the_paper(family: Family, cls: type) -> None:
    references = [reference for tested, reference in family.cases if tested is cls]
    assert references, f"{cls.__name__} has no line in tests/cases.py"
    for reference in references:
        function = reference.func if isinstance(reference, partial) else reference
        assert function.__module__.startswith("reference."), f"{cls.__name__}'s reference is not in tests/reference/"


@every_class
def test_docstring_is_complete(family: Family, cls: type) -> None:
    doc = inspect.getdoc(cls) or ""
    missing = [section for section in family.sections if section not in doc]
    assert not missing, f"{cls.__name__}'s docstring lacks {missing}"
    assert doctest.DocTestParser().get_examples(doc), f"{cls.__name__}'s docstring has no example"


@every_class
def test_is_final(family: Family, cls: type) -> None:
    extended = any(other is not cls and issubclass(other, cls) for other in family.classes())
    assert getattr(cls, "__final__", False) or extended, f"{cls.__name__} is neither abstract nor @final"


def _public(base: type) -> set[type]:
    members = [getattr(comm, name) for name in comm.__all__]
    return {cls for cls in members if isinstance(cls, type) and issubclass(cls, base) and not inspect.isabstract(cls)}


def test_every_communicator_and_exchange_has_a_case() -> None:
    made = [case.make() for case in cases.COMMUNICATORS]
    composed = [communicator for communicator in made if isinstance(communicator, comm.Communicator)]
    assert _public(comm.Averager) == {type(communicator) for communicator in made}
    used = {type(communicator.exchange) for communicator in composed}
    # Simulated is what the others are compared with; after Gossip ranks differ, and tests/test_gossip.py says by what.
    # ReduceScatter goes with FSDP2 alone: tests/test_fsdp_shard.py.
    assert _public(comm.Exchange) == used | {comm.Simulated, comm.Gossip, comm.ReduceScatter}
    assert {type(case.compressor) for case in cases.COMPRESSORS} == {type(made.compressor) for made in composed}


@pytest.mark.parametrize("cls", sorted(_public(comm.Averager) | _public(comm.Exchange), key=lambda cls: cls.__name__))
def test_docstring_of_communicators_and_exchanges(cls: type) -> None:
    doc = inspect.getdoc(cls) or ""
    missing = [section for section in ("Cost:", "State:", "Example:", "Reference:") if section not in doc]
    assert not missing, f"{cls.__name__}'s docstring lacks {missing}"
    assert doctest.DocTestParser().get_examples(doc), f"{cls.__name__}'s docstring has no example"


@pytest.mark.parametrize("module", [module for package in PACKAGES for module in modules(package)])
def test_examples_run(module: ModuleType) -> None:
    assert doctest.testmod(module, extraglobs={"torch": torch}).failed == 0
