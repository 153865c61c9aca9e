"""PASD's networks from the official folders, and their pixel-aware weights as an adapter.

    checkpoint-100000/
        unet/{config.json,diffusion_pytorch_model.safetensors}            the base model's weights included
        controlnet/{config.json,diffusion_pytorch_model.safetensors}
        scheduler/                                                        SDXL only

The official configs name stock classes, so the variant is read off the weights' names.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from diffattn.files.weights import Weights, cast, check_keys, load_strictly, read_weights
from diffattn.files.writing import written

from ..networks.controlnet import PASDControlNetModel
from ..networks.paca import is_pixel_aware, variant_of
from ..networks.unet import PASDUNet2DConditionModel

FORMAT = "pasd-paca"
IGNORED_SETTINGS = {"use_sd3_vae"}
"""Keys of official configs that no network reads."""


@dataclass(frozen=True)
class PASDNetworks:
    """What one checkpoint holds."""

    unet: PASDUNet2DConditionModel
    controlnet: PASDControlNetModel
    scheduler: Path | None = None
    """Folder of the scheduler to use, where the checkpoint brings one."""

    @property
    def variant(self) -> str:
        """For people: "full" or "light", "rrdb", "SDXL"."""
        parts = [self.unet.config.pixel_attention]
        parts += ["rrdb"] if self.controlnet.config.use_rrdb else []
        parts += ["SDXL"] if self.unet.config.addition_embed_type == "text_time" else []
        return ", ".join(parts)


def load_pasd(path: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32) -> PASDNetworks:
    """Both networks of `path`, a folder `checkpoint-N` of the official layout, or one with a single such folder in it.

    Folders that `save_pretrained` of a `PASDPipeline` wrote have the same layout. Raises `ValueError` for a folder
    without both networks, for a stock U-Net or ControlNet, and for weights that are not exactly those of the config.
    """
    folder = find_checkpoint(Path(path))
    unet_config, unet_weights = _read(folder / "unet")
    control_config, control_weights = _read(folder / "controlnet")
    variant = variant_of(list(unet_weights))
    if variant is None:
        raise ValueError(
            f"{folder / 'unet'} holds a stock U-Net, without pixel-aware weights; give a checkpoint of PASD, or build "
            f"the U-Net by load_paca from this one and an adapter"
        )
    encoder = "controlnet_cond_embedding"
    if not any(key.startswith(f"{encoder}.to_rgbs.") for key in control_weights):
        if control_config.get("_class_name") != PASDControlNetModel.__name__:
            raise ValueError(f"{folder / 'controlnet'} holds a stock ControlNet; PASD needs the one trained with it")
        control_config["return_rgbs"] = False
    control_config["use_rrdb"] = any(key.startswith(f"{encoder}.preprocesser.") for key in control_weights)
    unet_config["pixel_attention"] = variant
    _check_pair(folder, unet_config, control_config)
    unet = _build(PASDUNet2DConditionModel, unet_config, unet_weights, folder / "unet", dtype)
    controlnet = _build(PASDControlNetModel, control_config, control_weights, folder / "controlnet", dtype)
    scheduler = next((place for place in (folder / "scheduler", folder.parent / "scheduler") if place.is_dir()), None)
    return PASDNetworks(unet, controlnet, scheduler)


def find_checkpoint(path: Path) -> Path:
    """The folder with `unet` and `controlnet` in it: `path`, or the only one below it."""
    if not path.is_dir():
        raise ValueError(f"expected the folder of a PASD checkpoint; {path} is not a folder")
    found = [folder for folder in (path, *sorted(path.glob("checkpoint-*"))) if (folder / "unet").is_dir()]
    if len(found) != 1:
        names = ", ".join(folder.name for folder in found) or "no unet/"
        raise ValueError(f"expected one PASD checkpoint in {path}; found {names}; give the folder that holds unet/")
    if not (found[0] / "controlnet").is_dir():
        raise ValueError(f"expected unet/ and controlnet/ in {found[0]}; controlnet/ is missing; download it as well")
    return found[0]


def _read(folder: Path) -> tuple[dict[str, Any], Weights]:
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {folder / 'config.json'}: {error}") from error
    return {key: value for key, value in config.items() if key not in IGNORED_SETTINGS}, read_weights(folder)


def _check_pair(folder: Path, unet: dict[str, Any], controlnet: dict[str, Any]) -> None:
    for setting in ("block_out_channels", "cross_attention_dim"):
        if unet.get(setting) != controlnet.get(setting):
            raise ValueError(
                f"expected a U-Net and a ControlNet of one base model in {folder}; {setting} is {unet.get(setting)} "
                f"in one and {controlnet.get(setting)} in the other; are they of one checkpoint?"
            )


def _build(cls: type[ModelMixin], config: dict[str, Any], weights: Weights, source: Path, dtype: torch.dtype) -> Any:
    with torch.device("meta"):
        model = cls.from_config({**config, "_class_name": cls.__name__})
    load_strictly(model, {key: cast(tensor, dtype) for key, tensor in weights.items()}, source, assign=True)
    return model.eval()


def save_paca(unet: PASDUNet2DConditionModel, path: str | os.PathLike[str]) -> Path:
    """Write the pixel-aware weights alone, as one safetensors file: 28.7 M (light) of SD 1.5's 888.2 M, for example."""
    weights = {key: tensor.contiguous() for key, tensor in unet.state_dict().items() if is_pixel_aware(key)}
    with written(path) as file:
        save_file(weights, file, metadata={"format": FORMAT, "pixel_attention": unet.config.pixel_attention})
    return Path(path)


def load_paca(unet: UNet2DConditionModel, path: str | os.PathLike[str]) -> PASDUNet2DConditionModel:
    """Put pixel-aware weights from `save_paca` on any U-Net of the same sizes: a personalised one stylizes.

    The base weights are shared with `unet`, which is not changed. Raises `ValueError` for other files, and for
    adapters of another size.
    """
    if isinstance(unet, PASDUNet2DConditionModel):
        raise ValueError("expected a stock U-Net to put the adapter on; this one is pixel-aware already")
    weights = read_weights(path)
    with safe_open(path, "pt") as file:
        said = file.metadata() or {}
    variant = variant_of(list(weights))
    if said.get("format") != FORMAT or variant is None or not all(map(is_pixel_aware, weights)):
        raise ValueError(f"expected an adapter written by save_paca; {path} is something else")
    with torch.device("meta"):
        model = PASDUNet2DConditionModel.from_config({**unet.config, "pixel_attention": variant})
    base = {key: tensor.detach() for key, tensor in unet.state_dict().items()}
    _check_base(model, base, path)
    own = {key: cast(tensor, unet.dtype).to(unet.device) for key, tensor in weights.items()}
    load_strictly(model, {**base, **own}, path, assign=True)
    return model.eval()


def _check_base(model: nn.Module, base: dict[str, Tensor], path: object) -> None:
    """The base's weights are those that are not pixel-aware."""
    expected = {key for key in model.state_dict() if not is_pixel_aware(key)}
    check_keys(expected - base.keys(), base.keys() - expected, f"the U-Net under {path}")
