"""What the tests of `DiLoCo` and `LocalSGD` between processes share: a small model in training, by every method."""

from typing import Any

import pytest
import torch
import toy
from torch import nn

from gradwire.comm import EF, Communicator, LocalSGD, TwoPhase, keep_local
from gradwire.compression import BlockQuantize, Chain, ChunkTopK
from gradwire.optim import DiLoCo

METHODS = ["diloco", "int8", "sparseloco", "local_sgd"]
every_method = pytest.mark.parametrize("method", METHODS)


class Training:
    """The toy model on one host."""

    def __init__(self, method: str = "diloco", host: str = "loop", seed: int = 0, every: int = 4) -> None:
        self.model = toy.model(seed)
        self.host: nn.Module = self.model
        if host == "ddp":
            self.host = toy.ddp(self.model)
            keep_local(self.host)
        params = list(self.model.parameters())
        inner = torch.optim.AdamW(self.model.named_parameters(), lr=3e-3)
        self.optimizer: Any = inner
        self.objects: dict[str, Any] = {"model": self.model, "optimizer": inner}
        if method == "local_sgd":
            self.loop: Any = LocalSGD(inner, every=every, bucket_mb=0.01)
            self.objects["loop"] = self.loop
            return
        outer, communicator = None, None
        if method == "sparseloco":
            outer = torch.optim.SGD(params, lr=1.0)
            chain = Chain(ChunkTopK(k=64, chunk=256), BlockQuantize(bits=2, block=64))
            communicator = Communicator(chain, feedback=EF(decay=0.95))
        elif method == "int8":
            communicator = Communicator(BlockQuantize(bits=8), feedback=EF(), exchange=TwoPhase())
        self.loop = self.optimizer = DiLoCo(inner, outer, every=every, communicator=communicator, bucket_mb=0.01)
        self.objects["optimizer"] = self.optimizer

    def run(self, first: int, last: int, micro_batches: int = 1) -> "Training":
        for step in range(first, last):
            self.optimizer.zero_grad()
            for i in range(micro_batches):
                (toy.loss(self.host, micro_batches * step + i) / micro_batches).backward()
            self.optimizer.step()
        return self

    def result(self) -> tuple[str, str]:
        return toy.digest(self.model.parameters()), toy.state_digest(self.loop.communicator)
