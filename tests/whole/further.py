"""Further image transformers, and what is made of latents of one frame each."""

import functools
from collections.abc import Callable
from typing import Any

import diffusers
import models
import torch
from further import flux_like
from further import images as built
from hand_masks import Layouts
from models import TEXT, Tokens, draw
from tiny_model import _JOINT
from tiny_pipelines import tiny_vae

from .case import STEPS, Whole, image, mask, whole

SIZE = {"height": 24, "width": 36}
"""Latents of 12 x 18, 6 x 9 tokens."""


def _pool(size: dict[str, int]) -> dict[str, Any]:
    return {
        "prompt_embeds": draw(1, TEXT, 12),
        "negative_prompt_embeds": -draw(1, TEXT, 12),
        "prompt_attention_mask": torch.ones(1, TEXT, dtype=torch.long),
        "negative_prompt_attention_mask": models.text_mask(TEXT, 3)[1:].long(),
        "num_inference_steps": STEPS,
        "guidance_scale": 3.0,
        "strength": 1.0,
        "image": image(**size),
        "mask_image": mask(**size),
        **size,
    }


def _parts(transformer: Any, **others: Any) -> dict[str, Any]:
    vae = models.randomize(tiny_vae(shift_factor=0.3, scaling_factor=1.5))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return {"scheduler": scheduler, "vae": vae, "transformer": transformer, **others}


def z_image(name: str) -> Whole:
    """Image and caption are padded, to 64 and to 32 tokens."""
    tiny = models.z_image()
    embeds = {"prompt_embeds": [draw(TEXT, 12)], "negative_prompt_embeds": [-draw(TEXT, 12)]}
    layouts: dict[str, Layouts] = {
        "transformer": {
            r"noise_refiner\.\d+\.attention": (Tokens(0, 1, 6, 9, 10),),
            r"layers\.\d+\.attention": (Tokens(0, 1, 6, 9, 10 + 32),),
        }
    }
    return whole(name, _parts(tiny.model), {**_pool(SIZE), **embeds}, layouts)


def like_flux(name: str, transformer: Any) -> Whole:
    """Latents of one channel, packed."""
    vae = models.randomize(tiny_vae(latent_channels=1, shift_factor=0.0))
    parts = _parts(transformer, vae=vae)
    layouts: dict[str, Layouts] = {"transformer": {_JOINT: (Tokens(TEXT, 1, 6, 9),)}}
    return whole(name, parts, {**_pool(SIZE), "negative_prompt": None}, layouts)


def lumina2(name: str) -> Whole:
    tiny = models.lumina2()
    layouts: dict[str, Layouts] = {
        "transformer": {
            r"noise_refiner\.\d+\.attn": (Tokens(0, 1, 6, 9),),
            # guidance is a call of its own, whose prompt is shorter: what it is padded by is left out
            r"layers\.\d+\.attn": (Tokens(TEXT, 1, 6, 9), Tokens(3, 1, 6, 9)),
        }
    }
    return whole(name, _parts(tiny.model), _pool({"height": 96, "width": 144}), layouts)


def aura_flow(name: str) -> Whole:
    tiny = built.aura_flow()
    return whole(name, _parts(tiny.model), _pool(SIZE), {"transformer": tiny.spatial})


def cogview3(name: str) -> Whole:
    layouts: dict[str, Layouts] = {"transformer": {r"transformer_blocks\.\d+\.attn1": (Tokens(TEXT, 1, 6, 10),)}}
    parts = _parts(built.cogview3_plus().model, scheduler=diffusers.CogVideoXDDIMScheduler())
    return whole(name, parts, _pool({"height": 24, "width": 40}), layouts)


def latte(name: str) -> Whole:
    """Each frame by itself."""
    pool = {**_pool({"height": 24, "width": 40}), "video_length": 3, "negative_prompt": None}
    config = models.BUILDERS["Latte"]().model.config
    plain = {key: value for key, value in config.items() if not key.startswith("_")}
    model = models._make("LatteTransformer3DModel", **{**plain, "out_channels": 8})
    parts = _parts(model, scheduler=diffusers.DDIMScheduler())
    layouts: dict[str, Layouts] = {"transformer": {r"transformer_blocks\.\d+\.attn1": (Tokens(0, 1, 6, 10),)}}
    return whole(name, parts, pool, layouts, prompts=False)


CASES: dict[str, Callable[[], Whole]] = {
    **{
        name: functools.partial(z_image, name)
        for name in ("ZImagePipeline", "ZImageImg2ImgPipeline", "ZImageInpaintPipeline")
    },
    "OvisImagePipeline": lambda: like_flux("OvisImagePipeline", flux_like.ovis_image().model),
    "BriaPipeline": lambda: like_flux("BriaPipeline", flux_like.bria().model),
    "Lumina2Pipeline": lambda: lumina2("Lumina2Pipeline"),
    "AuraFlowPipeline": lambda: aura_flow("AuraFlowPipeline"),
    "CogView3PlusPipeline": lambda: cogview3("CogView3PlusPipeline"),
    "LattePipeline": lambda: latte("LattePipeline"),
}
"""Name -> builder."""
