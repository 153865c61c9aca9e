"""PASD under SDXL."""

import os
from collections.abc import Sequence
from typing import Self

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
from diffusers.pipelines.controlnet.pipeline_controlnet_sd_xl import StableDiffusionXLControlNetPipeline
from diffusers.schedulers import KarrasDiffusionSchedulers
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from . import prompts
from .base_pipeline import PixelAwarePipeline, check_parts
from .checkpoint.bases import check_sizes, open_base, scheduler_config
from .checkpoint.loading import load_pasd
from .networks.controlnet import PASDControlNetModel
from .networks.unet import PASDUNet2DConditionModel
from .sampling.denoiser import TextCondition
from .sampling.starting import Generators, draw, mix
from .settings import CELL, SDXL

PARTS = {
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
    "tokenizer": CLIPTokenizer,
    "tokenizer_2": CLIPTokenizer,
}
"""What comes from the base model."""


class PASDXLPipeline(PixelAwarePipeline, StableDiffusionXLLoraLoaderMixin):  # type: ignore[misc]
    """PASD under SDXL.

    Args:
        vae: of the base model.
        text_encoder: of the base model.
        text_encoder_2: of the base model.
        tokenizer: of the base model.
        tokenizer_2: of the base model.
        unet: with full pixel-aware cross-attention.
        controlnet: trained with it.
        scheduler: Euler in PASD's recipe.
    """

    defaults = SDXL
    quality = prompts.XL_QUALITY
    negative = prompts.XL_NEGATIVE
    replaced = prompts.XL_REPLACED
    _encode_prompt = StableDiffusionXLControlNetPipeline.encode_prompt
    _get_add_time_ids = StableDiffusionXLControlNetPipeline._get_add_time_ids

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        text_encoder_2: CLIPTextModelWithProjection,
        tokenizer: CLIPTokenizer,
        tokenizer_2: CLIPTokenizer,
        unet: PASDUNet2DConditionModel,
        controlnet: PASDControlNetModel,
        scheduler: KarrasDiffusionSchedulers,
    ) -> None:
        """Raises `ValueError` for parts that do not belong together."""
        super().__init__()
        check_parts(unet, controlnet, vae, text_encoder.config.hidden_size + text_encoder_2.config.hidden_size)
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            text_encoder_2=text_encoder_2,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            unet=unet,
            controlnet=controlnet,
            scheduler=scheduler,
        )
        self.image_processor = VaeImageProcessor(vae_scale_factor=CELL)

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: str | os.PathLike[str],
        base: str | os.PathLike[str],
        *,
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """From an official checkpoint, its scheduler included, and SDXL's folder or hub id."""
        networks = load_pasd(checkpoint, dtype=dtype)
        scheduler = EulerDiscreteScheduler.from_config(scheduler_config(networks.scheduler or base))
        parts = open_base(base, PARTS, dtype)
        check_sizes(parts, networks.unet, base)
        return cls(**parts, unet=networks.unet, controlnet=networks.controlnet, scheduler=scheduler)

    def encode_texts(
        self, texts: list[str], negatives: list[str], size: Sequence[int], *, guided: bool
    ) -> TextCondition:
        """Both CLIP models' states; the time ids name the size of the whole image, for tiles as well."""
        positive, negative, pooled, negative_pooled = self._encode_prompt(
            texts,
            device=self._execution_device,
            do_classifier_free_guidance=guided,
            negative_prompt=negatives,
        )
        sides = tuple(int(side) for side in size)
        width = self.text_encoder_2.config.projection_dim
        ids = self._get_add_time_ids(sides, (0, 0), sides, positive.dtype, text_encoder_projection_dim=width)
        embeds = torch.cat([negative, positive]) if guided else positive
        pooled = torch.cat([negative_pooled, pooled]) if guided else pooled
        added = {"text_embeds": pooled, "time_ids": ids.to(embeds.device).repeat(len(embeds), 1)}
        return TextCondition(embeds, added, guided)

    def add_start_noise(self, latents: Tensor, level: int, generator: Generators, official: bool) -> Tensor:
        """A share of 0.005 of the picture's latents; the released code has this start and does not call it."""
        return mix(latents, draw(latents, generator))
