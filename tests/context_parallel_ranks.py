"""One rank of a group of two that runs tiny models under context parallelism, with and without a swap.

    python context_parallel_ranks.py <rank> <rendezvous file> <results> [cuda]

writes a JSON object, case -> what this rank found. `run_ranks` starts both.
"""

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import diffusers
import models
import tiny_pipelines
import torch
import torch.distributed as dist
from diffusers.hooks.context_parallel import apply_context_parallel
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from models import Tiny, draw, text_mask
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import diffattn
from diffattn.mechanisms.base import Mechanism
from diffattn.parallel.operations.collectives import leave_group

HERE = Path(__file__).resolve().parent
RANKS = 2
TEXT = 6
"""Text tokens, a multiple of the ranks: without ulysses_anything diffusers splits no other number."""

Results = dict[str, dict[str, Any]]


def run_ranks(folder: Path, device: str = "cpu", timeout: float = 240) -> list[Results]:
    """What both ranks found."""
    paths = os.pathsep.join([str(HERE.parent), str(HERE)])
    settings = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "DIFFUSERS_ATTN_BACKEND": "native", "HF_HUB_OFFLINE": "1"}
    environment = {**os.environ, **settings}
    ranks, results = [], []
    for rank in range(RANKS):
        arguments = [str(rank), str(folder / "rendezvous"), str(folder / f"{rank}.json"), device]
        command = [sys.executable, str(Path(__file__).resolve()), *arguments]
        ranks.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    try:
        for rank, process in enumerate(ranks):
            output, _ = process.communicate(timeout=timeout)
            assert process.returncode == 0, f"rank {rank}:\n{output}"
            results.append(json.loads((folder / f"{rank}.json").read_text()))
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    return results


def flux(**config: Any) -> Tiny:
    return with_even_text(models.flux(**config))


def with_even_text(tiny: Tiny) -> Tiny:
    """The model called with as many text tokens as can be split."""
    ids = tiny.inputs.get("txt_ids")
    if ids is not None:
        tiny.inputs["txt_ids"] = ids.new_zeros(*ids.shape[:-2], TEXT, ids.shape[-1])
    if "encoder_hidden_states_mask" in tiny.inputs:
        tiny.inputs["encoder_hidden_states_mask"] = text_mask(TEXT, 3)
    # LTX's own cross-attention fails with a mask in diffusers 0.42.1: it has all heads, the queries a rank's
    if "encoder_attention_mask" in tiny.inputs:
        tiny.inputs["encoder_attention_mask"] = None
    tiny.inputs["encoder_hidden_states"] = draw(2, TEXT, tiny.inputs["encoder_hidden_states"].shape[-1])
    return tiny


BUILDERS: dict[str, Callable[[], Tiny]] = {
    name: lambda name=name: with_even_text(models.BUILDERS[name]())  # type: ignore[misc]
    for name in ("Flux", "Flux-Kontext", "Flux2", "Wan", "LTX", "Qwen-Image", "Qwen-Image-Edit")
}


class Parallelism:
    """Sets models up as `enable_parallelism` does, which itself needs GPUs."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._meshes: dict[tuple[int, int], DeviceMesh] = {}

    def config(self, ring: int = 1, **options: Any) -> diffusers.ContextParallelConfig:
        shape = (ring, RANKS // ring)
        if shape not in self._meshes:
            self._meshes[shape] = init_device_mesh(self.device, shape, mesh_dim_names=("ring", "ulysses"))
        return diffusers.ContextParallelConfig(
            ring_degree=ring, ulysses_degree=RANKS // ring, mesh=self._meshes[shape], **options
        )

    def __call__(self, model: nn.Module, plan: Any = None, **options: Any) -> None:
        if self.device != "cpu":
            model.enable_parallelism(config=self.config(**options), cp_plan=plan)
            return
        context = self.config(**options)
        config = diffusers.ParallelConfig(context_parallel_config=context)
        config.setup(dist.get_rank(), RANKS, torch.device("cpu"), mesh=context.mesh)
        model._parallel_config = config
        for module in model.modules():
            if hasattr(getattr(module, "processor", None), "_parallel_config"):
                module.processor._parallel_config = config
        apply_context_parallel(model, context, plan or model._cp_plan)


def on_device(tiny: Tiny, device: str) -> Tiny:
    tiny.model.to(device)
    tiny.inputs = {
        name: value.to(device) if isinstance(value, Tensor) else value for name, value in tiny.inputs.items()
    }
    return tiny


def distance(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max())


def compared(
    parallelize: Parallelism,
    build: Callable[[], Tiny],
    mechanism: Mechanism,
    *,
    order: str = "before",
    min_tokens: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """A swap on two ranks beside the same on one, and what restoring leaves; parallelism `order` the swap."""
    tiny, fresh = (on_device(build(), parallelize.device) for _ in range(2))
    full = tiny.run()
    with diffattn.apply(tiny.model, mechanism):
        want = tiny.run()
    parallelize(fresh.model, **options)
    plain = fresh.run()
    if order == "before":
        parallelize(tiny.model, **options)
    handle = diffattn.apply(tiny.model, mechanism, min_tokens=min_tokens)
    if order == "after":
        parallelize(tiny.model, **options)
    got = tiny.run()
    reached = all(layer.reached and layer.module.processor._parallel_config for layer in handle.layers)
    handle.restore()
    return {
        "error": distance(got, want),
        "change": distance(got, full),
        "from plain": distance(got, plain),
        "plain error": distance(plain, full),
        "reached": bool(reached),
        "restored": torch.equal(tiny.run(), plain),
    }


def refused(
    parallelize: Parallelism, build: Callable[[], Tiny], mechanism: Mechanism, **options: Any
) -> dict[str, Any]:
    """The error of a swap that cannot be run, and whether the model can after it is undone."""
    tiny = on_device(build(), parallelize.device)
    parallelize(tiny.model, **options)
    handle = diffattn.apply(tiny.model, mechanism)
    try:
        tiny.run()
    except (NotImplementedError, ValueError) as error:
        handle.restore()
        return {"type": type(error).__name__, "message": str(error)}
    return {"type": "none", "message": ""}


def steps(parallelize: Parallelism) -> dict[str, Any]:
    """Whole pipelines that are swapped in some of their steps."""

    def build() -> tiny_pipelines.TinyPipeline:
        tiny = tiny_pipelines.flux(steps=3)
        tiny.call["prompt_embeds"] = draw(1, TEXT, 12)
        return tiny

    tiny, parallel = build(), build()
    full = tiny.run()
    with diffattn.apply(tiny.pipe, "clear", radius=2):
        always = tiny.run()
    with diffattn.apply(tiny.pipe, "clear", radius=2, steps=slice(1, 2)):
        want = tiny.run()
    parallelize(parallel.pipe.transformer)
    plain = parallel.run()
    with diffattn.apply(parallel.pipe, "clear", radius=2, steps=slice(1, 2)):
        got = parallel.run()
    return {
        "error": distance(got, want),
        "change": min(distance(want, full), distance(want, always)),
        "restored": torch.equal(parallel.run(), plain),
    }


def gradients(parallelize: Parallelism, checkpointing: bool) -> dict[str, Any]:
    """Parameters' gradients, which the ranks have to add up, beside those of one process."""

    def backward(tiny: Tiny) -> Tensor:
        output = tiny.run()
        (output * torch.linspace(-1, 1, len(output), device=output.device)).sum().backward()
        return torch.cat([p.grad.flatten() for p in tiny.model.parameters() if p.grad is not None])

    with torch.enable_grad():
        single, tiny = (on_device(flux(), parallelize.device) for _ in range(2))
        diffattn.apply(single.model, "clear", radius=2)
        want = backward(single)
        parallelize(tiny.model)
        diffattn.apply(tiny.model, "clear", radius=2)
        if checkpointing:
            tiny.model.enable_gradient_checkpointing()
            tiny.model.train()
        own = backward(tiny)
    total = own.clone()
    dist.all_reduce(total)
    scale = float(want.abs().max())
    return {"error": distance(total, want) / scale, "change": distance(own, want) / scale}


def compiled(parallelize: Parallelism) -> dict[str, Any]:
    """Blocks compiled one by one, as diffusers does."""
    tiny = on_device(flux(num_layers=0, num_single_layers=1), parallelize.device)
    parallelize(tiny.model)
    diffattn.apply(tiny.model, "clear", radius=2)
    want = tiny.run()
    tiny.model.compile_repeated_blocks(fullgraph=True, backend="eager")
    return {"error": distance(tiny.run(), want), "breaks": len(torch._dynamo.utils.counters["graph_break"])}


CLEAR = diffattn.ClearAttention(radius=2)
ROUTING = diffattn.RoutingAttention(top_k=1, tile=2, pool=2)
KINDS = diffattn.ShiftedWindowAttention(window=3)
AGENT = diffattn.AgentAttention(num_agents=6)
UNEVEN = dict(ulysses_anything=True)
OTHER_PLAN = {
    "": {
        "hidden_states": ContextParallelInput(split_dim=1, expected_dims=3),
        "img_ids": ContextParallelInput(split_dim=0, expected_dims=2),
    },
    "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
}
"""Flux with its text on every rank."""

CASES: dict[str, Callable[[Parallelism], dict[str, Any]]] = {
    **{
        f"{family}, {order}": lambda on, build=build, order=order: compared(on, build, CLEAR, order=order)  # type: ignore[misc]
        for family, build in BUILDERS.items()
        for order in ("before", "after")
    },
    "agent": lambda on: compared(on, flux, AGENT),
    "routing": lambda on: compared(on, flux, ROUTING),
    "routing by content": lambda on: compared(on, flux, replace(ROUTING, order="content")),
    "routing by centroids": lambda on: compared(on, flux, replace(ROUTING, order="centroids", means="weighted")),
    "pool": lambda on: compared(on, flux, diffattn.ClearAttention(radius=1, pool=2)),
    "weights for all heads": lambda on: compared(on, flux, diffattn.ClearAttention(radius=2, down_factor=3)),
    "kinds of heads": lambda on: compared(on, lambda: flux(num_attention_heads=6), KINDS),
    "uneven tokens": lambda on: compared(on, models.qwen_image, CLEAR, **UNEVEN),
    "uneven heads": lambda on: compared(on, lambda: models.flux(num_attention_heads=3), CLEAR, **UNEVEN),
    "min_tokens between a rank's and all": lambda on: compared(on, flux, CLEAR, min_tokens=40),
    "min_tokens of all, uneven": lambda on: compared(on, models.flux, CLEAR, min_tokens=59, **UNEVEN),
    "min_tokens above all": lambda on: compared(on, flux, CLEAR, min_tokens=61),
    "steps": steps,
    "gradients": lambda on: gradients(on, checkpointing=False),
    "gradients, checkpointing": lambda on: gradients(on, checkpointing=True),
    "compiled": compiled,
    "ring": lambda on: refused(on, flux, CLEAR, ring=RANKS),
    "odd heads": lambda on: refused(on, lambda: flux(num_attention_heads=3), CLEAR),
    "another plan": lambda on: refused(on, flux, CLEAR, plan=OTHER_PLAN),
    "weights for each head": lambda on: refused(on, flux, diffattn.AgentAttention.published((3, 3))),
    "block input": lambda on: refused(on, flux, diffattn.AgentAttention(agents="merge")),
}
ON_GPUS = ("Flux, before", "Wan, after", "Qwen-Image, before", "uneven tokens", "gradients", "ring")


def main(rank: int, rendezvous: str, results: str, device: str = "cpu") -> None:
    if device != "cpu":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "gloo" if device == "cpu" else "nccl",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=120),
    )
    torch.set_grad_enabled(False)
    parallelize = Parallelism(device)
    chosen = CASES if device == "cpu" else {name: CASES[name] for name in ON_GPUS}
    found: Results = {}
    for name, case in chosen.items():
        try:
            found[name] = case(parallelize)
        except Exception:
            found[name] = {"failed": traceback.format_exc()}
    Path(results).write_text(json.dumps(found))
    leave_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
