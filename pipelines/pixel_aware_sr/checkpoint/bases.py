"""The base model under PASD's networks, and another one in its place."""

import os
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from diffattn.files.weights import check_keys

from ..networks.paca import is_pixel_aware
from ..networks.unet import PASDUNet2DConditionModel

Source = str | os.PathLike[str]


def open_base(source: Source, classes: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Parts of a diffusers pipeline, from its folder or hub id; `classes` gives the class of each by its name."""
    check_base(source, classes)
    parts = {}
    for name, cls in classes.items():
        options = {} if name.startswith("tokenizer") else {"dtype": dtype}
        try:
            parts[name] = cls.from_pretrained(source, subfolder=name, **options)
        except (OSError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise ValueError(f"cannot load the {name} of the base model {str(source)!r}: {first}") from error
    return parts


def check_base(source: Source, classes: dict[str, Any]) -> None:
    """Raise `ValueError` unless `source` is a pipeline of the kind that the networks were made for; reads its index.

    That is Stable Diffusion, or SDXL where `classes` has a second text encoder: a pipeline with a U-Net of images,
    and parts of the classes that are wanted.
    """
    try:
        index = DiffusionPipeline.load_config(source)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"cannot read model_index.json of the base model {str(source)!r}: {first}") from error
    if not isinstance(index, dict):
        raise ValueError(f"expected a JSON object in model_index.json of {str(source)!r}; got a {type(index).__name__}")
    wanted = {"unet": UNet2DConditionModel.__name__, **{name: cls.__name__ for name, cls in classes.items()}}
    own = {name: entry[1] for name, entry in index.items() if isinstance(entry, (list, tuple)) and len(entry) == 2}
    kinds = {True: "SDXL", False: "Stable Diffusion 1.5"}
    is_xl = "text_encoder_2" in classes
    is_unet = str(own.get("unet")).endswith(wanted["unet"])  # PASD's own saved pipelines have a subclass of it
    if is_unet and (own.get("text_encoder_2") is not None) != is_xl:
        raise ValueError(
            f"expected a base model of the kind of {kinds[is_xl]}; {str(source)!r} is of that of {kinds[not is_xl]}"
        )
    for name, cls in wanted.items():
        found = own.get(name) or "missing"
        if not (found in (cls, f"{cls}Fast") or (name == "unet" and is_unet)):
            raise ValueError(
                f"expected a base model of the kind of {kinds[is_xl]}, with {name} of {cls}; {str(source)!r} is a "
                f"{index.get('_class_name')}, and its {name} is {found}; name another"
            )


def check_sizes(parts: dict[str, Any], unet: PASDUNet2DConditionModel, source: Source) -> None:
    """Raise `ValueError` for parts that do not fit the U-Net in the width of text or the channels of latents."""
    encoders = [part for name, part in parts.items() if name.startswith("text_encoder")]
    found = {
        "cross_attention_dim": sum(encoder.config.hidden_size for encoder in encoders),
        "in_channels": parts["vae"].config.latent_channels,
    }
    words = {"cross_attention_dim": "text of width", "in_channels": "latents of channels"}
    for name, value in found.items():
        if value != unet.config[name]:
            raise ValueError(
                f"expected a base model with {words[name]} {unet.config[name]}, as the checkpoint's U-Net takes; "
                f"{str(source)!r} has {value}; is it another version of Stable Diffusion?"
            )


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
