"""Velocities of a whole clip, from windows over time, with guidance.

    v = u + w (c - u),    u, c = sum_k W_k f([x_k, z_k], t, text)

W_k: ramps over the overlaps that add up to 1 at each latent frame. The clip's estimate x0 is linear in v, so joining
velocities joins estimates.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffattn.media.windows import blend_windows, ramp_weights, starts

from .transformer import Rotary, rotary_embedding

NO_GUIDANCE = 1e-6
"""Weights this near to 1 leave the call without text out: dynamic guidance begins with steps of these."""


@dataclass(frozen=True)
class Denoiser:
    """The transformer on one clip.

    Args:
        transformer: see `STARCogVideoXTransformer3DModel`.
        condition: low-quality latents (1, frames, channels, rows, columns).
        text: (1, tokens, width).
        negative: likewise.
        window: latent frames in a window; None: all.
        overlap: least number of latent frames that neighbouring windows share.
        sequential: two calls for guidance instead of one with both.
    """

    transformer: Any
    condition: Tensor
    text: Tensor
    negative: Tensor
    window: int | None = None
    overlap: int = 0
    sequential: bool = False
    _begins: list[int] = field(init=False)
    _rotary: Rotary = field(init=False)

    def __post_init__(self) -> None:
        _, frames, _, height, width = self.condition.shape
        size = self._size
        begins = [0] if size == frames else starts(frames, size, self.overlap)
        rotary = rotary_embedding(self.transformer, size, height, width, self.condition.device)
        object.__setattr__(self, "_begins", begins)
        object.__setattr__(self, "_rotary", rotary)

    @property
    def _size(self) -> int:
        frames = self.condition.shape[1]
        return frames if self.window is None else min(self.window, frames)

    def __call__(self, latents: Tensor, timestep: Tensor, weight: float) -> Tensor:
        """v (1, frames, channels, rows, columns) of noisy `latents`, float32.

        Args:
            timestep: a number.
            weight: of guidance, w.
        """
        frames, size = latents.shape[1], self._size
        places = [range(begin, begin + size) for begin in self._begins]
        parts = (self._guided(latents, timestep, weight, begin) for begin in self._begins)
        return blend_windows(parts, places, ramp_weights(self._begins, size, frames), frames, dim=1)

    def _guided(self, latents: Tensor, timestep: Tensor, weight: float, begin: int) -> Tensor:
        place = slice(begin, begin + self._size)
        joined = torch.cat([latents[:, place].to(self.condition.dtype), self.condition[:, place]], dim=2)
        if abs(weight - 1) < NO_GUIDANCE:
            return self._run(joined, self.text, timestep, f"text-{begin}")
        if self.sequential:
            negative = self._run(joined, self.negative, timestep, f"negative-{begin}")
            positive = self._run(joined, self.text, timestep, f"text-{begin}")
        else:
            both = self._run(
                joined.expand(2, -1, -1, -1, -1), torch.cat([self.negative, self.text]), timestep, f"both-{begin}"
            )
            negative, positive = both.chunk(2)
        return negative + weight * (positive - negative)

    def _run(self, joined: Tensor, text: Tensor, timestep: Tensor, context: str) -> Tensor:
        with self.transformer.cache_context(context):
            output: Tensor = self.transformer(
                joined, text, timestep.expand(len(joined)), image_rotary_emb=self._rotary, return_dict=False
            )[0]
        return output.float()
