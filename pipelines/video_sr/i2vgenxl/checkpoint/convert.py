"""STAR's official I2VGen-XL checkpoint, one file of both networks, as a folder of a diffusers pipeline.

    convert("light_deg.pt", "star-light", vae="stable-video-diffusion-img2vid/vae",
            text_encoder="stable-diffusion-2-1/text_encoder", tokenizer="stable-diffusion-2-1/tokenizer",
            dtype=torch.float16)
    pipe = STARPipeline.from_pretrained("star-light", torch_dtype=torch.float16)

Weights go over one to one. The checkpoint has neither the VAE, which is Stable Video Diffusion's, nor the text encoder,
OpenCLIP ViT-H/14 without its last layer, which is that of Stable Diffusion 2.1.
"""

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from diffusers import AutoencoderKLTemporalDecoder
from transformers import CLIPTextModel, CLIPTokenizer

from diffattn.files.weights import Weights, cast, check_keys, load_strictly, read_weights
from diffattn.files.writing import check_new_folder, new_folder

from ..networks.components import STARSizes, build_networks
from .names import CONTROL, official_names

if TYPE_CHECKING:
    from ..pipeline import STARPipeline

logger = logging.getLogger("diffattn")

PREFIXES = {"unet": "", "controlnet": CONTROL}
"""What the names of a network's weights begin with in the official checkpoint."""
_OTHER_VARIANT = re.compile(r"(model\.diffusion_model|mixins)\..*")
_FRAME_PROJECTION = re.compile(r"(.*\.temp_attentions\.\d+|transformer_in)\.proj_(in|out)\.weight")
"""Linear layers that are convolutions of one frame in the checkpoint."""


def convert(
    checkpoint: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    vae: Any,
    text_encoder: Any,
    tokenizer: Any,
    dtype: torch.dtype = torch.float32,
    sizes: STARSizes | None = None,
    strict: bool = True,
) -> Path:
    """Write what `load_official` reads to `folder`, whole or not at all; see there for the arguments."""
    folder = check_new_folder(folder)
    parts = {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer}
    pipe = load_official(checkpoint, **parts, dtype=dtype, sizes=sizes, strict=strict)
    with new_folder(folder) as temporary:
        pipe.save_pretrained(temporary)
    return folder


def load_official(
    checkpoint: str | os.PathLike[str],
    *,
    vae: Any,
    text_encoder: Any,
    tokenizer: Any,
    dtype: torch.dtype = torch.float32,
    sizes: STARSizes | None = None,
    strict: bool = True,
) -> "STARPipeline":
    """A pipeline with the weights of the official checkpoint.

    Args:
        checkpoint: `light_deg.pt` or `heavy_deg.pt`, or a safetensors file with the same names; no code in it is run.
        vae: of Stable Video Diffusion: its folder, or the loaded model, which is taken as it is; so are
            `text_encoder` and `tokenizer`.
        text_encoder: of Stable Diffusion 2.1.
        tokenizer: of Stable Diffusion 2.1.
        dtype: of both networks, and of what is read from folders.
        sizes: None: the official ones.
        strict: False leaves weights that no network has behind with a warning, instead of refusing them.

    Raises `ValueError` that names every weight that is missing, unexpected or of another shape, by its official name;
    for a checkpoint of the CogVideoX variant; and for parts that do not belong to these networks.
    """
    from ..pipeline import STARPipeline
    from ..scheduler import STARScheduler

    sizes = sizes or STARSizes()
    parts = {
        "vae": _part("vae", AutoencoderKLTemporalDecoder, vae, torch_dtype=dtype),
        "text_encoder": _part("text_encoder", CLIPTextModel, text_encoder, dtype=dtype),
        "tokenizer": _part("tokenizer", CLIPTokenizer, tokenizer),
    }
    _check_parts(parts["vae"], parts["text_encoder"], sizes)
    networks = load_networks(read_weights(checkpoint), checkpoint, sizes, dtype=dtype, strict=strict)
    return STARPipeline(**parts, **networks, scheduler=STARScheduler())


def load_networks(
    weights: Weights, source: object, sizes: STARSizes, *, dtype: torch.dtype = torch.float32, strict: bool = True
) -> dict[str, Any]:
    """`unet` and `controlnet` from weights with official names; `source` is for errors, see `load_official`."""
    if any(_OTHER_VARIANT.fullmatch(name) for name in weights):
        raise ValueError(
            f"expected a checkpoint of STAR's I2VGen-XL variant; got one of the CogVideoX variant in {source}; convert "
            "it with diffattn.pipelines.video_sr.cogvideox_convert"
        )
    with torch.device("meta"):
        networks = build_networks(sizes)
    wanted = official_places(networks)
    check(weights, wanted, source, strict=strict)
    for name, network in networks.items():
        places = {official: place for official, place in wanted.items() if place.network == name}
        own = {
            place.key: cast(weights[official].reshape(network.get_parameter(place.key).shape), dtype)
            for official, place in places.items()
        }
        load_strictly(network, own, source, assign=True)
        network.eval()
    return networks


class Place(NamedTuple):
    """Where a weight belongs, and the shape that it has in the checkpoint."""

    network: str
    key: str
    shape: tuple[int, ...]


def official_places(networks: Mapping[str, Any]) -> dict[str, Place]:
    """The place of each weight that a checkpoint of these networks should have, by its official name."""
    places = {}
    for name, network in networks.items():
        own = network.state_dict()
        for key, official in official_names(own, network.config.layers_per_block).items():
            shape = tuple(own[key].shape)
            places[PREFIXES[name] + official] = Place(
                name, key, (*shape, 1) if _FRAME_PROJECTION.fullmatch(key) else shape
            )
    return places


def check(weights: Weights, wanted: Mapping[str, Place], source: object, *, strict: bool) -> None:
    """Raise `ValueError` for weights that are not those that are wanted."""
    unexpected = weights.keys() - wanted.keys()
    if unexpected and not strict:
        logger.warning("left %d weights of %s behind: %s", len(unexpected), source, ", ".join(sorted(unexpected)))
        unexpected = set()
    check_keys(wanted.keys() - weights.keys(), unexpected, source)
    others = [
        f"{name} is {tuple(weights[name].shape)}, expected {place.shape}"
        for name, place in wanted.items()
        if tuple(weights[name].shape) != place.shape
    ]
    if others:
        raise ValueError(f"the weights of {source} are not those of STAR: {'; '.join(others)}")


def _part(name: str, cls: Any, given: Any, **options: Any) -> Any:
    """What was given, or what its folder holds."""
    if not isinstance(given, str | os.PathLike):
        return given
    if not Path(given).is_dir():
        raise ValueError(f"expected the {name} as a folder or as a loaded model; there is no folder {given}")
    return cls.from_pretrained(given, **options)


def _check_parts(vae: Any, text_encoder: Any, sizes: STARSizes) -> None:
    channels, width = vae.config.latent_channels, text_encoder.config.hidden_size
    if channels != sizes.latent_channels:
        raise ValueError(
            f"expected a VAE of {sizes.latent_channels} latent channels; got {channels}; take Stable Video Diffusion's"
        )
    if width != sizes.text_width:
        raise ValueError(
            f"expected a text encoder {sizes.text_width} wide; got {width}; take that of Stable Diffusion 2.1"
        )
