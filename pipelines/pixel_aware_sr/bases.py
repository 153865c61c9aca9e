"""The base model under PASD's networks, and another one in its place."""

import os
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from diffattn.weights import check_keys

from .paca import is_pixel_aware
from .unet import PASDUNet2DConditionModel

Source = str | os.PathLike[str]


def open_base(source: Source, classes: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Parts of a diffusers pipeline, from its folder or hub id; `classes` gives the class of each by its name."""
    _check_kind(source, "text_encoder_2" in classes)
    parts = {}
    for name, cls in classes.items():
        options = {} if name.startswith("tokenizer") else {"dtype": dtype}
        try:
            parts[name] = cls.from_pretrained(source, subfolder=name, **options)
        except (OSError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise ValueError(f"cannot load the {name} of the base model {str(source)!r}: {first}") from error
    return parts


def _check_kind(source: Source, wanted: bool) -> None:
    """Raise `ValueError` for SDXL in the place of Stable Diffusion 1.5, or the other way round."""
    try:
        index = DiffusionPipeline.load_config(source)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"cannot read model_index.json of the base model {str(source)!r}: {first}") from error
    if ("text_encoder_2" in index) != wanted:
        kinds = ("SDXL", "Stable Diffusion 1.5") if wanted else ("Stable Diffusion 1.5", "SDXL")
        raise ValueError(f"expected a base model of the kind of {kinds[0]}; {str(source)!r} is of that of {kinds[1]}")


def scheduler_config(source: Source) -> dict[str, Any]:
    """The scheduler's configuration of a pipeline, or of the scheduler's own folder."""
    own = (Path(source) / "scheduler_config.json").is_file()
    try:
        config: dict[str, Any] = DDPMScheduler.load_config(source, subfolder=None if own else "scheduler")
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the scheduler of {str(source)!r}: {str(error).splitlines()[0]}") from error
    return config


def open_style(source: Source, base: Source, classes: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Parts of a personalised model and its U-Net, from a folder, a hub id, or a single safetensors file.

    A single file is read by the configuration of `base`.
    """
    if not Path(source).is_file():
        return open_base(source, {**classes, "unet": UNet2DConditionModel}, dtype)
    if Path(source).suffix != ".safetensors":
        raise ValueError(f"expected a .safetensors file of a model; got {source}; a pickle may run code: convert it")
    try:
        pipe = StableDiffusionPipeline.from_single_file(
            str(source), config=str(base), dtype=dtype, safety_checker=None, local_files_only=Path(base).is_dir()
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ValueError(f"cannot read {source} as a model like {base}: {str(error).splitlines()[0]}") from error
    return {name: pipe.components[name] for name in (*classes, "unet")}


def restyle(
    unet: PASDUNet2DConditionModel, style: UNet2DConditionModel, weight: float = 1.0
) -> PASDUNet2DConditionModel:
    """Put another model's weights under the pixel-aware layers, which stay: w = weight w_style + (1 - weight) w.

    Changes `unet` and returns it. Raises `ValueError` for a weight outside 0..1 and for a U-Net of other sizes.
    """
    if not 0.0 <= weight <= 1.0:
        raise ValueError(f"expected a style_weight from 0, the base, to 1, the other model; got {weight}")
    own = {key: tensor for key, tensor in unet.state_dict().items() if not is_pixel_aware(key)}
    other: dict[str, Tensor] = style.state_dict()
    check_keys(own.keys() - other.keys(), other.keys() - own.keys(), "the other model's U-Net")
    unlike = [key for key, tensor in own.items() if tensor.shape != other[key].shape]
    if unlike:
        raise ValueError(
            f"expected a U-Net with the sizes of the base's; {len(unlike)} weights differ: {unlike[0]}, ..."
        )
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.lerp_(other[key].to(tensor), weight)
    return unet
