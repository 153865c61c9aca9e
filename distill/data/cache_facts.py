"""What the files of a cache are: diffattn_cache.json, the two formats, and whether they belong to a model.

Flux has the files of CLEAR's official training, beside each image NAME:

- NAME_latent_code.safetensors: `mean` and `std` of the VAE's posterior (channels, height, width), neither shifted nor
  scaled;
- NAME_prompt_embed.safetensors: `caption_feature_t5` (text tokens, dim) and `caption_feature_clip` (dim,).

Every other family has one, NAME_sample.safetensors: `mean` and `std`, with an axis of frames behind the channels for
video models, and the conditioning under the names of the model's forward.

diffattn_cache.json lies once in the folder and says what model the cache is for.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..encoders import Facts

LATENTS = "_latent_code.safetensors"
PROMPT = "_prompt_embed.safetensors"
SAMPLE = "_sample.safetensors"
FACTS = "diffattn_cache.json"

ORIGIN = "origin"
"""The entry in a file's metadata that says what it was made from."""

POSTERIOR = ("mean", "std")
OFFICIAL = {"caption_feature_t5": "encoder_hidden_states", "caption_feature_clip": "pooled_projections"}
"""Names in CLEAR's files -> names in the model's forward."""

FACT_NAMES = (
    "model",
    "latent_channels",
    "latent_size",
    "picture_size",
    "scaling_factor",
    "shift_factor",
    "text_length",
    "text_dim",
    "pooled_dim",
)
"""What diffattn_cache.json says; sizes are (height, width), or (frames, height, width) for latents with frames.

Where there are NAME_sample files, it says besides: `conditioning`, the shapes of the tensors in them by name, and
`constants`, the values of those that are the same for all samples; for a video model `frames`, those of a clip, and
where they are more than one the `stride` or the rate, `fps`, at which they were taken.
"""

CLIP_FACTS = ("frames", "stride", "fps")

Shapes = dict[str, list[int]]


def layout(facts: Facts) -> dict[str, Shapes]:
    """The files of a sample by ending, and the tensors of each."""
    latent = [facts["latent_channels"], *facts["latent_size"]]
    posterior: Shapes = {name: latent for name in POSTERIOR}
    if "conditioning" in facts:
        return {SAMPLE: posterior | facts["conditioning"]}
    text = {
        "caption_feature_t5": [facts["text_length"], facts["text_dim"]],
        "caption_feature_clip": [facts["pooled_dim"]],
    }
    return {LATENTS: posterior, PROMPT: text}


def read_facts(folder: Path) -> Facts | None:
    """What diffattn_cache.json says; None where there is none."""
    path = folder / FACTS
    if not path.exists():
        return None
    try:
        facts: Facts = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); delete it and write the cache again") from error
    absent = [name for name in FACT_NAMES if name not in facts]
    if absent:
        raise ValueError(f"{path} lacks {', '.join(absent)}; delete it and write the cache again")
    if len(facts["latent_size"]) == 3:  # a release that knew of images alone did not say it
        facts.setdefault("frames", 1)
    return facts


def official_facts(folder: Path, name: str, shift: Any, scale: Any) -> Facts:
    """What the files of one sample of an official cache tell; the rest is None."""
    latent, prompt = (shapes_in(folder / f"{name}{ending}") for ending in (LATENTS, PROMPT))
    try:
        channels, *latent_size = latent["mean"]
        text_length, text_dim = prompt["caption_feature_t5"]
        (pooled_dim,) = prompt["caption_feature_clip"]
    except (KeyError, ValueError) as error:
        raise ValueError(f"sample {name} has not the tensors of a cache, but {latent} and {prompt}") from error
    return dict.fromkeys(FACT_NAMES) | {
        "latent_channels": channels,
        "latent_size": latent_size,
        "scaling_factor": scale,
        "shift_factor": shift,
        "text_length": text_length,
        "text_dim": text_dim,
        "pooled_dim": pooled_dim,
    }


def compare(folder: Path, expected: Mapping[str, Any], got: Facts) -> None:
    """Raise `ValueError` where a cache is not what is expected; what an official one does not tell is not compared."""
    unknown = sorted(expected.keys() - {*FACT_NAMES, *CLIP_FACTS, "conditioning", "constants"})
    if unknown:
        raise ValueError(f"expected facts among {', '.join(FACT_NAMES)}, got {', '.join(unknown)}")
    want = {name: list(value) if isinstance(value, tuple) else value for name, value in expected.items()}
    official = got["model"] is None
    wrong = [
        f"{name} {value}, got {got.get(name)}"
        for name, value in want.items()
        if got.get(name) != value and not (official and got.get(name) is None)
    ]
    if wrong:
        raise ValueError(
            f"{folder} holds the cache of another model or size: expected {'; '.join(wrong)}; use another folder, or "
            f"delete {FACTS} and the .safetensors files there to encode anew"
        )


def shapes_in(path: Path) -> Shapes:
    """The tensors of a file; raises `ValueError` where it is not whole. The header tells, nothing else is read."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: list(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is missing or not a whole safetensors file ({error})") from error


def agree(got: Shapes, want: Shapes) -> bool:
    """Whether a file has the tensors that are wanted; it may have others."""
    return all(got.get(key) == shape for key, shape in want.items())
