"""Image transformers."""

import functools
from collections.abc import Callable
from typing import Any

import diffusers
import models
import torch
from further import images, videos
from hand_masks import Layouts
from models import TEXT, Tokens, draw
from tiny_pipelines import tiny_vae

from .case import STEPS, Whole, image, mask, whole

BLOCKS = r"transformer_blocks\.\d+\.attn"
SIZE = {"height": 24, "width": 36}
"""Latents of 12 x 18, 6 x 9 tokens."""
IMAGE = Tokens(0, 1, 6, 9)


def _pool() -> dict[str, Any]:
    return {
        "prompt_embeds": draw(1, TEXT, 12),
        "pooled_prompt_embeds": draw(1, 8),
        "negative_prompt_embeds": -draw(1, TEXT, 12),
        "negative_pooled_prompt_embeds": -draw(1, 8),
        "num_inference_steps": STEPS,
        "guidance_scale": 3.0,
        "true_cfg_scale": 3.0,
        "strength": 1.0,
        "image": image(**SIZE),
        "mask_image": mask(**SIZE),
        "control_image": image(**SIZE, shade=120),
        "control_mask": mask(**SIZE),
        **SIZE,
    }


def _parts(transformer: Any, **others: Any) -> dict[str, Any]:
    vae = models.randomize(tiny_vae(shift_factor=0.3, scaling_factor=1.5))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return {"scheduler": scheduler, "vae": vae, "transformer": transformer, **others}


def sd3(name: str, **call: Any) -> Whole:
    layouts: dict[str, Layouts] = {"transformer": {BLOCKS: (Tokens(0, 1, 6, 9, TEXT),)}}
    parts = _parts(models.sd3().model)
    if "ControlNet" in name:
        further = {"extra_conditioning_channels": 1} if "Inpainting" in name else {}
        parts["controlnet"] = models._make("SD3ControlNetModel", **{**_SD3, **further})
        layouts["controlnet"] = dict(layouts["transformer"])
    return whole(name, parts, {**_pool(), **call}, layouts)


_SD3 = {key: value for key, value in models._SD3.items() if key != "out_channels"}


def qwen(name: str, references: tuple[int, ...] = (), **call: Any) -> Whole:
    """Of 64 x 96 pixels, an eighth as many latents, half as many tokens."""
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=4, z_dim=1, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.1], latents_std=[1.5]
    )
    size = {"height": 64, "width": 96}
    pool = {
        **_pool(),
        **size,
        "image": image(**size),
        "mask_image": mask(**size),
        "control_image": image(**size, shade=120),
        "control_mask": mask(**size),
        "prompt_embeds_mask": torch.ones(1, TEXT, dtype=torch.long),
        "negative_prompt_embeds_mask": torch.ones(1, TEXT, dtype=torch.long),
        **call,
    }
    layouts: dict[str, Layouts] = {"transformer": {BLOCKS: (Tokens(TEXT, 1, 4, 6, sum(references)),)}}
    parts = _parts(models.qwen_image().model, vae=models.randomize(vae))
    if "ControlNet" in name:
        further = {"extra_condition_channels": 4} if "Inpaint" in name else {}
        parts["controlnet"] = models._make("QwenImageControlNetModel", **{**models._QWEN_IMAGE, **further})
        layouts["controlnet"] = dict(layouts["transformer"])
    return whole(name, parts, pool, layouts)


def joy_image(name: str) -> Whole:
    """The given image lies behind the one that is made."""
    vae = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    )
    size = {"height": 64, "width": 96}
    pool = {
        **_pool(),
        **size,
        "image": image(**size),
        "prompt_embeds_mask": torch.ones(1, TEXT, dtype=torch.long),
        "negative_prompt_embeds_mask": torch.ones(1, TEXT, dtype=torch.long),
    }
    parts = _parts(videos.joy_image().model, vae=models.randomize(vae))
    return whole(name, parts, pool, {"transformer": {r"double_blocks\.\d+\.attn": (Tokens(0, 1, 4, 6, 24 + TEXT),)}})


def hidream(name: str) -> Whole:
    pool = {
        **_pool(),
        "prompt_embeds_t5": draw(1, TEXT, 12),
        "prompt_embeds_llama3": draw(2, 1, 4, 8),
        "negative_prompt_embeds_t5": -draw(1, TEXT, 12),
        "negative_prompt_embeds_llama3": -draw(2, 1, 4, 8),
    }
    layers = r"(double|single)_stream_blocks\.\d+\.block\.attn1"
    layout = Tokens(0, 1, 6, 9, 64 - 54 + TEXT + 4 + 4)
    return whole(name, _parts(images.hidream().model), pool, {"transformer": {layers: (layout,)}})


def cogview4(name: str, channels: int = 4) -> Whole:
    transformer = images._cogview("CogView4Transformer2DModel", rope_axes_dim=(24, 24), sample_size=24).model
    if channels > 4:
        config = {key: value for key, value in transformer.config.items() if not key.startswith("_")}
        transformer = models._make("CogView4Transformer2DModel", **{**config, "in_channels": channels})
    layouts: dict[str, Layouts] = {"transformer": {rf"{BLOCKS}1": (Tokens(TEXT, 1, 6, 9),)}}
    return whole(name, _parts(transformer), _pool(), layouts)


def kandinsky5(name: str) -> Whole:
    visual = name == "Kandinsky5I2IPipeline"
    transformer = videos.kandinsky5().model
    if visual:
        config = {key: value for key, value in transformer.config.items() if not key.startswith("_")}
        transformer = models._make("Kandinsky5Transformer3DModel", **{**config, "visual_cond": True})
    pool = {
        **_pool(),
        "prompt_embeds_qwen": draw(1, TEXT, 12),
        "prompt_embeds_clip": draw(1, 8),
        "negative_prompt_embeds_qwen": -draw(1, TEXT, 12),
        "negative_prompt_embeds_clip": -draw(1, 8),
        "prompt_cu_seqlens": torch.tensor([0, TEXT]),
        "negative_prompt_cu_seqlens": torch.tensor([0, TEXT]),
    }
    layers = r"visual_transformer_blocks\.\d+\.self_attention"
    return whole(name, _parts(transformer), pool, {"transformer": {layers: (IMAGE,)}})


CASES: dict[str, Callable[[], Whole]] = {
    **{
        name: functools.partial(sd3, name)
        for name in (
            "StableDiffusion3Img2ImgPipeline",
            "StableDiffusion3InpaintPipeline",
            "StableDiffusion3ControlNetPipeline",
            "StableDiffusion3ControlNetInpaintingPipeline",
        )
    },
    "StableDiffusion3Pipeline, a layer left out": lambda: sd3(
        "StableDiffusion3Pipeline",
        skip_guidance_layers=[1],
        skip_layer_guidance_start=0.0,
        skip_layer_guidance_stop=1.0,
    ),
    **{
        name: functools.partial(qwen, name)
        for name in (
            "QwenImagePipeline",
            "QwenImageImg2ImgPipeline",
            "QwenImageInpaintPipeline",
            "QwenImageControlNetPipeline",
            "QwenImageControlNetInpaintPipeline",
        )
    },
    "JoyImageEditPipeline": lambda: joy_image("JoyImageEditPipeline"),
    "HiDreamImagePipeline": lambda: hidream("HiDreamImagePipeline"),
    "CogView4Pipeline": lambda: cogview4("CogView4Pipeline"),
    "CogView4ControlPipeline": lambda: cogview4("CogView4ControlPipeline", 8),
    "Kandinsky5T2IPipeline": lambda: kandinsky5("Kandinsky5T2IPipeline"),
    "Kandinsky5I2IPipeline": lambda: kandinsky5("Kandinsky5I2IPipeline"),
}
"""Name -> builder."""
