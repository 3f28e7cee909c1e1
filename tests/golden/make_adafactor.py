"""Makes `adafactor.npz`: 50 steps in float64 of transformers' and of optax's Adafactor, which tests compare with.

pip install transformers==5.23.0 optax==0.2.8 jax==0.10.2
JAX_ENABLE_X64=1 python tests/golden/make_adafactor.py
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from transformers.optimization import Adafactor

SHAPES = [(6, 5), (5,), (4, 3, 3, 3), (2, 6, 7), ()]
STEPS = 50

TRANSFORMERS: list[dict[str, Any]] = [
    {},
    {"beta1": 0.9, "weight_decay": 0.1},
    {"lr": 1e-2, "relative_step": False, "weight_decay": 0.1},
    {
        "lr": 1e-2,
        "relative_step": False,
        "scale_parameter": False,
        "beta1": 0.5,
        "clip_threshold": 0.5,
        "decay_rate": -0.5,
        "eps": (1e-12, 1e-2),
    },
    {"warmup_init": True},
]
OPTAX: list[dict[str, Any]] = [
    {},
    {"momentum": 0.9, "dtype_momentum": jnp.float64},
    {"min_dim_size_to_factor": 4, "clipping_threshold": None, "decay_rate": 0.5},
]


def weights_and_gradients() -> tuple[list[Any], Iterator[list[Any]]]:
    """Gradients have the scales 1, 1e-4 and 1e-8 in turns."""
    rng = np.random.RandomState(7)
    weights = [np.asarray(rng.standard_normal(shape)) for shape in SHAPES]
    steps = ([rng.standard_normal(shape) * 10.0 ** -(t % 3 * 4) for shape in SHAPES] for t in range(STEPS))
    return weights, steps


def by_transformers(kwargs: dict[str, Any]) -> list[Any]:
    weights, gradients = weights_and_gradients()
    params = [torch.nn.Parameter(torch.tensor(w)) for w in weights]
    optimizer = Adafactor(params, **kwargs)
    for step in gradients:
        for p, g in zip(params, step, strict=True):
            p.grad = torch.tensor(g)
        optimizer.step()
    return [p.detach().numpy() for p in params]


def by_optax(kwargs: dict[str, Any]) -> list[Any]:
    weights, gradients = weights_and_gradients()
    optimizer = optax.adafactor(
        lambda count: jnp.minimum(1e-2, (count + 1.0) ** -0.5), **{"min_dim_size_to_factor": 0, **kwargs}
    )
    params = [jnp.asarray(w) for w in weights]
    state = optimizer.init(params)
    for step in gradients:
        updates, state = optimizer.update([jnp.asarray(g) for g in step], state, params)
        params = optax.apply_updates(params, updates)
    return [np.asarray(p) for p in params]


def main() -> None:
    assert jax.config.jax_enable_x64, "set JAX_ENABLE_X64=1"
    kept: dict[str, Any] = {}
    runs: list[tuple[str, Callable[[dict[str, Any]], list[Any]], list[dict[str, Any]]]] = [
        ("transformers", by_transformers, TRANSFORMERS),
        ("optax", by_optax, OPTAX),
    ]
    for name, run, cases in runs:
        for number, kwargs in enumerate(cases):
            kept |= {f"{name}_{number}_{i}": w for i, w in enumerate(run(kwargs))}
    np.savez_compressed(Path(__file__).with_name("adafactor.npz"), **kept)


if __name__ == "__main__":
    main()
