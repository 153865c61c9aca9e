"""One prediction of the noise: the ControlNet and the U-Net, on the whole latents or on tiles of them.

The condition encoder sees each tile's pixels once, before the first step; what it makes of them serves every step and
both branches of classifier-free guidance.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffattn.media.windows import Tile, blend_tiles

from ..networks.controlnet import PASDControlNetModel
from ..networks.unet import PASDUNet2DConditionModel


@dataclass(frozen=True)
class TextCondition:
    """What the U-Net is told beside the image."""

    embeds: Tensor
    """(batch, tokens, width); with guidance (2 batch, ...), the negative half first."""
    added: dict[str, Tensor] = field(default_factory=dict)
    """SDXL's `text_embeds` and `time_ids`, of the same batch."""
    guided: bool = True
    """Are there two halves?"""

    def repeated(self, tiles: int) -> "TextCondition":
        """For a batch of `tiles` times as many samples, tile by tile within each half."""
        return self._each(lambda half: half.repeat(tiles, *[1] * (half.ndim - 1)))

    def positive(self) -> "TextCondition":
        """The positive half alone."""
        embeds, added = self.embeds.chunk(2)[1], {name: tensor.chunk(2)[1] for name, tensor in self.added.items()}
        return TextCondition(embeds, added, guided=False)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "TextCondition":
        def both(tensor: Tensor) -> Tensor:
            return torch.cat([change(half) for half in tensor.chunk(2 if self.guided else 1)])

        return TextCondition(both(self.embeds), {name: both(it) for name, it in self.added.items()}, self.guided)


@dataclass(frozen=True)
class TilePlan:
    """Which parts of the latents are computed apart, and how they are joined."""

    height: int
    width: int
    tiles: Sequence[Tile]
    weights: Tensor
    """(rows, columns) of a tile."""
    batch: int = 1
    """Tiles in one call of the networks."""

    def batches(self) -> Iterator[Sequence[Tile]]:
        """The tiles of each call."""
        for start in range(0, len(self.tiles), self.batch):
            yield self.tiles[start : start + self.batch]


class Denoiser:
    """Predicts noise from noisy latents, with guidance."""

    def __init__(
        self,
        unet: PASDUNet2DConditionModel,
        controlnet: PASDControlNetModel,
        pictures: Tensor,
        text: TextCondition,
        plan: TilePlan,
        *,
        guidance_scale: float,
        conditioning_scale: float = 1.0,
        guess_mode: bool = False,
        cross_attention_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Encode the images, (batch, 3, 8 rows, 8 columns) in 0..1, tile by tile."""
        self.unet, self.controlnet, self.text, self.plan = unet, controlnet, text, plan
        self.guidance_scale, self.conditioning_scale, self.guess_mode = guidance_scale, conditioning_scale, guess_mode
        self.cross_attention_kwargs = cross_attention_kwargs
        factor = pictures.shape[-1] // plan.width
        crops = ([pictures[..., *tile.scaled(factor).slices] for tile in batch] for batch in plan.batches())
        self._conditions = [controlnet.encode_condition(torch.cat(crop)) for crop in crops]

    def __call__(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """The guided prediction for latents (batch, 4, rows, columns) that the scheduler has scaled."""
        parts = (
            part for i, tiles in enumerate(self.plan.batches()) for part in self._tiles(latents, timestep, i, tiles)
        )
        if len(self.plan.tiles) == 1:
            return next(parts)
        return blend_tiles(parts, self.plan.tiles, self.plan.weights, self.plan.height, self.plan.width)

    def _tiles(self, latents: Tensor, timestep: Tensor, number: int, tiles: Sequence[Tile]) -> tuple[Tensor, ...]:
        sample = torch.cat([latents[..., *tile.slices] for tile in tiles])
        predicted = self._predict(sample, timestep, self.text.repeated(len(tiles)), self._conditions[number])
        return predicted.chunk(len(tiles))

    def _predict(self, sample: Tensor, timestep: Tensor, text: TextCondition, condition: Tensor) -> Tensor:
        if not text.guided:
            return self._run(sample, timestep, text, *self._control(sample, timestep, text, condition))
        both = torch.cat([sample, sample])
        if self.guess_mode:
            down, mid = self._control(sample, timestep, text.positive(), condition)
            down, mid = [with_zeros(residual) for residual in down], with_zeros(mid)
        else:
            down, mid = self._control(both, timestep, text, torch.cat([condition, condition]))
        negative, positive = self._run(both, timestep, text, down, mid).chunk(2)
        return negative + self.guidance_scale * (positive - negative)

    def _control(
        self, sample: Tensor, timestep: Tensor, text: TextCondition, condition: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        down, mid = self.controlnet(
            sample,
            timestep,
            text.embeds,
            condition,
            self.conditioning_scale,
            guess_mode=self.guess_mode,
            added_cond_kwargs=text.added or None,
            return_dict=False,
        )
        return list(down), mid

    def _run(self, sample: Tensor, timestep: Tensor, text: TextCondition, down: list[Tensor], mid: Tensor) -> Tensor:
        predicted: Tensor = self.unet(
            sample,
            timestep,
            text.embeds,
            cross_attention_kwargs=self.cross_attention_kwargs,
            added_cond_kwargs=text.added or None,
            down_block_additional_residuals=tuple(down),
            mid_block_additional_residual=mid,
            return_dict=False,
        )[0]
        return predicted


def with_zeros(residual: Tensor) -> Tensor:
    """A residual of the positive half alone, with zeros for the negative half."""
    return torch.cat([torch.zeros_like(residual), residual])
