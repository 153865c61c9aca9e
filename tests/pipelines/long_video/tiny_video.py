"""A tiny random text-to-video pipeline, as a folder; and the command in processes of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import models
import torch
import transformers
from diffattn.pipelines.long_video import FpsUNet3D, LongVideoConfig, PromptRange
from safetensors.torch import load_file, save_file
from tiny_pipelines import tiny_vae

import diffattn
from diffattn.parallel import FramePlan

ROOT = Path(__file__).resolve().parents[3]
SIZE = 16
UNET: dict[str, Any] = {
    **models._UNET,
    **models._two_levels("CrossAttnDownBlock3D", "CrossAttnUpBlock3D"),
    "attention_head_dim": 8,
}


def write_pipeline(folder: Path) -> Path:
    """Random, but for the VAE's size that of any text-to-video pipeline."""
    words = transformers.AutoTokenizer.from_pretrained(diffattn.tiny.path("flux") / "tokenizer")
    text = transformers.CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=12,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=words.model_max_length,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    torch.manual_seed(1)
    pipe = diffusers.TextToVideoSDPipeline(
        vae=models.randomize(tiny_vae(latent_channels=4)),
        text_encoder=models.randomize(transformers.CLIPTextModel(text)),
        tokenizer=words,
        unet=models.randomize(diffusers.UNet3DConditionModel(**UNET)),
        scheduler=diffusers.DDIMScheduler(clip_sample=False),
    )
    pipe.save_pretrained(folder)
    return folder


def write_fps_unet(folder: Path) -> FpsUNet3D:
    """A UNet as VideoCrafter2's is stored: two modules more, and a class name that diffusers does not know."""
    torch.manual_seed(2)
    unet = models.randomize(FpsUNet3D(**UNET))
    unet.save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "_class_name": "UNetVideoCrafter", "fps_cond": True}))
    return unet


def drop_weight(folder: Path, name: str, instead: str | None = None) -> None:
    """Take a weight out of a stored model, or give it another name."""
    file = folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weight = weights.pop(name)
    save_file({**weights, **({} if instead is None else {instead: weight})}, file)


def config(frames: int = 7, **changes: Any) -> LongVideoConfig:
    first = PromptRange(0, 3, "a red circle")
    values: dict[str, Any] = {
        "prompts": (first, PromptRange(3, frames, "a blue square")),
        "frames": frames,
        "height": SIZE,
        "width": SIZE,
        "steps": 4,
        "guidance": 3.0,
        "padding": 2,
        "top_k": 3,
        "blend": 2,
        "seed": 5,
    }
    return LongVideoConfig(**{**values, **changes})


def command(*arguments: Any, ranks: int = 1) -> tuple[list[str], dict[str, str]]:
    """The command line and its environment."""
    start = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", "0"]
    start += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    module = ["-m", "diffattn.pipelines.long_video", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return [sys.executable, *(start if ranks > 1 else []), *module], environment


def call(*arguments: Any, ranks: int = 1) -> "subprocess.CompletedProcess[str]":
    line, environment = command(*arguments, ranks=ranks)
    return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300, check=False)


def alone(frames: int) -> FramePlan:
    return FramePlan((frames,))


def write_prompts(path: Path, frames: int) -> Path:
    """The prompts of `config` as a file."""
    path.write_text(json.dumps(config(frames).to_dict()["prompts"]))
    return path


def stored_config(checkpoint: Path) -> dict[str, Any]:
    """The config that a checkpoint was written with."""
    values: dict[str, Any] = json.loads((checkpoint / "manifest.json").read_text())["config"]
    return values
