"""The adapter to `DistributedDataParallel`: its communication hook, with overlap."""

import functools
from typing import Any, final

import torch
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.nn.parallel import DistributedDataParallel

from gradwire.comm.averager import Averager
from gradwire.comm.beside import Beside
from gradwire.comm.deepspeed import DeepSpeedEngine, keep_engine_local
from gradwire.comm.deepspeed_checks import is_engine
from gradwire.comm.plain_name import plain_name


@final
class DDPHook:
    """Averages DDP's buckets through a communicator while backward goes on.

    Works with any number of buckets and with rebuilt ones (state is keyed by parameter name), with `no_sync` (the hook
    is not called), with unused parameters (they take part with zero) and with compiled autograd. Under
    `find_unused_parameters`, DDP drops the gradient of a parameter that no rank used in a step, and with it what the
    parameter's residual sent in that step.
    """

    def __init__(self, module: DistributedDataParallel, communicator: Averager) -> None:
        parameters = [(plain_name(name), p) for name, p in module.module.named_parameters() if p.requires_grad]
        self._names = {p: name for name, p in parameters}
        self._communicator = communicator
        self._arrived: set[str] = set()
        self._beside = Beside(parameters[0][1].device)
        communicator.prepare([name for name, _ in parameters], [p.detach() for _, p in parameters])
        module.register_comm_hook(None, self._average_bucket)

    # DDP inspects this signature: the parameter must be called `bucket` and the annotations be these objects.
    def _average_bucket(self, state: object, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        pair: Any = bucket
        if isinstance(pair, tuple):  # compiled autograd: one call per parameter, the result ignored
            return self._average_parameter(*pair)  # type: ignore[no-any-return]
        names = [self._names[parameter] for parameter in bucket.parameters()]
        average = functools.partial(self._communicator.average_, bucket.gradients(), names, last=bucket.is_last())
        # The reducer cannot read an exception out of a future; one raised in a callback reaches it with its text.
        return self._beside.submit(average, bucket.buffer()).then(_result)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _average_parameter(self, grad: Tensor, parameter: Any) -> None:
        name = self._names[parameter]
        if name in self._arrived:
            missing = next((other for other in self._names.values() if other not in self._arrived), name)
            raise RuntimeError(
                "attach: expected DDP's python reducer to bring every gradient once per step, "
                f"got none for {missing!r}. Freeze it, or use another torch._dynamo.config.optimize_ddp."
            )
        self._arrived.add(name)
        last = len(self._arrived) == len(self._names)
        if last:
            self._arrived.clear()
        self._communicator.average_([grad], [name], last=last)


def keep_local(module: DistributedDataParallel | DeepSpeedEngine) -> None:
    """Leave gradients as each rank has them, for optimizers that exchange by themselves (`gradwire.optim.DeMo`).

    DDP then sends nothing in backward, and `no_sync` is not needed. It still broadcasts buffers in forward. A DeepSpeed
    engine sends nothing, either.

    Raises:
        RuntimeError: the module has a communication hook already.
        ValueError: the DeepSpeed engine is at a ZeRO stage other than 0, which cuts gradients into partitions.
    """
    if is_engine(module):
        keep_engine_local(module)
        return
    assert isinstance(module, DistributedDataParallel)
    module.register_comm_hook(None, _local_bucket)


def _local_bucket(state: object, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def _result(future: torch.futures.Future[Tensor]) -> Tensor:
    return future.wait()
