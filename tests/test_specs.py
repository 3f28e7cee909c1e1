"""Configurations as text: what they mean, and what they refuse."""

import pytest
import torch

from gradwire.bench import specs
from gradwire.bench.errors import UsageError
from gradwire.comm import EF, EF21, AllGather, AllReduce, Communicator, Plan, PowerSGD, TwoPhase, Warmup
from gradwire.compression import BlockQuantize, Chain, ChunkTopK, Identity
from gradwire.optim import DeMo


@pytest.mark.parametrize("text", specs.DEFAULTS)
def test_defaults_build(text: str) -> None:
    assert specs.parse(text).communicator(seed=3).seed == 3


def test_terms_go_where_their_class_belongs() -> None:
    communicator = specs.parse("AllGather + Plan(min_numel=7) + EF21 + ChunkTopK(k=8, chunk=256)").communicator(seed=1)
    assert isinstance(communicator, Communicator)
    assert communicator.compressor == ChunkTopK(k=8, chunk=256)
    assert isinstance(communicator.feedback, EF21)
    assert isinstance(communicator.exchange, AllGather)
    assert communicator.plan == Plan(min_numel=7)


def test_dense_is_all_reduce_of_everything_as_it_is() -> None:
    communicator = specs.parse("DENSE").communicator(seed=0)
    assert isinstance(communicator, Communicator)
    assert communicator.compressor == Identity()
    assert isinstance(communicator.exchange, AllReduce)


def test_names_in_any_case_and_nested_terms() -> None:
    chained = specs.parse("chain(chunktopk(k=8), blockquantize) + ef").communicator(seed=0)
    assert isinstance(chained, Communicator)
    assert chained.compressor == Chain(ChunkTopK(k=8), BlockQuantize())
    two_phase = specs.parse("blockquantize(bits=4) + twophase(second=BlockQuantize(8)) + ef").communicator(seed=0)
    assert isinstance(two_phase, Communicator)
    assert isinstance(two_phase.exchange, TwoPhase)
    assert two_phase.exchange.second == BlockQuantize(bits=8)


def test_a_communicator_holds_communicators() -> None:
    warmup = specs.parse("Warmup(dense, ChunkTopK(k=8) + EF(decay=0.5), steps=5)").communicator(seed=4)
    assert isinstance(warmup, Warmup)
    assert isinstance(warmup.first, Communicator)
    assert isinstance(warmup.then, Communicator)
    assert warmup.then.feedback == EF(decay=0.5)
    assert (warmup.steps, warmup.first.seed, warmup.then.seed) == (5, 4, 4)
    power = specs.parse("Warmup(first=BlockQuantize, then=PowerSGD(matrix_rank=2), steps=1)").communicator(seed=0)
    assert isinstance(power, Warmup)
    assert isinstance(power.then, PowerSGD)


def test_optimizers_come_from_gradwire_and_torch() -> None:
    parameters = [("w", torch.nn.Parameter(torch.ones(2)))]
    named = specs.parse("dense + sgd(lr=0.5, momentum=0.9)").optimizer(parameters, "AdamP", lr=0.1)
    assert isinstance(named, torch.optim.SGD)
    assert named.defaults["lr"] == 0.5
    default = specs.parse("dense").optimizer(parameters, "adamp(weight_decay=0.1)", lr=0.1)
    assert type(default).__module__.startswith("gradwire.optim")
    assert (default.defaults["lr"], default.defaults["weight_decay"]) == (0.1, 0.1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "chunktpk(k=1) + EF",
            r"unknown name 'chunktpk'. Did you mean ChunkTopK\? There is .*compressor: Block",
        ),
        (
            "ChunkTopK(q=3)",
            r"ChunkTopK: got an unexpected .*'q'; expected ChunkTopK\(k=32, chunk=4096\)",
        ),
        ("ChunkTopK(k=0)", r"ChunkTopK: expected .* k=0"),
        ("ScaledSign + AllReduce", r"AllReduce: .*ScaledSign"),
        ("EF", r"expected a compressor, too. There is compressor: BlockQuantize"),
        ("ScaledSign + EF + EF21", r"expected one feedback, got EF and EF21"),
        ("dense + ScaledSign", r"expected one compressor, got Identity and ScaledSign"),
        ("PowerSGD + EF", r"PowerSGD is complete"),
        ("dense + SGD(0.1)", r"SGD: expected named values such as lr=1e-3, got 0.1"),
        ("dense + SGD(lr=-1.0)", r"[Ll]earning rate"),
        ("ChunkTopK(**{'k': 3})", r"expected named values"),
        ("ChunkTopK(k=1", r"expected terms joined by \+"),
        ("", r"expected terms joined by \+"),
        ("__import__('os').system('true')", r"expected the name of a class"),
        ("ChunkTopK(k=open('x'))", r"unknown name 'open'"),
        ("ChunkTopK(k=1 if True else 2)", r"expected a literal or a known name"),
    ],
)
def test_mistakes_get_one_sentence(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        specs.parse(text)


def test_join_checks_each_family() -> None:
    assert specs.join({"compressor": "ScaledSign", "feedback": "EF"}) == "ScaledSign + EF"
    assert specs.join({}) == "dense"
    with pytest.raises(UsageError, match=r"unknown name 'ScaledSign'. There is feedback: .*EF, EF21"):
        specs.join({"feedback": "ScaledSign"})


# Optimizers that exchange gradients by themselves.


def test_an_optimizer_with_a_communicator_needs_no_other() -> None:
    parameters = [("w", torch.nn.Parameter(torch.ones(64, 64)))]
    configuration = specs.parse("DeMo(k=8, values='sign', plan=Plan(min_numel=7))")
    made = configuration.optimizer(parameters, lr=0.1, seed=5)
    assert isinstance(made, DeMo)
    communicator = specs.own_communicator(made)
    assert communicator is made.communicator
    assert (communicator.seed, made.communicator.plan, made.defaults["lr"]) == (5, Plan(min_numel=7), 0.1)
    assert specs.own_communicator(torch.optim.SGD(parameters, lr=0.1)) is None
    named = specs.parse("DeMo(seed=3, lr=0.5)").optimizer(parameters, lr=0.1, seed=5)
    assert isinstance(named, DeMo)
    assert (named.communicator.seed, named.defaults["lr"]) == (3, 0.5)


def test_join_lets_it_stand_alone() -> None:
    assert specs.join({}, "DeMo(k=8)") == "DeMo(k=8)"
    assert specs.join({}, "AdamP") == "dense"
    assert specs.join({"compressor": "ScaledSign"}, "DeMo(k=8)") == "ScaledSign"  # for parse to refuse


@pytest.mark.parametrize(
    ("text", "optimizer"),
    [
        ("dense + DeMo", "AdamW"),
        ("ChunkTopK + EF + demo(k=8)", "AdamW"),
        ("PowerSGD + DeMo", "AdamW"),
        ("dense", "DeMo(k=8)"),
        ("ScaledSign + EF", "DeMo"),
    ],
)
def test_it_takes_nothing_beside_it(text: str, optimizer: str) -> None:
    refused = r"DeMo: expected no compressor, feedback or exchange beside it, .* Write DeMo alone, or name another"
    with pytest.raises(UsageError, match=refused):
        specs.parse(text, optimizer)


def test_every_optimizer_named_needs_parameters_only() -> None:
    parameters = [("w", torch.nn.Parameter(torch.ones(2)))]
    named = specs.catalogue()["optimizer"]
    assert {"AdamW", "AdamP", "DeMo", "LBFGS"} <= named.keys()
    for name in named.keys() - {"Muon"}:  # takes matrices only
        assert specs.parse(name).optimizer(parameters, lr=0.1).param_groups[0]["lr"] == 0.1


def test_expand_replaces_default_and_keeps_each_once() -> None:
    assert specs.expand(["ScaledSign", "default", "dense"]) == ["ScaledSign", *specs.DEFAULTS]
