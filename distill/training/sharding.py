"""A student spread over processes: its weights in shards (`fully_shard`, FSDP2), and what lies outside the model.

    shard(student)          # parameters become DTensors, each process holds 1 / ranks of them
    whole(weight)           # the full tensor, on every process
    scatter(value, weight)  # a full tensor as `weight` is laid out

Each block of the model is a group that is gathered when its forward comes and given back after it; what is left is one
more group. A mechanism's own weights lie outside the model and are few: every process holds them, and their gradients
are averaged. Source: `torch.distributed.fsdp.fully_shard`, https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
"""

import math
import os
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

from ..config import DistillConfig
from ..student import Student


def check_processes(config: DistillConfig, accelerator: Accelerator) -> None:
    """Raise `ValueError` where what was asked of the processes would not take effect."""
    asked = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true", "yes", "y", "on")
    if accelerator.distributed_type == DistributedType.FSDP or (asked and not config.sharded):
        raise ValueError(
            "accelerate's FSDP plugin is not used here (on gloo it silently gives DistributedDataParallel): launch "
            "without --use_fsdp and set sharded=true, which shards by fully_shard"
        )
    if accelerator.distributed_type == DistributedType.DEEPSPEED and accelerator.deepspeed_plugin.zero_stage == 3:
        raise ValueError(
            "DeepSpeed's ZeRO stage 3 takes the teacher's original weights apart: use stage 1 or 2, or sharded=true"
        )
    if not config.sharded:
        return
    if accelerator.num_processes == 1:
        raise ValueError(
            "sharded=true splits the weights over processes, and there is one: start several by accelerate launch "
            "--num_processes N or torchrun --nproc-per-node N (on a CPU `accelerate launch --cpu` starts one, torchrun "
            "as many as asked), or leave it out"
        )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ValueError("sharded=true and DeepSpeed both split the weights: choose one")
    if config.precision == "fp16":
        raise ValueError("sharded=true has no gradient scaling, which fp16 needs: use precision=bf16 or no")


def shard(student: Student) -> None:
    """Split the model's weights, originals included, over all processes of the default group.

    Every process must hold the same model. Raises `RuntimeError` where it had no effect on the trained weights.
    """
    from torch.distributed.fsdp import fully_shard

    model = student.model
    device = next(model.parameters()).device.type
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    named = dict(model.named_parameters())
    student.parameters.update({name: named[name] for name in student.parameters if name in named})
    student.originals.copy_again()
    left = [name for name, weight in student.parameters.items() if name in named and not is_sharded(weight)]
    if left:
        raise RuntimeError(f"fully_shard left {len(left)} trained weights whole, such as {left[0]}")


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of a diffusers model: the members of its lists of modules, such as `transformer_blocks`."""
    lists = (child for child in model.children() if isinstance(child, nn.ModuleList))
    return [block for blocks in lists for block in blocks if any(True for _ in block.parameters())]


def is_sharded(tensor: Any) -> bool:
    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The full tensor on the CPU; of a sharded one every process must ask for it."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().cpu()


def scatter(value: Tensor, like: Tensor) -> Tensor:
    """A full tensor laid out as `like`."""
    if not isinstance(like, DTensor):
        return value.to(like.device)
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def average_gradients(weights: Iterable[Tensor]) -> None:
    """The mean over all processes of the gradients of weights that each of them holds, in one collective."""
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    if not gradients or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def clip_gradients(weights: list[nn.Parameter], limit: float) -> Tensor:
    """`clip_grad_norm_` over sharded and whole weights together; returns the norm before."""
    groups = [part for part in split(weights) if part]
    norms = []
    for group in groups:
        norm = nn.utils.get_total_norm([weight.grad for weight in group if weight.grad is not None])
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    total = torch.stack(norms).square().sum().sqrt()
    if math.isfinite(limit):
        for group in groups:
            nn.utils.clip_grads_with_norm_(group, limit, total)
    return total


def split(weights: list[nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The sharded weights, and the whole ones: an optimizer's group may not mix them."""
    sharded = [weight for weight in weights if is_sharded(weight)]
    return sharded, [weight for weight in weights if not is_sharded(weight)]


def whole_state(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state dict with full tensors; every process must ask for it."""
    values = {
        index: {name: whole(value) if isinstance(value, Tensor) else value for name, value in entry.items()}
        for index, entry in state["state"].items()
    }
    return {**state, "state": values}


def scattered_state(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A state dict of full tensors, laid out as the weights of `optimizer`."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]

    def place(value: Any, weight: Tensor) -> Any:
        fits = isinstance(value, Tensor) and value.shape == weight.shape and value.ndim > 0
        return scatter(value, weight) if fits else value

    values = {
        index: {name: place(value, weights[index]) for name, value in entry.items()}
        for index, entry in state["state"].items()
    }
    return {**state, "state": values}
