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
SIZE = {"height": 24, "width": 40}
"""Latents of 12 x 20, 6 x 10 tokens."""
LARGE = {"height": 32, "width": 48}


def _pool(size: dict[str, int] = SIZE) -> dict[str, Any]:
    return {
        "prompt_embeds": draw(1, TEXT, 12),
        "pooled_prompt_embeds": draw(1, 8),
        "negative_prompt_embeds": -draw(1, TEXT, 12),
        "negative_pooled_prompt_embeds": -draw(1, 8),
        "num_inference_steps": STEPS,
        "guidance_scale": 3.0,
        "true_cfg_scale": 3.0,
        "strength": 1.0,
        "image": image(**size),
        "mask_image": mask(**size),
        "control_image": image(**size, shade=120),
        "control_mask": mask(**size),
        **size,
    }


def _parts(transformer: Any, **others: Any) -> dict[str, Any]:
    vae = models.randomize(tiny_vae(shift_factor=0.3, scaling_factor=1.5))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return {"scheduler": scheduler, "vae": vae, "transformer": transformer, **others}


def _plain(config: Any, **changes: Any) -> dict[str, Any]:
    """A config without what diffusers notes in it."""
    return {**{key: value for key, value in config.items() if not key.startswith("_")}, **changes}


def sd3(name: str, channels: int = 4, **call: Any) -> Whole:
    layouts: dict[str, Layouts] = {"transformer": {BLOCKS: (Tokens(0, 1, 6, 10, TEXT),)}}
    config = {**models._SD3, "in_channels": channels, "out_channels": channels}
    parts = _parts(models._make("SD3Transformer2DModel", **config))
    parts["vae"] = models.randomize(tiny_vae(shift_factor=0.3, scaling_factor=1.5, latent_channels=channels))
    if "ControlNet" in name:
        further = {"extra_conditioning_channels": 1} if "Inpainting" in name else {}
        parts["controlnet"] = models._make("SD3ControlNetModel", **{**models._SD3, **further})
        layouts["controlnet"] = dict(layouts["transformer"])
    return whole(name, parts, {**_pool(), **call}, layouts)


def qwen(name: str, references: tuple[int, ...] = (), **call: Any) -> Whole:
    """Of 64 x 96 pixels, an eighth as many latents, half as many tokens."""
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=4, z_dim=1, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.1], latents_std=[1.5]
    )
    size = {"height": 64, "width": 96}
    pool = {
        **_pool(size),
        "prompt_embeds_mask": torch.ones(1, TEXT, dtype=torch.long),
        "negative_prompt_embeds_mask": torch.ones(1, TEXT, dtype=torch.long),
        **call,
    }
    layouts: dict[str, Layouts] = {"transformer": {BLOCKS: (Tokens(TEXT, 1, 4, 6, sum(references)),)}}
    parts = _parts(models.qwen_image(out_channels=1).model, vae=models.randomize(vae))
    if "ControlNet" in name:
        further = {"extra_condition_channels": 4} if "Inpaint" in name else {}
        parts["controlnet"] = models._make(
            "QwenImageControlNetModel", **{**models._QWEN_IMAGE, "out_channels": 1, **further}
        )
        layouts["controlnet"] = dict(layouts["transformer"])
    # a given image of any size would have a megapixel
    sizes = (96, 64, None) if name in ("QwenImageEditPipeline", "QwenImageEditInpaintPipeline") else (96, 64)
    patches = {"calculate_dimensions": lambda *given: sizes} if "Edit" in name else {}
    return whole(name, parts, pool, layouts, patches=patches, prompts="EditPlus" not in name)


def joy_image(name: str) -> Whole:
    """The given image lies behind the one that is made."""
    vae = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    )
    size = {"height": 64, "width": 96}
    pool = {
        **_pool(size),
        "prompt_embeds_mask": torch.ones(1, TEXT, dtype=torch.long),
        "negative_prompt_embeds_mask": torch.ones(1, TEXT, dtype=torch.long),
    }
    parts = _parts(videos.joy_image().model, vae=models.randomize(vae))
    layout = Tokens(0, 1, 4, 6, 4 * 6 + TEXT)
    case = whole(name, parts, pool, {"transformer": {r"double_blocks\.\d+\.attn": (layout,)}}, prompts=False)
    # it takes sizes from a list of large ones
    case.pipe.vae_image_processor.get_default_height_width = lambda *given: (size["height"], size["width"])
    return case


def hidream(name: str) -> Whole:
    pool = {
        **_pool(),
        "prompt_embeds_t5": draw(1, TEXT, 12),
        "prompt_embeds_llama3": draw(2, 1, 4, 8),
        "negative_prompt_embeds_t5": -draw(1, TEXT, 12),
        "negative_prompt_embeds_llama3": -draw(2, 1, 4, 8),
    }
    layers = r"(double|single)_stream_blocks\.\d+\.block\.attn1"
    layout = Tokens(0, 1, 6, 10, 64 - 60 + TEXT + 4 + 4)
    case = whole(name, _parts(images.hidream().model), pool, {"transformer": {layers: (layout,)}}, prompts=False)
    case.pipe.default_sample_size = 16
    return case


def cogview4(name: str, channels: int = 4) -> Whole:
    transformer = images._cogview("CogView4Transformer2DModel", rope_axes_dim=(24, 24), sample_size=24).model
    if channels > 4:
        transformer = models._make("CogView4Transformer2DModel", **_plain(transformer.config, in_channels=channels))
    layouts: dict[str, Layouts] = {"transformer": {rf"{BLOCKS}1": (Tokens(TEXT, 1, 8, 12),)}}
    return whole(name, _parts(transformer), _pool(LARGE), layouts)


def kandinsky5(name: str) -> Whole:
    """An eighth as many latents, half as many tokens."""
    transformer = videos.kandinsky5().model
    if name == "Kandinsky5I2IPipeline":
        transformer = models._make("Kandinsky5Transformer3DModel", **_plain(transformer.config, visual_cond=True))
    size = {"height": 64, "width": 96}
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=2,
    )
    pool = {
        **_pool(size),
        "prompt_embeds_qwen": draw(1, TEXT, 12),
        "prompt_embeds_clip": draw(1, 8),
        "negative_prompt_embeds_qwen": -draw(1, TEXT, 12),
        "negative_prompt_embeds_clip": -draw(1, 8),
        "prompt_cu_seqlens": torch.tensor([0, TEXT]),
        "negative_prompt_cu_seqlens": torch.tensor([0, TEXT]),
    }
    layers = r"visual_transformer_blocks\.\d+\.self_attention"
    parts = _parts(transformer, vae=models.randomize(vae))
    batch = {"prompts": False, "single": name == "Kandinsky5I2IPipeline"}
    case = whole(name, parts, pool, {"transformer": {layers: (Tokens(0, 1, 4, 6),)}}, **batch)
    # it takes sizes from a list of large ones
    case.pipe.resolutions = [(96, 64)]
    return case


CASES: dict[str, Callable[[], Whole]] = {
    **{
        name: functools.partial(sd3, name)
        for name in (
            "StableDiffusion3Img2ImgPipeline",
            "StableDiffusion3ControlNetPipeline",
            "StableDiffusion3ControlNetInpaintingPipeline",
        )
    },
    "StableDiffusion3InpaintPipeline": lambda: sd3("StableDiffusion3InpaintPipeline", 16),
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
    "QwenImageEditPipeline": lambda: qwen("QwenImageEditPipeline", (24,)),
    "QwenImageEditInpaintPipeline": lambda: qwen("QwenImageEditInpaintPipeline", (24,)),
    "QwenImageEditPlusPipeline": lambda: qwen("QwenImageEditPlusPipeline", (24,)),
    "QwenImageEditPlusPipeline, two references": lambda: qwen(
        "QwenImageEditPlusPipeline", (24, 24), image=[image(64, 96), image(64, 96, shade=99)]
    ),
    "JoyImageEditPipeline": lambda: joy_image("JoyImageEditPipeline"),
    "HiDreamImagePipeline": lambda: hidream("HiDreamImagePipeline"),
    "CogView4Pipeline": lambda: cogview4("CogView4Pipeline"),
    "CogView4ControlPipeline": lambda: cogview4("CogView4ControlPipeline", 8),
    "Kandinsky5T2IPipeline": lambda: kandinsky5("Kandinsky5T2IPipeline"),
    "Kandinsky5I2IPipeline": lambda: kandinsky5("Kandinsky5I2IPipeline"),
}
"""Name -> builder."""
