"""Communicators for FSDP2's own reduce-scatter, and what tests of them share."""

from collections.abc import Callable
from typing import Any

import hsdp
import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from gradwire.comm import EF, EF21, Averager, Communicator, Plan, ReduceScatter, Warmup
from gradwire.comm.row_matrix import RowMatrix
from gradwire.compression import DCTTopK, Identity, TopK

PLAN = Plan(min_numel=256)
EXCHANGE = ReduceScatter()
MAKERS: dict[str, Callable[[], Averager]] = {
    "dense": lambda: Communicator(Identity(), exchange=EXCHANGE),
    "dense-EF": lambda: Communicator(Identity(), feedback=EF(), exchange=EXCHANGE, plan=hsdp.ALL),
    "chunk-EF": lambda: Communicator(hsdp.CHUNK, feedback=EF(), exchange=EXCHANGE, plan=PLAN),
    "chunk-EF-bf16": lambda: Communicator(hsdp.CHUNK, feedback=EF(dtype="bfloat16"), exchange=EXCHANGE, plan=PLAN),
    "chunk-EF21": lambda: Communicator(hsdp.CHUNK, feedback=EF21(), exchange=EXCHANGE, plan=PLAN),
    "topk-EF": lambda: Communicator(TopK(ratio=0.05), feedback=EF(), exchange=EXCHANGE, plan=PLAN),
    "dct-EF": lambda: Communicator(DCTTopK(k=16, chunk=16), feedback=EF(), exchange=EXCHANGE, plan=PLAN),
    "int8": lambda: Communicator(hsdp.INT8, exchange=EXCHANGE, plan=PLAN),
    "warmup": lambda: Warmup(MAKERS["dense"](), MAKERS["chunk-EF"](), 2),
}


def flat() -> Any:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def weights_of(model: nn.Module) -> list[np.ndarray]:
    return [p.detach().numpy().copy() for p in hsdp.whole(model)]


def in_entries(communicator: Communicator, model: nn.Module, state: str) -> dict[str, np.ndarray]:
    """What this rank keeps under this name, in entries of whole parameters; zero in shards for which it keeps none."""
    shapes = {name: p.shape for name, p in model.named_parameters()}
    wholes: dict[str, torch.Tensor] = {}
    for key, rows in communicator.state_rows().items():
        name, _, rest = key.partition("/")
        if name != state:
            continue
        parameter, _, place = rest.rpartition("/")[0].rpartition("[")
        owner, size = (int(number.rstrip("]")) for number in place.split("/"))
        whole = wholes.setdefault(parameter, torch.zeros(shapes[parameter], dtype=torch.float64))
        most = -(-whole.shape[0] // size)
        shard = whole[owner * most : (owner + 1) * most]
        tile = communicator.compressor.tile(shard.shape)
        device = torch.device("cpu")
        matrix = RowMatrix([""], [shard.shape], [0], torch.float64, tile, shards=1, workers=1, device=device)
        matrix.store(communicator.compressor.inverse_transform_rows(rows[0].double(), tile), [shard], 1.0)
    return {name: whole.numpy() for name, whole in wholes.items()}


def check_equal(weights: list[np.ndarray], expected: list[np.ndarray], atol: float = 1e-12) -> None:
    for w, other in zip(weights, expected, strict=True):
        np.testing.assert_allclose(w, other, rtol=0, atol=atol)
