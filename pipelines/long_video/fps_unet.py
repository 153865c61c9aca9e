"""VideoCrafter2's UNet: a UNet3D that is told the frame rate.

    time embedding <- time_embedding(sinusoid(t)) + fps_embedding(sinusoid(fps))

Two modules more than `UNet3DConditionModel`, under the names of the released weights: `fps_proj` (without weights) and
`fps_embedding` (two linear layers).
"""

import functools
from typing import Any

import torch
from diffusers import UNet3DConditionModel
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn


class FpsUNet3D(UNet3DConditionModel):  # type: ignore[misc]
    """The configuration is that of `UNet3DConditionModel`."""

    fps: float = 24
    """Frames a second that the model is told; set it before a call."""

    @functools.wraps(UNet3DConditionModel.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        channels = self.config.block_out_channels[0]
        self.fps_proj = Timesteps(channels, True, 0)
        self.fps_embedding = TimestepEmbedding(channels, 4 * channels, act_fn=self.config.act_fn)
        self.time_embedding.register_forward_hook(self._add_fps)

    def _add_fps(self, module: nn.Module, args: tuple[Any, ...], time: Tensor) -> Tensor:
        fps = torch.tensor([self.fps], dtype=torch.float64, device=time.device)
        added: Tensor = self.fps_embedding(self.fps_proj(fps).to(time.dtype))
        return time + added
