"""Settings of X-Portrait's networks, and the networks untrained."""

from dataclasses import dataclass
from typing import Any

from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, MultiControlNetModel
from transformers import CLIPTextConfig, CLIPTextModel

from .null_text import NullText
from .reference_unet import XPortraitReferenceUNet
from .unet import XPortraitUNet

PREFIXES = {
    "unet": "model.diffusion_model.",
    "reference_unet": "appearance_control_model.",
    "controlnet.nets.0": "pose_control_model.",
    "controlnet.nets.1": "local_pose_control_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.transformer.",
}
"""What the names of a network's weights begin with in the official checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of the networks; the defaults are X-Portrait's, those of Stable Diffusion 1.5."""

    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    """Of each level of the U-Nets and ControlNets."""
    heads: int = 8
    """Attention heads."""
    motion_heads: int | None = None
    """Those of the motion modules; None for as many as `heads`."""
    text_tokens: int = 77
    text_width: int = 768
    text_layers: int = 12
    """Of CLIP's text encoder, which conversion alone needs; so are the next two."""
    text_heads: int = 12
    vocabulary: int = 49408
    positions: int = 24
    """Frames that the motion modules have positions for."""
    latent_side: int = 64
    """Cells of the latents that the networks were trained on."""
    vae_channels: tuple[int, ...] = (128, 256, 512, 512)
    vae_layers: int = 2
    """Residual blocks in each level of the VAE's encoder."""


def spatial_config(sizes: Sizes) -> dict[str, Any]:
    """Settings that all four networks share."""
    return {"block_out_channels": sizes.channels, "cross_attention_dim": sizes.text_width}


def unet_config(sizes: Sizes) -> dict[str, Any]:
    """Of `XPortraitUNet`."""
    return {
        **spatial_config(sizes),
        "sample_size": sizes.latent_side,
        "num_attention_heads": sizes.heads,
        "motion_num_attention_heads": sizes.heads if sizes.motion_heads is None else sizes.motion_heads,
        "motion_max_seq_length": sizes.positions,
        "use_motion_mid_block": False,
    }


def reference_unet_config(sizes: Sizes) -> dict[str, Any]:
    """Of `XPortraitReferenceUNet`; diffusers calls the number of heads `attention_head_dim` there."""
    return {**spatial_config(sizes), "sample_size": sizes.latent_side, "attention_head_dim": sizes.heads}


def controlnet_config(sizes: Sizes) -> dict[str, Any]:
    """Of both ControlNets; see `reference_unet_config`."""
    return {**spatial_config(sizes), "attention_head_dim": sizes.heads}


def vae_config(sizes: Sizes) -> dict[str, Any]:
    """Of the VAE; its scaling factor of 0.18215 is the default."""
    levels = len(sizes.vae_channels)
    return {
        "block_out_channels": sizes.vae_channels,
        "layers_per_block": sizes.vae_layers,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "sample_size": 8 * sizes.latent_side,
    }


def build_networks(sizes: Sizes) -> dict[str, Any]:
    """All networks of the pipeline by their names in it, untrained."""
    controlnets = [ControlNetModel(**controlnet_config(sizes)) for _ in ("pose", "local")]
    return {
        "unet": XPortraitUNet(**unet_config(sizes)),
        "reference_unet": XPortraitReferenceUNet(**reference_unet_config(sizes)),
        "controlnet": MultiControlNetModel(controlnets),
        "vae": AutoencoderKL(**vae_config(sizes)),
        "null_text": NullText(sizes.text_tokens, sizes.text_width),
    }


def build_text_encoder(sizes: Sizes) -> CLIPTextModel:
    """CLIP's text encoder, untrained; the last two words of its vocabulary begin and end a text."""
    config = CLIPTextConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.text_width,
        intermediate_size=4 * sizes.text_width,
        num_hidden_layers=sizes.text_layers,
        num_attention_heads=sizes.text_heads,
        max_position_embeddings=sizes.text_tokens,
        bos_token_id=sizes.vocabulary - 2,
        eos_token_id=sizes.vocabulary - 1,
    )
    return CLIPTextModel(config)


def official_scheduler() -> DDIMScheduler:
    """DDIM with Stable Diffusion's schedule; the pipeline gives it the official timesteps."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
