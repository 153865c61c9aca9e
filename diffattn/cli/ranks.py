"""The processes that torchrun starts for one command: `torchrun --nproc-per-node N -m diffattn ...`."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return os.environ.get("RANK", "0") == "0"


def own_device(device: str) -> str:
    """`auto` as this process's own GPU, where torchrun or `accelerate launch` says its number."""
    import torch

    number = os.environ.get("LOCAL_RANK")
    return f"cuda:{number}" if device == "auto" and number and torch.cuda.is_available() else device


@contextlib.contextmanager
def joined(wanted: bool) -> Iterator[Any]:
    """A mesh of all processes inside the block, by gloo on CPUs and NCCL on GPUs; None where it is not wanted.

    Raises `ValueError` where the processes were not started by torchrun.
    """
    if not wanted:
        yield None
        return
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        raise ValueError(
            "--parallel needs several processes: start them by `torchrun --nproc-per-node 2 -m diffattn ...`, one a GPU"
        )
    import torch
    import torch.distributed as dist

    from ..parallel.operations.collectives import leave_group

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    try:
        yield dist.device_mesh.init_device_mesh(kind, (dist.get_world_size(),))
        leave_group()
    finally:
        if dist.is_initialized():  # after an error the others may never come
            dist.destroy_process_group()
