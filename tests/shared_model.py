"""Pipelines around one tiny Flux transformer, and images of several shapes."""

from typing import Any

import diffusers
import tiny_pipelines
import torch
from hand_masks import error
from torch import Tensor

SHAPES = [(16, 24), (24, 16), (16, 16), (32, 8)]
"""In pixels: 4 x 6, 6 x 4, 4 x 4 and 8 x 2 tokens, two pairs of equal number."""


def flux_pipelines(count: int) -> list[Any]:
    """Pipelines around one transformer, each with a scheduler of its own."""
    first = tiny_pipelines.flux().pipe
    others = [
        diffusers.FluxPipeline(
            diffusers.FlowMatchEulerDiscreteScheduler(), first.vae, None, None, None, None, first.transformer
        )
        for _ in range(count - 1)
    ]
    for pipe in others:
        pipe.set_progress_bar_config(disable=True)
    return [first, *others]


def picture(pipe: Any, shape: tuple[int, int], seed: int, steps: int = 2) -> Tensor:
    call = {**tiny_pipelines.flux_call(steps), "height": shape[0], "width": shape[1]}
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        return pipe(**call, generator=generator, output_type="latent", return_dict=False)[0]


def spread(outputs: list[Tensor]) -> None:
    for i, one in enumerate(outputs):
        assert all(error(one, other) > 1e-3 for other in outputs[:i])
