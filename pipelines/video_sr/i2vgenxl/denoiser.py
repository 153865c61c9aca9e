"""The networks of a step on one window: control branch, then U-Net, tile by tile, and guidance of the whole window."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffattn.media.windows import Tile

from .guidance import guide
from .tiles import run_in_tiles


class Denoiser:
    """Predicts the guided velocity.

    Tiles of both guidance branches are blended before guidance, whose rescaling has one gain for a window.

    Args:
        unet: `STARUNet3DConditionModel`.
        controlnet: its `STARControlNetModel`.
        text: embeddings (1, tokens, width) of the prompt and the negative prompt.
        tiles: latent cells that the networks see together.
        guidance_scale: 1 leaves the negative half out.
        guidance_rescale: see `guide`.
        batch: both guidance branches in one call, with the same numbers up to rounding.
    """

    def __init__(
        self,
        unet: Any,
        controlnet: Any,
        text: tuple[Tensor, Tensor],
        tiles: Sequence[Tile],
        *,
        guidance_scale: float,
        guidance_rescale: float,
        batch: bool = False,
    ) -> None:
        self.unet, self.controlnet, self.tiles = unet, controlnet, tiles
        self.guidance_scale, self.guidance_rescale = guidance_scale, guidance_rescale
        both = torch.cat(text).to(unet.dtype)
        texts = both[:1] if guidance_scale == 1 else both
        self._texts = [texts] if batch else list(texts.split(1))

    def __call__(self, x: Tensor, hint: Tensor, timestep: Tensor) -> Tensor:
        """v of a window, float32.

        Args:
            x: noisy latents (1, 4, frames, rows, columns), as the scheduler wants the networks to see them.
            hint: latents of the low-resolution clip, of the same shape.
            timestep: of the step.
        """
        x, hint = x.to(self.unet.dtype), hint.to(self.unet.dtype)
        halves = run_in_tiles(lambda tile: self._halves(x, hint, timestep, tile), self.tiles)
        uncond = halves[1:] if len(halves) > 1 else None
        return guide(halves[:1], uncond, self.guidance_scale, self.guidance_rescale)

    def _halves(self, x: Tensor, hint: Tensor, timestep: Tensor, tile: Tile) -> Tensor:
        """v (1 or 2, ..) of a tile, with the prompt and with the negative prompt."""
        sample, condition = x[..., *tile.slices], hint[..., *tile.slices]
        return torch.cat([self._run(sample, condition, timestep, text) for text in self._texts]).float()

    def _run(self, sample: Tensor, condition: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        text = text.to(sample.device)
        sample, condition = (latents.expand(len(text), *latents.shape[1:]) for latents in (sample, condition))
        down, mid = self.controlnet(sample, timestep, text, condition, return_dict=False)
        velocity: Tensor = self.unet(
            sample,
            timestep,
            text,
            down_block_additional_residuals=down,
            mid_block_additional_residual=mid,
            return_dict=False,
        )[0]
        return velocity
