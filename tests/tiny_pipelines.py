"""Whole pipelines around the tiny models.

A builder makes the same pipeline, with the same weights, at every call. Sizes are such that the models see the grids of
`models`: 8 x 12 latents for the UNet, 3 x 4 x 5 tokens for the video models; Flux has 4 x 6.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import models
import torch
from compositions import VISIBLE, Composition
from hand_masks import RADIUS, TOLERANCE, Layouts, error, under_masks
from models import Tokens
from torch import Tensor, nn

import diffattn


@dataclass
class TinyPipeline:
    """A pipeline, the arguments of one call, and where the tokens of its models' self-attention lie."""

    pipe: Any
    call: dict[str, Any]
    layouts: dict[str, Layouts]
    """Name of a part -> layouts of its layers."""

    def __post_init__(self) -> None:
        self.pipe.set_progress_bar_config(disable=True)

    @property
    def models(self) -> list[nn.Module]:
        """The parts with attention to swap."""
        return [getattr(self.pipe, name) for name in self.layouts]

    @torch.no_grad()
    def run(self) -> Tensor:
        """The latents of one call, with the same noise every time."""
        generator = torch.Generator().manual_seed(0)
        output = self.pipe(**self.call, generator=generator, output_type="latent", return_dict=False)[0]
        return output.float().cpu().flatten()

    @property
    def pairs(self) -> tuple[tuple[nn.Module, Layouts], ...]:
        """The parts with attention to swap, and their layouts."""
        return tuple(zip(self.models, self.layouts.values(), strict=True))

    def check_swap(self, **options: Any) -> None:
        """The pipeline as it stands: a swap is right in two calls and undone to the last bit."""
        own, want = self.run(), under_masks(self.run, *self.pairs)
        assert error(want, own) > VISIBLE, "the mask changes nothing: the test proves nothing"
        with diffattn.apply(self.pipe, "clear", radius=RADIUS, **options) as handle:
            for _ in range(2):
                assert error(self.run(), want) < TOLERANCE
            assert all(layer.reached for layer in handle.layers)
        assert torch.equal(self.run(), own)

    def composition(self, on: Callable[[], Any], off: Callable[[], Any], **options: Any) -> Composition:
        """With a feature that is switched on and off; `options` as in `Composition`."""
        return Composition(target=self.pipe, run=self.run, layouts=self.pairs, on=on, off=off, **options)


def tiny_vae(**options: Any) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        **options,
    )


def flux_call(steps: int = 3) -> dict[str, Any]:
    return {
        "prompt_embeds": models.draw(1, models.TEXT, 12),
        "pooled_prompt_embeds": models.draw(1, 8),
        "height": 16,
        "width": 24,
        "num_inference_steps": steps,
    }


def flux(steps: int = 3, **config: Any) -> TinyPipeline:
    transformer = models.flux(**config).model
    vae = tiny_vae(latent_channels=1, shift_factor=0.0)
    pipe = diffusers.FluxPipeline(diffusers.FlowMatchEulerDiscreteScheduler(), vae, None, None, None, None, transformer)
    layer = r"(single_)?transformer_blocks\.\d+\.attn"
    return TinyPipeline(pipe, flux_call(steps), {"transformer": {layer: (Tokens(models.TEXT, 1, 4, 6),)}})


def wan(steps: int = 3, **parts: Any) -> TinyPipeline:
    """Guidance in two calls a step."""
    tiny = models.wan()
    vae = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    )
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    pipe = diffusers.WanPipeline(None, None, vae, scheduler, transformer=tiny.model, **parts)
    call = {
        "prompt_embeds": models.draw(1, models.TEXT, 8),
        "negative_prompt_embeds": torch.zeros(1, models.TEXT, 8),
        "height": 64,
        "width": 80,
        "num_frames": 9,
        "num_inference_steps": steps,
    }
    return TinyPipeline(pipe, call, {"transformer": tiny.spatial})


def sd15(steps: int = 3) -> TinyPipeline:
    """Guidance in one batch of two."""
    tiny = models.sd15()
    tiny.model.register_to_config(sample_size=64)
    pipe = diffusers.StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=None,
        tokenizer=None,
        unet=tiny.model,
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    call = {
        "prompt_embeds": models.draw(1, models.TEXT, 12),
        "negative_prompt_embeds": torch.zeros(1, models.TEXT, 12),
        "height": 16,
        "width": 24,
        "num_inference_steps": steps,
    }
    return TinyPipeline(pipe, call, {"unet": tiny.spatial})


def cogvideox(steps: int = 3) -> TinyPipeline:
    """Guidance in one batch of two."""
    tiny = models.cogvideox()
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(2, 2, 2, 2),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    pipe = diffusers.CogVideoXPipeline(None, None, vae, tiny.model, diffusers.DDIMScheduler())
    call = {
        "prompt_embeds": models.draw(1, models.TEXT, 12),
        "negative_prompt_embeds": torch.zeros(1, models.TEXT, 12),
        "height": 64,
        "width": 80,
        "num_frames": 9,
        "num_inference_steps": steps,
    }
    return TinyPipeline(pipe, call, {"transformer": tiny.spatial})


PIPELINES: dict[str, Callable[..., TinyPipeline]] = {"Flux": flux, "Wan": wan, "SD1.5": sd15, "CogVideoX": cogvideox}
