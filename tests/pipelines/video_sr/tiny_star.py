"""STAR's networks, tiny and random, the parts beside them, and their weights in the official layout."""

import zlib
from typing import Any

import diffusers
import text_pipelines
import torch
from diffattn.pipelines.video_sr.i2vgenxl.checkpoint.names import CONTROL, official_names
from diffattn.pipelines.video_sr.i2vgenxl.networks.controlnet import STARControlNetModel
from diffattn.pipelines.video_sr.i2vgenxl.networks.unet import STARUNet3DConditionModel
from torch import Tensor, nn

TEXT = 12
"""Width of the text."""
ENCODER: dict[str, Any] = {
    "block_out_channels": (8, 8, 16, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": TEXT,
    "attention_head_dim": 4,
    "transformer_in_heads": 3,
}
"""What both networks share: the official three downsamplings and levels with attention, one layer in each."""


def randomize(model: nn.Module, seed: int) -> nn.Module:
    """Matrices of unit gain, vectors near where they start, gates of deviation 1; by the names of the weights.

    So that leaving a gate out shows, and no weight depends on the order in which modules are made.
    """
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        noise = torch.randn(parameter.shape, generator=generator)
        if ".local" in name:
            parameter.data = noise
        elif parameter.ndim > 1:
            parameter.data = noise / parameter[0].numel() ** 0.5
        else:
            parameter.data = ("norm" in name and name.endswith("weight")) + 0.1 * noise
    return model.eval()


def unet(seed: int = 1, **config: Any) -> STARUNet3DConditionModel:
    """Takes latents whose height is 2 more than a multiple of 8, and whose width is a multiple of 8."""
    return randomize(STARUNet3DConditionModel(**{**ENCODER, **config}), seed)


def controlnet(seed: int = 2, **config: Any) -> STARControlNetModel:
    """For `unet` of the same configuration; its hint and its zero convolutions are not zero."""
    return randomize(STARControlNetModel(**{**ENCODER, **config}), seed)


def vae(seed: int = 3, **config: Any) -> diffusers.AutoencoderKLTemporalDecoder:
    """8 x 8 pixels to a cell, as the official one."""
    settings: dict[str, Any] = {
        "block_out_channels": (32, 32, 32, 32),  # its decoder has 32 groups whatever the configuration says
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "layers_per_block": 1,
        "sample_size": 32,
    }
    return randomize(diffusers.AutoencoderKLTemporalDecoder(**{**settings, **config}), seed)


def text_encoder() -> Any:
    return text_pipelines.clip(TEXT)


def tokenizer() -> Any:
    return text_pipelines.tokenizer("clip")


def latents(frames: int = 3, height: int = 10, width: int = 8, batch: int = 1, seed: int = 0) -> Tensor:
    """(batch, 4, frames, height, width)."""
    return torch.randn(batch, 4, frames, height, width, generator=torch.Generator().manual_seed(seed))


def text(batch: int = 1, tokens: int = 5, seed: int = 0) -> Tensor:
    """(batch, tokens, width) as the text encoder gives it."""
    return torch.randn(batch, tokens, TEXT, generator=torch.Generator().manual_seed(1000 + seed))


def clip(frames: int = 3, height: int = 20, width: int = 16, seed: int = 0) -> Tensor:
    """Smooth frames (frames, 3, height, width) in 0..1, no two columns alike."""
    drawn = torch.rand(frames, 3, 4, 5, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(drawn, (height, width), mode="bicubic").clamp(0, 1)


def official_weights(unet: STARUNet3DConditionModel, controlnet: STARControlNetModel) -> dict[str, Tensor]:
    """The weights of both in the official layout."""
    return {**_official(unet, ""), **_official(controlnet, CONTROL)}


def _official(network: Any, prefix: str) -> dict[str, Tensor]:
    own: dict[str, Tensor] = network.state_dict()
    names = official_names(own, network.config.layers_per_block)
    return {prefix + names[key]: _unsqueezed(key, tensor).clone() for key, tensor in own.items()}


def _unsqueezed(key: str, tensor: Tensor) -> Tensor:
    """Projections of the temporal transformers are convolutions of one frame there."""
    temporal = "temp_attentions." in key or "transformer_in." in key
    return tensor[..., None] if temporal and key.endswith(("proj_in.weight", "proj_out.weight")) else tensor
