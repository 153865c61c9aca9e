"""The bundled Wan pipeline's own world as data: procedural clips, encoded once, seen in training or held out."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from diffattn.measure.progress import bar_options
from diffattn.tiny.moving import MovingScene, caption, draw_course, is_set_apart, render, scenes, set_apart_scenes
from diffattn.tiny.shapes import to_tensor

from ..encoders import vae_facts
from .samples import Sample

UNTOLD = 0.1
"""Share of the draws in which a caption is empty, as it is for the half of a call without guidance."""


class Moving:
    """`count` clips of `diffattn.tiny.moving` with their captions, as samples of the Wan pipeline `pipe`.

    `unseen`: scenes that the pipeline's own training never saw, with whole captions, for evaluation; else the others,
    each on several random courses where `count` is more than they are.
    """

    @torch.no_grad()
    def __init__(
        self,
        pipe: Any,
        count: int,
        *,
        frames: int = 33,
        seed: int = 0,
        text_length: int = 16,
        unseen: bool = False,
        progress: bool = False,
    ) -> None:
        rng = np.random.default_rng(seed)
        world = set_apart_scenes() if unseen else [scene for scene in scenes() if not is_set_apart(scene)]
        rounds = -(-count // len(world))
        chosen = [world[index] for _ in range(rounds) for index in rng.permutation(len(world))][:count]
        self._captions = [caption(scene) for scene in chosen]
        self._untold = 0.0 if unseen else UNTOLD
        self._text = {
            text: pipe.encode_prompt(text, do_classifier_free_guidance=False, max_sequence_length=text_length)[0][0]
            for text in {"", *self._captions}
        }
        shown = tqdm(chosen, desc="encoding clips", **bar_options(progress))
        courses = (np.random.default_rng([seed, number]) for number in range(count))
        self._latents = [
            encode(pipe.vae, clip_of(scene, own, frames)) for scene, own in zip(shown, courses, strict=True)
        ]

    def __len__(self) -> int:
        return len(self._captions)

    def sample(self, index: int, generator: torch.Generator) -> Sample:
        """One clip; whether its caption is told is random."""
        told = float(torch.rand((), generator=generator)) >= self._untold
        text = self._text[self._captions[index] if told else ""]
        return Sample(self._captions[index], self._latents[index], {"encoder_hidden_states": text})


def clip_of(scene: MovingScene, rng: np.random.Generator, frames: int) -> Tensor:
    """A clip of a scene on a random course, float32 (3, frames, side, side) in [-1, 1]."""
    return to_tensor(render(scene, draw_course(scene, rng), frames)).transpose(0, 1)


def encode(vae: Any, clip: Tensor) -> Tensor:
    """The posterior mean of a clip (3, frames, h, w) in [-1, 1], as the transformer sees it: (c, f', h', w')."""
    mean = vae.encode(clip[None].to(vae.device)).latent_dist.mean[0].cpu()
    facts = vae_facts(vae.config)
    shift, scale = (torch.tensor(facts[name]).view(-1, 1, 1, 1) for name in ("shift_factor", "scaling_factor"))
    return (mean - shift) * scale


def held_out(count: int, seed: int = 0) -> list[str]:
    """Captions of clips that neither this training nor the pipeline's own has seen."""
    pool = set_apart_scenes()
    order = np.random.default_rng(seed).permutation(len(pool))[:count]
    return [caption(pool[index]) for index in order]
