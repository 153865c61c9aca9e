"""Stable Diffusion, AnimateDiff, and pipelines of their UNets."""

import functools
from collections.abc import Callable
from typing import Any

import diffusers
import models
import torch
from hand_masks import Layouts
from models import TEXT, draw
from tiny_pipelines import tiny_vae

from .case import STEPS, Whole, image, mask, whole

SIZE = {"height": 16, "width": 24}
"""Latents of 8 x 12."""
FRAMES = 5


def _pool() -> dict[str, Any]:
    return {
        "prompt_embeds": draw(1, TEXT, 12),
        "pooled_prompt_embeds": draw(1, 8),
        "negative_prompt_embeds": -draw(1, TEXT, 12),
        "negative_pooled_prompt_embeds": -draw(1, 8),
        "num_inference_steps": STEPS,
        "guidance_scale": 3.0,
        "strength": 1.0,
        "image": image(**SIZE),
        "mask_image": mask(**SIZE),
        "control_image": image(**SIZE, shade=120),
        "num_frames": FRAMES,
        **SIZE,
    }


def _parts(unet: Any, **others: Any) -> dict[str, Any]:
    return {
        "scheduler": diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        "vae": models.randomize(tiny_vae(force_upcast=False)),
        "unet": unet,
        "requires_safety_checker": False,
        "add_watermarker": False,
        "safety_checker": None,
        "feature_extractor": None,
        **others,
    }


def _config(model: Any, **changes: Any) -> dict[str, Any]:
    return {**{key: value for key, value in model.config.items() if not key.startswith("_")}, **changes}


def sd15(name: str, channels: int = 4, **call: Any) -> Whole:
    """`channels` of them with a mask and what is kept, or a given image."""
    tiny = models.sd15()
    unet = models._make("UNet2DConditionModel", **_config(tiny.model, in_channels=channels, sample_size=64))
    parts, layouts = _parts(unet), {"unet": tiny.spatial}
    if "ControlNet" in name:
        control = models.controlnet()
        parts["controlnet"], layouts["controlnet"] = control.model, control.spatial
    if "Adapter" in name:
        parts["adapter"] = _adapter()
    return whole(name, parts, {**_pool(), **call}, layouts, prompts="Adapter" not in name)


def _adapter() -> Any:
    """Features of each of the two levels."""
    return models.randomize(
        diffusers.T2IAdapter(
            in_channels=3, channels=[8, 16], num_res_blocks=1, downscale_factor=2, adapter_type="full_adapter"
        )
    )


def sdxl(name: str, channels: int = 4, **call: Any) -> Whole:
    tiny = models.sdxl()
    unet = models._make("UNet2DConditionModel", **_config(tiny.model, in_channels=channels, sample_size=64))
    parts, layouts = _parts(unet), {"unet": tiny.spatial}
    # the projection's width counts the pooled text
    parts["text_encoder_2"] = _Projection()
    if "ControlNet" in name:
        parts["controlnet"] = models._make("ControlNetModel", **_control_config(tiny.model))
        layouts["controlnet"] = {key: value for key, value in tiny.spatial.items()}
    return whole(name, parts, {**_pool(), **call}, layouts)


def _control_config(unet: Any) -> dict[str, Any]:
    names = (
        "norm_num_groups",
        "layers_per_block",
        "cross_attention_dim",
        "block_out_channels",
        "down_block_types",
        "transformer_layers_per_block",
        "attention_head_dim",
        "use_linear_projection",
        "addition_embed_type",
        "addition_time_embed_dim",
        "projection_class_embeddings_input_dim",
    )
    return {**{name: unet.config[name] for name in names}, "conditioning_embedding_out_channels": (4, 8)}


class _Projection(torch.nn.Module):
    """Stands for a text encoder that is not asked."""

    def __init__(self) -> None:
        super().__init__()
        self.config = type("Config", (), {"projection_dim": 8})()
        self.dtype, self.device = torch.float32, torch.device("cpu")


def motion(name: str, **call: Any) -> Whole:
    """AnimateDiff's UNet, whose layers in space see each frame by itself."""
    tiny = models.animatediff()
    parts: dict[str, Any] = _parts(tiny.model, motion_adapter=None)
    layouts: dict[str, Layouts] = {"unet": tiny.spatial}
    if "Sparse" in name:
        control = models.BUILDERS["SparseCtrl-ControlNet"]()
        parts["controlnet"], layouts["controlnet"] = control.model, control.spatial
    elif "ControlNet" in name:
        control = models.controlnet()
        parts["controlnet"], layouts["controlnet"] = control.model, control.spatial
    pool = {
        **_pool(),
        "video": [image(**SIZE, shade=shade) for shade in range(FRAMES)],
        "conditioning_frames": [image(**SIZE, shade=shade) for shade in range(FRAMES)],
        "decode_chunk_size": 2,
        **call,
    }
    return whole(name, parts, pool, layouts, prompts=False)


CASES: dict[str, Callable[[], Whole]] = {
    **{
        name: functools.partial(sd15, name)
        for name in (
            "StableDiffusionPipeline",
            "StableDiffusionAdapterPipeline",
            "StableDiffusionImg2ImgPipeline",
            "StableDiffusionInpaintPipeline",
            "StableDiffusionControlNetPipeline",
            "StableDiffusionControlNetImg2ImgPipeline",
            "StableDiffusionControlNetInpaintPipeline",
        )
    },
    "StableDiffusionInpaintPipeline, 9 channels": lambda: sd15("StableDiffusionInpaintPipeline", 9),
    "StableDiffusionInstructPix2PixPipeline": lambda: sd15("StableDiffusionInstructPix2PixPipeline", 8),
    **{
        name: functools.partial(sdxl, name)
        for name in (
            "StableDiffusionXLPipeline",
            "StableDiffusionXLImg2ImgPipeline",
            "StableDiffusionXLInpaintPipeline",
            "StableDiffusionXLControlNetPipeline",
            "StableDiffusionXLControlNetImg2ImgPipeline",
        )
    },
    "StableDiffusionXLInstructPix2PixPipeline": lambda: sdxl("StableDiffusionXLInstructPix2PixPipeline", 8),
    **{
        name: functools.partial(motion, name)
        for name in (
            "AnimateDiffPipeline",
            "AnimateDiffPAGPipeline",
            "AnimateDiffVideoToVideoPipeline",
            "AnimateDiffControlNetPipeline",
            "AnimateDiffVideoToVideoControlNetPipeline",
        )
    },
    "AnimateDiffSparseControlNetPipeline": lambda: motion(
        "AnimateDiffSparseControlNetPipeline", conditioning_frames=[image(**SIZE)], controlnet_frame_indices=[0]
    ),
}
"""Name -> builder."""
