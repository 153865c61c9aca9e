"""Flux, Flux 2 and what is built as they are."""

import functools
from collections.abc import Callable
from typing import Any

import diffusers
import models
import torch
from further import flux_like
from hand_masks import Layouts
from models import TEXT, Tokens, draw
from tiny_model import _JOINT
from tiny_pipelines import tiny_vae

from .case import STEPS, Whole, image, mask, whole

SIZE = {"height": 16, "width": 24}
OWN = Tokens(TEXT, 1, 4, 6)
REFERENCE = Tokens(TEXT, 1, 4, 6, 3 * 4)


def _pool(text: int = 12) -> dict[str, Any]:
    return {
        "prompt_embeds": draw(1, TEXT, text),
        "pooled_prompt_embeds": draw(1, 8),
        "negative_prompt_embeds": -draw(1, TEXT, text),
        "negative_pooled_prompt_embeds": -draw(1, 8),
        "prompt_attention_mask": torch.ones(1, TEXT),
        "negative_prompt_attention_mask": models.text_mask(TEXT, 3)[1:].float(),
        "true_cfg_scale": 2.0,
        "num_inference_steps": STEPS,
        "strength": 1.0,
        "image": image(**SIZE),
        "mask_image": mask(**SIZE),
        "control_image": image(**SIZE, shade=120),
        **SIZE,
    }


def _parts(transformer: Any, **others: Any) -> dict[str, Any]:
    vae = models.randomize(tiny_vae(latent_channels=1, shift_factor=0.0))
    return {"scheduler": diffusers.FlowMatchEulerDiscreteScheduler(), "vae": vae, "transformer": transformer, **others}


def flux(name: str, layout: Tokens = OWN, channels: int = 4, **call: Any) -> Whole:
    transformer = models.flux(in_channels=channels, out_channels=4).model
    layouts: dict[str, Layouts] = {"transformer": {_JOINT: (layout,)}}
    parts = _parts(transformer)
    if "ControlNet" in name:
        parts["controlnet"] = models.flux_controlnet().model
        layouts["controlnet"] = {_JOINT: (OWN,)}
    return whole(name, parts, {**_pool(), **call}, layouts)


def chroma(name: str) -> Whole:
    transformer = flux_like.chroma().model
    # the inpainting pipeline asks for it, and the model's class does not have it
    transformer.register_to_config(guidance_embeds=False)
    return whole(name, _parts(transformer), _pool(), {"transformer": {_JOINT: (OWN,)}})


def flux2(name: str, layout: Tokens, **call: Any) -> Whole:
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        latent_channels=1,
    )
    parts = {**_parts(models.flux2().model), "vae": models.randomize(vae)}
    pool = {key: value for key, value in _pool().items() if key != "image"}
    return whole(name, parts, {**pool, "guidance_scale": 2.0, **call}, {"transformer": {_JOINT: (layout,)}})


KONTEXT = {"image": image(12, 16), "max_area": 16 * 24, "_auto_resize": False}
# 64 pixels are the least that references may have
FLUX2_REFERENCE = Tokens(TEXT, 1, 4, 6, 16 * 24)
CASES: dict[str, Callable[[], Whole]] = {
    **{
        name: functools.partial(flux, name)
        for name in (
            "FluxPipeline",
            "FluxImg2ImgPipeline",
            "FluxInpaintPipeline",
            "FluxControlNetPipeline",
            "FluxControlNetImg2ImgPipeline",
            "FluxControlNetInpaintPipeline",
        )
    },
    "FluxControlPipeline": lambda: flux("FluxControlPipeline", channels=8),
    "FluxControlImg2ImgPipeline": lambda: flux("FluxControlImg2ImgPipeline", channels=8),
    "FluxControlInpaintPipeline": lambda: flux("FluxControlInpaintPipeline", channels=8),
    "FluxFillPipeline": lambda: flux("FluxFillPipeline", channels=4 + 4 + 16),
    "FluxKontextPipeline": lambda: flux("FluxKontextPipeline", REFERENCE, **KONTEXT),
    "FluxKontextInpaintPipeline": lambda: flux(
        "FluxKontextInpaintPipeline", REFERENCE, **{**KONTEXT, "image_reference": image(12, 16), "image": image(**SIZE)}
    ),
    **{
        name: functools.partial(chroma, name)
        for name in ("ChromaPipeline", "ChromaImg2ImgPipeline", "ChromaInpaintPipeline")
    },
    "Flux2Pipeline": lambda: flux2("Flux2Pipeline", OWN),
    "Flux2Pipeline, a reference": lambda: flux2("Flux2Pipeline", FLUX2_REFERENCE, image=image(64, 96)),
    "Flux2KleinPipeline": lambda: flux2("Flux2KleinPipeline", OWN),
    "Flux2KleinPipeline, a reference": lambda: flux2("Flux2KleinPipeline", FLUX2_REFERENCE, image=image(64, 96)),
    "Flux2KleinInpaintPipeline": lambda: flux2(
        "Flux2KleinInpaintPipeline",
        Tokens(TEXT, 1, 4, 6, 4 * 6 + 16 * 24),
        image=image(**SIZE),
        image_reference=image(64, 96),
    ),
}
"""Name -> builder."""
