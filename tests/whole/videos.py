"""Video transformers."""

import functools
from collections.abc import Callable
from typing import Any

import diffusers
import models
import torch
from further import videos, wan_like
from hand_masks import Layouts
from models import TEXT, Tokens, draw
from tiny_model import _WAN, _make

from .case import STEPS, Whole, image, whole

SIZE = {"height": 64, "width": 80}
FRAMES = 9
VIDEO = Tokens(0, 3, 4, 5)
"""9 frames of 64 x 80 pixels are 3 of 8 x 10 latents, 4 x 5 tokens."""
LAYERS = r"(vace_)?blocks\.\d+\.attn1"


def _pool(text: int = 8) -> dict[str, Any]:
    clip = [image(**SIZE, shade=shade) for shade in range(0, 10 * FRAMES, 10)]
    return {
        "prompt_embeds": draw(1, TEXT, text),
        "negative_prompt_embeds": -draw(1, TEXT, text),
        "num_inference_steps": STEPS,
        "guidance_scale": 3.0,
        "num_frames": FRAMES,
        "strength": 1.0,
        "image": clip[0],
        "video": clip,
        "control_video": clip,
        **SIZE,
    }


def _wan_vae() -> Any:
    return models.randomize(
        diffusers.AutoencoderKLWan(
            base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
        )
    )


def wan(name: str, model: Any, layout: Tokens = VIDEO, **call: Any) -> Whole:
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    parts = {"vae": _wan_vae(), "scheduler": scheduler, "transformer": model}
    if "expand_timesteps" in call:
        parts["expand_timesteps"] = call.pop("expand_timesteps")
    several = {"single": "VACE" in name or "Lucy" in name}
    return whole(name, parts, {**_pool(), **call}, {"transformer": {LAYERS: (layout,)}}, **several)


def _wan_model(name: str = "WanTransformer3DModel", **changes: Any) -> Any:
    return _make(name, **{**_WAN, **changes})


def vace(references: int) -> Whole:
    """References are frames before the video's own, for the model too."""
    model = _wan_model("WanVACETransformer3DModel", vace_layers=[0, 1], vace_in_channels=8 + 64)
    given = {"reference_images": [image(**SIZE, shade=90)] * references} if references else {}
    layout = Tokens(0, 3 + references, 4, 5)
    return wan("WanVACEPipeline", model, layout, mask=[image(**SIZE)] * FRAMES, **given)


def cogvideox(name: str, channels: int = 4) -> Whole:
    tiny = models.cogvideox()
    config = {key: value for key, value in tiny.model.config.items() if not key.startswith("_")}
    model = _make("CogVideoXTransformer3DModel", **{**config, "in_channels": channels, "out_channels": 4})
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(2, 2, 2, 2),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    scheduler = diffusers.CogVideoXDDIMScheduler()
    parts = {"vae": models.randomize(vae), "scheduler": scheduler, "transformer": model}
    return whole(name, parts, _pool(12), {"transformer": tiny.spatial}, prompts=False)


def kandinsky5(name: str) -> Whole:
    """The given image is in further channels."""
    tiny = videos.kandinsky5(visual_cond=True)
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        mid_block_add_attention=False,
    )
    pool = {
        **_pool(),
        "prompt_embeds_qwen": draw(1, TEXT, 12),
        "prompt_embeds_clip": draw(1, 8),
        "negative_prompt_embeds_qwen": -draw(1, TEXT, 12),
        "negative_prompt_embeds_clip": -draw(1, 8),
        "prompt_cu_seqlens": torch.tensor([0, TEXT]),
        "negative_prompt_cu_seqlens": torch.tensor([0, TEXT]),
    }
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    parts = {"vae": models.randomize(vae), "scheduler": scheduler, "transformer": tiny.model}
    # from an image it looks at more than four frames in the end
    frames = 6 if "I2V" in name else 3
    layouts: dict[str, Layouts] = {"transformer": {key: (Tokens(0, frames, 4, 5),) for key in tiny.spatial}}
    return whole(name, parts, {**pool, "num_frames": 4 * frames - 3}, layouts, prompts=False)


def easy_animate(name: str) -> Whole:
    """Of the three the one that diffusers 0.42.1 can run."""
    spatial = ["Spatial", *["SpatialTemporal"] * 3]
    vae = diffusers.AutoencoderKLMagvit(
        latent_channels=4,
        block_out_channels=[4, 4, 4, 4],
        down_block_types=[f"{kind}DownBlock3D" for kind in spatial],
        up_block_types=[f"{kind}UpBlock3D" for kind in spatial],
        layers_per_block=1,
        norm_num_groups=2,
    )
    tiny = videos.easy_animate()
    pool = {
        **_pool(12),
        "prompt_attention_mask": torch.ones(1, TEXT),
        "negative_prompt_attention_mask": torch.ones(1, TEXT),
    }
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    parts = {"vae": models.randomize(vae), "scheduler": scheduler, "transformer": tiny.model}
    return whole(name, parts, pool, {"transformer": tiny.spatial})


def skyreels(name: str, **call: Any) -> Whole:
    model = wan_like.skyreels_v2().model if "I2V" not in name else None
    if model is None:
        model = _wan_model("SkyReelsV2Transformer3DModel")
    layouts: dict[str, Layouts] = {"transformer": {LAYERS: (VIDEO,)}}
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    parts = {"vae": _wan_vae(), "scheduler": scheduler, "transformer": model}
    return whole(name, parts, {"prompt": None, **_pool(), **call}, layouts)


CASES: dict[str, Callable[[], Whole]] = {
    "WanPipeline": lambda: wan("WanPipeline", _wan_model()),
    "WanPipeline, a time for each token": lambda: wan("WanPipeline", _wan_model(), expand_timesteps=True),
    "WanVideoToVideoPipeline": lambda: wan("WanVideoToVideoPipeline", _wan_model()),
    "WanImageToVideoPipeline": lambda: wan("WanImageToVideoPipeline", _wan_model(in_channels=12)),
    "WanImageToVideoPipeline, a time for each token": lambda: wan(
        "WanImageToVideoPipeline", _wan_model(), expand_timesteps=True
    ),
    "WanVACEPipeline": lambda: vace(0),
    "WanVACEPipeline, a reference": lambda: vace(1),
    "LucyEditPipeline": lambda: wan("LucyEditPipeline", _wan_model(in_channels=8)),
    "SkyReelsV2Pipeline": lambda: skyreels("SkyReelsV2Pipeline"),
    "SkyReelsV2DiffusionForcingPipeline": lambda: skyreels("SkyReelsV2DiffusionForcingPipeline"),
    "SkyReelsV2DiffusionForcingImageToVideoPipeline": lambda: skyreels(
        "SkyReelsV2DiffusionForcingImageToVideoPipeline"
    ),
    **{name: functools.partial(cogvideox, name) for name in ("CogVideoXPipeline", "CogVideoXVideoToVideoPipeline")},
    "CogVideoXImageToVideoPipeline": lambda: cogvideox("CogVideoXImageToVideoPipeline", 8),
    "CogVideoXFunControlPipeline": lambda: cogvideox("CogVideoXFunControlPipeline", 8),
    "Kandinsky5T2VPipeline": lambda: kandinsky5("Kandinsky5T2VPipeline"),
    "Kandinsky5I2VPipeline": lambda: kandinsky5("Kandinsky5I2VPipeline"),
    "EasyAnimatePipeline": lambda: easy_animate("EasyAnimatePipeline"),
}
"""Name -> builder."""
