"""The cache that training reads instead of pictures and captions, so that it needs neither VAE nor text encoders.

The files are those of CLEAR's official training, beside each picture NAME:

- NAME_latent_code.safetensors: `mean` and `std` of the VAE's posterior (channels, height, width), neither shifted nor
  scaled;
- NAME_prompt_embed.safetensors: `caption_feature_t5` (text tokens, dim) and `caption_feature_clip` (dim,).

Added to them is one diffattn_cache.json in the folder, which says what model the cache is for.
"""

import json
import logging
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from diffattn.files import write_json, written

from .data import Sample, Source
from .pictures import Captioned, Counts, find_pictures, list_files, load_picture, named, pictures_in, share

logger = logging.getLogger("diffattn")

LATENTS = "_latent_code.safetensors"
PROMPT = "_prompt_embed.safetensors"
FACTS = "diffattn_cache.json"

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
"""What diffattn_cache.json says; sizes are (height, width)."""

_PARTS = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")

Facts = dict[str, Any]
Shapes = dict[str, list[int]]


def model_facts(transformer: Any) -> Facts:
    """What a cache must be like for a Flux transformer: `expected` of a `CacheSource`."""
    config = transformer.config
    return {
        "model": type(transformer).__name__,
        # The transformer's tokens are 2 x 2 latent cells.
        "latent_channels": config.in_channels // 4,
        "text_dim": config.joint_attention_dim,
        "pooled_dim": config.pooled_projection_dim,
    }


@torch.no_grad()
def write_cache(
    pipe: Any,
    folder: str | os.PathLike[str],
    *,
    size: tuple[int, int],
    max_sequence_length: int,
    dtype: torch.dtype = torch.bfloat16,
    rank: int = 0,
    world: int = 1,
    progress: bool = False,
) -> Counts:
    """Encode the pictures and captions of a folder with a Flux pipeline, as far as they aren't yet.

    Files are written whole or not at all; one that is not whole is written anew. Corrupt pictures are left out with a
    warning each. That a picture or a caption has changed since is not noticed: delete its files.

    Args:
        size: height and width in pixels; pictures are resized to cover it and cropped at their centre.
        rank: this process works on every `world`-th picture, from the `rank`-th on.

    Raises `ValueError` for a folder without pictures or captions, for one that holds the cache of another model or
    size, and where every picture is corrupt.
    """
    root = Path(folder)
    pictures = find_pictures(root)
    mine = share(pictures, rank, world)
    facts = _facts(pipe, size, max_sequence_length)
    _claim(root, facts)
    outcomes = Counter(_encode(pipe, one, facts, dtype) for one in tqdm(mine, desc="cache", disable=not progress))
    # The share of one process may be corrupt by bad luck; that all are, it can't know without a look at the others.
    if outcomes["corrupt"] == len(mine) and all(_pixels(one, size) is None for one in pictures):
        raise ValueError(f"expected pictures in {root}, got {len(pictures)} corrupt files only; replace them")
    return Counts(**outcomes)


class CacheSource(Source):
    """The samples of a cache; a latent is drawn from the VAE's posterior each time.

    They are the pictures of the folder whose two files are there, told by names alone; pictures without are left out
    with a warning. A folder without any picture gives what its cache files hold.

    Args:
        expected: what the cache must be, such as `model_facts(transformer)`; other values raise `ValueError`.
        shift, scale: sample = (latent - shift) * scale. None: as diffattn_cache.json says; an official cache has none,
            and both must be given.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        expected: Mapping[str, Any] | None = None,
        shift: float | None = None,
        scale: float | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.names = _cached_names(self.folder)
        facts = _read_facts(self.folder) or _official_facts(self.folder, self.names[0], shift, scale)
        _compare(self.folder, expected or {}, facts)
        self.shift: float = facts["shift_factor"] if shift is None else shift
        self.scale: float = facts["scaling_factor"] if scale is None else scale
        self._shapes = _shapes(facts)

    def __len__(self) -> int:
        return len(self.names)

    def sample(self, index: int, generator: torch.Generator) -> Sample:
        """Sample `index`; `generator` draws its latent."""
        name = self.names[index]
        latent, prompt = self._read(name, LATENTS), self._read(name, PROMPT)
        noise = torch.randn(latent["mean"].shape, generator=generator)
        return Sample(
            name,
            (latent["mean"] + latent["std"] * noise - self.shift) * self.scale,
            {
                "encoder_hidden_states": prompt["caption_feature_t5"],
                "pooled_projections": prompt["caption_feature_clip"],
            },
        )

    def _read(self, name: str, ending: str) -> dict[str, Tensor]:
        """The tensors of one file in float32."""
        path, want = self.folder / f"{name}{ending}", self._shapes[ending]
        try:
            got = _shapes_in(path)
            if not _agree(got, want):
                raise ValueError(f"expected tensors {want} in {path}, got {got}")
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key).float() for key in want}
        except ValueError as error:
            raise ValueError(
                f"sample {name} can't be read: {error}; delete the file and write the cache again"
            ) from error


def _facts(pipe: Any, size: tuple[int, int], max_sequence_length: int) -> Facts:
    """What the cache of a pipeline is; refuses pipelines and sizes that can't be cached."""
    _check(pipe)
    factor: int = pipe.vae_scale_factor
    if any(side < 1 or side % (2 * factor) for side in size):
        raise ValueError(f"expected a height and width in multiples of {2 * factor} pixels, got {size}; round them")
    vae = pipe.vae.config
    return model_facts(pipe.transformer) | {
        "latent_channels": vae.latent_channels,
        "latent_size": [side // factor for side in size],
        "picture_size": list(size),
        "scaling_factor": vae.scaling_factor,
        "shift_factor": vae.shift_factor or 0.0,
        "text_length": max_sequence_length,
    }


def _check(pipe: Any) -> None:
    from diffusers import FluxTransformer2DModel

    transformer = getattr(pipe, "transformer", None)
    if not isinstance(transformer, FluxTransformer2DModel):
        raise ValueError(f"expected a Flux pipeline, got {type(pipe).__name__} with {type(transformer).__name__}")
    absent = [part for part in _PARTS if getattr(pipe, part, None) is None]
    if absent:
        raise ValueError(
            f"expected a pipeline with VAE and text encoders, got one without {', '.join(absent)}; load them"
        )


def _claim(folder: Path, facts: Facts) -> None:
    """Say what the cache is, or compare with what it says."""
    known = _read_facts(folder)
    if known is None:
        write_json(folder / FACTS, facts)
    else:
        _compare(folder, facts, known)


def _read_facts(folder: Path) -> Facts | None:
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
    return facts


def _official_facts(folder: Path, name: str, shift: float | None, scale: float | None) -> Facts:
    """What the files of one sample tell; the rest is None."""
    if shift is None or scale is None:
        raise ValueError(
            f"expected {FACTS} in {folder}, got none, as in an official cache; pass shift= and scale=, the "
            f"shift_factor and scaling_factor of the VAE that encoded it"
        )
    latent, prompt = (_shapes_in(folder / f"{name}{ending}") for ending in (LATENTS, PROMPT))
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


def _compare(folder: Path, expected: Mapping[str, Any], got: Facts) -> None:
    unknown = sorted(expected.keys() - set(FACT_NAMES))
    if unknown:
        raise ValueError(f"expected facts among {', '.join(FACT_NAMES)}, got {', '.join(unknown)}")
    want = {name: list(value) if isinstance(value, tuple) else value for name, value in expected.items()}
    wrong = [f"{name} {value}, got {got[name]}" for name, value in want.items() if got[name] not in (value, None)]
    if wrong:
        raise ValueError(
            f"{folder} holds the cache of another model or size: expected {'; '.join(wrong)}; use another folder, or "
            f"delete {FACTS} and the .safetensors files there to encode anew"
        )


def _shapes(facts: Facts) -> dict[str, Shapes]:
    """The tensors of each file."""
    latent = [facts["latent_channels"], *facts["latent_size"]]
    return {
        LATENTS: {"mean": latent, "std": latent},
        PROMPT: {
            "caption_feature_t5": [facts["text_length"], facts["text_dim"]],
            "caption_feature_clip": [facts["pooled_dim"]],
        },
    }


def _shapes_in(path: Path) -> Shapes:
    """The tensors of a file; raises `ValueError` where it is not whole. The header tells, nothing else is read."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: list(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is missing or not a whole safetensors file ({error})") from error


def _agree(got: Shapes, want: Shapes) -> bool:
    return all(got.get(key) == shape for key, shape in want.items())


def _encode(pipe: Any, picture: Captioned, facts: Facts, dtype: torch.dtype) -> str:
    """Write what one picture lacks; says what became of it, in the words of `Counts`."""
    paths = {ending: picture.path.with_name(f"{picture.path.stem}{ending}") for ending in (LATENTS, PROMPT)}
    lacking = [ending for ending, shapes in _shapes(facts).items() if not _whole(paths[ending], shapes)]
    if LATENTS in lacking:
        pixels = _pixels(picture, facts["picture_size"])
        if pixels is None:
            # A broken file left here would look like a sample.
            paths[LATENTS].unlink(missing_ok=True)
            return "corrupt"
        _save(paths[LATENTS], _posterior(pipe, pixels), dtype)
    if PROMPT in lacking:
        _save(paths[PROMPT], _embeddings(pipe, picture.caption, facts["text_length"]), dtype)
    return "done" if lacking else "skipped"


def _whole(path: Path, shapes: Shapes) -> bool:
    """Whether a file is there and whole; raises `ValueError` where it is, but holds something else."""
    if not path.exists():
        return False
    try:
        got = _shapes_in(path)
    except ValueError as error:
        logger.warning("%s; it is written anew", error)
        return False
    if not _agree(got, shapes):
        raise ValueError(
            f"{path} is of the cache of another model or size: expected {shapes}, got {got}; use another folder, or "
            f"delete the .safetensors files there to encode anew"
        )
    return True


def _pixels(picture: Captioned, size: tuple[int, int]) -> Tensor | None:
    """The picture; None, with a warning, where it can't be read."""
    try:
        return load_picture(picture.path, size)
    except ValueError as error:
        logger.warning("corrupt picture: %s", error)
        return None


def _posterior(pipe: Any, pixels: Tensor) -> dict[str, Tensor]:
    # Not the VAE's own device, which is the CPU while it is offloaded.
    device = pipe._execution_device
    posterior = pipe.vae.encode(pixels[None].to(device, pipe.vae.dtype)).latent_dist
    return {"mean": posterior.mean[0], "std": posterior.std[0]}


def _embeddings(pipe: Any, caption: str, text_length: int) -> dict[str, Tensor]:
    text, pooled, _ = pipe.encode_prompt(prompt=caption, prompt_2=None, max_sequence_length=text_length)
    return {"caption_feature_t5": text[0], "caption_feature_clip": pooled[0]}


def _save(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    values = {key: value.to("cpu", dtype).contiguous() for key, value in tensors.items()}
    if not all(value.isfinite().all() for value in values.values()):
        raise ValueError(f"expected finite numbers for {path.name}, got NaN or infinity; encode in bfloat16 or float32")
    with written(path) as temporary:
        save_file(values, temporary)


def _cached_names(folder: Path) -> list[str]:
    """The names of the samples."""
    files = list_files(folder)
    latents, prompts = (
        {file.removesuffix(ending) for file in files if file.endswith(ending)} for ending in (LATENTS, PROMPT)
    )
    whole, wanted = latents & prompts, pictures_in(files).keys() or latents | prompts
    if not whole & wanted:
        raise ValueError(
            f"expected cached pictures in {folder}, got none of {len(wanted)}; run write_cache on it first"
        )
    if wanted - whole:
        logger.warning("not cached, left out: %s; run write_cache on %s", named(sorted(wanted - whole)), folder)
    if whole - wanted:
        logger.warning("cached, but their pictures are gone, left out: %s", named(sorted(whole - wanted)))
    return sorted(whole & wanted)
