"""Images of the bundled pipeline, and calls of its model on the way to them."""

from typing import Any

import numpy as np
import torch
from diffusers import FluxImg2ImgPipeline, FluxPipeline
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from diffattn import tiny
from diffattn.tiny.shapes import caption, held_out_scenes
from fidelity.methods import Method

Call = tuple[dict[str, Any], Tensor]
"""Arguments of the model and what it gave."""


class Painter:
    """Draws with the bundled pipeline; positions of larger images are scaled to those of training."""

    def __init__(self, count: int, seed: int) -> None:
        self.text_to_image = FluxPipeline.from_pretrained(tiny.path("flux"))
        self.image_to_image = FluxImg2ImgPipeline(**self.text_to_image.components)
        for pipe in (self.text_to_image, self.image_to_image):
            pipe.set_progress_bar_config(disable=True)
        self.prompts = [caption(scene) for scene in held_out_scenes(count, seed=seed)]
        self.zoom = 1
        self.text_to_image.transformer.pos_embed.register_forward_pre_hook(lambda _, args: (args[0] / self.zoom,))

    def native(self, number: int, **options: Any) -> np.ndarray:
        """One image, float (128, 128, 3)."""
        call = {**tiny.defaults("flux"), **options}
        generator = torch.Generator().manual_seed(number)
        image: np.ndarray = self.text_to_image(
            self.prompts[number], generator=generator, output_type="np", **call
        ).images[0]
        return image

    def enlarged(self, number: int, native: np.ndarray, zoom: int = 2, **options: Any) -> np.ndarray:
        """The native image enlarged and drawn over from half of the noise steps on."""
        side = 128 * zoom
        start = Image.fromarray((native * 255).round().astype(np.uint8)).resize((side, side), Image.Resampling.LANCZOS)
        call = {**tiny.defaults("flux"), "height": side, "width": side, "strength": 0.5, "image": start, **options}
        self.zoom = zoom
        try:
            generator = torch.Generator().manual_seed(100 + number)
            image: np.ndarray = self.image_to_image(
                self.prompts[number], generator=generator, output_type="np", **call
            ).images[0]
        finally:
            self.zoom = 1
        return image

    def record(self, zoom: int, **options: Any) -> list[Call]:
        """The model's first, middle and last call of full attention's own run of every prompt."""
        found: list[Call] = []

        def note(module: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
            found.append((dict(kwargs), out[0]))

        calls = []
        for number in tqdm(range(len(self.prompts)), desc="full attention", disable=None):
            start = self.native(number)
            hook = self.text_to_image.transformer.register_forward_hook(note, with_kwargs=True)
            self.enlarged(number, start, zoom=zoom, **options)
            hook.remove()
            calls += [found[0], found[len(found) // 2], found[-1]]
            found.clear()
        return calls

    @torch.no_grad()
    def errors(self, calls: list[Call], zoom: int, method: Method) -> tuple[float, ...]:
        """Relative error of the model's output under a method, on full attention's own path."""
        transformer, found = self.text_to_image.transformer, []
        self.zoom = zoom
        try:
            with method.on(self.image_to_image):
                for call, want in tqdm(calls, desc=method.name, leave=False, disable=None):
                    got = transformer(**call)[0]
                    found.append(float((got - want).norm() / want.norm()))
        finally:
            self.zoom = 1
        return tuple(found)
