"""The trained parts as a standard `FluxPipeline` folder."""

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxPipeline

from diffattn.tiny.components import build_scheduler, build_transformer
from diffattn.tiny.fit_flow import TinyFlow


def export_pipeline(work_dir: Path, folder: Path) -> FluxPipeline:
    """Write the averaged weights of `work_dir`/flow.pt and the VAE of `work_dir`/vae as a pipeline in `folder`.

    Transformer and VAE are stored in float16, which diffusers loads as float32; the text encoders are stored in
    float32, because transformers keeps the stored type.
    """
    flow = TinyFlow()
    state = torch.load(work_dir / "flow.pt")
    for parameter, averaged in zip(flow.parameters(), state["ema"], strict=True):
        parameter.data.copy_(averaged)
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
    fresh, stale = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    pipeline.save_pretrained(fresh)
    for file in fresh.rglob("*.safetensors"):
        file.chmod(0o644)
    forget_origin(fresh / "vae" / "config.json")
    if folder.exists():
        folder.rename(stale)
    fresh.rename(folder)
    shutil.rmtree(stale, ignore_errors=True)
    return FluxPipeline.from_pretrained(folder)


def forget_origin(config: Path) -> None:
    """Drop the path that a model was loaded from out of its saved configuration."""
    entries = json.loads(config.read_text())
    entries.pop("_name_or_path", None)
    config.write_text(json.dumps(entries, indent=2) + "\n")


def folder_size(folder: Path) -> int:
    """Bytes of all files under `folder`."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
