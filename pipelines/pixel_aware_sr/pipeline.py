"""PASD on diffusers: restore, enlarge, stylize or colorize images under a pixel-aware ControlNet.

    pipe = PASDPipeline.from_checkpoint("pasd/checkpoint-100000", base="stable-diffusion-v1-5/stable-diffusion-v1-5")
    image = pipe(Image.open("small.jpg"), "a harbour", upscale=4).images[0]

Source: Yang et al., Pixel-Aware Stable Diffusion, https://arxiv.org/abs/2308.14469; docs/super-resolution.md lists
what differs from the released code.
"""

import os
from collections.abc import Sequence
from typing import Self

import torch
from diffusers import AutoencoderKL, UniPCMultistepScheduler
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.pipelines.controlnet.pipeline_controlnet import StableDiffusionControlNetPipeline
from diffusers.schedulers import KarrasDiffusionSchedulers
from transformers import CLIPTextModel, CLIPTokenizer

from . import prompts
from .base_pipeline import PixelAwarePipeline, check_parts
from .checkpoint.bases import check_sizes, open_base, open_style, restyle, scheduler_config
from .checkpoint.loading import load_pasd
from .networks.controlnet import PASDControlNetModel
from .networks.unet import PASDUNet2DConditionModel
from .sampling.denoiser import TextCondition
from .settings import CELL, SD15

PARTS = {"vae": AutoencoderKL, "text_encoder": CLIPTextModel, "tokenizer": CLIPTokenizer}
"""What comes from the base model."""


class PASDPipeline(PixelAwarePipeline, StableDiffusionLoraLoaderMixin):  # type: ignore[misc]
    """PASD under Stable Diffusion 1.5, or under any model of its sizes: a personalised one stylizes.

    Args:
        vae: of the base model.
        text_encoder: of the base model.
        tokenizer: of the base model.
        unet: with pixel-aware cross-attention, full or light.
        controlnet: trained with it.
        scheduler: UniPC in PASD's recipe.
    """

    defaults = SD15
    quality = prompts.QUALITY
    negative = prompts.NEGATIVE
    _encode_prompt = StableDiffusionControlNetPipeline.encode_prompt

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: PASDUNet2DConditionModel,
        controlnet: PASDControlNetModel,
        scheduler: KarrasDiffusionSchedulers,
    ) -> None:
        """Raises `ValueError` for parts that do not belong together."""
        super().__init__()
        check_parts(unet, controlnet, vae, text_encoder.config.hidden_size)
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
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
        stylize: str | os.PathLike[str] | None = None,
        style_weight: float = 1.0,
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """From an official checkpoint.

        Args:
            checkpoint: folder with `unet` and `controlnet`, see `load_pasd`.
            base: folder or hub id of the model that it was trained on, Stable Diffusion 1.5.
            stylize: folder, hub id or single file of another model of its kind, whose U-Net, VAE and text encoder come
                in place of the base's.
            style_weight: share of that model in the U-Net's weights; the rest stays with the base.
            dtype: of all networks.
        """
        networks = load_pasd(checkpoint, dtype=dtype)
        parts = open_base(base, PARTS, dtype)
        unet = networks.unet
        check_sizes(parts, unet, base)
        if stylize is not None:
            style = open_style(stylize, base, PARTS, dtype)
            unet = restyle(unet, style.pop("unet"), style_weight)
            parts |= style
            check_sizes(parts, unet, stylize)
        scheduler = UniPCMultistepScheduler.from_config(scheduler_config(networks.scheduler or base))
        return cls(**parts, unet=unet, controlnet=networks.controlnet, scheduler=scheduler)

    def encode_texts(
        self, texts: list[str], negatives: list[str], size: Sequence[int], *, guided: bool
    ) -> TextCondition:
        """CLIP's last hidden states."""
        positive, negative = self._encode_prompt(
            texts, self._execution_device, 1, guided, negative_prompt=negatives if guided else None
        )
        embeds = torch.cat([negative, positive]) if guided else positive
        return TextCondition(embeds, guided=guided)
