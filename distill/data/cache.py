"""The cache that training reads instead of images or clips and captions, so that it needs neither VAE nor encoders.

`cache_facts.py` says what its files are.
"""

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from diffattn.files.writing import write_json, written
from diffattn.measure.progress import bar_options

from ..encoders import (
    Facts,
    Tensors,
    check_frames,
    encoder_of,
    latent_frames,
    model_facts,
    model_of,
    multiple_of,
    text_length_of,
    vae_facts,
    whole_patches,
)
from .cache_facts import (
    FACTS,
    LATENTS,
    OFFICIAL,
    ORIGIN,
    POSTERIOR,
    PROMPT,
    SAMPLE,
    Shapes,
    agree,
    compare,
    layout,
    official_facts,
    read_facts,
    shapes_in,
)
from .clips import Cut, clips_in, find_clips, load_clip
from .fingerprints import of_parts
from .origins import Origins
from .pictures import Captioned, Counts, find_pictures, list_files, load_picture, named, pictures_in, share
from .samples import Sample, Source

logger = logging.getLogger("diffattn")

PerChannel = float | list[float]


@torch.no_grad()
def write_cache(
    pipe: Any,
    folder: str | os.PathLike[str],
    *,
    size: tuple[int, int],
    cut: Cut | None = None,
    max_sequence_length: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    rank: int = 0,
    world: int = 1,
    progress: bool = False,
) -> Counts:
    """Encode the images and captions of a folder with a stock pipeline, as far as they aren't yet; or its clips.

    Files are written whole or not at all; one that is not whole, or whose image or caption has changed since, is
    written anew. Corrupt images, and clips that are corrupt or too short, are left out with a warning each. One is in
    memory at a time.

    Args:
        size: height and width in pixels; images are resized to cover it and cropped at their centre.
        cut: which frames of videos are their clips; None for images, which are clips of one frame to a video model.
        max_sequence_length: text tokens; None: as the pipeline's own calls.
        rank: this process works on every `world`-th image, from the `rank`-th on.

    Raises `ValueError` for a folder without images or captions, for one that holds the cache of another model,
    precision or size, and where every image is corrupt.
    """
    root = Path(folder)
    pictures = find_pictures(root) if cut is None else find_clips(root)
    mine = share(pictures, rank, world)
    facts = _facts(pipe, size, cut, max_sequence_length)
    model = model_of(pipe)
    maker = of_parts(getattr(pipe, name) for name in ("vae", *encoder_of(model).parts))
    origins = Origins(maker, facts, dtype)
    claimed = _claim(root, facts)
    shown = tqdm(mine, desc="cache", **bar_options(progress, leave=True))
    outcomes = Counter(_encode(pipe, root, one, facts, dtype, origins) for one in shown)
    origins.tell(root)
    # The share of one process may be corrupt by bad luck; that all are, it can't know without a look at the others.
    if outcomes["corrupt"] == len(mine) and all(_pixels(one, facts) is None for one in pictures):
        if claimed:
            (root / FACTS).unlink(missing_ok=True)
        kind = "images" if cut is None else "clips"
        raise ValueError(f"expected {kind} in {root}, got {len(pictures)} corrupt files only; replace them")
    return Counts(**outcomes)


class CacheSource(Source):
    """The samples of a cache; a latent is drawn from the VAE's posterior each time.

    They are the images or clips of the folder whose files are there, told by names alone; those without are left out
    with a warning. A folder without any gives what its cache files hold.

    Args:
        expected: what the cache must be, such as `model_facts(transformer)`; other values raise `ValueError`.
        shift, scale: sample = (latent - shift) * scale, each a number or a list with one for each channel. None: as
            diffattn_cache.json says; an official cache has none, and both must be given.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        expected: Mapping[str, Any] | None = None,
        shift: PerChannel | None = None,
        scale: PerChannel | None = None,
    ) -> None:
        self.folder = Path(folder)
        known = read_facts(self.folder)
        find = clips_in if known and Cut.of(known) else pictures_in
        self.names = _cached_names(self.folder, tuple(layout(known)) if known else (LATENTS, PROMPT), find)
        if known is None and (shift is None or scale is None):
            raise ValueError(
                f"expected {FACTS} in {folder}, got none, as in an official cache; pass shift= and scale=, the "
                f"shift_factor and scaling_factor of the VAE that encoded it"
            )
        self.facts = known or official_facts(self.folder, self.names[0], shift, scale)
        compare(self.folder, expected or {}, self.facts)
        self.shift: PerChannel = self.facts["shift_factor"] if shift is None else shift
        self.scale: PerChannel = self.facts["scaling_factor"] if scale is None else scale
        self._layout = layout(self.facts)
        self._constants = {
            name: torch.tensor(value, dtype=torch.float32) for name, value in self.facts.get("constants", {}).items()
        }

    def __len__(self) -> int:
        return len(self.names)

    @property
    def picture_size(self) -> tuple[int, int] | None:
        """Height and width in pixels; None where an official cache does not say."""
        size = self.facts["picture_size"]
        return None if size is None else (size[0], size[1])

    @property
    def frames(self) -> int | None:
        """Of a clip; None for images of an image model."""
        frames: int | None = self.facts.get("frames")
        return frames

    def sample(self, index: int, generator: torch.Generator) -> Sample:
        """Sample `index`; `generator` draws its latent."""
        name = self.names[index]
        found: Tensors = {}
        for ending, shapes in self._layout.items():
            found |= self._read(name, ending, shapes)
        mean, std = (found.pop(part).float() for part in POSTERIOR)
        shift, scale = (_spread(value, mean) for value in (self.shift, self.scale))
        latents = (mean + std * torch.randn(mean.shape, generator=generator) - shift) * scale
        conditioning = {OFFICIAL.get(key, key): value for key, value in found.items()} | self._constants
        return Sample(name, latents, conditioning)

    def _read(self, name: str, ending: str, want: Shapes) -> Tensors:
        """The tensors of one file; floating ones in float32."""
        path = self.folder / f"{name}{ending}"
        try:
            got = shapes_in(path)
            if not agree(got, want):
                raise ValueError(f"expected tensors {want} in {path}, got {got}")
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in want}
        except ValueError as error:
            raise ValueError(
                f"sample {name} can't be read: {error}; delete the file and write the cache again"
            ) from error
        return {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}


def _spread(value: PerChannel, like: Tensor) -> Tensor | float:
    """One value, or one for each channel along the first axis of `like`."""
    return torch.tensor(value).view(-1, *[1] * (like.ndim - 1)) if isinstance(value, list) else value


def _facts(pipe: Any, size: tuple[int, int], cut: Cut | None, max_sequence_length: int | None) -> Facts:
    """What the cache of a pipeline is; refuses pipelines, sizes and clips that can't be cached."""
    model = model_of(pipe)
    row, own = encoder_of(model), model_facts(model)
    cell, token = multiple_of(pipe, model)
    if any(side < 1 or side % token for side in size):
        raise ValueError(f"expected a height and width in multiples of {token} pixels, got {size}; round them")
    length = max_sequence_length or own.get("text_length") or text_length_of(pipe)
    if own.get("text_length", length) != length:
        raise ValueError(f"{own['model']} takes {own['text_length']} text tokens, got {length}; leave it out")
    if cut is not None:
        if not row.frames:
            raise ValueError(f"{own['model']} makes images, got frames={cut.frames} of clips; leave the frames out")
        check_frames(pipe, cut.frames)
    facts = own | {
        **(({"frames": 1} if cut is None else cut.facts) if row.frames else {}),
        "latent_size": [
            *([latent_frames(pipe, model, cut.frames if cut else 1)] if row.frames else []),
            *(side // cell for side in size),
        ],
        "picture_size": list(size),
        **vae_facts(pipe.vae.config),
        "text_length": length,
    }
    if "FluxTransformer2DModel" in row.models:
        return facts
    # A look at one caption: how many tokens there are in the end is the pipeline's own affair.
    shapes = {name: list(value.shape) for name, value in row.text(pipe, "", length).items()}
    width = shapes["encoder_hidden_states"][-1]
    if width != own["text_dim"]:
        raise ValueError(
            f"expected text of width {own['text_dim']} for {own['model']}, got {width}: wrong text encoder"
        )
    return facts | {"conditioning": shapes, "constants": row.by_size(model, size)}


def _claim(folder: Path, facts: Facts) -> bool:
    """Say what the cache is, or compare with what it says; whether it was said now."""
    known = read_facts(folder)
    if known is None:
        write_json(folder / FACTS, facts)
    else:
        compare(folder, facts, known)
    return known is None


def _encode(pipe: Any, root: Path, picture: Captioned, facts: Facts, dtype: torch.dtype, origins: Origins) -> str:
    """Write what one image lacks; says what became of it, in the words of `Counts`."""
    files = layout(facts)
    paths = {ending: root / f"{picture.name}{ending}" for ending in files}
    wanted = {ending: origins.of(picture, shapes) for ending, shapes in files.items()}
    lacking = [
        ending
        for ending, shapes in files.items()
        if not (_whole(paths[ending], shapes) and origins.holds(paths[ending], wanted[ending], picture.name))
    ]
    for ending in lacking:
        tensors: Tensors = {}
        if "mean" in files[ending]:
            pixels = _pixels(picture, facts)
            if pixels is None:
                # A broken file left here would look like a sample.
                paths[ending].unlink(missing_ok=True)
                return "corrupt"
            tensors |= _posterior(pipe, pixels)
        if files[ending].keys() - set(POSTERIOR):
            tensors |= _conditioning(pipe, picture.caption, facts)
        _save(paths[ending], {name: tensors[name] for name in files[ending]}, dtype, wanted[ending])
    return "done" if lacking else "skipped"


def _whole(path: Path, shapes: Shapes) -> bool:
    """Whether a file is there and whole; raises `ValueError` where it is, but holds something else."""
    if not path.exists():
        return False
    try:
        got = shapes_in(path)
    except ValueError as error:
        logger.warning("%s; it is written anew", error)
        return False
    if not agree(got, shapes):
        raise ValueError(
            f"{path} is of the cache of another model or size: expected {shapes}, got {got}; use another folder, or "
            f"delete the .safetensors files there to encode anew"
        )
    return True


def _pixels(picture: Captioned, facts: Facts) -> Tensor | None:
    """The image (3, h, w) or clip (3, f, h, w); None, with a warning, where it can't be read."""
    size, cut = facts["picture_size"], Cut.of(facts)
    try:
        return load_picture(picture.path, size) if cut is None else load_clip(picture.path, size, cut)
    except ValueError as error:
        logger.warning("corrupt %s: %s", "image" if cut is None else "clip", error)
        return None


def _posterior(pipe: Any, pixels: Tensor) -> Tensors:
    # Not the VAE's own device, which is the CPU while it is offloaded.
    batch, model = pixels[None].to(pipe._execution_device, pipe.vae.dtype), model_of(pipe)
    frames = encoder_of(model).frames
    posterior = pipe.vae.encode(batch[:, :, None] if frames and batch.ndim == 4 else batch).latent_dist
    found = {"mean": posterior.mean[0], "std": posterior.std[0]}
    return {name: whole_patches(model, value) for name, value in found.items()} if frames else found


def _conditioning(pipe: Any, caption: str, facts: Facts) -> Tensors:
    """The caption's tensors, under the names in the file."""
    tensors = encoder_of(model_of(pipe)).text(pipe, caption, facts["text_length"])
    if "conditioning" in facts:
        return tensors
    return {official: tensors[name] for official, name in OFFICIAL.items()}


def _save(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype, origin: str) -> None:
    values = {
        key: value.to("cpu", dtype if value.is_floating_point() else value.dtype).contiguous()
        for key, value in tensors.items()
    }
    if not all(value.isfinite().all() for value in values.values()):
        raise ValueError(f"expected finite numbers for {path.name}, got NaN or infinity; encode in bfloat16 or float32")
    with written(path) as temporary:
        save_file(values, temporary, {ORIGIN: origin})  # one entry: safetensors gives several any order


def _cached_names(folder: Path, endings: tuple[str, ...], find: Callable[[Iterable[str]], dict[str, str]]) -> list[str]:
    """The names of the samples; `find` tells those of images or clips among files."""
    files = list_files(folder)
    by_ending = [{file.removesuffix(ending) for file in files if file.endswith(ending)} for ending in endings]
    whole, any_of = set.intersection(*by_ending), set.union(*by_ending)
    wanted = find(files).keys() or any_of
    if not whole & wanted:
        lost = f"{FACTS} is missing; " if any(file.endswith(SAMPLE) for file in files) and SAMPLE not in endings else ""
        raise ValueError(
            f"expected cached images or clips in {folder}, got none of {len(wanted)}; {lost}run write_cache on it first"
        )
    if wanted - whole:
        logger.warning("not cached, left out: %s; run write_cache on %s", named(sorted(wanted - whole)), folder)
    if whole - wanted:
        logger.warning("cached, but their images or videos are gone, left out: %s", named(sorted(whole - wanted)))
    return sorted(whole & wanted)
