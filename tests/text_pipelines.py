"""Whole pipelines of the families around the tiny models, with random text encoders: from a caption to an image.

Tokenizers are those of the bundled pipeline; the widths are those of `models`. Images of `SIZE` suit all of them.
"""

import warnings
from collections.abc import Callable
from typing import Any

import diffusers
import models
import torch
import transformers
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny_pipelines import tiny_vae

import diffattn

SIZE = (32, 48)


def tokenizer(kind: str) -> Any:
    folder = diffattn.tiny.path("flux") / {"clip": "tokenizer", "t5": "tokenizer_2"}[kind]
    return transformers.AutoTokenizer.from_pretrained(folder)


def clip(width: int, projection: int | None = None) -> Any:
    """A CLIP text encoder; with `projection` it gives a pooled vector of that width."""
    words = tokenizer("clip")
    config = transformers.CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=words.model_max_length,
        projection_dim=projection or 8,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    kind = transformers.CLIPTextModel if projection is None else transformers.CLIPTextModelWithProjection
    torch.manual_seed(1)
    return models.randomize(kind(config))


def t5(width: int, kind: str = "T5") -> Any:
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(tokenizer("t5")), d_model=width, d_kv=4, d_ff=16, num_layers=1, num_heads=2
    )
    torch.manual_seed(2)
    return models.randomize(getattr(transformers, f"{kind}EncoderModel")(config))


def sd3() -> Any:
    return diffusers.StableDiffusion3Pipeline(
        transformer=models.sd3().model,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=models.randomize(tiny_vae(shift_factor=0.3, scaling_factor=1.5)),
        text_encoder=clip(6, 4),
        tokenizer=tokenizer("clip"),
        text_encoder_2=clip(6, 4),
        tokenizer_2=tokenizer("clip"),
        text_encoder_3=t5(12),
        tokenizer_3=tokenizer("t5"),
    )


def wan() -> Any:
    vae = diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.0, 2.0, 0.5, 1.5],
    )
    return diffusers.WanPipeline(
        tokenizer("t5"),
        t5(8, "UMT5"),
        models.randomize(vae),
        FlowMatchEulerDiscreteScheduler(),
        transformer=models.wan().model,
    )


def wan22() -> Any:
    """Two models, the second below three quarters of the noise, and the solver of Wan's checkpoints."""
    one, low = wan(), models.wan().model
    with torch.no_grad():
        for parameter in low.parameters():
            parameter.mul_(0.9)
    solver = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return diffusers.WanPipeline(
        one.tokenizer, one.text_encoder, one.vae, solver, one.transformer, low, boundary_ratio=0.75
    )


def cogvideox(model: Any = None) -> Any:
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(2, 2, 2, 2),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    return diffusers.CogVideoXPipeline(
        tokenizer("t5"),
        t5(12),
        models.randomize(vae),
        models.cogvideox().model if model is None else model,
        diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction"),
    )


def cogvideox15() -> Any:
    """Patches of two latent frames."""
    return cogvideox(models.cogvideox15().model)


def pixart() -> Any:
    """PixArt-Sigma's; Alpha's, which is told the size of the image, is `pixart_alpha`."""
    return diffusers.PixArtSigmaPipeline(
        tokenizer("t5"), t5(12), models.randomize(tiny_vae()), models.pixart().model, diffusers.DDIMScheduler()
    )


def pixart_alpha() -> Any:
    # Its size embedding cuts the width in three.
    changes = {
        "use_additional_conditions": None,
        "sample_size": 128,
        "num_attention_heads": 3,
        "cross_attention_dim": 24,
    }
    model = models._make("PixArtTransformer2DModel", **{**models.pixart().model.config, **changes})
    return diffusers.PixArtAlphaPipeline(
        tokenizer("t5"), t5(12), models.randomize(tiny_vae()), model, diffusers.DDIMScheduler()
    )


def sd15() -> Any:
    return diffusers.StableDiffusionPipeline(
        vae=models.randomize(tiny_vae()),
        text_encoder=clip(12),
        tokenizer=tokenizer("clip"),
        unet=models.sd15().model,
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl() -> Any:
    return diffusers.StableDiffusionXLPipeline(
        vae=models.randomize(tiny_vae(force_upcast=False)),
        text_encoder=clip(6),
        tokenizer=tokenizer("clip"),
        text_encoder_2=clip(6, 8),
        tokenizer_2=tokenizer("clip"),
        unet=models.sdxl().model,
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        add_watermarker=False,
    )


def _made(build: Callable[[], Any]) -> Callable[[], Any]:
    def make() -> Any:
        with warnings.catch_warnings():
            # diffusers' own deprecations, of the smallest UNets among others
            warnings.simplefilter("ignore", FutureWarning)
            pipe = build()
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


PIPELINES: dict[str, Callable[[], Any]] = {
    "SD3": _made(sd3),
    "Wan": _made(wan),
    "CogVideoX": _made(cogvideox),
    "CogVideoX-1.5": _made(cogvideox15),
    "PixArt": _made(pixart),
    "PixArt-Alpha": _made(pixart_alpha),
    "SD1.5": _made(sd15),
    "SDXL": _made(sdxl),
}
"""Families whose cache is not CLEAR's."""

CALL: dict[str, dict[str, Any]] = {
    "Wan": {"num_frames": 1, "max_sequence_length": 12},
    "CogVideoX": {"num_frames": 1, "max_sequence_length": models.TEXT},
    "CogVideoX-1.5": {"num_frames": 1, "max_sequence_length": models.TEXT},
    "PixArt": {"use_resolution_binning": False, "max_sequence_length": 9},
    "PixArt-Alpha": {"use_resolution_binning": False, "max_sequence_length": 9},
    "SD3": {"max_sequence_length": 11},
}
"""Arguments of a call beside those that all take."""
