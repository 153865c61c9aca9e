"""The trained parts as standard pipeline folders."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLWan, FluxPipeline, TextToVideoSDPipeline, WanPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from tiny_training.components import build_scheduler, build_transformer, build_unet, build_video_scheduler
from tiny_training.fit import load_averaged
from tiny_training.fit_flow import TinyFlow
from tiny_training.fit_video import TinyVideo
from tiny_training.fit_wan import TinyWan
from tiny_training.wan_parts import build_wan_scheduler


def export_pipeline(work_dir: Path, folder: Path) -> FluxPipeline:
    """Write the averaged weights of `work_dir`/flow.pt and the VAE of `work_dir`/vae as a pipeline in `folder`.

    Transformer and VAE are stored in float16, which diffusers loads as float32; the text encoders are stored in
    float32, because transformers keeps the stored type.
    """
    flow = TinyFlow()
    load_averaged(flow, work_dir / "flow.pt")
    transformer = build_transformer()
    transformer.load_state_dict(flow.transformer.state_dict())
    pipeline = FluxPipeline(
        scheduler=build_scheduler(),
        vae=AutoencoderKL.from_pretrained(work_dir / "vae").half(),
        text_encoder=flow.text.clip,
        tokenizer=flow.text.tokenizer,
        text_encoder_2=flow.text.t5,
        tokenizer_2=flow.text.tokenizer_2,
        transformer=transformer.half(),
    )
    replace_folder(pipeline, folder)
    return FluxPipeline.from_pretrained(folder)


def export_video_pipeline(work_dir: Path, folder: Path) -> TextToVideoSDPipeline:
    """Write the averaged weights of `work_dir`/video.pt and the VAE of `work_dir`/vae as a pipeline in `folder`.

    U-Net and VAE are stored in float16, as those of the image pipeline are.
    """
    video = TinyVideo()
    load_averaged(video, work_dir / "video.pt")
    unet = build_unet()
    unet.load_state_dict(video.unet.state_dict())
    vae = AutoencoderKL.from_pretrained(work_dir / "vae")
    fold_shift(vae)
    pipeline = TextToVideoSDPipeline(
        vae=vae.half(),
        text_encoder=video.clip,
        tokenizer=video.tokenizer,
        unet=unet.half(),
        scheduler=build_video_scheduler(),
    )
    replace_folder(pipeline, folder)
    return TextToVideoSDPipeline.from_pretrained(folder)


def export_wan_pipeline(work_dir: Path, folder: Path) -> WanPipeline:
    """Write the averaged weights of `work_dir`/wan.pt and the VAE of `work_dir`/vae as a pipeline in `folder`.

    Transformer and VAE are stored in float16, as those of the image pipeline are.
    """
    wan = TinyWan()
    load_averaged(wan, work_dir / "wan.pt")
    pipeline = WanPipeline(
        tokenizer=wan.tokenizer,
        text_encoder=wan.text,
        vae=AutoencoderKLWan.from_pretrained(work_dir / "vae").half(),
        scheduler=build_wan_scheduler(),
        transformer=wan.transformer.half(),
    )
    replace_folder(pipeline, folder)
    return WanPipeline.from_pretrained(folder)


@torch.no_grad()
def fold_shift(vae: AutoencoderKL) -> None:
    """Make latents of mean zero by the weights themselves, for pipelines that know a scale but no shift.

    encode gives z - shift: from the bias of the encoder's last layer. decode takes z - shift: its first layer sees
    latents padded by zeros, so the shift goes to the bias of an added 1 x 1 layer before it.
    """
    shift = vae.config.shift_factor
    if not shift:
        return
    channels = vae.config.latent_channels
    vae.encoder.conv_out.bias[:channels] -= shift
    vae.post_quant_conv = torch.nn.Conv2d(channels, channels, 1)
    vae.post_quant_conv.weight.copy_(torch.eye(channels)[:, :, None, None])
    vae.post_quant_conv.bias.fill_(shift)
    vae.register_to_config(shift_factor=None, use_post_quant_conv=True)


def replace_folder(pipeline: Any, folder: Path) -> None:
    """Save the pipeline as `folder`, of which a former one stays whole until then.

    Raises `ValueError` where something else than a pipeline is there.
    """
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise ValueError(f"expected a new folder, or one of a pipeline; {folder} is neither; give another name")
    fresh, stale = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    pipeline.save_pretrained(fresh)
    for file in fresh.rglob("*.safetensors"):
        file.chmod(0o644)
    if isinstance(pipeline.text_encoder, CLIPTextModel):
        name_as_the_hub_does(fresh / "text_encoder" / "model.safetensors")
    forget_origin(fresh / "vae" / "config.json")
    if folder.exists():
        folder.rename(stale)
    fresh.rename(folder)
    shutil.rmtree(stale, ignore_errors=True)


def name_as_the_hub_does(file: Path) -> None:
    """Put `text_model.` before the names of CLIP's weights.

    Every release of transformers reads these names; later ones save them without, and the first releases of version 5
    then leave all weights random and go on.
    """
    weights = {f"text_model.{name.removeprefix('text_model.')}": weight for name, weight in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})


def forget_origin(config: Path) -> None:
    """Drop the path that a model was loaded from out of its saved configuration."""
    entries = json.loads(config.read_text())
    entries.pop("_name_or_path", None)
    config.write_text(json.dumps(entries, indent=2) + "\n")


def folder_size(folder: Path) -> int:
    """Bytes of all files under `folder`."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
