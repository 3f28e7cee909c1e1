"""Runs checks on DeepSpeed engines, many in one job: to start one takes seconds, an engine a tenth of one.

    torchrun --nproc-per-node 2 tests/deepspeed_runs.py FOLDER CHECK ...

FOLDER gets an empty file per check that passed, or one with the traceback of the rank that failed; the job then ends,
since other ranks may wait for that one.
"""

import gc
import logging
import os
import sys
import traceback
import warnings
from pathlib import Path

import deepspeed
import deepspeed.comm
import deepspeed_averaging  # noqa: F401
import deepspeed_commands  # noqa: F401
import deepspeed_optimizers  # noqa: F401
import torch
from deepspeed_training import CHECKS


def main() -> None:
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Its CPU back-end compiles an operation for inference when it starts: a minute, and a lock that outlives a kill.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.comm.init_distributed("gloo")
    warnings.simplefilter("error")
    for renamed in ("all_gather_into_tensor", "reduce_scatter_tensor"):  # which DeepSpeed still calls
        warnings.filterwarnings("ignore", f".torch.distributed.{renamed}. is deprecated", FutureWarning)
    # torch's own, when ZeRO imports its compiler.
    warnings.filterwarnings("ignore", ".torch.jit.script_method. is deprecated", DeprecationWarning)
    os.chdir(sys.argv[1])
    for name in sys.argv[2:]:
        try:
            CHECKS[name]()
        except BaseException:
            Path(f"{name}.failed.{torch.distributed.get_rank()}").write_text(traceback.format_exc())
            os._exit(1)
        gc.collect()
        torch.distributed.barrier()
        Path(f"{name}.passed").touch()
    torch.distributed.barrier()
    deepspeed.comm.destroy_process_group()
    gc.collect()  # engines, before the interpreter goes: gloo aborts otherwise now and then


if __name__ == "__main__":
    main()
