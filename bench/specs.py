"""Configurations as text: `"ChunkTopK(k=32) + EF21 + AllGather"`, read with `ast`, never evaluated.

A configuration is a sum of terms. A term is the name of a public class, in any case, with literal arguments or further
terms as arguments: `TwoPhase(second=BlockQuantize(bits=8))`. What a term means follows from its class.
"""

import ast
import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, final, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from gradwire import comm, compression, federated, optim
from gradwire.bench.errors import UsageError
from gradwire.comm import AllReduce, Communicator, Plan
from gradwire.comm.averager import Averager
from gradwire.comm.exchange import Exchange
from gradwire.comm.feedback import ErrorFeedback
from gradwire.compression.base import Compressor

DENSE = "dense"
"""Plain averaging: the short name of `Identity + AllReduce`."""

DEFAULTS = (
    DENSE,
    "Cast(dtype='bfloat16')",
    "ChunkTopK(k=256) + EF",
    "ChunkTopK(k=256) + EF21",
    "ScaledSign(width=128) + EF",
    "BlockQuantize(bits=8) + EF + TwoPhase",
    "BlockQuantize(bits=4) + EF + TwoPhase(second=BlockQuantize(bits=8))",
    "PowerSGD(matrix_rank=4)",
)
"""What `--compare default` trains."""


@final
@dataclass(frozen=True)
class Configuration:
    """How gradients are averaged (densely unless it says otherwise) and weights updated.

    Args:
        text: As the user wrote it.
        terms: The parsed terms by family.

    Example:
        >>> configuration = parse("chunktopk(k=8) + ef + sgd(lr=0.1)")
        >>> configuration.communicator(seed=0).compressor
        ChunkTopK(k=8, chunk=4096)
        >>> configuration.optimizer([("w", torch.nn.Parameter(torch.ones(2)))], lr=1.0).defaults["lr"]
        0.1
    """

    text: str
    terms: Mapping[str, ast.expr]

    def communicator(self, seed: int, group: dist.ProcessGroup | None = None, exchange: str | None = None) -> Averager:
        """A new communicator of these ranks, all by default; with this `exchange` if the configuration names none.

        Raises:
            UsageError: a value is wrong or the product is not legal.
        """
        terms = dict(self.terms)
        plain = "communicator" not in terms and terms.get("exchange", _PLAIN_EXCHANGE) is _PLAIN_EXCHANGE
        if exchange is not None and plain:
            terms |= {"compressor": terms.get("compressor", _reference("Identity")), "exchange": _tree(exchange)}
        made = _communicator(terms, seed)
        made.group = group
        return made

    def optimizer(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        default: str = "AdamW",
        *,
        lr: float,
        seed: int = 0,
        group: dist.ProcessGroup | None = None,
    ) -> torch.optim.Optimizer:
        """A new optimizer: `default` unless the configuration names one, with this `lr` unless its term gives one.

        One that draws random numbers of its own gets the `seed`, again unless its term gives one, and one that
        exchanges gradients by itself the `group` that it does it in.

        Raises:
            UsageError: a name or value is wrong.
        """
        term = self.terms["optimizer"] if "optimizer" in self.terms else _tree(default)
        return make_optimizer(term, "optimizer", named_parameters, lr=lr, seed=seed, group=group)


def parse(text: str, optimizer: str = "AdamW") -> Configuration:
    """Read a configuration and try it out, so that every mistake shows before anything is trained.

    Args:
        text: Terms joined by `+`.
        optimizer: The optimizer for a configuration that names none.

    Raises:
        UsageError: one sentence on what is wrong, and what exists.
    """
    configuration = Configuration(text, terms(text, _OF_TRAINING))
    configuration.communicator(seed=0)
    made = _probe(configuration, optimizer)
    if own_communicator(made) is not None and configuration.terms.keys() - {"optimizer"}:
        name = type(made).__name__
        raise UsageError(
            f"{name}: expected no compressor, feedback or exchange beside it, since it exchanges gradients by itself, "
            f"got {text!r}. Write {name} alone, or name another optimizer: 'dense + AdamW'."
        )
    return configuration


def terms(text: str, families: tuple[str, ...]) -> dict[str, ast.expr]:
    """The terms of a text by family, each family at most once; `dense` is a compressor and an exchange.

    Raises:
        UsageError: it is no sum of terms, or a name is unknown in these families.
    """
    return _terms(_tree(text), families)


def make(term: ast.expr, family: str, *, seed: int = 0) -> Any:
    """The object that a term of a family describes.

    Raises:
        UsageError: a name or value is wrong.
    """
    return _make(term, (family,), seed)


def make_optimizer(
    term: ast.expr, family: str, params: Iterable[Any], *, lr: float | None, **given: Any
) -> torch.optim.Optimizer:
    """The optimizer that a term describes, with this `lr`, if any, unless its term gives one.

    So for those of the `given` values that it takes.

    Raises:
        UsageError: a name or value is wrong.
    """
    _, cls = _find(term, (family,))
    args, keywords = _arguments(term, 0)
    if args:
        raise UsageError(f"{cls.__name__}: expected named values such as lr=1e-3, got {args[0]!r}.")
    for name, value in given.items():
        if name in _keywords(cls):
            keywords.setdefault(name, value)
    if lr is not None:
        keywords = {"lr": lr, **keywords}
    made = _call(cls, [params], keywords)
    assert isinstance(made, torch.optim.Optimizer)
    return made


def join(terms: Mapping[str, str], optimizer: str = "AdamW") -> str:
    """One configuration from texts by family, each checked to be of its family.

    From none it is `dense`, or the optimizer alone where that exchanges gradients by itself.

    Raises:
        UsageError: a name is unknown in its family.
    """
    for family, text in terms.items():
        _find(_tree(text), (family,))
    return " + ".join(terms.values()) or (optimizer if exchanges_itself(optimizer) else DENSE)


def own_communicator(optimizer: torch.optim.Optimizer) -> Averager | None:
    """What an optimizer that brings the gradients of all ranks together by itself does it with, else None.

    Such an optimizer has it as its attribute `communicator`, takes local gradients, and skips a step on every rank if a
    gradient is not finite on any.
    """
    found = getattr(optimizer, "communicator", None)
    return found if isinstance(found, Averager) else None


def exchanges_itself(optimizer: str) -> bool:
    """Whether the optimizer of this text has a communicator of its own.

    Raises:
        UsageError: a name or value is wrong.
    """
    return own_communicator(_probe(Configuration("", {}), optimizer)) is not None


def expand(texts: Iterable[str]) -> list[str]:
    """The configurations with `default` replaced by `DEFAULTS`, each once."""
    return list(dict.fromkeys(one for text in texts for one in (DEFAULTS if text == "default" else (text,))))


def _probe(configuration: Configuration, optimizer: str) -> torch.optim.Optimizer:
    """The optimizer of a configuration, on one small parameter."""
    return configuration.optimizer([("probe", torch.nn.Parameter(torch.zeros(1)))], optimizer, lr=1.0)


def _tree(text: str) -> ast.expr:
    try:
        return ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        example = "ChunkTopK(k=32) + EF21"
        raise UsageError(f"{text!r}: expected terms joined by +, such as {example!r}.") from None


_OF_TRAINING = ("optimizer", "compressor", "feedback", "exchange", "communicator", "plan")
"""Families of the terms of a `Configuration`."""

_INSIDE = {"algorithm": ("compressor",), "aggregator": ("aggregator",)}
"""Families that a term of this family may hold; others may hold those of communicators."""

_TIMES = (federated.FixedTimes, federated.ExponentialTimes, federated.HalfNormalTimes)
"""Client times that are made from numbers alone."""


@functools.cache
def catalogue() -> Mapping[str, Mapping[str, type]]:
    """Every public class that a term may name, by family and name."""
    return {
        "optimizer": _of_parameters_alone(_public(torch.optim.Optimizer, torch.optim, optim)),
        "compressor": _public(Compressor, compression),
        "feedback": _public(ErrorFeedback, comm),
        "exchange": _public(Exchange, comm),
        "communicator": {name: cls for name, cls in _public(Averager, comm).items() if cls is not Communicator},
        "plan": {"Plan": Plan},
        "algorithm": _public(federated.Algorithm, federated),
        "aggregator": _public(federated.Aggregator, federated),
        "server optimizer": _of_parameters_alone(_public(torch.optim.Optimizer, torch.optim, optim, federated)),
        "policy": _public(federated.AsyncPolicy, federated),
        "client times": {cls.__name__: cls for cls in _TIMES},
    }


def _public(base: type, *modules: ModuleType) -> dict[str, type]:
    named = {name: getattr(module, name) for module in modules for name in module.__all__}
    return {
        name: value
        for name, value in sorted(named.items())
        if isinstance(value, type) and issubclass(value, base) and value is not base and not inspect.isabstract(value)
    }


def _of_parameters_alone(classes: dict[str, type]) -> dict[str, type]:
    """Those that can be made from a text: they need nothing but parameters, such as no model."""
    signatures = {name: inspect.signature(cls).parameters.values() for name, cls in classes.items()}
    needed = {name: [p.name for p in taken if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
              for name, taken in signatures.items()}  # fmt: skip
    return {name: cls for name, cls in classes.items() if needed[name] == ["params"]}


def _terms(tree: ast.expr, families: tuple[str, ...]) -> dict[str, ast.expr]:
    """The terms of a sum by family, each family at most once."""
    terms: dict[str, ast.expr] = {}
    for term in _summands(tree):
        if isinstance(term, ast.Name) and term.id.lower() == DENSE and "compressor" in families:
            found = {"compressor": _reference("Identity"), "exchange": _PLAIN_EXCHANGE}
        else:
            found = {_find(term, families)[0]: term}
        for family, expression in found.items():
            if family in terms:
                raise UsageError(f"expected one {family}, got {ast.unparse(terms[family])} and {ast.unparse(term)}.")
            terms[family] = expression
    if "communicator" in terms and terms.keys() & {"compressor", "feedback", "exchange", "plan"}:
        raise UsageError(
            f"{ast.unparse(terms['communicator'])} is complete and takes no compressor, feedback or exchange."
        )
    if "compressor" not in terms and terms.keys() & {"feedback", "exchange", "plan"} and "compressor" in families:
        raise UsageError(f"expected a compressor, too. {_what_exists(('compressor',))}")
    return terms


def _reference(name: str) -> ast.expr:
    return ast.Name(name, ast.Load())


_PLAIN_EXCHANGE = _reference("AllReduce")
"""The exchange of `dense`."""


def _summands(tree: ast.expr) -> list[ast.expr]:
    if isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.Add):
        return [*_summands(tree.left), tree.right]
    return [tree]


def _find(term: ast.expr, families: tuple[str, ...]) -> tuple[str, type]:
    """The family and class that a term names."""
    name = term.func if isinstance(term, ast.Call) else term
    if not isinstance(name, ast.Name):
        raise UsageError(f"expected the name of a class, got {ast.unparse(term)}. {_what_exists(families)}")
    for family in families:
        for known, cls in catalogue()[family].items():
            if known.lower() == name.id.lower():
                return family, cls
    known_names = {known.lower(): known for family in families for known in catalogue()[family]}
    close = difflib.get_close_matches(name.id.lower(), known_names, n=1)
    hint = f" Did you mean {known_names[close[0]]}?" if close else ""
    raise UsageError(f"unknown name {name.id!r}.{hint} {_what_exists(families)}")


def _what_exists(families: Iterable[str]) -> str:
    return "There is " + "; ".join(f"{family}: {', '.join(catalogue()[family])}" for family in families) + "."


def _communicator(terms: Mapping[str, ast.expr], seed: int) -> Averager:
    if not terms.keys() - {"optimizer"}:
        return _dense(seed)
    if "communicator" in terms:
        made = _make(terms["communicator"], ("communicator",), seed)
        assert isinstance(made, Averager)
        return made
    parts = {family: _make(terms[family], (family,), seed) for family in terms.keys() - {"compressor", "optimizer"}}
    compressor = _make(terms["compressor"], ("compressor",), seed)
    made = _call(Communicator, [compressor], {**parts, "seed": seed})
    assert isinstance(made, Communicator)
    return made


def _dense(seed: int) -> Communicator:
    return Communicator(compression.Identity(), exchange=AllReduce(), seed=seed)


def _make(term: ast.expr, families: tuple[str, ...], seed: int) -> Any:
    """Construct the object that a term describes."""
    family, cls = _find(term, families)
    args, keywords = _arguments(term, seed, _INSIDE.get(family, _OF_TRAINING[1:]))
    if family == "communicator":
        # A communicator inside another one may be written as a sum, or as a bare compressor.
        args = [_as_communicator(value, seed) for value in args]
        keywords = {name: _as_communicator(value, seed) for name, value in keywords.items()}
        if "seed" in inspect.signature(cls).parameters:
            keywords.setdefault("seed", seed)
    return _call(cls, args, keywords)


def _as_communicator(value: Any, seed: int) -> Any:
    return Communicator(value, seed=seed) if isinstance(value, Compressor) else value


def _arguments(
    term: ast.expr, seed: int, inside: tuple[str, ...] = _OF_TRAINING[1:]
) -> tuple[list[Any], dict[str, Any]]:
    if not isinstance(term, ast.Call):
        return [], {}
    keywords = {}
    for keyword in term.keywords:
        if keyword.arg is None:
            raise UsageError(f"expected named values, got {ast.unparse(keyword)}.")
        keywords[keyword.arg] = _value(keyword.value, seed, inside)
    return [_value(arg, seed, inside) for arg in term.args], keywords


def _value(node: ast.expr, seed: int, inside: tuple[str, ...]) -> Any:
    """A literal, or the object that a nested term describes."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _communicator(_terms(node, ("compressor", "feedback", "exchange", "plan")), seed)
    if isinstance(node, ast.Name) and node.id.lower() == DENSE:
        return _dense(seed)
    if isinstance(node, ast.Name | ast.Call):
        return _make(node, inside, seed)
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise UsageError(f"expected a literal or a known name, got {ast.unparse(node)}.") from None


def _keywords(cls: type) -> set[str]:
    """The names that a constructor takes, those of `**options: Unpack[...]` among them."""
    names = set()
    for parameter in inspect.signature(cls).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            names |= {name for options in get_args(parameter.annotation) for name in options.__annotations__}
        else:
            names.add(parameter.name)
    return names


def _call(cls: Callable[..., Any], args: list[Any], keywords: Mapping[str, Any]) -> Any:
    """Call a constructor; what it refuses becomes a `UsageError`."""
    signature = inspect.signature(cls)
    try:
        signature.bind(*args, **keywords)
    except TypeError as error:
        name = getattr(cls, "__name__", str(cls))
        takes = ", ".join(str(p.replace(annotation=p.empty)) for p in signature.parameters.values())
        raise UsageError(f"{name}: {error}; expected {name}({takes}).") from None
    try:
        return cls(*args, **keywords)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from None
