"""One process or many: the same code under torchrun, another launcher that sets its variables, or none."""

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed import distributed_c10d


def local_device() -> torch.device:
    """This process's GPU, by its number on this machine; the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


@contextlib.contextmanager
def process_group() -> Iterator[torch.device]:
    """The default process group, NCCL and CUDA where there is a GPU, else gloo and CPU; yields this rank's device.

    Without a launcher it is a group of one. On an error the group is left as it is: the launcher ends the other ranks,
    and waiting for them here could hang.
    """
    alone, device, backend = "WORLD_SIZE" not in os.environ, local_device(), "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"  # gloo beside it for what lives on the host, such as checkpoints
    if not alone and "OMP_NUM_THREADS" not in os.environ:
        # Ranks that share a machine would fight over its cores.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    if alone:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group(backend)
    yield device
    dist.barrier()  # gloo may abort a rank that still talks to one which has gone
    leave_process_groups()


def leave_process_groups() -> None:
    """Destroy all process groups, but hold on to what they were.

    A thread of gloo lets go of its group a little after the work is done. If it were the last to hold the group, it
    would wait for its own end, which aborts the process ("Resource deadlock avoided").
    """
    _left.extend(distributed_c10d._world.pg_map)
    dist.destroy_process_group()


_left: list[dist.ProcessGroup] = []
