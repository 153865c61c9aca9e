"""Tiny pipelines in the place of those that the documents load from the hub, so that every code block can be run.

A stand-in is a real pipeline of the same class with the bundled text encoders and small random models. It takes the
sizes that the documents name, divided by `SHRINK`, and makes two steps; so does the bundled pipeline, at its own size.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import diffusers
import torch
from diffusers import DiffusionPipeline
from models import _make

import diffattn

SHRINK = 16
SHRINK_VIDEO = 3
"""Frames are few: a grid must have room for shares of its pairs."""
MULTIPLE = 16
"""What the sides of an image must divide by, in pixels."""
MOST_FRAMES = 9
STEPS = 2


def flux() -> Any:
    return DiffusionPipeline.from_pretrained(diffattn.tiny.path("flux"))


def stable_diffusion(**changes: Any) -> Any:
    text = flux()
    unet = _make(
        "UNet2DConditionModel",
        block_out_channels=(16, 32),
        norm_num_groups=8,
        layers_per_block=1,
        cross_attention_dim=text.text_encoder.config.hidden_size,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    parts = dict(vae=_picture_vae(), text_encoder=text.text_encoder, tokenizer=text.tokenizer, unet=unet)
    return diffusers.StableDiffusionPipeline(
        **parts,
        scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **changes,
    )


def animatediff(motion_adapter: Any = None) -> Any:
    base = stable_diffusion()
    adapter = motion_adapter or diffusers.MotionAdapter(
        block_out_channels=(16, 32),
        motion_layers_per_block=1,
        motion_norm_num_groups=8,
        motion_num_attention_heads=2,
        motion_max_seq_length=32,
    )
    return diffusers.AnimateDiffPipeline(
        vae=base.vae,
        text_encoder=base.text_encoder,
        tokenizer=base.tokenizer,
        unet=base.unet,
        motion_adapter=adapter,
        scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1, beta_schedule="linear"),
    )


def wan() -> Any:
    text = flux()
    transformer = _make(
        "WanTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=text.text_encoder_2.config.d_model,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    vae = diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    return diffusers.WanPipeline(text.tokenizer_2, text.text_encoder_2, vae, scheduler, transformer=transformer)


def ltx2_decoder() -> Any:
    decoder = diffusers.LTX2VideoDiffusionDecoderModel(
        latent_channels=4,
        patch_size=2,
        decoder_head_dim=8,
        decoder_stage_channels=(64, 32, 16, 16, 8),
        decoder_stage_depths=(1, 1, 1, 1, 1),
        decoder_stage_kernels=((3, 3, 3),) * 4,
        decoder_stage5_kernel=(3, 5, 5),
        decoder_t_emb_dim=16,
    )
    return diffusers.LTX2VideoDiffusionDecodePipeline(decoder, diffusers.FlowMatchEulerDiscreteScheduler())


def _picture_vae() -> Any:
    return _make(
        "AutoencoderKL",
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
    )


HUB: dict[str, Callable[..., Any]] = {
    "black-forest-labs/FLUX.1-dev": flux,
    "stable-diffusion-v1-5/stable-diffusion-v1-5": stable_diffusion,
    "emilianJR/epiCRealism": animatediff,
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": wan,
    "ltx-2.5-decoder": ltx2_decoder,
}


def shrunk(pipe: Any, shrink: int = SHRINK) -> Any:
    """The pipeline with a `__call__` that takes the documents' arguments and a `to` that stays on the CPU."""
    base = getattr(type(pipe), "unshrunk", type(pipe))  # one from another stand-in has been here before

    def call(self: Any, *args: Any, **options: Any) -> Any:
        taken = inspect.signature(base.__call__).parameters
        if "height" not in taken:
            return base.__call__(self, *args, **options)
        for side in {"height", "width"} & set(options):
            options[side] = max(options[side] // shrink // MULTIPLE, 1) * MULTIPLE
        for side in {"height", "width"} - set(options):
            options[side] = 64
        if "num_frames" in options:
            options["num_frames"] = min(options["num_frames"], MOST_FRAMES)
        if "max_sequence_length" in taken:
            options["max_sequence_length"] = 32
        return base.__call__(self, *args, **{**options, "num_inference_steps": STEPS})

    own = {"__call__": call, "to": lambda self, *args, **kwargs: self, "unshrunk": base}
    pipe.__class__ = type(base.__name__, (base,), own)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextmanager
def hub(files: dict[str, Path]) -> Iterator[None]:
    """Within it, `from_pretrained` and `diffattn.load` find the names of `HUB` and of `files` as if on the hub."""
    found = DiffusionPipeline.from_pretrained.__func__  # type: ignore[attr-defined]

    def from_pretrained(cls: Any, name: Any, torch_dtype: Any = None, **options: Any) -> Any:
        if name not in HUB:
            return shrunk(found(cls, name, torch_dtype=torch_dtype, **options), shrink=1)
        pipe = HUB[name](**{key: options[key] for key in {"motion_adapter"} & set(options)})
        assert isinstance(pipe, cls), f"{name} is a {type(pipe).__name__}"
        return shrunk(pipe, SHRINK_VIDEO if hasattr(pipe, "vae_scale_factor_temporal") else SHRINK)

    def adapter_file(repo: str, filename: str, **options: Any) -> str:
        return str(files[f"{repo}/{filename}"])

    made = DiffusionPipeline.from_pipe.__func__  # type: ignore[attr-defined]

    def from_pipe(cls: Any, pipe: Any, **options: Any) -> Any:
        return shrunk(made(cls, pipe, **options))

    with (
        patch.object(DiffusionPipeline, "from_pretrained", classmethod(from_pretrained)),
        patch.object(DiffusionPipeline, "from_pipe", classmethod(from_pipe)),
        patch("huggingface_hub.hf_hub_download", adapter_file),
        patch.object(torch.cuda, "max_memory_allocated", lambda *args: 0),
    ):
        yield
