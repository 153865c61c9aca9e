"""The official checkpoint, one file of all networks, as a folder of a diffusers pipeline.

    convert("model_state-415001.th", "x-portrait", dtype=torch.float16)
    pipe = XPortraitPipeline.from_pretrained("x-portrait")

Weights go over one to one. What the pipeline has no use for is left behind: buffers of the schedule, the condition
encoder of the appearance network, second copies of the motion modules' positions, and CLIP's text encoder, of which
the embedding of "" is kept.
"""

import logging
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffattn.files.weights import Weights, cast, check_keys, load_strictly, read_weights
from diffattn.files.writing import check_new_folder, new_folder

from ..networks.components import PREFIXES, Sizes, build_networks, build_text_encoder, official_scheduler
from ..pipeline import XPortraitPipeline
from .names import official_name, official_text_name, official_vae_name

logger = logging.getLogger("diffattn")

SECOND_POSITIONS = re.compile(r"(.*\.attention_blocks\.)1(\.pos_encoder\.pe)")
UNUSED = (
    re.compile(r"betas|logvar|posterior_\w+|\w*alphas_cumprod\w*"),
    re.compile(r"appearance_control_model\.input_hint_block\..*"),
    re.compile(r"cond_stage_model\.transformer\.text_model\..*"),
    SECOND_POSITIONS,
)
"""Names of weights that are left behind, unless a network wants them."""


def convert(
    checkpoint: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    sizes: Sizes | None = None,
    null_text: Tensor | None = None,
    strict: bool = True,
) -> Path:
    """Write what `load_official` reads to `folder`, whole or not at all; see there for arguments, shapes and errors."""
    folder = check_new_folder(folder)
    pipe = load_official(checkpoint, dtype=dtype, sizes=sizes, null_text=null_text, strict=strict)
    with new_folder(folder) as temporary:
        pipe.save_pretrained(temporary)
    return folder


def load_official(
    checkpoint: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    sizes: Sizes | None = None,
    null_text: Tensor | None = None,
    strict: bool = True,
) -> XPortraitPipeline:
    """A pipeline with the weights of the official checkpoint.

    Args:
        checkpoint: `model_state-415001.th`, or a safetensors file with the same names; no code in it is run.
        dtype: of all networks.
        sizes: None: the official ones.
        null_text: embedding of the empty prompt, (1, tokens, width), for a checkpoint without the text encoder. None:
            it is computed by the checkpoint's.
        strict: False leaves weights that no network has behind with a warning, instead of refusing them.

    Raises `ValueError` that names every weight that is missing, unexpected or of another shape, by its official name.
    """
    networks = load_networks(
        read_weights(checkpoint), checkpoint, sizes or Sizes(), dtype=dtype, null_text=null_text, strict=strict
    )
    return XPortraitPipeline(**networks, scheduler=official_scheduler())


def load_networks(
    weights: Weights,
    source: object,
    sizes: Sizes,
    *,
    dtype: torch.dtype = torch.float32,
    null_text: Tensor | None = None,
    strict: bool = True,
) -> dict[str, Any]:
    """All networks of the pipeline from weights with official names; `source` is for errors, see `load_official`."""
    if null_text is None and not any(name.startswith(PREFIXES["text_encoder"]) for name in weights):
        raise ValueError(
            f"expected the text encoder in {source}, {PREFIXES['text_encoder']}..; got a checkpoint without; give the "
            "embedding of the empty prompt as null_text"
        )
    with torch.device("meta"):
        networks = build_networks(sizes)
        text_encoder = {"text_encoder": build_text_encoder(sizes)} if null_text is None else {}
    wanted = official_names({**networks, **text_encoder})
    check(weights, wanted, source, strict=strict)
    if null_text is None:
        null_text = embed_nothing(taken("text_encoder", weights, wanted, torch.float32), sizes)
    for name, network in networks.items():
        own = {"embedding": null_text.to(dtype)} if name == "null_text" else taken(name, weights, wanted, dtype)
        load_strictly(network, own, source, assign=True)
        network.eval()
    return networks


class Place(NamedTuple):
    """Where a weight belongs."""

    network: str
    key: str
    shape: torch.Size


Wanted = dict[str, Place]
"""The place of each weight by its official name."""


def official_names(networks: dict[str, Any]) -> Wanted:
    """All weights that a checkpoint of these networks should have."""
    wanted: Wanted = {}
    for path, prefix in PREFIXES.items():
        name, _, inner = path.partition(".")
        rename = {"vae": official_vae_name, "text_encoder": official_text_name}.get(name, official_name)
        for key, tensor in networks[name].get_submodule(inner).state_dict().items() if name in networks else ():
            wanted[prefix + rename(key)] = Place(name, f"{inner}.{key}" if inner else key, tensor.shape)
    return wanted


def taken(network: str, weights: Weights, wanted: Wanted, dtype: torch.dtype) -> Weights:
    """The weights of one network, by the names that they have there."""
    places = {name: place for name, place in wanted.items() if place.network == network}
    return {place.key: cast(weights[name].reshape(place.shape), dtype) for name, place in places.items()}


def check(weights: Weights, wanted: Wanted, source: object, *, strict: bool) -> None:
    """Raise `ValueError` for weights that are not those that are wanted."""
    unused = {name for name in weights.keys() - wanted.keys() if any(rule.fullmatch(name) for rule in UNUSED)}
    unexpected = weights.keys() - wanted.keys() - unused
    if unexpected and not strict:
        logger.warning("left %d weights of %s behind: %s", len(unexpected), source, ", ".join(sorted(unexpected)))
        unexpected = set()
    check_keys(wanted.keys() - weights.keys(), unexpected, source)
    others = [
        f"{name} is {tuple(weights[name].shape)}, expected {tuple(place.shape)}"
        for name, place in wanted.items()
        if not same_shape(weights[name].shape, place.shape)
    ]
    for name in unused:
        match = SECOND_POSITIONS.fullmatch(name)
        if match and not weights[name].equal(weights[f"{match[1]}0{match[2]}"]):
            others.append(f"{name} differs from the positions of the first attention, expected the same")
    if others:
        raise ValueError(f"the weights of {source} are not those of X-Portrait: {'; '.join(others)}")


def same_shape(found: torch.Size, expected: torch.Size) -> bool:
    """The VAE's attention has 1 x 1 convolutions in the checkpoint, and linear layers here."""
    return found in (expected, (*expected, 1, 1))


@torch.no_grad()
def embed_nothing(weights: Weights, sizes: Sizes) -> Tensor:
    """The text encoder's last hidden states for "", (1, tokens, width): begin, then end in every place that is left."""
    encoder = build_text_encoder(sizes).eval()
    load_strictly(encoder, weights, "the text encoder")
    begin, end = sizes.vocabulary - 2, sizes.vocabulary - 1
    hidden: Tensor = encoder(torch.tensor([[begin] + [end] * (sizes.text_tokens - 1)])).last_hidden_state
    return hidden
