"""A whole denoising run on clips, for the tests of every family: noise by frame, some steps, this rank's frames out."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffattn.parallel.operations.noise import FrameNoise
from diffattn.parallel.operations.shares import FramePlan

SPLITS: dict[int, list[tuple[int, ...]]] = {
    6: [(3, 3), (1, 5), (2, 1, 3), (1, 2, 2, 1)],
    8: [(4, 4), (1, 7), (3, 3, 2), (1, 6, 1), (2, 2, 2, 2), (1, 1, 1, 5)],
    48: [(24, 24), (7, 41), (16, 15, 17), (30, 1, 16, 1)],
}
"""Frames of a video -> even and uneven splits, with clips shorter than the halo."""


@torch.no_grad()
def denoise(
    predict: Callable[[Tensor, Tensor], Tensor],
    scheduler: Any,
    plan: FramePlan,
    shape: tuple[int, ...],
    dim: int,
    step_noise: str | None = None,
) -> Tensor:
    """Three steps from `FrameNoise`; `predict(latents, t)` is the model on this rank's frames.

    Args:
        shape: of the latents without their axis `dim` of frames.
        step_noise: the name by which the scheduler's step takes noise of its own, if any.
    """
    noise = FrameNoise(seed=3)
    scheduler.set_timesteps(3)
    latents = noise.draw(plan.own, shape, dim=dim)
    for i, t in enumerate(scheduler.timesteps):
        more = {} if step_noise is None else {step_noise: noise.draw(plan.own, shape, dim=dim, step=i + 1)}
        latents = scheduler.step(predict(latents, t), t, latents, return_dict=False, **more)[0]
    return latents


def state_of(model: torch.nn.Module) -> dict[str, Any]:
    """Everything that hangs on the modules, beside their parameters."""
    kept = {}
    for name, module in model.named_modules():
        own = {key: value for key, value in vars(module).items() if key not in ("_parameters", "_buffers", "_modules")}
        kept[name] = {key: len(value) if "hooks" in key else value for key, value in own.items()}
    return kept
