"""Which DeepSpeed engines a communicator can average for, and what to change where it cannot."""

import sys
from collections.abc import Iterator
from typing import Any

from gradwire.comm.averager import Averager

_VERSIONS = ("0.19.",)
_NATIVE = (
    "DeepSpeed's own compressed path is ZeRO++: zero_quantized_gradients, zero_quantized_weights and "
    "zero_hpz_partition_size in the section zero_optimization of its configuration."
)


def is_engine(host: Any) -> bool:
    """Whether this is a DeepSpeed engine; imports nothing."""
    engine = getattr(sys.modules.get("deepspeed"), "DeepSpeedEngine", None)
    return isinstance(engine, type) and isinstance(host, engine)


def check_engine(engine: Any, communicator: Averager) -> None:
    """Raise ValueError unless the engine's gradients can be averaged through a communicator."""
    version = sys.modules["deepspeed"].__version__
    if not version.startswith(_VERSIONS):
        raise ValueError(
            f"attach: expected deepspeed>=0.19,<0.20, got {version}. Other versions reduce gradients in other places; "
            'install them with pip install "gradwire[deepspeed]".'
        )
    for wanted, got, remedy in _misfits(engine):
        raise ValueError(f"attach: expected a DeepSpeed engine with {wanted}, got {got}. {remedy}")
    ranks = communicator.connect()
    if ranks.size != engine.dp_world_size:
        raise ValueError(
            f"attach: expected a communicator of the engine's {engine.dp_world_size} data-parallel ranks, got one of "
            f"{ranks.size}. Leave group= out."
        )


def check_local(engine: Any) -> None:
    """Raise ValueError unless the engine can leave gradients as they are."""
    stage = int(engine.zero_optimization_stage())
    if stage != 0:
        raise ValueError(
            f"keep_local: expected ZeRO stage 0, got stage {stage}, which cuts gradients into partitions. Optimizers "
            "that exchange by themselves need whole ones: use stage 0, or shard with FSDP2."
        )


def _misfits(engine: Any) -> Iterator[tuple[str, str, str]]:
    """What is in the way: what is expected, what is there, and what to do."""
    stage = int(engine.zero_optimization_stage())
    if stage == 3:
        yield "ZeRO stage 0, 1 or 2", "stage 3", f"Use one of them, or FSDP2 with replicate=. {_NATIVE}"
    if engine.pipeline_parallelism:
        yield "data parallelism alone", "a pipeline", f"Use DeepSpeed's own reduction there. {_NATIVE}"
    if engine.has_moe_layers:
        yield "dense layers", "mixtures of experts", f"Use DeepSpeed's own reduction there. {_NATIVE}"
    if engine.mp_world_size > 1 or engine.seq_dp_world_size != engine.dp_world_size:
        got = "tensor or sequence parallelism"
        yield "data parallelism alone", got, f"Use DeepSpeed's own reduction there. {_NATIVE}"
    if engine.is_deepcompile_enabled():
        yield "its own backward pass", "DeepCompile", "Leave compile.deepcompile out of its configuration."
    if not engine.gradient_average:
        yield "gradients that are averaged", "gradient_allreduce_op='sum'", "Leave it out, and scale lr instead."
    if engine.enable_backward_allreduce is not True:
        yield (
            "gradients that it reduces",
            "enable_backward_allreduce=False",
            "Do not call keep_local, or do not attach.",
        )
    yield from _misfits_of_optimizer(engine, stage)
    if stage in (1, 2):
        yield from _misfits_of_zero(engine)


def _misfits_of_optimizer(engine: Any, stage: int) -> Iterator[tuple[str, str, str]]:
    optimizer = engine.basic_optimizer
    name = type(optimizer).__name__
    if optimizer is None:
        yield "an optimizer", "none", "Pass optimizer= to deepspeed.initialize."
    if isinstance(getattr(optimizer, "communicator", None), Averager):
        yield (
            "an optimizer that takes averaged gradients",
            f"{name}, which exchanges by itself",
            "Call keep_local(engine) instead of attach, at ZeRO stage 0.",
        )
    if stage > 0 and not getattr(optimizer, "elementwise", True):
        yield (
            "an optimizer that treats each element alone where ZeRO cuts tensors into partitions",
            f"{name} at stage {stage}",
            "Use stage 0, AdaBelief, DiffGrad or LaProp, or shard with FSDP2.",
        )


def _misfits_of_zero(engine: Any) -> Iterator[tuple[str, str, str]]:
    zero = engine.optimizer
    section = "in the section zero_optimization of its configuration"
    for option, wanted in (("reduce_scatter", False), ("overlap_comm", False), ("contiguous_gradients", True)):
        if (found := bool(getattr(zero, option, wanted))) != wanted:
            yield f"{option}={wanted}", f"{option}={found}", f'Set "{option}": {str(wanted).lower()} {section}.'
    if engine.zero_cpu_offload() or engine.zenflow:
        yield "its optimizer's state in place", "offloading", f"Leave offload_optimizer and zenflow out {section}."
    missing = [
        name for name in ("gradient_reduction_w_predivide", "ipg_buckets", "bit16_groups") if not hasattr(zero, name)
    ]
    if missing:
        yield (
            "its ZeRO optimizer of stages 1 and 2",
            f"{type(zero).__name__} without {missing[0]}",
            "With bf16 leave data_types.grad_accum_dtype out of its configuration; or use stage 0.",
        )
