"""The processes that torchrun started, or this one alone."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from diffattn.parallel.operations.collectives import leave_group

Found = TypeVar("Found")
SLACK = 60
"""Seconds that collectives wait longer than the watch, which knows better whom they wait for."""


class ElsewhereError(ValueError):
    """What another rank has found to be wrong."""


@dataclass(frozen=True)
class Ranks:
    """This process and how to reach the others."""

    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None
    store: Any = None
    """A store that all ranks share; None for one rank alone."""

    @classmethod
    def start(cls, device: torch.device, timeout: float) -> "Ranks":
        """Join the ranks of torchrun: gloo between CPUs, NCCL between GPUs. Without torchrun there is one."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        limit = timedelta(seconds=timeout + SLACK)
        store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=max(timeout, SLACK))))
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, store=PrefixStore("group", store), rank=rank, world_size=size, timeout=limit)
        mesh = init_device_mesh(device.type, (size,), mesh_dim_names=("frames",))
        return cls(rank, size, mesh, store)

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank."""
        if self.mesh is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def together(self, function: Callable[[], Found]) -> Found:
        """What `function` returns; where it raises on one rank, all raise."""
        error: Exception | None = None
        found: Any = None
        try:
            found = function()
        except (ValueError, TypeError, OSError, ImportError, NotImplementedError, RuntimeError) as wrong:
            error = wrong
        told = self.gather("" if error is None else str(error) or type(error).__name__)
        if error is not None:
            raise error
        for rank, wrong_there in enumerate(told):
            if wrong_there:
                raise ElsewhereError(f"rank {rank}: {wrong_there}")
        return found

    def agree(self, what: str, values: dict[str, Any]) -> None:
        """Raise `ValueError` on every rank that names the entries on which they disagree."""
        told = self.gather(values)
        for rank, there in enumerate(told):
            different = [name for name in told[0] if told[0][name] != there.get(name)]
            if different:
                name = different[0]
                raise ValueError(
                    f"the ranks disagree on {what}: {', '.join(different)}; {name} is {told[0][name]!r} on rank 0 and "
                    f"{there.get(name)!r} on rank {rank}; start all ranks with the same settings and files"
                )

    def close(self) -> None:
        """Leave the group."""
        if self.mesh is not None:
            leave_group()
