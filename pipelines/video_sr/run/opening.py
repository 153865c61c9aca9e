"""A converted checkpoint in a folder: what its configurations say before it is opened, and its networks whole."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLTemporalDecoder
from safetensors import safe_open

from diffattn.files.weights import check_keys, read_weights

from ..cogvideox.pipeline import CogVideoXSTARPipeline
from ..i2vgenxl.checkpoint.convert import load_networks
from ..i2vgenxl.networks.components import STARSizes
from ..i2vgenxl.networks.controlnet import STARControlNetModel
from ..i2vgenxl.networks.unet import STARUNet3DConditionModel
from ..i2vgenxl.pipeline import STARPipeline
from ..i2vgenxl.scheduler import STARScheduler

NETWORKS = {
    "unet": STARUNet3DConditionModel,
    "controlnet": STARControlNetModel,
    "vae": AutoencoderKLTemporalDecoder,
}
WEIGHTED = (*NETWORKS, "text_encoder")
"""Parts with weights."""


def check_checkpoint(folder: Path) -> None:
    """Raise `ValueError` for a folder that is not of `STARPipeline`."""
    try:
        kind = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"expected a folder from `convert` as the checkpoint; got {folder}: {error}; convert the official file "
            "first"
        ) from error
    if kind == CogVideoXSTARPipeline.__name__:
        raise ValueError(
            f"expected a checkpoint of STAR's I2VGen-XL variant; got one of the CogVideoX variant in {folder}; open it "
            "from Python, with diffattn.pipelines.video_sr.CogVideoXSTARPipeline.from_pretrained"
        )
    if kind != STARPipeline.__name__:
        raise ValueError(
            f"expected a checkpoint of {STARPipeline.__name__} in {folder}; got one of {kind}; name another folder"
        )


def count_steps(folder: Path, num_inference_steps: int) -> int:
    """Evaluations of the networks that the checkpoint's scheduler makes."""
    scheduler = _opened(folder, "scheduler", STARScheduler)
    scheduler.set_timesteps(num_inference_steps)
    return len(scheduler.timesteps)


def untrained(folder: Path, name: str) -> Any:
    """One of `NETWORKS` by its configuration, with no weights read."""
    cls: Any = NETWORKS[name]
    try:
        return cls.from_config(cls.load_config(folder / name)).eval()
    except (OSError, ValueError, TypeError) as error:
        raise _broken(folder, error) from error


def count_weights(folder: Path, name: str) -> int:
    """Numbers in the safetensors files of a part, by their heads."""
    files = sorted((folder / name).glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"expected safetensors files in {folder / name}; got none; convert the official file, or save the pipeline "
            "anew"
        )
    total = 0
    for file in files:
        with safe_open(file, framework="pt") as weights:
            total += sum(math.prod(weights.get_slice(key).get_shape()) for key in weights.keys())  # noqa: SIM118
    return total


def open_network(folder: Path, name: str, dtype: torch.dtype) -> Any:
    """One of `NETWORKS` with all of its weights, on the CPU."""
    network = _opened(folder, name, NETWORKS[name], dtype=dtype, use_safetensors=True)
    check_keys(network.state_dict().keys() - read_weights(folder / name).keys(), (), folder / name)
    return network


def open_networks(checkpoint: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """U-Net and control branch from a converted folder, or from the official file, on the CPU.

    Raises `ValueError` for what is neither, and for the CogVideoX variant.
    """
    if checkpoint.is_file():
        made = load_networks(read_weights(checkpoint), checkpoint, STARSizes(), dtype=dtype)
        return made["unet"], made["controlnet"]
    check_checkpoint(checkpoint)
    return open_network(checkpoint, "unet", dtype), open_network(checkpoint, "controlnet", dtype)


def open_pipeline(folder: Path, device: torch.device, dtype: torch.dtype, *, offload: bool = False) -> STARPipeline:
    """The pipeline on its device; `offload` leaves parts on the CPU until they are needed.

    Raises `ValueError` where a part or a weight is missing, which diffusers would make up.
    """
    try:
        pipe = STARPipeline.from_pretrained(folder, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise _broken(folder, error) from error
    for name in NETWORKS:
        check_keys(getattr(pipe, name).state_dict().keys() - read_weights(folder / name).keys(), (), folder / name)
    text = read_weights(folder / "text_encoder" / "model.safetensors")
    check_keys(pipe.text_encoder.state_dict().keys() - text.keys(), (), folder / "text_encoder")
    if offload:
        pipe.enable_model_cpu_offload(device=device)
        return pipe
    return pipe.to(device)


def _opened(folder: Path, name: str, cls: Any, **options: Any) -> Any:
    try:
        return cls.from_pretrained(folder / name, **options)
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise _broken(folder, error) from error


def _broken(folder: Path, error: Exception) -> ValueError:
    return ValueError(f"cannot open {folder}: {error}; convert the official file anew")
