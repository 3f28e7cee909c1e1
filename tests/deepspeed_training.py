"""What the checks on DeepSpeed engines share: a register of them, and a small model in training."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gradwire import comm
from gradwire.compression import BlockQuantize, ChunkTopK, Identity

CHECKS: dict[str, Callable[[], None]] = {}
ALL = comm.Plan(min_ndim=0, min_numel=0)


def check(function: Callable[[], None]) -> Callable[[], None]:
    """Register a check; every rank calls it, in a folder that they share."""
    CHECKS[function.__name__] = function
    return function


def rank() -> int:
    return torch.distributed.get_rank()


def sparse() -> comm.Communicator:
    return comm.Communicator(ChunkTopK(k=16, chunk=64), feedback=comm.EF21(), plan=ALL)


def int8() -> comm.Communicator:
    return comm.Communicator(BlockQuantize(bits=8, block=64), feedback=comm.EF(), exchange=comm.TwoPhase(), plan=ALL)


def lossless() -> comm.Communicator:
    return comm.Communicator(Identity(), feedback=comm.EF(), plan=ALL)


class Training:
    """A small classifier on an engine; every rank has its own data, equal in every run."""

    def __init__(
        self,
        stage: int,
        communicator: comm.Averager | None = None,
        *,
        optimizer: Callable[[nn.Module], Any] | None = None,
        accumulate: int = 1,
        bf16: bool = False,
        zero: dict[str, Any] | None = None,
        **config: Any,
    ) -> None:
        import deepspeed

        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(24, 48), nn.Tanh(), nn.LayerNorm(48), nn.Linear(48, 6))
        made = optimizer(self.model) if optimizer else torch.optim.AdamW(self.model.named_parameters(), lr=1e-2)
        self.accumulate, self.dtype = accumulate, torch.bfloat16 if bf16 else torch.float32
        options = {
            "train_micro_batch_size_per_gpu": 8,
            "gradient_accumulation_steps": accumulate,
            "gradient_clipping": 1.0,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": stage, "reduce_scatter": False, "overlap_comm": False, **(zero or {})},
            "bf16": {"enabled": bf16},
            "steps_per_print": None,
            **config,
        }
        self.engine: Any = deepspeed.initialize(model=self.model, optimizer=made, config=options)[0]
        self.communicator = communicator
        self.handle = comm.attach(self.engine, communicator) if communicator is not None else None
        self.batches = torch.Generator().manual_seed(100 + rank())
        self.labels = torch.linspace(-1, 1, 24 * 6).sin().view(24, 6)

    def run(self, steps: int, spoil: Callable[[int, int], bool] = lambda step, part: False) -> list[float]:
        """Losses of each step on this rank; where `spoil(step, part)` holds, the gradient is not finite."""
        losses = []
        for step in range(steps):
            for part in range(self.accumulate):
                inputs = torch.randn(8, 24, generator=self.batches)
                target = (inputs @ self.labels).argmax(1)
                loss = nn.functional.cross_entropy(self.engine(inputs.to(self.dtype)).float(), target)
                losses.append(loss.item())
                self.engine.backward(loss * torch.inf if spoil(step, part) else loss)
                self.engine.step()
        return losses

    def flat(self) -> Tensor:
        """All parameters, gathered if need be."""
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self.model.parameters())):
            return torch.cat([p.detach().flatten().float() for p in self.model.parameters()])


def error_of(act: Callable[[], Any], kind: type[Exception] = ValueError) -> str:
    try:
        act()
    except kind as error:
        return str(error)
    raise AssertionError(f"expected {kind.__name__}, got none")


def assert_agreed(flat: Tensor) -> None:
    gathered = [torch.empty_like(flat) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(gathered, flat)
    assert all(torch.equal(gathered[0], other) for other in gathered)


def assert_equal(ours: Tensor, theirs: Tensor, atol: float = 0.0) -> None:
    assert theirs.isfinite().all()
    torch.testing.assert_close(ours, theirs, rtol=0.0, atol=atol)
