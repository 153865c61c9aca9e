"""The parts of a text-to-video pipeline with a UNet3D, from a folder or the hub, strictly.

bundled pipeline:  tiny
VideoCrafter2:     cerspense/zeroscope_v2_576w, its UNet from adamdad/videocrafterv2_diffusers
others:            any folder or hub id that `TextToVideoSDPipeline` loads
"""

import contextlib
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffattn import tiny
from diffattn.files.weights import check_keys

RECIPES = {"videocrafter2": ("cerspense/zeroscope_v2_576w", "adamdad/videocrafterv2_diffusers")}
"""Name -> where the parts come from, and where the UNet does."""

PLAIN, WITH_FPS = "UNet3DConditionModel", ("UNetVideoCrafter", "FpsUNet3D")


def sources(model: str, unet: str | None = None) -> tuple[str, str]:
    """Folders or hub ids of the pipeline and of its UNet; raises `ValueError` for a folder that does not exist."""
    if model == "tiny":
        parts = own = str(tiny.path("video"))
        if not Path(parts).is_dir():
            raise ValueError(f"the bundled video pipeline is not installed, there is no {parts}; give --model")
    else:
        parts, own = RECIPES.get(model, (model, model))
    for source in (parts, unet or own):
        if not Path(source).exists() and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source):
            raise ValueError(f"no folder {source!r}, and a hub id has the form owner/name")
    return parts, unet or own


def open_parts(model: str, unet: str | None, dtype: torch.dtype, device: torch.device) -> Any:
    """A `TextToVideoSDPipeline` on its device; the UNet is an `FpsUNet3D` where the weights are those of one.

    Raises `ValueError` where the parts cannot be loaded, or are those of another pipeline.
    """
    from diffusers import TextToVideoSDPipeline

    parts, own = sources(model, unet)
    check_family(parts)
    with _errors_only():
        try:
            pipe = TextToVideoSDPipeline.from_pretrained(parts, unet=open_unet(own, dtype), dtype=dtype)
        except OSError as error:
            raise ValueError(f"cannot load {parts!r}: {_first_line(error)}") from error
        return pipe.to(device, dtype)


def check_family(source: str) -> None:
    """Raise `ValueError` unless `source` is a pipeline around a UNet3D; reads its index alone."""
    from diffusers import DiffusionPipeline

    try:
        index = DiffusionPipeline.load_config(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read model_index.json of {source!r}: {_first_line(error)}") from error
    if not isinstance(index, dict):
        raise ValueError(f"expected a JSON object in model_index.json of {source!r}, got a {type(index).__name__}")
    found = index.get("unet") or [None, None]
    if found[1] not in (PLAIN, *WITH_FPS):
        raise ValueError(
            f"{source!r} is a {index.get('_class_name')}, and a long video needs a text-to-video pipeline with a UNet "
            f"of the class {PLAIN} or {WITH_FPS[0]}, such as cerspense/zeroscope_v2_576w"
        )


def open_unet(source: str, dtype: torch.dtype) -> nn.Module:
    """A UNet from its own folder or from that of a pipeline; every weight has to be there, and no other."""
    from diffusers import UNet3DConditionModel

    from .fps_unet import FpsUNet3D

    subfolder, config = _unet_config(source)
    name = config.get("_class_name")
    if name not in (PLAIN, *WITH_FPS):
        raise ValueError(f"the UNet of {source!r} is a {name}, expected {PLAIN} or {WITH_FPS[0]}")
    cls = FpsUNet3D if name in WITH_FPS and config.get("fps_cond", True) else UNet3DConditionModel
    place = {} if subfolder is None else {"subfolder": subfolder}
    try:
        unet, found = cls.from_pretrained(source, **place, dtype=dtype, output_loading_info=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"cannot load the UNet of {source!r}: {_first_line(error)}") from error
    check_keys(found["missing_keys"], found["unexpected_keys"], repr(source))
    return unet


@contextlib.contextmanager
def _errors_only() -> Iterator[None]:
    """Without the bars and warnings of diffusers and transformers: keys that do not fit are errors here, by name."""
    import diffusers.utils.logging as of_diffusers
    import transformers.utils.logging as of_transformers

    libraries = (of_diffusers, of_transformers)
    levels = [library.get_verbosity() for library in libraries]
    try:
        for library in libraries:
            library.set_verbosity_error()
            library.disable_progress_bar()
        yield
    finally:
        for library, level in zip(libraries, levels, strict=True):
            library.set_verbosity(level)
            library.enable_progress_bar()


def _unet_config(source: str) -> tuple[str | None, dict[str, Any]]:
    """Where in `source` the UNet lies, and its configuration."""
    from diffusers import UNet3DConditionModel

    for subfolder in ("unet", None):
        with contextlib.suppress(OSError, ValueError):
            place = {} if subfolder is None else {"subfolder": subfolder}
            return subfolder, dict(UNet3DConditionModel.load_config(source, **place))
    raise ValueError(f"{source!r} has no UNet: neither unet/config.json nor config.json can be read")


def fingerprint(model: nn.Module) -> str:
    """Of a model's weights, all of them; ranks compare it, and a run that goes on."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
