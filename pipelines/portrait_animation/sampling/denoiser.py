"""One prediction of the noise of all frames: appearance network, ControlNets and U-Net, window by window.

    eps = u + s (c - u)

    c                                reference, both ControlNets
    u, "controlnet_important"        neither
    u, "balance"                     reference; both ControlNets see mid grey

Motion modules work in both. The appearance network runs once for all frames and windows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diffattn.media.windows import blend_windows

from ..networks.reference import ReferenceBank
from .features import CELL, Frames, features_given
from .windows import Windows

MODES = ("controlnet_important", "balance")


@dataclass(frozen=True)
class Networks:
    """Those of one checkpoint."""

    unet: Any
    reference_unet: Any
    controlnet: Any
    """A `MultiControlNetModel` of two."""


@dataclass(frozen=True)
class Condition:
    """What a video is made from."""

    references: Tensor
    """Scaled latents (references, 1 or frames of a window, 4, rows, columns)."""
    features: tuple[Frames, Frames]
    """Of driving frames, and of their eyes and mouth alone, from the encoders of the ControlNets."""
    text: Tensor
    """(1, tokens, width)."""
    negative: Tensor
    """The text of u."""


class Denoiser:
    """Predicts noise from noisy latents, with guidance."""

    def __init__(
        self,
        networks: Networks,
        condition: Condition,
        *,
        guidance_scale: float,
        mode: str = "controlnet_important",
        window_batch: int = 1,
    ) -> None:
        """`guidance_scale` of at most 1 leaves u out; `window_batch` windows are in one call of the U-Net."""
        self.networks, self.condition = networks, condition
        self.guidance_scale, self.mode, self.window_batch = guidance_scale, mode, window_batch

    def __call__(self, latents: Tensor, timestep: Tensor, windows: Windows) -> Tensor:
        """The guided prediction for latents (frames, 4, rows, columns) that the scheduler has scaled."""
        bank = self._write(timestep, self.condition.text)
        other = bank if self._shares_bank() else self._write(timestep, self.condition.negative)
        parts = (
            part
            for places in windows.batches(self.window_batch)
            for part in self._predict(latents, timestep, places, bank, other)
        )
        return blend_windows(parts, windows.places, windows.weights, len(latents), dim=0)

    def _shares_bank(self) -> bool:
        """Is the text of u, if u reads a bank at all, that of c?"""
        only_c = self.guidance_scale <= 1 or self.mode != "balance"
        return only_c or self.condition.negative is self.condition.text

    def _write(self, timestep: Tensor, text: Tensor) -> ReferenceBank:
        references = self.condition.references
        bank = ReferenceBank.write(self.networks.reference_unet, references.flatten(0, 1), timestep, text)
        return bank.joined(len(references))

    def _predict(
        self,
        latents: Tensor,
        timestep: Tensor,
        places: Sequence[Sequence[int]],
        bank: ReferenceBank,
        other: ReferenceBank,
    ) -> tuple[Tensor, ...]:
        frames = [frame for place in places for frame in place]
        sample = latents[frames].unflatten(0, (len(places), -1))
        features = [of[frames].to(latents.device, latents.dtype) for of in self.condition.features]
        eps = self.run(sample, timestep, self.condition.text, features, bank)
        if self.guidance_scale > 1:
            if self.mode == "balance":
                grey = self._grey(latents)
                u = self.run(sample, timestep, self.condition.negative, grey, other)
            else:
                u = self.run(sample, timestep, self.condition.negative, None, None)
            eps = u + self.guidance_scale * (eps - u)
        return eps.unbind(0)

    def _grey(self, latents: Tensor) -> list[Tensor]:
        """Features (1, channels, rows, columns) of a mid grey image, which all frames share."""
        rows, columns = latents.shape[-2:]
        picture = latents.new_zeros(1, 3, CELL * rows, CELL * columns)
        return [net.controlnet_cond_embedding(picture) for net in self.networks.controlnet.nets]

    def run(
        self, sample: Tensor, timestep: Tensor, text: Tensor, features: list[Tensor] | None, bank: ReferenceBank | None
    ) -> Tensor:
        """Epsilon (windows, frames, 4, rows, columns) of a sample of that shape, without guidance.

        Args:
            sample: noisy latents.
            timestep: one for all.
            text: (1, tokens, width).
            features: as in `Condition`, of the frames of all windows. None: without ControlNets.
            bank: what was written at this timestep. None: without reference.
        """
        unet, flat = self.networks.unet, sample.flatten(0, 1)
        text, options = text.expand(len(flat), -1, -1), dict[str, Any](return_dict=False)
        if features is not None:
            with features_given(self.networks.controlnet):
                down, mid = self.networks.controlnet(flat, timestep, text, features, [1.0, 1.0], return_dict=False)
            options |= {"down_block_additional_residuals": tuple(down), "mid_block_additional_residual": mid}
        video = sample.transpose(1, 2)
        if bank is None:
            predicted: Tensor = unet(video, timestep, text, **options)[0]
        else:
            with bank.read_by(unet):
                predicted = unet(video, timestep, text, **options)[0]
        return predicted.transpose(1, 2)
