"""`LocalSGD`: ranks train apart, and average their parameters every few steps."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor

from gradwire.comm.averager import Averager
from gradwire.comm.rank_state import RankState
from gradwire.comm.rounds import Rounds


@final
class LocalSGD:
    """Let any optimizer take `every` steps on each rank alone, then replace parameters by their mean over ranks.

        every step:   x_i <- step of the optimizer along this rank's own gradient
        every H-th:   x_i <- agreed <- agreed - mean over ranks of (agreed - x_i)

    What is sent are differences from the last agreed point, so that any compressor and any feedback may be used; with
    the default all bits are sent, and the parameters become their mean. It follows the optimizer's `step` by itself.
    Before the first, all ranks take the parameters of rank 0.

    Gradients must be local when the optimizer steps. In a plain loop they are; under `DistributedDataParallel` call
    `gradwire.comm.keep_local(ddp)`, and if the model has buffers turn off their broadcast in forward. All ranks must
    step equally often. Of most optimizers, a `GradScaler` leaves out steps on one rank alone: with it use
    `gradwire.optim.DiLoCo` and an outer `SGD(lr=1)`, which is the same algorithm.

    If a difference is not finite on any rank, all ranks return to the last agreed point, and the optimizer's state of
    the parameters where it is not finite starts anew. After a round `.grad` is None.

    Args:
        optimizer: What steps on each rank; its parameters are the same on every rank, in the same order.
        every: Steps from one exchange to the next, H >= 1. With 1 and SGD it is data-parallel SGD.
        communicator: What averages the differences; dense averaging over all ranks by default.
        buffers: `(name, buffer)` pairs, such as `model.named_buffers()`: floating-point ones become their mean over
            ranks, sent dense, at each exchange. Without it every rank keeps its own, running statistics included.
        bucket_mb: Size of a bucket in MiB, > 0; each is one exchange.

    Cost:
        A copy of the parameters, and while a round ends another, in place of the gradients. Of every `every` steps one
        communicates; `communicator.stats` counts exchanges as steps.

    State:
        The point agreed on, equal on all ranks; parameters and the optimizer's state are each rank's own within a
        round. Give this object to `gradwire.comm.checkpoint` beside the model and the optimizer, or save and load the
        `state_dict` of all three on every rank.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = torch.optim.SGD([weight], lr=0.5)
        >>> local_sgd = LocalSGD(optimizer, every=2)
        >>> for _ in range(4):
        ...     weight.grad = torch.ones(2)
        ...     optimizer.step()
        >>> local_sgd.communicator.stats.steps
        2

    Reference:
        S. U. Stich, "Local SGD Converges Fast and Communicates Little", ICLR 2019, arXiv:1805.09767, algorithm 1; with
        compressed differences D. Basu, D. Data, C. Karakus, S. Diggavi, "Qsparse-local-SGD", NeurIPS 2019,
        arXiv:1906.02367, algorithm 1.

    Differences from the paper:
        Any optimizer in place of SGD; its momenta stay where they are.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        every: int,
        communicator: Averager | None = None,
        buffers: Iterable[tuple[str, Tensor]] = (),
        bucket_mb: float = 25.0,
    ) -> None:
        if bucket_mb <= 0:
            raise ValueError(f"LocalSGD: expected bucket_mb > 0, got bucket_mb={bucket_mb}.")
        self._rounds = Rounds("LocalSGD", optimizer, every, communicator, buffers, int(bucket_mb * 2**20))
        self.communicator = self._rounds.communicator
        self.rank_state = RankState("LocalSGD", self.communicator, self._rounds.read, self._rounds.write)
        self._hooks = [
            optimizer.register_step_pre_hook(lambda *_: self._rounds.begin()),
            optimizer.register_step_post_hook(lambda *_: self._rounds.step(self._move)),
        ]

    def _move(self, pseudo_gradients: dict[str, Tensor]) -> None:
        """The point agreed on becomes the mean of the ranks' parameters."""
        for name, p in self._rounds.params.items():
            p.detach().sub_(pseudo_gradients[name])

    def synchronize(self) -> None:
        """End the round now, if a step was taken in it: parameters are then equal on all ranks, which all must call."""
        if self._rounds.steps:
            self._rounds.end(self._move)

    @contextmanager
    def returned(self) -> Iterator[None]:
        """Inside, parameters and buffers are those last agreed on, for an evaluation that sends nothing."""
        with self._rounds.returned():
            yield

    def detach(self) -> None:
        """End the round and leave the optimizer alone from now on; all ranks must call it."""
        self.synchronize()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self.communicator.attached = False

    def state_dict(self) -> dict[str, Any]:
        """The point agreed on and this rank's communicator; all ranks must call it, and keep their own."""
        self._rounds.connect()
        return {**self._rounds.state_dict(), "communicator": self.communicator.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` of the same rank gave; load the model and the optimizer, too.

        Raises:
            CheckpointError: It is another rank's, of another world size, or of other hyper-parameters.
            ValueError: It belongs to another model.
        """
        self._rounds.connect()
        self.communicator.load_state_dict(state_dict["communicator"])
        self._rounds.load_state_dict(state_dict)
