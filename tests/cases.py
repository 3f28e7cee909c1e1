"""The one list of cases: every public class stands here and passes its family's conformance suite.

Adding an algorithm is one file, one export line, one line here and one reference in `tests/reference/`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from reference import (
    adafactor,
    asynchronous,
    demo,
    diloco,
    federated_optimizers,
    feedback,
    lamb,
    masha,
    mkor,
    one_bit,
    optimizers,
    quantizers,
    sparsifiers,
)
from reference import aggregators as rules
from reference import federated as rounds

from gradwire import comm, federated, optim
from gradwire import compression as C


@dataclass(frozen=True)
class CompressorCase:
    """A compressor, its float64 NumPy reference, and what its constructor must refuse.

    Args:
        compressor: The instance under test.
        reference: `(x [rows, width] float64) -> float64 [rows, width]` in NumPy, written from the paper. It also takes
            `keys=` (`[rows]` int64) if the compressor draws random numbers.
        rtol: Tolerance against the reference, relative to the largest magnitude of a row, for float32 input.
        errors: `(keyword arguments, regex)` pairs for which the class raises ValueError.
    """

    compressor: C.Compressor
    reference: Callable[..., Any]
    rtol: float = 1e-6
    errors: tuple[tuple[dict[str, Any], str], ...] = ()


@dataclass(frozen=True)
class OptimizerCase:
    """An optimizer class, keyword arguments, its float64 NumPy reference, and what its constructor must refuse.

    Args:
        cls: The class under test.
        kwargs: Its hyper-parameters, without lr and how it runs (foreach, fused, maximize).
        reference: `(weight, gradients of every step or None, lr of every step, **kwargs) -> weight`, in float64 NumPy.
        errors: `(keyword arguments, regex)` pairs for which the class raises ValueError.
        rosenbrock_lr: With this lr it descends Rosenbrock's function.
    """

    cls: type[optim.Optimizer]
    kwargs: dict[str, Any]
    reference: Callable[..., Any]
    errors: tuple[tuple[dict[str, Any], str], ...] = ()
    rosenbrock_lr: float = 2e-2

    def __str__(self) -> str:
        return f"{self.cls.__name__}({', '.join(f'{name}={value}' for name, value in self.kwargs.items())})"


@dataclass(frozen=True)
class FeedbackCase:
    """An error feedback mechanism, its float64 NumPy reference, and what its constructor must refuse."""

    feedback: comm.ErrorFeedback
    reference: Callable[..., Any]
    errors: tuple[tuple[dict[str, Any], str], ...] = ()


@dataclass(frozen=True)
class AlgorithmCase:
    """A federated algorithm, its float64 NumPy reference, and what its constructor must refuse.

    Args:
        algorithm: The instance under test.
        reference: `(reference.federated.Run, **kwargs) -> x after every round`.
        training: Further arguments of `LocalTraining`.
        compress: What the algorithm's compressor does to rows, in NumPy, as in `CompressorCase.reference`.
        everyone: Whether all clients must take part.
        equal_steps: Whether all clients must take the same number of steps.
        server_lr: Of the server.
        errors: `(keyword arguments, regex)` pairs for which the class raises ValueError.
    """

    algorithm: federated.Algorithm
    reference: Callable[..., Any]
    training: dict[str, Any] = field(default_factory=dict)
    compress: Callable[..., Any] | None = None
    everyone: bool = False
    equal_steps: bool = False
    server_lr: float = 1.0
    errors: tuple[tuple[dict[str, Any], str], ...] = ()


@dataclass(frozen=True)
class AggregatorCase:
    """An aggregator, its float64 NumPy reference, and what holds for it.

    Args:
        aggregator: The instance under test; a test takes a copy.
        reference: `(messages [n, d], weights [n]) -> [d]`, of a first round.
        translates: Whether shifting all messages shifts the result.
        scales: Whether scaling all messages, by a positive number, scales the result.
        unordered: Whether the order of messages does not matter.
        radius: How far, per diameter of honest messages, the result may be from their mean, whatever tolerated others
            send; None where it is bounded in another way.
        errors: `(keyword arguments, regex)` pairs for which the class raises ValueError.
    """

    aggregator: federated.Aggregator
    reference: Callable[..., Any]
    translates: bool = True
    scales: bool = True
    unordered: bool = True
    radius: float | None = None
    errors: tuple[tuple[dict[str, Any], str], ...] = ()


@dataclass(frozen=True)
class CommunicatorCase:
    """A legal communicator.

    Args:
        name: What a failing test prints.
        make: Makes a new one; takes `seed`, `plan`, `group` and `timeout`, and all else that `Communicator` takes if it
            is one.
        inside: The world size must be a multiple of it.
        composed: Whether it is a `Communicator`, so that `make(exchange=Simulated(n))` is its simulation.
    """

    name: str
    make: Callable[..., comm.Averager]
    inside: int = 1
    composed: bool = True


def _composed(
    name: str,
    compressor: C.Compressor,
    feedback: comm.ErrorFeedback | None = None,
    exchange: Callable[[], comm.Exchange] | None = None,
    inside: int = 1,
    participants: int | None = None,
) -> CommunicatorCase:
    def make(**options: Any) -> comm.Communicator:
        made = exchange() if exchange is not None and "exchange" not in options else None
        given = {"feedback": feedback, "exchange": made, "participants": participants}
        return comm.Communicator(compressor, **{**given, **options})

    return CommunicatorCase(name, make, inside)


def _warmup(**options: Any) -> comm.Warmup:
    first = comm.Communicator(C.Identity(), **options)
    return comm.Warmup(first, comm.Communicator(C.ChunkTopK(k=8, chunk=256), feedback=comm.EF(), **options), steps=2)


COMPRESSORS: list[CompressorCase] = [
    CompressorCase(
        C.Identity(), sparsifiers.identity, rtol=0, errors=(({"width": 0}, "expected an integer width >= 1"),)
    ),
    CompressorCase(C.Identity(width=5), sparsifiers.identity, rtol=0),
    CompressorCase(
        C.TopK(ratio=0.1),
        partial(sparsifiers.top_k, ratio=0.1),
        rtol=0,
        errors=(
            ({"ratio": 0.0}, r"TopK: expected 0 < ratio <= 1, got ratio=0\.0\."),
            ({"ratio": 1.5}, r"TopK: expected 0 < ratio <= 1, got ratio=1\.5\."),
            ({"ratio": float("nan")}, r"TopK: expected 0 < ratio <= 1, got ratio=nan\."),
        ),
    ),
    CompressorCase(C.TopK(ratio=1.0), sparsifiers.identity, rtol=0),
    CompressorCase(
        C.ChunkTopK(),
        partial(sparsifiers.top_k, k=32),
        rtol=0,
        errors=(
            ({"k": 0}, "expected an integer k >= 1, got k=0"),
            ({"k": 2.0}, r"expected an integer k >= 1, got k=2\.0"),
            ({"k": 1, "chunk": 1}, "expected 2 <= chunk <= 65536, got chunk=1"),
            ({"chunk": 65537}, "expected 2 <= chunk <= 65536, got chunk=65537"),
            ({"k": 9, "chunk": 8}, "expected k <= chunk, got k=9 and chunk=8"),
        ),
    ),
    CompressorCase(C.ChunkTopK(k=4, chunk=256), partial(sparsifiers.top_k, k=4), rtol=0),
    CompressorCase(C.ChunkTopK(k=3, chunk=100), partial(sparsifiers.top_k, k=3), rtol=0),
    CompressorCase(
        C.RandomK(k=8, chunk=64),
        partial(sparsifiers.random_k, k=8),
        errors=(
            ({"k": 0}, "expected an integer k >= 1, got k=0"),
            ({"k": 1, "chunk": 1}, "expected 2 <= chunk <= 65536, got chunk=1"),
            ({"k": 3, "chunk": 8}, "expected k to divide chunk, got k=3 and chunk=8"),
        ),
    ),
    CompressorCase(
        C.RandomK(k=5, chunk=15, unbiased=False), partial(sparsifiers.random_k, k=5, unbiased=False), rtol=0
    ),
    CompressorCase(
        C.Chain(C.ChunkTopK(k=16, chunk=256), C.BlockQuantize(bits=8)),
        partial(
            sparsifiers.chained,
            first=partial(sparsifiers.top_k, k=16),
            second=partial(quantizers.block_quantize, bits=8),
        ),
        errors=(
            ({"first": C.ScaledSign(), "second": C.Identity()}, "expected a first that sends its values"),
            ({"first": C.Cast(), "second": C.Identity()}, "Put the sparsifier first"),
        ),
    ),
    CompressorCase(
        C.Chain(C.RandomK(k=8, chunk=64), C.Cast("bfloat16")),
        partial(
            sparsifiers.chained,
            first=partial(sparsifiers.random_k, k=8),
            second=partial(quantizers.cast, dtype="bfloat16"),
            scale=8,
        ),
    ),
    CompressorCase(
        C.ThresholdTopK(ratio=0.1),
        partial(sparsifiers.threshold_top_k, ratio=0.1, mantissa_bits=5),
        rtol=0,
        errors=(
            ({"ratio": 0.0}, r"ThresholdTopK: expected 0 < ratio <= 1, got ratio=0\.0\."),
            ({"mantissa_bits": 8}, r"expected an integer mantissa_bits in 0\.\.7, got mantissa_bits=8"),
            ({"mantissa_bits": 2.0}, r"got mantissa_bits=2\.0"),
        ),
    ),
    CompressorCase(
        C.ThresholdTopK(ratio=0.3, mantissa_bits=0),
        partial(sparsifiers.threshold_top_k, ratio=0.3, mantissa_bits=0),
        rtol=0,
    ),
    CompressorCase(
        C.DARE(drop=0.8, chunk=64),
        partial(sparsifiers.dare, drop=0.8),
        errors=(
            ({"drop": 1.0}, r"DARE: expected 0 <= drop < 1, got drop=1\.0"),
            ({"drop": -0.1}, r"got drop=-0\.1"),
            ({"chunk": 1}, "expected 2 <= chunk <= 65536, got chunk=1"),
            ({"chunk": 64.0}, r"expected an integer chunk >= 1, got chunk=64\.0"),
        ),
    ),
    CompressorCase(C.DARE(drop=0.25, chunk=30), partial(sparsifiers.dare, drop=0.25)),
    CompressorCase(
        C.DAREx(drop=0.8, rescale=1.5, chunk=64),
        partial(sparsifiers.dare, drop=0.8, rescale=1.5),
        errors=(
            ({"drop": 1.5}, r"DAREx: expected 0 <= drop < 1, got drop=1\.5"),
            ({"drop": 0.5, "rescale": 2.5}, r"DAREx: expected 1 <= rescale <= 2, got rescale=2\.5"),
            ({"rescale": 0.5}, r"got rescale=0\.5"),
        ),
    ),
    CompressorCase(C.DAREx(drop=0.0, chunk=16), partial(sparsifiers.dare, drop=0.0, rescale=1.0), rtol=0),
    CompressorCase(
        C.DCTTopK(k=4, chunk=16, values="fp32"),
        partial(sparsifiers.top_k_of_tile, k=4, chunk=16),
        rtol=0,
        errors=(
            ({"k": 0}, "DCTTopK: expected an integer k >= 1, got k=0"),
            ({"k": 65, "chunk": 8}, r"expected k <= chunk\^2, got k=65 and chunk=8"),
            ({"k": 8, "ratio": 0.1}, r"expected k or ratio, got k=8 and ratio=0\.1"),
            ({"ratio": 0.0}, r"expected 0 < ratio <= 1, got ratio=0\.0"),
            ({"chunk": 129}, "expected 2 <= chunk <= 128, got chunk=129"),
            ({"transform": "fft"}, r"expected transform in \('dct', 'random', 'none'\), got transform='fft'"),
            ({"values": "fp8"}, "expected values in .*, got values='fp8'"),
        ),
    ),
    CompressorCase(C.DCTTopK(), partial(sparsifiers.top_k_of_tile, k=32, chunk=64), rtol=2.0**-8),
    CompressorCase(
        C.DCTTopK(ratio=0.02, transform="random", values="int8"), partial(sparsifiers.top_k, ratio=0.02), rtol=1 / 254
    ),
    CompressorCase(C.DCTTopK(k=8, chunk=16, values="sign"), partial(sparsifiers.top_k_signs, k=8, chunk=16), rtol=0),
    CompressorCase(
        C.DCTTopK(k=1, chunk=32, values="sign", transform="none"),
        partial(sparsifiers.top_k_signs, k=1, chunk=32),
        rtol=0,
    ),
    # Quantisers.
    *(CompressorCase(C.Cast(name), partial(quantizers.cast, dtype=name)) for name in quantizers.FORMATS),
    CompressorCase(
        C.Cast("bfloat16", stochastic=True),
        partial(quantizers.cast, dtype="bfloat16"),
        errors=(({"dtype": "int8"}, r"Cast: expected dtype in \('bfloat16', .*\), got dtype='int8'"),),
    ),
    CompressorCase(C.Cast("float8_e4m3fn", stochastic=True), partial(quantizers.cast, dtype="float8_e4m3fn")),
    CompressorCase(
        C.ScaledSign(),
        quantizers.scaled_sign,
        errors=(({"width": 0}, "ScaledSign: expected an integer width >= 1, got width=0"),),
    ),
    CompressorCase(C.ScaledSign(width=100), quantizers.scaled_sign),
    *(CompressorCase(C.BlockQuantize(bits), partial(quantizers.block_quantize, bits=bits)) for bits in (8, 4, 2)),
    CompressorCase(
        C.BlockQuantize(bits=8, block=100, stochastic=True),
        partial(quantizers.block_quantize, bits=8),
        errors=(
            ({"bits": 3}, r"BlockQuantize: expected bits in \(8, 4, 2\), got bits=3"),
            ({"block": 0}, "BlockQuantize: expected an integer block >= 1, got block=0"),
        ),
    ),
    CompressorCase(C.BlockQuantize(bits=2, block=10, stochastic=True), partial(quantizers.block_quantize, bits=2)),
    # Unbiased quantisers.
    CompressorCase(
        C.QSGD(),
        partial(quantizers.linear_dithering, levels=7, norm=2),
        errors=(
            ({"levels": 0}, "QSGD: expected an integer levels >= 1, got levels=0"),
            ({"levels": 32768}, "QSGD: expected levels <= 32767 with linear spacing, got levels=32768"),
            ({"bucket": 0}, "QSGD: expected an integer bucket >= 1, got bucket=0"),
        ),
    ),
    CompressorCase(C.QSGD(levels=1, bucket=64), partial(quantizers.linear_dithering, levels=1, norm=2)),
    CompressorCase(C.QSGD(levels=12, bucket=100), partial(quantizers.linear_dithering, levels=12, norm=2)),
    CompressorCase(
        C.RandomDithering(),
        partial(quantizers.natural_dithering, levels=7, norm=np.inf),
        errors=(
            ({"levels": 128}, "RandomDithering: expected levels <= 127 with natural spacing, got levels=128"),
            ({"norm": 3}, r"RandomDithering: expected norm in \(1, 2, 'inf'\), got norm=3"),
            ({"spacing": "log"}, r"expected spacing in \('linear', 'natural'\), got spacing='log'"),
        ),
    ),
    CompressorCase(
        C.RandomDithering(levels=3, norm=1, bucket=24),
        partial(quantizers.natural_dithering, levels=3, norm=1),
    ),
    CompressorCase(
        C.RandomDithering(levels=127, norm=2, bucket=40),
        partial(quantizers.natural_dithering, levels=127, norm=2),
    ),
    CompressorCase(
        C.RandomDithering(levels=30, norm=1, spacing="linear", bucket=40),
        partial(quantizers.linear_dithering, levels=30, norm=1),
    ),
    CompressorCase(
        C.TernGrad(),
        quantizers.terngrad,
        errors=(
            ({"bucket": 0}, "TernGrad: expected an integer bucket >= 1, got bucket=0"),
            ({"clip": 0.0}, r"TernGrad: expected a finite clip > 0 or None, got clip=0\.0"),
            ({"clip": float("inf")}, "finite clip > 0 or None, got clip=inf"),
        ),
    ),
    CompressorCase(C.TernGrad(bucket=33), quantizers.terngrad),
    CompressorCase(C.TernGrad(bucket=100, clip=1.5), partial(quantizers.terngrad, clip=1.5)),
    CompressorCase(C.NaturalCompression(), quantizers.natural_compression),
    CompressorCase(
        C.Scaled(C.QSGD(levels=1, bucket=100)),
        partial(quantizers.scaled, inner=partial(quantizers.linear_dithering, levels=1, norm=2), omega=9),
        errors=(
            ({"compressor": C.ChunkTopK()}, "Scaled: expected an unbiased compressor, got ChunkTopK.* Use it as it is"),
            ({"compressor": C.TernGrad(clip=2.5)}, "Scaled: .*clip=None"),
        ),
    ),
]

OPTIMIZERS: list[OptimizerCase] = [
    OptimizerCase(
        optim.AdamP,
        {},
        optimizers.adamp,
        errors=(
            ({"lr": -1.0}, r"AdamP: expected 0 <= lr, got lr=-1\.0\."),
            ({"lr": float("nan")}, "expected 0 <= lr, got lr=nan"),
            ({"lr": torch.tensor([0.1])}, r"expected a number or a 0-d tensor lr, got shape \(1,\)"),
            ({"lr": torch.tensor(-0.1)}, "expected 0 <= lr, got lr=-0.1"),
            ({"betas": 0.9}, "expected a pair betas"),
            ({"betas": (0.9, 1.0)}, r"expected 0 <= betas\[1\] < 1, got betas\[1\]=1\.0"),
            ({"eps": -1e-8}, "expected 0 <= eps, got eps=-1e-08"),
            ({"weight_decay": "0.1"}, "expected 0 <= weight_decay, got weight_decay='0.1'"),
            ({"delta": -0.1}, "expected 0 <= delta"),
            ({"wd_ratio": -0.1}, "expected 0 <= wd_ratio"),
            ({"foreach": True, "fused": True}, "expected foreach or fused, got both"),
        ),
    ),
    OptimizerCase(optim.AdamP, {"weight_decay": 0.1, "delta": 1.0, "nesterov": True}, optimizers.adamp),
    OptimizerCase(
        optim.AdamP, {"betas": (0.5, 0.9), "eps": 1e-4, "weight_decay": 0.1, "wd_ratio": 0.5}, optimizers.adamp
    ),
    OptimizerCase(
        optim.SGDP,
        {"momentum": 0.9, "weight_decay": 0.01},
        optimizers.sgdp,
        errors=(
            ({"lr": -1.0}, r"SGDP: expected 0 <= lr, got lr=-1\.0\."),
            ({"momentum": 1.0}, r"expected 0 <= momentum < 1, got momentum=1\.0"),
            ({"dampening": 1.5}, r"expected 0 <= dampening < 1, got dampening=1\.5"),
            ({"weight_decay": -0.1}, "expected 0 <= weight_decay"),
            ({"eps": -1e-8}, "expected 0 <= eps"),
            ({"delta": -0.1}, "expected 0 <= delta"),
            ({"wd_ratio": -0.1}, "expected 0 <= wd_ratio"),
        ),
        rosenbrock_lr=5e-4,
    ),
    OptimizerCase(optim.SGDP, {}, optimizers.sgdp),
    OptimizerCase(optim.SGDP, {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True, "delta": 1.0}, optimizers.sgdp),
    OptimizerCase(
        optim.SGDP,
        {"momentum": 0.5, "dampening": 0.3, "weight_decay": 0.1, "eps": 1e-4, "wd_ratio": 0.5},
        optimizers.sgdp,
    ),
    OptimizerCase(
        optim.AdaBelief,
        {},
        optimizers.adabelief,
        errors=(
            ({"lr": -1.0}, r"AdaBelief: expected 0 <= lr, got lr=-1\.0\."),
            ({"betas": (1.0, 0.9)}, r"expected 0 <= betas\[0\] < 1, got betas\[0\]=1\.0"),
            ({"eps": -1e-16}, "expected 0 <= eps, got eps=-1e-16"),
            ({"weight_decay": -0.1}, "expected 0 <= weight_decay"),
            (
                {"state_dtype": torch.float16},
                r"AdaBelief: expected eps >= 6\.0e-08 with state_dtype=torch\.float16, got eps=1e-16",
            ),
            ({"fixed_decay": True, "weight_decouple": False}, "expected weight_decouple with fixed_decay"),
        ),
        rosenbrock_lr=5e-4,  # the first steps follow the gradient itself
    ),
    OptimizerCase(
        optim.AdaBelief,
        {"rectify": False, "amsgrad": True, "weight_decay": 0.1, "weight_decouple": False, "eps": 1e-8},
        optimizers.adabelief,
    ),
    OptimizerCase(
        optim.AdaBelief,
        {"rectify": False, "betas": (0.5, 0.9), "weight_decay": 0.01, "fixed_decay": True},
        optimizers.adabelief,
    ),
    OptimizerCase(
        optim.AdaBelief,
        {"degenerated_to_sgd": False, "amsgrad": True, "weight_decay": 0.1, "betas": (0.9, 0.99)},
        optimizers.adabelief,
    ),
    OptimizerCase(optim.AdaBelief, {"betas": (0.9, 0.5)}, optimizers.adabelief),  # never rectified: rho_max is 3
    OptimizerCase(
        optim.LaProp,
        {},
        optimizers.laprop,
        errors=(
            ({"lr": -1.0}, r"LaProp: expected 0 <= lr, got lr=-1\.0\."),
            ({"betas": (0.9,)}, "expected a pair betas"),
            ({"eps": -1e-15}, "expected 0 <= eps, got eps=-1e-15"),
            ({"weight_decay": -0.1}, "expected 0 <= weight_decay"),
            ({"steps_before_using_centered": -1}, "expected 0 <= steps_before_using_centered"),
            (
                {"state_dtype": torch.float16},
                r"LaProp: expected eps >= 6\.0e-08 with state_dtype=torch\.float16, got eps=1e-15",
            ),
            (
                {"state_dtype": torch.bfloat16, "centered": True},
                r"LaProp: expected a state_dtype .* with centered, got state_dtype=torch\.bfloat16. Use torch.float32",
            ),
        ),
    ),
    OptimizerCase(optim.LaProp, {"weight_decay": 0.1, "amsgrad": True, "eps": 1e-4}, optimizers.laprop),
    OptimizerCase(
        optim.LaProp,
        {"betas": (0.5, 0.99), "weight_decay": 0.01, "fixed_decay": True, "centered": True},
        optimizers.laprop,
    ),
    OptimizerCase(
        optim.LaProp,
        {"paper_momentum": True, "centered": True, "amsgrad": True, "steps_before_using_centered": 3},
        optimizers.laprop,
    ),
    OptimizerCase(
        optim.DiffGrad,
        {},
        optimizers.diffgrad,
        errors=(
            ({"lr": -1.0}, r"DiffGrad: expected 0 <= lr, got lr=-1\.0\."),
            ({"betas": (0.9, 1.0)}, r"expected 0 <= betas\[1\] < 1, got betas\[1\]=1\.0"),
            ({"eps": -1e-8}, "expected 0 <= eps, got eps=-1e-08"),
            ({"weight_decay": -0.1}, "expected 0 <= weight_decay"),
            ({"version": 3}, r"expected version in \(0, 1, 2\), got version=3"),
        ),
    ),
    OptimizerCase(optim.DiffGrad, {"weight_decay": 0.1, "version": 1}, optimizers.diffgrad),
    OptimizerCase(optim.DiffGrad, {"betas": (0.5, 0.9), "eps": 1e-4, "version": 2}, optimizers.diffgrad),
    OptimizerCase(optim.DiffGrad, {"weight_decay": 0.1, "original": True}, optimizers.diffgrad),
    OptimizerCase(
        optim.Adafactor,
        {},
        adafactor.adafactor,
        errors=(
            ({"lr": -1.0}, r"Adafactor: expected 0 <= lr, got lr=-1\.0\."),
            ({"lr": None}, "expected 0 <= lr, got lr=None"),
            ({"beta2_decay": 0.8}, r"expected beta2_decay <= 0, got beta2_decay=0\.8"),
            ({"eps": 1e-8}, "expected a pair eps"),
            ({"eps": (-1.0, 1e-3)}, r"expected 0 <= eps\[0\]"),
            ({"eps": (1e-30, None)}, r"expected 0 <= eps\[1\], got eps\[1\]=None"),
            ({"d": 0.0}, r"expected d > 0 or None, got d=0\.0"),
            ({"weight_decay": -0.1}, "expected 0 <= weight_decay"),
            ({"beta1": 1.0}, r"expected 0 <= beta1 < 1, got beta1=1\.0"),
            ({"beta2_cap": 1.0}, r"expected 0 <= beta2_cap < 1, got beta2_cap=1\.0"),
            ({"step_offset": -1}, "expected 0 <= step_offset"),
            ({"min_dim_size_to_factor": -1}, "expected 0 <= min_dim_size_to_factor"),
            ({"warmup_init": True, "relative_step": False}, "expected relative_step with warmup_init"),
            ({"factored_dims": "first"}, r"expected factored_dims in \('last', 'largest'\), got factored_dims='first'"),
            ({"decay": "rms"}, r"expected decay in \('lr', 'effective'\), got decay='rms'"),
        ),
    ),
    OptimizerCase(
        optim.Adafactor,
        {"beta1": 0.9, "weight_decay": 0.1, "decay": "effective", "relative_step": False, "d": 0.8},
        adafactor.adafactor,
    ),
    OptimizerCase(
        optim.Adafactor,
        {"factored_dims": "largest", "min_dim_size_to_factor": 4, "beta2_cap": 0.9, "weight_decay": 0.1, "d": None},
        adafactor.adafactor,
    ),
    OptimizerCase(
        optim.Adafactor,
        {"beta2_decay": -0.5, "eps": (None, 0.1), "step_offset": 3, "warmup_init": True, "beta1": 0.5},
        adafactor.adafactor,
    ),
    OptimizerCase(optim.Adafactor, {"scale_parameter": False, "eps": (1e-8, 0.0)}, adafactor.adafactor),
    OptimizerCase(
        optim.LAMB,
        {},
        lamb.lamb,
        errors=(
            ({"lr": -1.0}, r"LAMB: expected 0 <= lr, got lr=-1\.0\."),
            ({"betas": (0.9, 1.0)}, r"expected 0 <= betas\[1\] < 1, got betas\[1\]=1\.0"),
            ({"eps": -1e-6}, "expected 0 <= eps, got eps=-1e-06"),
            ({"weight_decay": -0.1}, "expected 0 <= weight_decay"),
            ({"norm_bounds": 10.0}, r"LAMB: expected norm_bounds \(low, high\) with 0 <= low <= high, got 10\.0"),
            ({"norm_bounds": (2.0, 1.0)}, r"got \(2\.0, 1\.0\)"),
            ({"norm_bounds": (-1.0, 1.0)}, r"got \(-1\.0, 1\.0\)"),
        ),
    ),
    OptimizerCase(optim.LAMB, {"weight_decay": 0.1, "bias_correction": False, "norm_bounds": (0.5, 3.0)}, lamb.lamb),
    OptimizerCase(optim.LAMB, {"betas": (0.5, 0.9), "eps": 1e-4, "weight_decay": 0.5, "trust_clip": True}, lamb.lamb),
    OptimizerCase(optim.LAMB, {"weight_decay": 0.1, "adapt": False}, lamb.lamb),
]

_ALL = comm.Plan(min_ndim=0, min_numel=0)
_EXACT = {"chunk": 16, "plan": _ALL, "values": "fp32"}

EXCHANGING: list[OptimizerCase] = [  # their suite is tests/test_demo*.py: a step needs all parameters and all ranks
    OptimizerCase(
        optim.DeMo,
        {"k": 8, **_EXACT},
        demo.demo,
        errors=(
            ({"lr": -1.0}, r"DeMo: expected 0 <= lr, got lr=-1\.0"),
            ({"form": "2025"}, r"expected form in \('2024', '2026', 'overlapped'\), got form='2025'"),
            ({"momentum": 1.0}, r"expected 0 <= momentum < 1, got momentum=1\.0"),
            ({"alpha": 1.5}, r"0 <= alpha <= 1, got alpha=1\.5"),
            ({"base": "adam"}, "expected base 'sign', 'identity' or 'orthogonalized', got base='adam'"),
            ({"base": "identity"}, "expected form='2026' and values with a size .* got form='2024'"),
            ({"base": "identity", "form": "2026", "values": "sign"}, "got form='2026' and values='sign'"),
            ({"weight_decay": -0.1}, "expected 0 <= weight_decay"),
            ({"bucket_mb": 0}, "expected bucket_mb > 0, got bucket_mb=0"),
            ({"k": 5000}, r"expected k <= chunk\^2, got k=5000"),
            ({"differentiable": True}, "expected differentiable=False"),
        ),
    ),
    OptimizerCase(optim.DeMo, {"k": 8, "momentum": 0.5, "weight_decay": 0.1, **_EXACT}, demo.demo),
    OptimizerCase(optim.DeMo, {"k": 16, "transform": "none", **_EXACT}, demo.demo),
    OptimizerCase(optim.DeMo, {"k": 8, **_EXACT, "values": "sign"}, demo.demo),
    OptimizerCase(
        optim.DeMo, {"k": 8, "form": "2026", "momentum": 0.9, "alpha": 0.2, "weight_decay": 0.1, **_EXACT}, demo.demo
    ),
    OptimizerCase(
        optim.DeMo, {"k": 8, "form": "2026", "momentum": 0.9, "alpha": 0.5, "base": "identity", **_EXACT}, demo.demo
    ),
]

_POLICY = {"kappa": 2, "double_every": 4, "max_interval": 4}
_SIGNS = {"compressor": C.ScaledSign(width=16), "plan": _ALL}

ONE_BIT: list[OptimizerCase] = [  # their suite: tests/test_one_bit*.py
    OptimizerCase(
        optim.OneBitAdam,
        {"warmup_steps": 5, **_SIGNS},
        partial(one_bit.one_bit_adam, width=16),
        errors=(
            ({"lr": -1.0}, r"OneBitAdam: expected 0 <= lr, got lr=-1\.0"),
            ({"betas": (1.0, 0.9)}, r"expected 0 <= betas\[0\] < 1"),
            ({"eps": -1.0}, "expected 0 <= eps"),
            ({"weight_decay": -0.1}, "expected 0 <= weight_decay"),
            ({"warmup_steps": 0}, "OneBitAdam: expected an integer warmup_steps >= 1, got warmup_steps=0"),
            ({"warmup_steps": 0.5}, r"got warmup_steps=0\.5"),
            ({"bucket_mb": 0}, "OneBitAdam: expected bucket_mb > 0, got bucket_mb=0"),
            ({"differentiable": True}, "OneBitAdam: expected differentiable=False"),
            ({"compressor": C.RandomK(k=8, chunk=64)}, "TwoPhase: expected a second compressor without shared random"),
        ),
    ),
    OptimizerCase(
        optim.OneBitAdam,
        {"warmup_steps": 3, "betas": (0.5, 0.9), "eps": 1e-4, "weight_decay": 0.1, "bias_correction": False, **_SIGNS},
        partial(one_bit.one_bit_adam, width=16),
    ),
    OptimizerCase(
        optim.OneBitLAMB,
        {"warmup_steps": 5, **_SIGNS},
        partial(one_bit.one_bit_lamb, width=16),
        errors=(
            ({"beta3": 1.0}, r"OneBitLAMB: expected 0 <= beta3 < 1, got beta3=1\.0"),
            ({"threshold": 1.0}, "expected 0 <= threshold < 1"),
            ({"ratio_bounds": (2.0, 1.0)}, r"expected ratio_bounds \(low, high\) with 0 <= low <= high, got \(2"),
            ({"factor_bounds": 4.0}, r"expected factor_bounds \(low, high\)"),
            ({"factor_bounds": (2.0, 4.0)}, r"expected factor_bounds around 1, got \(2\.0, 4\.0\)"),
            ({"warmup_steps": True}, "OneBitLAMB: expected an integer warmup_steps >= 1, got warmup_steps=True"),
        ),
    ),
    OptimizerCase(
        optim.OneBitLAMB,
        {
            "warmup_steps": 4,
            "betas": (0.5, 0.9),
            "weight_decay": 0.5,
            "beta3": 0.5,
            "ratio_bounds": (0.1, 0.5),
            "factor_bounds": (0.9, 1.2),
            "threshold": 0.05,
            "bias_correction": False,
            **_SIGNS,
        },
        partial(one_bit.one_bit_lamb, width=16),
    ),
    OptimizerCase(
        optim.ZeroOneAdam,
        {"warmup_steps": 4, **_POLICY, **_SIGNS},
        partial(one_bit.zero_one_adam, width=16),
        errors=(
            ({"kappa": 0}, "ZeroOneAdam: expected an integer kappa >= 1, got kappa=0"),
            ({"double_every": 0}, "expected an integer double_every >= 1, got double_every=0"),
            ({"max_interval": 1.5}, r"expected an integer max_interval >= 1, got max_interval=1\.5"),
            ({"warmup_steps": 0}, "expected an integer warmup_steps >= 1, got warmup_steps=0"),
        ),
    ),
    OptimizerCase(
        optim.ZeroOneAdam,
        {"warmup_steps": 12, "betas": (0.5, 0.9), "weight_decay": 0.5, "bias_correction": False, **_POLICY, **_SIGNS},
        partial(one_bit.zero_one_adam, width=16),
    ),
    OptimizerCase(
        optim.ZeroOneAdam,
        {"warmup_steps": 4, "eps": 1e-4, "weight_decay": 0.1, **_POLICY, "max_interval": 2, **_SIGNS},
        partial(one_bit.zero_one_adam, width=16),
    ),
]

PRECONDITIONERS: list[tuple[type[torch.optim.Optimizer], Callable[..., Any]]] = [  # their suite: tests/test_mkor*.py
    (optim.MKOR, mkor.mkor),
    (optim.MKORH, mkor.mkorh),
]

GAMES: list[tuple[type[torch.optim.Optimizer], Callable[..., Any]]] = [  # their suite: tests/test_masha*.py
    (optim.MASHA1, masha.masha1),
    (optim.MASHA2, masha.masha2),
]

OUTER_LOOPS: list[tuple[type, Callable[..., Any]]] = [  # their suite: tests/test_diloco*.py
    (optim.DiLoCo, diloco.diloco),
    (comm.LocalSGD, diloco.local_sgd),
]

FEEDBACKS: list[FeedbackCase] = [
    FeedbackCase(comm.NoFeedback(), feedback.none),
    FeedbackCase(
        comm.EF(), feedback.ef, errors=(({"decay": 0.0}, "0 < decay <= 1, got decay=0.0"), ({"decay": 1.5}, "decay"))
    ),
    FeedbackCase(comm.EF(decay=0.75), partial(feedback.ef, decay=0.75)),
    FeedbackCase(comm.EF21(), feedback.ef21),
    FeedbackCase(comm.EF21(dense_start=True), partial(feedback.ef21, dense_start=True)),
    FeedbackCase(
        comm.EF21W(smoothness=(1.0, 4.0, 0.25)),
        partial(feedback.ef21_w, smoothness=(1.0, 4.0, 0.25)),
        errors=(
            ({"smoothness": ()}, r"a finite smoothness > 0 of every worker, got \(\)"),
            ({"smoothness": (1.0, 0.0)}, r"got \(1\.0, 0\.0\)"),
            ({"smoothness": (1.0, float("nan"))}, r"got \(1\.0, nan\)"),
        ),
    ),
    FeedbackCase(
        comm.EF21W(smoothness=(3.0, 1.0, 8.0), dense_start=True),
        partial(feedback.ef21_w, smoothness=(3.0, 1.0, 8.0), dense_start=True),
    ),
    FeedbackCase(
        comm.EF21SGDM(),
        partial(feedback.ef21_sgdm, eta=0.1),
        errors=(({"eta": 0.0}, r"0 < eta <= 1, got eta=0\.0"), ({"eta": 1.5}, r"got eta=1\.5")),
    ),
    FeedbackCase(comm.EF21SGDM(0.5, dense_start=True), partial(feedback.ef21_sgdm, eta=0.5, dense_start=True)),
    FeedbackCase(
        comm.EControl(eta=0.05),
        partial(feedback.econtrol, eta=0.05),
        errors=(({"eta": -0.1}, r"0 <= eta <= 1, got eta=-0\.1"), ({"eta": 1.5}, r"got eta=1\.5")),
    ),
    FeedbackCase(comm.EControl(eta=0.1, dense_start=True), partial(feedback.econtrol, eta=0.1, dense_start=True)),
    FeedbackCase(
        comm.DIANA(),
        partial(feedback.diana, rate=0.25),
        errors=(({"rate": 0.0}, r"0 < rate <= 1, got rate=0\.0"), ({"rate": 2.0}, r"got rate=2\.0")),
    ),
    FeedbackCase(comm.DIANA(rate=0.1), partial(feedback.diana, rate=0.1)),
    FeedbackCase(
        comm.MARINA(),
        partial(feedback.marina, dense=(0, 1, 2, 6, 15, 18, 20, 23, 27, 28)),
        errors=(({"probability": 0.0}, r"0 < probability <= 1, got probability=0\.0"), ({"probability": 2.0}, "got")),
    ),
    FeedbackCase(
        comm.DecoupledMomentum(decay=0.9),
        partial(feedback.decoupled_momentum, decay=0.9),
        errors=(
            ({"decay": 1.5}, r"0 <= decay <= 1, got decay=1\.5"),
            ({"alpha": -0.1}, r"0 <= alpha <= 1, got alpha=-0\.1"),
            ({"decay": 1.0, "ema": True}, "decay < 1 with ema=True, got decay=1"),
        ),
    ),
    FeedbackCase(
        comm.DecoupledMomentum(decay=0.75, alpha=0.2, ema=True),
        partial(feedback.decoupled_momentum, decay=0.75, alpha=0.2, ema=True),
    ),
]

_DCT = C.DCTTopK(k=16, chunk=16)
_CHUNK = C.ChunkTopK(k=8, chunk=256)
_INT8, _INT4 = C.BlockQuantize(bits=8, block=256), C.BlockQuantize(bits=4, block=256)
_RANDOM_K = C.RandomK(k=8, chunk=256, unbiased=False)

COMMUNICATORS: list[CommunicatorCase] = [
    _composed("dense", C.Identity()),
    _composed("dense-gather", C.Identity(), exchange=comm.AllGather),
    _composed("dense-two-phase", C.Identity(), exchange=comm.TwoPhase),
    _composed("dense-hierarchical", C.Identity(), exchange=lambda: comm.Hierarchical(2, comm.AllReduce()), inside=2),
    _composed("bf16", C.Cast("bfloat16")),
    _composed("bf16-EF-gather", C.Cast("bfloat16"), comm.EF(), comm.AllGather),
    _composed("bf16-stochastic-gather", C.Cast("bfloat16", stochastic=True), exchange=comm.AllGather),
    _composed("fp16", C.Cast("float16")),
    _composed("e4m3-EF", C.Cast("float8_e4m3fn"), comm.EF()),
    _composed("e5m2-two-phase", C.Cast("float8_e5m2"), comm.EF(), comm.TwoPhase),
    _composed("topk-EF", C.TopK(ratio=0.05), comm.EF()),
    _composed("topk-EF21", C.TopK(ratio=0.05), comm.EF21()),
    _composed("chunk-EF", _CHUNK, comm.EF()),
    _composed("chunk-EF-decay", _CHUNK, comm.EF(decay=0.9)),
    _composed("chunk-EF21", _CHUNK, comm.EF21()),
    _composed("chunk-EF-two-phase-int8", _CHUNK, comm.EF(), lambda: comm.TwoPhase(second=_INT8)),
    _composed("chunk-EF-hierarchical", _CHUNK, comm.EF(), lambda: comm.Hierarchical(2, comm.AllGather()), inside=2),
    _composed("chunk-EF21-dense-start", _CHUNK, comm.EF21(dense_start=True)),
    _composed("chunk-EF21-one-participant", _CHUNK, comm.EF21(), participants=1),
    _composed("chunk-EF21SGDM", _CHUNK, comm.EF21SGDM()),
    _composed("chunk-EControl", _CHUNK, comm.EControl()),
    _composed("chunk-EControl-two-phase-int8", _CHUNK, comm.EControl(), lambda: comm.TwoPhase(second=_INT8)),
    _composed(
        "chunk-EF21-dense-start-hierarchical",
        _CHUNK,
        comm.EF21(dense_start=True),
        lambda: comm.Hierarchical(2, comm.TwoPhase(second=_INT8)),
        inside=2,
    ),
    _composed("int2-DIANA", C.BlockQuantize(bits=2, block=256, stochastic=True), comm.DIANA()),
    _composed("int8-MARINA", C.BlockQuantize(bits=8, block=256, stochastic=True), comm.MARINA(probability=0.25)),
    _composed("sign-EF", C.ScaledSign(width=256), comm.EF()),
    _composed("sign-EF-two-phase", C.ScaledSign(width=256), comm.EF(), comm.TwoPhase),
    _composed("sign-EF21-two-phase-int8", C.ScaledSign(width=256), comm.EF21(), lambda: comm.TwoPhase(second=_INT8)),
    _composed("int8-two-phase", _INT8, exchange=comm.TwoPhase),
    _composed("int8-stochastic-two-phase", C.BlockQuantize(bits=8, block=256, stochastic=True), exchange=comm.TwoPhase),
    _composed("int4-EF-two-phase-int8", _INT4, comm.EF(), lambda: comm.TwoPhase(second=_INT8)),
    _composed(
        "int4-EF-hierarchical-two-phase",
        _INT4,
        comm.EF(),
        lambda: comm.Hierarchical(2, comm.TwoPhase(second=_INT8)),
        inside=2,
    ),
    _composed("int2-EF21", C.BlockQuantize(bits=2, block=256), comm.EF21()),
    _composed("int2-stochastic", C.BlockQuantize(bits=2, block=256, stochastic=True)),
    _composed("random-k", C.RandomK(k=8, chunk=256)),
    _composed("random-k-EF", _RANDOM_K, comm.EF()),
    _composed("random-k-EF-two-phase-int8", _RANDOM_K, comm.EF(), lambda: comm.TwoPhase(second=_INT8)),
    _composed("threshold-EF", C.ThresholdTopK(ratio=0.05), comm.EF()),
    _composed("threshold-EF21", C.ThresholdTopK(ratio=0.05), comm.EF21()),
    _composed("dare", C.DARE(drop=0.9, chunk=256)),
    _composed("dare-DIANA", C.DARE(drop=0.9, chunk=256), comm.DIANA()),
    _composed("darex-EF", C.DAREx(drop=0.9, chunk=256), comm.EF()),
    _composed("qsgd-DIANA", C.QSGD(bucket=256), comm.DIANA()),
    _composed("qsgd-two-phase-int8", C.QSGD(bucket=256), exchange=lambda: comm.TwoPhase(second=_INT8)),
    _composed("dithering-EF", C.RandomDithering(bucket=256), comm.EF()),
    _composed("terngrad-clipped", C.TernGrad(bucket=256, clip=2.5)),
    _composed("natural-EF21", C.NaturalCompression(), comm.EF21()),
    _composed("scaled-qsgd-EF21", C.Scaled(C.QSGD(levels=1, bucket=256)), comm.EF21()),
    _composed("chain-chunk-scaled-terngrad-EF", C.Chain(_CHUNK, C.Scaled(C.TernGrad(bucket=8))), comm.EF()),
    _composed("chain-chunk-int8-EF", C.Chain(_CHUNK, C.BlockQuantize(bits=8, block=8)), comm.EF()),
    _composed("chain-chunk-int8-EF21", C.Chain(_CHUNK, C.BlockQuantize(bits=8, block=8)), comm.EF21()),
    _composed("chain-random-k-bf16-EF", C.Chain(_RANDOM_K, C.Cast("bfloat16")), comm.EF()),
    _composed("dct-EF", _DCT, comm.EF()),
    _composed("dct-EF-two-phase-fp32", _DCT, comm.EF(), lambda: comm.TwoPhase(second=C.Identity(width=256))),
    _composed("dct-EF-hierarchical", _DCT, comm.EF(), lambda: comm.Hierarchical(2, comm.AllGather()), inside=2),
    _composed("dct-EF21", _DCT, comm.EF21()),
    _composed(
        "dct-momentum-contributors", _DCT, comm.DecoupledMomentum(0.9), lambda: comm.AllGather(merge="contributors")
    ),
    CommunicatorCase("warmup-chunk-EF", _warmup, composed=False),
    CommunicatorCase("powersgd", partial(comm.PowerSGD, 2), composed=False),
    CommunicatorCase(
        "powersgd-newton-schulz", partial(comm.PowerSGD, 2, orthogonalization="newton_schulz"), composed=False
    ),
]


SERVER_OPTIMIZERS: list[OptimizerCase] = [
    OptimizerCase(
        federated.FedAdam,
        {},
        federated_optimizers.fedadam,
        errors=(
            ({"lr": -1.0}, r"FedAdam: expected 0 <= lr, got lr=-1\.0\."),
            ({"betas": (0.9, 1.0)}, r"expected 0 <= betas\[1\] < 1, got betas\[1\]=1\.0"),
            ({"tau": -1e-3}, r"expected 0 <= tau, got tau=-0\.001"),
            ({"tau": 0.0}, r"FedAdam: expected tau >= 3\.7e-23, got tau=0\.0"),
            ({"tau": 1e-4, "state_dtype": torch.float16}, r"expected tau >= 2\.4e-04, got tau=0\.0001"),
        ),
    ),
    OptimizerCase(federated.FedAdam, {"betas": (0.5, 0.9), "tau": 0.1}, federated_optimizers.fedadam),
    OptimizerCase(
        federated.FedYogi,
        {},
        federated_optimizers.fedyogi,
        errors=(
            ({"lr": float("nan")}, "FedYogi: expected 0 <= lr, got lr=nan"),
            ({"betas": 0.9}, "expected a pair betas"),
            ({"tau": 0.0}, r"FedYogi: expected tau >= 3\.7e-23, got tau=0\.0"),
        ),
    ),
    OptimizerCase(
        federated.FedAdagrad,
        {},
        federated_optimizers.fedadagrad,
        errors=(
            ({"lr": -1.0}, "FedAdagrad: expected 0 <= lr"),
            ({"beta1": 1.0}, r"FedAdagrad: expected 0 <= beta1 < 1, got beta1=1\.0"),
            ({"tau": 0.0}, r"FedAdagrad: expected tau >= 3\.7e-23, got tau=0\.0"),
        ),
        rosenbrock_lr=0.2,
    ),
    OptimizerCase(federated.FedAdagrad, {"beta1": 0.9, "tau": 0.1}, federated_optimizers.fedadagrad, rosenbrock_lr=0.2),
]


def _odd(client: int, num_examples: int) -> float:
    return 1.0 + client % 3


_RANDOM_1_OF_4 = C.RandomK(k=1, chunk=4)

ALGORITHMS: list[AlgorithmCase] = [
    AlgorithmCase(federated.FedAvg(), rounds.fedavg),
    AlgorithmCase(federated.FedAvg(weighting="uniform"), rounds.fedavg, {"momentum": 0.9}, server_lr=0.7),
    AlgorithmCase(federated.FedAvg(weighting=_odd), rounds.fedavg),
    AlgorithmCase(
        federated.FedProx(mu=0.5),
        partial(rounds.fedavg, mu=0.5),
        errors=(({"mu": -1.0}, r"FedProx: expected mu >= 0, got mu=-1\.0"), ({"mu": float("nan")}, "got mu=nan")),
    ),
    AlgorithmCase(federated.FedProx(mu=0.5, weighting="uniform"), partial(rounds.fedavg, mu=0.5), {"momentum": 0.9}),
    AlgorithmCase(
        federated.FisherAveraging(),
        partial(rules.fisher_averaging, exact=False),
        errors=(
            ({"max_examples": 0}, "FisherAveraging: expected max_examples >= 1, got max_examples=0"),
            ({"floor": -1.0}, r"expected floor >= 0, got floor=-1\.0"),
            ({"distribution": "poisson"}, "expected distribution categorical or gaussian, got 'poisson'"),
        ),
    ),
    AlgorithmCase(
        federated.FisherAveraging(
            outputs=lambda model, a, b: a.sqrt() * model.x, distribution="gaussian", floor=0.5, weighting="uniform"
        ),
        partial(rules.fisher_averaging, exact=True, floor=0.5),
        {"momentum": 0.5},
    ),
    AlgorithmCase(
        federated.FisherAveraging(normalize=True, max_examples=5),
        partial(rules.fisher_averaging, exact=False, normalize=True),
        server_lr=0.7,
    ),
    AlgorithmCase(
        federated.SCAFFOLD(),
        rounds.scaffold,
        errors=(
            (
                {"form": "short"},
                "SCAFFOLD: expected form 'textbook', 'one variable' or 'zero overhead', got form='short'",
            ),
            ({"option": "III"}, "expected option 'I' or 'II', got option='III'"),
            ({"form": "one variable", "option": "I"}, "Use form='textbook'"),
            ({"form": "zero overhead", "sum_gradients": True}, "got option='II', sum_gradients=True"),
            ({"option": "I", "sum_gradients": True}, "expected option='II' with sum_gradients"),
        ),
    ),
    AlgorithmCase(federated.SCAFFOLD(weighting="samples"), rounds.scaffold, server_lr=0.7),
    AlgorithmCase(federated.SCAFFOLD(option="I"), partial(rounds.scaffold, option="I"), {"momentum": 0.5}),
    AlgorithmCase(federated.SCAFFOLD(sum_gradients=True), rounds.scaffold),
    AlgorithmCase(federated.SCAFFOLD(sum_gradients=True), rounds.scaffold, {"momentum": 0.9}),
    AlgorithmCase(federated.SCAFFOLD(form="one variable"), rounds.scaffold, equal_steps=True, server_lr=0.7),
    AlgorithmCase(
        federated.SCAFFOLD(form="one variable", weighting="samples"), rounds.scaffold, equal_steps=True, everyone=True
    ),
    AlgorithmCase(federated.SCAFFOLD(form="zero overhead"), rounds.scaffold, equal_steps=True, everyone=True),
    AlgorithmCase(
        federated.SCAFFOLD(form="zero overhead", weighting="samples"), rounds.scaffold, equal_steps=True, everyone=True
    ),
    AlgorithmCase(
        federated.FedNova(),
        rounds.fednova,
        errors=(({"mu": -1.0}, r"FedNova: expected mu >= 0, got mu=-1\.0"),),
    ),
    AlgorithmCase(federated.FedNova(weighting="uniform"), rounds.fednova, {"momentum": 0.9}, server_lr=0.7),
    AlgorithmCase(federated.FedNova(mu=0.5), partial(rounds.fednova, mu=0.5)),
    AlgorithmCase(
        federated.FedDyn(alpha=0.5),
        partial(rounds.feddyn, alpha=0.5),
        errors=(
            ({"alpha": 0.0}, r"FedDyn: expected alpha > 0, got alpha=0\.0"),
            ({"max_norm": -1.0}, r"FedDyn: expected max_norm > 0, got max_norm=-1\.0"),
        ),
    ),
    AlgorithmCase(federated.FedDyn(alpha=2.0, weighting="samples"), partial(rounds.feddyn, alpha=2.0)),
    AlgorithmCase(federated.FedDyn(alpha=0.5, max_norm=0.1), partial(rounds.feddyn, alpha=0.5, max_norm=0.1)),
    AlgorithmCase(
        federated.SCALLION(_RANDOM_1_OF_4),
        partial(rounds.scallion, alpha=0.1),
        compress=partial(sparsifiers.random_k, k=1),
        errors=(
            ({"compressor": C.TopK(ratio=0.1)}, "SCALLION: expected an unbiased compressor that declares its omega"),
            ({"compressor": C.RandomK(unbiased=False)}, "Set unbiased=True or stochastic=True"),
            ({"alpha": 0.0}, r"expected 0 < alpha <= 1, got alpha=0\.0"),
            ({"alpha": 1.5}, r"got alpha=1\.5"),
        ),
    ),
    AlgorithmCase(
        federated.SCALLION(_RANDOM_1_OF_4, alpha=0.25, damped=False, weighting="samples"),
        partial(rounds.scallion, alpha=0.25, damped=False),
        compress=partial(sparsifiers.random_k, k=1),
        server_lr=0.7,
    ),
    AlgorithmCase(
        federated.SCAFCOM(C.TopK(ratio=0.25)),
        partial(rounds.scafcom, beta=0.2),
        compress=partial(sparsifiers.top_k, ratio=0.25),
        errors=(
            ({"beta": 0.0}, r"SCAFCOM: expected 0 < beta <= 1, got beta=0\.0"),
            ({"beta": 1.5}, r"got beta=1\.5"),
            ({"compressor": C.TernGrad(clip=2.5)}, "expected a compressor that is a contraction or unbiased"),
        ),
    ),
    AlgorithmCase(
        federated.SCAFCOM(_RANDOM_1_OF_4, beta=0.9, weighting="samples"),
        partial(rounds.scafcom, beta=0.9),
        compress=partial(sparsifiers.random_k, k=1, unbiased=False),
        server_lr=0.7,
    ),
]


def _dealt(count: int) -> list[int]:
    """The order in which `Bucketing(seed=3)` deals the messages of its first round."""
    generator = torch.Generator().manual_seed(C.counter_rng.fold(3, "bucketing", 0))
    return torch.randperm(count, generator=generator).tolist()


_MEDIAN = federated.CoordinateMedian()

AGGREGATORS: list[AggregatorCase] = [  # their suite: tests/test_federated_aggregators.py, with rounds of 11 messages
    AggregatorCase(federated.WeightedMean(), rules.weighted_mean),
    AggregatorCase(federated.WeightedMean(by_entry=True), rules.mean_by_entry),
    AggregatorCase(_MEDIAN, rules.coordinate_median, radius=1.0),
    AggregatorCase(
        federated.TrimmedMean(beta=0.3),
        partial(rules.trimmed_mean, beta=0.3),
        radius=1.0,
        errors=(
            ({"beta": -0.1}, r"TrimmedMean: expected 0 <= beta < 0\.5, got beta=-0\.1"),
            ({"beta": 0.5}, r"got beta=0\.5"),
        ),
    ),
    AggregatorCase(
        federated.Krum(byzantine=4),
        partial(rules.krum, f=4),
        radius=4.5,  # 1 + sqrt(n)
        errors=(({"byzantine": -1}, "Krum: expected byzantine >= 0, got byzantine=-1"),),
    ),
    AggregatorCase(
        federated.MultiKrum(byzantine=3),
        partial(rules.multi_krum, f=3),
        radius=4.5,
        errors=(
            ({"byzantine": -1}, "MultiKrum: expected byzantine >= 0, got byzantine=-1"),
            ({"m": 0}, "MultiKrum: expected m >= 1, got m=0"),
        ),
    ),
    AggregatorCase(federated.MultiKrum(byzantine=4, m=3), partial(rules.multi_krum, f=4, m=3), radius=4.5),
    AggregatorCase(
        federated.Bulyan(byzantine=2),
        partial(rules.bulyan, f=2),
        radius=2.0,
        errors=(({"byzantine": -1}, "Bulyan: expected byzantine >= 0, got byzantine=-1"),),
    ),
    AggregatorCase(federated.Bulyan(byzantine=1), partial(rules.bulyan, f=1), radius=2.0),
    AggregatorCase(
        federated.GeometricMedian(iterations=4, tolerance=0.0),
        partial(rules.geometric_median, iterations=4),
        errors=(
            ({"iterations": 0}, "GeometricMedian: expected iterations >= 1, got iterations=0"),
            ({"nu": 0.0}, r"expected nu > 0, got nu=0\.0"),
            ({"tolerance": -1.0}, r"expected tolerance >= 0, got tolerance=-1\.0"),
        ),
    ),
    AggregatorCase(
        federated.GeometricMedian(iterations=300, tolerance=1e-14),
        partial(rules.geometric_median, iterations=300),
        radius=12.0,  # 2 (n - f) / (n - 2 f)
    ),
    AggregatorCase(
        federated.NormClipping(max_norm=2.0),
        partial(rules.norm_clipping, max_norm=2.0),
        translates=False,
        scales=False,
        errors=(({"max_norm": 0.0}, r"NormClipping: expected max_norm > 0, got max_norm=0\.0"),),
    ),
    AggregatorCase(
        federated.NormClipping(2.0, federated.CoordinateMedian()),
        partial(rules.norm_clipping, max_norm=2.0, then=rules.coordinate_median),
        translates=False,
        scales=False,
    ),
    AggregatorCase(
        federated.CenteredClipping(tau=2.0, iterations=3),
        partial(rules.centered_clipping, tau=2.0, iterations=3),
        translates=False,
        scales=False,
        errors=(
            ({"tau": 0.0}, r"CenteredClipping: expected tau > 0, got tau=0\.0"),
            ({"iterations": 0}, "expected iterations >= 1, got iterations=0"),
        ),
    ),
    AggregatorCase(
        federated.Bucketing(_MEDIAN, s=2, seed=3),
        partial(rules.bucketing, s=2, then=rules.coordinate_median, order=_dealt),
        unordered=False,
        radius=1.0,
        errors=(({"s": 0}, "Bucketing: expected s >= 1, got s=0"),),
    ),
    AggregatorCase(
        federated.Bucketing(federated.Krum(byzantine=1), s=2, seed=3),
        partial(rules.bucketing, s=2, then=partial(rules.krum, f=1), order=_dealt),
        unordered=False,
        radius=4.5,
    ),
    AggregatorCase(
        federated.TIES(),
        partial(rules.ties, density=0.2),
        translates=False,
        errors=(
            ({"density": 0.0}, r"TIES: expected 0 < density <= 1, got density=0\.0"),
            ({"density": 1.5}, r"got density=1\.5"),
            ({"lamb": 0.0}, r"expected lamb > 0, got lamb=0\.0"),
        ),
    ),
    AggregatorCase(federated.TIES(density=1.0, lamb=0.8), partial(rules.ties, density=1.0, lamb=0.8), translates=False),
]

ASYNCHRONOUS: list[tuple[type, Callable[..., Any]]] = [  # their suite: tests/test_federated_async.py
    (federated.AsyncFedAvg, asynchronous.Asynchronous),
    (federated.FedAsync, asynchronous.Asynchronous),
    (federated.FedBuff, asynchronous.Asynchronous),
    (federated.FedFix, asynchronous.Asynchronous),
]
