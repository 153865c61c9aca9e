"""Tiny random X-Portrait networks and pipelines, and their checkpoint in the official layout."""

from pathlib import Path
from typing import Any

import models
import torch
from diffattn.pipelines.portrait_animation import Sizes, XPortraitPipeline
from diffattn.pipelines.portrait_animation.checkpoint.convert import official_names
from diffattn.pipelines.portrait_animation.networks.components import (
    build_networks,
    build_text_encoder,
    official_scheduler,
)
from PIL import Image
from torch import Tensor

SIZES = Sizes(
    channels=(32, 32, 32, 64),
    heads=2,
    text_tokens=3,
    text_width=8,
    text_layers=1,
    text_heads=2,
    vocabulary=11,
    latent_side=16,
    vae_channels=(32, 32, 32, 32),
    vae_layers=1,
)


def networks(seed: int = 1) -> dict[str, Any]:
    torch.manual_seed(seed)
    return {name: models.randomize(network).eval() for name, network in build_networks(SIZES).items()}


def pipeline(**parts: Any) -> XPortraitPipeline:
    made = {**networks(), "scheduler": official_scheduler(), **parts}
    pipe = XPortraitPipeline(**made)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def double(pipe: XPortraitPipeline) -> XPortraitPipeline:
    """Random networks magnify rounding."""
    for part in (pipe.unet, pipe.reference_unet, pipe.controlnet, pipe.vae, pipe.null_text):
        part.double()
    return pipe


def text_encoder(seed: int = 2) -> Any:
    torch.manual_seed(seed)
    return models.randomize(build_text_encoder(SIZES)).eval()


def official_weights(made: dict[str, Any], text: Any) -> dict[str, Tensor]:
    """As released: with 1 x 1 convolutions in the VAE's attention, and with weights that no network reads."""
    weights, states = {}, {name: network.state_dict() for name, network in (*made.items(), ("text_encoder", text))}
    for name, place in official_names({**made, "text_encoder": text}).items():
        tensor = states[place.network][place.key]
        convolution = ".mid.attn_1." in name and name.endswith("weight") and tensor.ndim == 2
        weights[name] = tensor[..., None, None].clone() if convolution else tensor.clone()
        if name.endswith("attention_blocks.0.pos_encoder.pe"):
            weights[name.replace("attention_blocks.0", "attention_blocks.1")] = tensor.clone()
    for unused in ("betas", "logvar", "sqrt_recipm1_alphas_cumprod", "posterior_mean_coef1"):
        weights[unused] = torch.zeros(1000)
    weights["appearance_control_model.input_hint_block.0.weight"] = torch.zeros(16, 3, 3, 3)
    weights["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(3)[None]
    return weights


def write_official(file: Path, weights: dict[str, Tensor]) -> Path:
    torch.save({"state_dict": weights}, file)
    return file


def pictures(count: int, width: int = 40, height: int = 24, seed: int = 0) -> list[Image.Image]:
    """Smooth colours, no two alike."""
    random = torch.rand(count, 3, 4, 5, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(random, (height, width), mode="bicubic").clamp(0, 1)
    return [Image.fromarray((255 * one).byte().permute(1, 2, 0).numpy()) for one in smooth]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def run(pipe: XPortraitPipeline, frames: int = 3, **options: Any) -> Any:
    """One video; two steps, the second of which continues the first."""
    given: dict[str, Any] = {
        "image": pictures(1),
        "driving": pictures(frames, seed=1),
        "local": pictures(frames, seed=2),
        "height": 64,
        "width": 128,
        "num_inference_steps": 2,
        "generator": generator(),
        **options,
    }
    return pipe(**given).frames[0]
