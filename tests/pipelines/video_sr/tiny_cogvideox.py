"""STAR's CogVideoX variant with tiny networks, its weights in the official layout, and clips."""

from typing import Any

import torch
from diffattn.pipelines.video_sr.cogvideox.convert import PREFIX, CogVideoXSizes, official_shapes
from diffattn.pipelines.video_sr.cogvideox.names import official_place
from diffattn.pipelines.video_sr.cogvideox.pipeline import CogVideoXSTARPipeline
from diffattn.pipelines.video_sr.cogvideox.scheduler import STARCogVideoXScheduler
from diffattn.pipelines.video_sr.cogvideox.transformer import STARCogVideoXTransformer3DModel
from diffusers import AutoencoderKLCogVideoX
from golden_vectors import GoldenCase
from text_pipelines import t5, tokenizer
from torch import Tensor

TEXT_WIDTH = 12
SIZES = CogVideoXSizes(
    layers=2,
    heads=2,
    head_width=16,
    text_width=TEXT_WIDTH,
    text_tokens=5,
    time_width=8,
    latent_channels=4,
    latent_height=4,
    latent_width=6,
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def transformer(seed: int = 0, **changes: Any) -> STARCogVideoXTransformer3DModel:
    """Random weights; those of the gates have deviation 1, so that leaving them out shows."""
    model = STARCogVideoXTransformer3DModel(**{**SIZES.transformer(), **changes}).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "_local." in name:
            parameter.data = noise
        elif parameter.ndim > 1:
            parameter.data = noise / parameter[0].numel() ** 0.5
        else:
            parameter.data = ("norm" in name and name.endswith("weight")) + 0.1 * noise
    return model


def vae(seed: int = 0) -> AutoencoderKLCogVideoX:
    """8 x 8 pixels to a cell, 4 frames to one, as the real one."""
    torch.manual_seed(seed)
    return AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(2, 2, 2, 2),
        latent_channels=SIZES.latent_channels,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
        sample_height=32,
        sample_width=48,
        scaling_factor=0.7,
    ).eval()


def pipeline() -> CogVideoXSTARPipeline:
    pipe = CogVideoXSTARPipeline(vae(), t5(TEXT_WIDTH).eval(), tokenizer("t5"), transformer(), STARCogVideoXScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def clip(frames: int, height: int = 12, width: int = 20, seed: int = 0) -> Tensor:
    """(frames, 3, height, width) in 0..1."""
    return torch.rand(frames, 3, height, width, generator=torch.Generator().manual_seed(seed))


def official_weights(
    model: STARCogVideoXTransformer3DModel, rank: int | None = 3, *, lora: float = 0.1, prefix: str = PREFIX
) -> dict[str, Tensor]:
    """The weights in the official layout, buffers included, LoRA pairs of deviation `lora` split off.

    None as the rank: nothing is split off, the layers have their plain names.
    """
    generator = torch.Generator().manual_seed(1)
    official: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = {}
    for key, tensor in model.state_dict().items():
        name, _, chunks = official_place(key)
        pieces = tensor.chunk(len(chunks))
        parts.setdefault(name, {}).update(zip(chunks, pieces, strict=True))
    plain = {name: torch.cat([found[i] for i in sorted(found)]) for name, found in parts.items()}
    for name, shape in official_shapes(model, rank).items():
        if ".matrix_" in name:
            official[name] = lora * torch.randn(shape, generator=generator)
        else:
            official[name] = plain[name.replace(".original.", ".")].clone()
    for name in [name for name in official if ".original.weight" in name]:
        layer = name.removesuffix(".original.weight")
        for j, share in enumerate(official[name].split(SIZES.heads * SIZES.head_width)):
            up, down = official[f"{layer}.matrix_B.{j}"], official[f"{layer}.matrix_A.{j}"]
            share -= up @ down / rank
    official["mixins.pos_embed.freqs_sin"] = torch.zeros(18, 16)
    official["mixins.pos_embed.freqs_cos"] = torch.ones(18, 16)
    official["transformer.position_embeddings.weight"] = torch.zeros(64, 32)
    return {prefix + name: tensor for name, tensor in official.items()}


def sizes_of(case: GoldenCase) -> CogVideoXSizes:
    """Sizes of a golden case's network, by its configuration."""
    config = case.config
    return CogVideoXSizes(
        layers=config["num_layers"],
        heads=config["heads"],
        head_width=config["head_dim"],
        text_width=config["text_hidden"],
        text_tokens=config["text_length"],
        time_width=config["time_embed_dim"],
        latent_channels=config["in_channels"],
        latent_height=config["latent_h"],
        latent_width=config["latent_w"],
    )
