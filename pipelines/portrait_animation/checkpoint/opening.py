"""A converted checkpoint in a folder: its numbers before it is opened, and the pipeline with all of its weights."""

import json
from pathlib import Path
from typing import Any

import torch

from diffattn.files.weights import check_keys, read_weights

from ..pipeline import XPortraitPipeline


def unet_number(checkpoint: Path, name: str) -> int:
    """A number of the U-Net's configuration; raises `ValueError` for a folder that is not X-Portrait's."""
    try:
        kind = json.loads((checkpoint / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
        number = json.loads((checkpoint / "unet" / "config.json").read_text(encoding="utf-8"))[name]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"expected a folder from `convert` for --checkpoint; got {checkpoint}: {error}; convert the official file "
            "first"
        ) from error
    if kind != XPortraitPipeline.__name__:
        raise ValueError(f"expected a checkpoint of {XPortraitPipeline.__name__} in {checkpoint}; got {kind}")
    return int(number)


def open_pipeline(checkpoint: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """The pipeline; raises `ValueError` where a part or a weight is missing, which diffusers would make up."""
    try:
        pipe = XPortraitPipeline.from_pretrained(checkpoint, dtype=dtype)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"cannot open {checkpoint}: {error}; convert the official file anew") from error
    networks = {name: getattr(pipe, name) for name in ("unet", "reference_unet", "vae", "null_text")}
    networks["controlnet"], networks["controlnet_1"] = pipe.controlnet.nets
    for name, network in networks.items():
        check_keys(network.state_dict().keys() - read_weights(checkpoint / name).keys(), (), checkpoint / name)
    return pipe.to(device)
