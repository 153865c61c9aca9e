"""The bundled pipeline's own world as data: procedural images, encoded once, seen in training or held out from it."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from diffattn.measure.progress import bar_options
from diffattn.tiny.shapes import caption, held_out_scenes, is_held_out, pixels, scenes

from .samples import Sample

PART = 32
"""Images encoded at once."""


class Shapes:
    """`count` images of `diffattn.tiny.shapes` with their captions, as samples of the pipeline `pipe`.

    `unseen`: held-out combinations, for evaluation; else those that training may see.
    """

    @torch.no_grad()
    def __init__(
        self,
        pipe: Any,
        count: int,
        *,
        seed: int = 0,
        text_length: int = 32,
        unseen: bool = False,
        progress: bool = False,
    ) -> None:
        rng = np.random.default_rng(seed)
        world = held_out_scenes(count, seed) if unseen else [scene for scene in scenes() if not is_held_out(scene)]
        chosen = [world[i] for i in rng.choice(len(world), size=min(count, len(world)), replace=False)]
        self._captions = [caption(scene) for scene in chosen]
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        starts = range(0, len(chosen), PART)
        for start in tqdm(starts, desc="encoding images", **bar_options(progress)):
            text, pooled, _ = pipe.encode_prompt(
                self._captions[start : start + PART], None, max_sequence_length=text_length
            )
            pictures = pixels(chosen[start : start + PART], rng).to(pipe.vae.device)
            parts.append((encode(pipe.vae, pictures).cpu(), text.cpu(), pooled.cpu()))
        self._latents, self._text, self._pooled = (torch.cat(columns) for columns in zip(*parts, strict=True))

    def __len__(self) -> int:
        return len(self._captions)

    def sample(self, index: int, generator: torch.Generator) -> Sample:
        """One image; nothing in it is random."""
        conditioning = {"encoder_hidden_states": self._text[index], "pooled_projections": self._pooled[index]}
        return Sample(self._captions[index], self._latents[index], conditioning)


def encode(vae: Any, pictures: Tensor) -> Tensor:
    """Posterior means of images in [-1, 1], shifted and scaled as the transformer sees them."""
    means: Tensor = vae.encode(pictures).latent_dist.mean
    return (means - vae.config.shift_factor) * vae.config.scaling_factor


def held_out(count: int, seed: int = 0) -> list[str]:
    """Captions of images that training never sees."""
    return [caption(scene) for scene in held_out_scenes(count, seed)]
