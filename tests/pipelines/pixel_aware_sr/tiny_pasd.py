"""Tiny random PASD networks and pipelines, and their folders in the official layout."""

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import models
import torch
import transformers
from diffattn.pipelines.pixel_aware_sr import (
    PASDControlNetModel,
    PASDPipeline,
    PASDUNet2DConditionModel,
    PASDXLPipeline,
)
from PIL import Image

import diffattn

TEXT = 12
LEVELS: dict[str, Any] = {
    "block_out_channels": (8, 16, 24, 24),
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "cross_attention_dim": TEXT,
    "attention_head_dim": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
}
UNET: dict[str, Any] = {
    **LEVELS,
    "sample_size": 8,
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
CONTROLNET: dict[str, Any] = {**LEVELS, "conditioning_embedding_out_channels": (4, 6, 8, 12)}
XL_LEVELS: dict[str, Any] = {
    "block_out_channels": (8, 16, 24),
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "cross_attention_dim": 2 * TEXT,
    "attention_head_dim": (2, 4, 4),
    "transformer_layers_per_block": (1, 1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + TEXT,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
}
XL_UNET = {
    **XL_LEVELS,
    "sample_size": 8,
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}
XL_CONTROLNET = {**XL_LEVELS, "conditioning_embedding_out_channels": (4, 6, 8, 12)}
PNDM: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
STEPS: dict[str, Any] = {"num_inference_steps": 2, "process_size": 64}
"""What makes a call quick."""


def unet(seed: int = 1, **options: Any) -> PASDUNet2DConditionModel:
    torch.manual_seed(seed)
    return models.randomize(PASDUNet2DConditionModel(**{**UNET, **options})).eval()


def controlnet(seed: int = 2, **options: Any) -> PASDControlNetModel:
    torch.manual_seed(seed)
    return models.randomize(PASDControlNetModel(**{**CONTROLNET, **options})).eval()


def tokenizer() -> Any:
    return transformers.CLIPTokenizer.from_pretrained(diffattn.tiny.path("flux") / "tokenizer")


def text_encoder(words: Any, cls: type = transformers.CLIPTextModel) -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=TEXT,
        intermediate_size=16,
        projection_dim=TEXT,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=words.model_max_length,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    return models.randomize(cls(config)).eval()


def vae(**options: Any) -> Any:
    """With the official factor of 8 between pixels and latents."""
    settings: dict[str, Any] = {
        "block_out_channels": (4, 4, 4, 4),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "norm_num_groups": 2,
        "sample_size": 64,
    }
    return models.randomize(diffusers.AutoencoderKL(**settings, **options)).eval()


def pipeline(variant: str = "full", **parts: Any) -> PASDPipeline:
    torch.manual_seed(0)
    words = tokenizer()
    made: dict[str, Any] = {
        "vae": vae(),
        "text_encoder": text_encoder(words),
        "tokenizer": words,
        "unet": unet(pixel_attention=variant),
        "controlnet": controlnet(),
        "scheduler": diffusers.UniPCMultistepScheduler.from_config(PNDM),
    }
    pipe = PASDPipeline(**{**made, **parts})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def xl_pipeline(**parts: Any) -> PASDXLPipeline:
    torch.manual_seed(0)
    words = tokenizer()
    made: dict[str, Any] = {
        "vae": vae(force_upcast=True),
        "text_encoder": text_encoder(words),
        "text_encoder_2": text_encoder(words, transformers.CLIPTextModelWithProjection),
        "tokenizer": words,
        "tokenizer_2": words,
        "unet": models.randomize(PASDUNet2DConditionModel(**XL_UNET)).eval(),
        "controlnet": models.randomize(PASDControlNetModel(**XL_CONTROLNET)).eval(),
        "scheduler": diffusers.EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
    }
    pipe = PASDXLPipeline(**{**made, **parts})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def write_base(folder: Path, seed: int = 5) -> Path:
    """A tiny Stable Diffusion 1.5, with another U-Net than PASD's for every seed."""
    torch.manual_seed(seed)
    words = tokenizer()
    diffusers.StableDiffusionPipeline(
        vae=vae(),
        text_encoder=text_encoder(words),
        tokenizer=words,
        unet=models.randomize(diffusers.UNet2DConditionModel(**UNET)),
        scheduler=diffusers.PNDMScheduler(**PNDM),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def write_checkpoint(folder: Path, variant: str = "full", rrdb: bool = False) -> Path:
    """As released: stock class names, no word of the variant, and a key that no network reads."""
    networks = {"unet": unet(pixel_attention=variant), "controlnet": controlnet(use_rrdb=rrdb)}
    for name, network in networks.items():
        network.save_pretrained(folder / name)
        file = folder / name / "config.json"
        config = json.loads(file.read_text())
        config["_class_name"] = config["_class_name"].removeprefix("PASD")
        for key in ("pixel_attention", "use_rrdb", "return_rgbs"):
            config.pop(key, None)
        file.write_text(json.dumps(config | {"use_sd3_vae": False}))
    return folder


def picture(width: int = 40, height: int = 24, seed: int = 0) -> Image.Image:
    """Smooth colours, never two columns alike."""
    random = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(random[None], (height, width), mode="bicubic").clamp(0, 1)[0]
    return Image.fromarray((255 * smooth).byte().permute(1, 2, 0).numpy())


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))
