"""Images larger than those of training, composed from a model's stock pipelines.

    image = text_to_image(prompt) at about the size of training, by the model's own attention
    image = image_to_image(prompt, enlarge(image), strength), stage by stage, by efficient attention

The first image settles the composition. A stage enlarges it, adds noise up to `strength` and takes the noise away
again, which draws the detail; there a window costs little and sees enough. The image-to-image pipeline is the one that
diffusers has for the family, around the same models and with its own time shifting.

Source: Liu et al., CLEAR: Conv-Like Linearization Revs Pre-Trained Diffusion Transformers Up,
https://arxiv.org/abs/2412.16112, after SDEdit, https://arxiv.org/abs/2108.01073. The paper goes from 1024 to 2048 to
4096 pixels; `growth=None` goes there at once, as the released notebook does. Difference: L0 of proportional attention
is the length of the first picture's sequence, not the constant 4608.
"""

import contextlib
import dataclasses
import functools
import inspect
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from .grid import TokenGrid
from .mechanisms import ClearAttention, Mechanism, SoftmaxAttention
from .mechanisms.softmax import OFFICIAL_TRAIN_TOKENS
from .swap.apply import Handle, apply, swaps_of
from .swap.plan import resolve

Size = tuple[int, int]
"""Height and width in pixels."""

StageAttention = Mechanism | Callable[[Any], Handle] | None
"""A mechanism, or a function that swaps a pipeline's attention; None leaves it as it is."""

Swap = Callable[[Any], contextlib.AbstractContextManager[Any]]
"""Swaps a pipeline's attention for as long as the context lasts."""

BASE_ONLY = {"num_inference_steps", "guidance_scale", "latents", "sigmas", "timesteps"}
"""Arguments that `base_call` may have for the first image alone."""
OURS = {"prompt", "height", "width", "generator", "num_images_per_prompt", "output_type", "return_dict"}
"""Arguments that `base_call` may not have."""


@dataclass(frozen=True)
class Stage:
    """One call of a pipeline."""

    size: Size
    steps: int
    """Denoising steps that were made: in image-to-image fewer than asked for."""
    seconds: float


@dataclass(frozen=True)
class LargeResult:
    """An image, and how it came about."""

    picture: Image.Image
    stages: tuple[Stage, ...]
    """The first image, then the stages."""


Progress = Callable[[Stage, Image.Image], None]


@torch.no_grad()
def generate_large(
    pipe: Any,
    prompt: str | None,
    *,
    size: Size,
    via: int = 1024,
    mechanism: StageAttention = None,
    apply_options: Mapping[str, Any] | None = None,
    strength: float = 0.7,
    num_inference_steps: int = 20,
    base_guidance_scale: float | None = None,
    guidance_scale: float | None = None,
    growth: float | None = 2.0,
    generator: torch.Generator | None = None,
    base_call: Mapping[str, Any] | None = None,
    tiled_vae: bool = True,
    progress: Progress | None = None,
) -> LargeResult:
    """Draw `prompt` at `size` by way of a smaller image; the pipeline is left as it was.

    Trained weights go into the stages alone, after a first image by the model's own, where `mechanism` loads them:
    `lambda pipe: diffattn.load(pipe, "Huage001/CLEAR", weight_name=..., proportional=True, ntk_factor=10)`.

    A pipeline that is swapped already keeps its swap in all stages, the first image included, with its `steps=` and
    `ntk_factor`; `mechanism` must be None.

    Args:
        pipe: a text-to-image pipeline.
        size: height and width in pixels, multiples of `vae_scale_factor * 2`.
        via: longer side of the first image in pixels; take the size that the model was trained for.
        mechanism: attention of the stages, such as `ClearAttention(radius=16, ntk_factor=10, proportional=True)`, or a
            function that swaps it. None: what `pipe` has. Its `train_tokens`, unless set, become those of the first
            image where the model is a transformer: its cells and `max_sequence_length` (or `prompt_embeds`) of text.
        apply_options: further arguments of `diffattn.apply`, such as `layers` or `backend`.
        strength: share of the steps that a stage makes, in (0, 1]; 1 forgets the image before.
        base_guidance_scale: of the first image. None, here and for the stages: the default of the pipeline.
        growth: the longer side grows by equal factors of at most this, but for rounding. None: to `size` at once.
        base_call: further arguments of the first call, such as `max_sequence_length`. Stages get those that their
            pipeline knows, but for steps, guidance, sigmas, timesteps and latents.
        tiled_vae: encode and decode in tiles during the stages.
        progress: called after the first image and after every stage, with the image so far.

    Raises `ValueError`, before anything is drawn, for sizes and options that do not fit, and for pipelines without a
    counterpart for image-to-image.
    """
    call = dict(base_call or {})
    _check(pipe, strength, num_inference_steps, call, tiled_vae)
    base, *larger = stage_sizes(size, via, growth, _multiple(pipe))
    refiner = image_to_image(pipe)
    swap = _swap_of_stages(pipe, mechanism, apply_options or {}, [_grid(pipe, s, call) for s in (base, *larger)])
    with swap(refiner):
        pass  # raises here what would else raise after the first image

    run = _Run(progress)
    common = {"prompt": prompt, "generator": generator, "num_inference_steps": num_inference_steps}
    picture = run(pipe, base, {**common, **_guidance(base_guidance_scale), **call})
    shared = {name: value for name, value in _takes(refiner, call).items() if name not in BASE_ONLY}
    later = {**shared, **common, **_guidance(guidance_scale), "strength": strength}
    with swap(refiner), _tiled(pipe.vae, tiled_vae):
        for stage in larger:
            enlarged = picture.resize(stage[::-1], Image.Resampling.LANCZOS)
            picture = run(refiner, stage, {**later, "image": enlarged})
            pipe.maybe_free_model_hooks()  # offloading is the first pipeline's: the other one has no hooks of its own
    return LargeResult(picture, tuple(run.stages))


@dataclass
class _Run:
    """Calls pipelines, one stage after the other, and keeps the record."""

    progress: Progress | None
    stages: list[Stage] = field(default_factory=list)

    def __call__(self, pipe: Any, size: Size, arguments: dict[str, Any]) -> Image.Image:
        arguments = {**arguments, **_takes(pipe, {"height": size[0], "width": size[1]})}
        start = time.perf_counter()
        picture: Image.Image = pipe(**arguments).images[0]
        seconds = time.perf_counter() - start
        self.stages.append(Stage(size, getattr(pipe, "num_timesteps", arguments["num_inference_steps"]), seconds))
        if self.progress is not None:
            self.progress(self.stages[-1], picture)
        return picture


def stage_sizes(size: Size, via: int, growth: float | None = 2.0, multiple: int = 16) -> list[Size]:
    """The size of the first image and of every stage, in multiples of `multiple` pixels.

    >>> stage_sizes((3072, 4096), via=1024)
    [(768, 1024), (1536, 2048), (3072, 4096)]
    """
    if any(side < 1 or side % multiple for side in size):
        raise ValueError(f"size must be a height and a width in multiples of {multiple} pixels, got {size}")
    if via < 1 or via % multiple:
        raise ValueError(f"via must be a multiple of {multiple} pixels, got {via}")
    if growth is not None and not growth > 1:
        raise ValueError(f"growth must be above 1, or None to go to the size at once, got {growth}")
    longer = max(size)
    if longer < via:
        raise ValueError(f"size={size} is smaller than via={via}: give a smaller via, or call the pipeline itself")
    # the logarithm of 8 to the base 2 may be a hair more than 3
    stages = 1 if growth is None else max(1, math.ceil(math.log(longer / via, growth) - 1e-9))
    factors = [(via / longer) ** (1 - i / stages) for i in range(stages)]
    smaller = [(_round(size[0] * factor, multiple), _round(size[1] * factor, multiple)) for factor in factors]
    return list(dict.fromkeys([*smaller, size]))


def _round(pixels: float, multiple: int) -> int:
    return max(multiple, round(pixels / multiple) * multiple)


def image_to_image(pipe: Any) -> Any:
    """The family's stock image-to-image pipeline around the models and the scheduler of `pipe`."""
    from diffusers import AutoPipelineForImage2Image

    try:
        refiner = AutoPipelineForImage2Image.from_pipe(pipe)
    except ValueError as error:
        raise ValueError(f"diffusers has no image-to-image pipeline for {type(pipe).__name__} ({error})") from error
    if not _takes(refiner, {"strength": 1}):
        raise ValueError(f"{type(refiner).__name__} edits images but takes no strength, which the stages need")
    refiner.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
    return refiner


def _check(pipe: Any, strength: float, steps: int, call: dict[str, Any], tiled_vae: bool) -> None:
    if getattr(pipe, "vae", None) is None or not hasattr(pipe, "vae_scale_factor"):
        raise ValueError(f"expected a text-to-image pipeline with a VAE, got {type(pipe).__name__}")
    if tiled_vae and not hasattr(pipe.vae, "use_tiling"):
        raise ValueError(f"{type(pipe.vae).__name__} cannot work in tiles: pass tiled_vae=False")
    if not 0 < strength <= 1:
        raise ValueError(f"strength must be above 0 and at most 1, got {strength}")
    if int(steps * strength) < 1:
        raise ValueError(f"strength={strength} of num_inference_steps={steps} leaves a stage no step: raise either")
    double = ", ".join(sorted(OURS & call.keys()))
    if double:
        raise ValueError(f"base_call may not have {double}: generate_large gives these itself")


def _multiple(pipe: Any) -> int:
    """What the sides of an image must divide by: two latent cells."""
    return int(pipe.vae_scale_factor) * 2


def _grid(pipe: Any, size: Size, call: dict[str, Any]) -> TokenGrid | None:
    """A transformer's tokens for an image of this size; None for UNets, whose layers see several grids."""
    if "transformer" not in pipe.components:
        return None
    height, width = (side // _multiple(pipe) for side in size)
    embeds = call.get("prompt_embeds")
    if isinstance(embeds, torch.Tensor):
        return TokenGrid(height, width, before=embeds.shape[1])
    default = inspect.signature(type(pipe).__call__).parameters.get("max_sequence_length")
    return TokenGrid(height, width, before=call.get("max_sequence_length", default.default if default else 0))


def _swap_of_stages(
    pipe: Any, mechanism: StageAttention, options: Mapping[str, Any], grids: list[TokenGrid | None]
) -> Swap:
    """What swaps the attention of the stages; `grids` are those of the first image and of every stage."""
    if options and (mechanism is None or callable(mechanism)):
        raise ValueError(f"apply_options={dict(options)} need a mechanism, such as ClearAttention(radius=16)")
    if mechanism is None:
        return contextlib.nullcontext
    if swaps_of(pipe):
        raise ValueError("this pipeline's attention is swapped already: pass mechanism=None to keep it, or restore it")
    if callable(mechanism):
        return mechanism
    chosen = with_train_tokens(resolve(mechanism), grids[0])
    for grid in grids[1:]:
        if grid is not None:
            chosen.check(grid)
    return functools.partial(apply, mechanism=chosen, **options)


def with_train_tokens(mechanism: Mechanism, grid: TokenGrid | None) -> Mechanism:
    """Proportional attention with L0 = the tokens of `grid`, unless it says its own; others as they are."""
    if grid is None or not isinstance(mechanism, ClearAttention | SoftmaxAttention) or not mechanism.proportional:
        return mechanism
    if mechanism.train_tokens != OFFICIAL_TRAIN_TOKENS or getattr(mechanism, "official", False):
        return mechanism
    return dataclasses.replace(mechanism, train_tokens=grid.tokens)


@contextlib.contextmanager
def _tiled(vae: Any, wanted: bool) -> Iterator[None]:
    """The VAE works in tiles inside the block, if wanted, and as before after it."""
    change = wanted and not vae.use_tiling
    if change:
        vae.enable_tiling()
    try:
        yield
    finally:
        if change:
            vae.disable_tiling()


def _guidance(scale: float | None) -> dict[str, float]:
    return {} if scale is None else {"guidance_scale": scale}


def _takes(pipe: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Those of the arguments that the pipeline's call knows."""
    known = inspect.signature(type(pipe).__call__).parameters
    return {name: value for name, value in arguments.items() if name in known}
