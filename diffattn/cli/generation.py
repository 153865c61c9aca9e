"""Make images or videos with a model of any family, by efficient attention or by its own."""

import inspect
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image

from ..highres import generate_large
from ..measure import psnr
from ..measure.draws import least_side
from ..measure.strips import VideoDistance, strips, to_image
from ..options import Help, at_least, check_fields
from ..swap.apply import restore
from .arguments import parse_size
from .places import Frames
from .swapping import Swap

MOST_STEPS, MOST_IMAGES = 10_000, 1000


def check_sides(pipe: Any, height: int | None, width: int | None) -> None:
    """Raise `ValueError` for sides smaller than one token, which diffusers would round to nothing."""
    least = least_side(pipe)
    for name, side in (("--height", height), ("--width", width)):
        if side is not None and side < least:
            raise ValueError(f"expected {name} of at least {least} pixels for {type(pipe).__name__}; got {side}")


def size_line(results: Sequence[Frames], call: dict[str, Any], pipe: Any) -> list[str]:
    """A line where the pipeline rounded the size that was asked for."""
    width, height = results[0][0].size
    asked = call.get("height") or height, call.get("width") or width
    if asked == (height, width):
        return []
    return [f"{height} x {width} pixels instead of {asked[0]} x {asked[1]}: {type(pipe).__name__} rounds them"]


def sizes(results: Sequence[Frames]) -> dict[str, int]:
    """Height, width, and the frames of videos, for the record."""
    width, height = results[0][0].size
    frames = {"frames": len(results[0])} if len(results[0]) > 1 else {}
    return {"height": height, "width": width, **frames}


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to make; None leaves the choice to the pipeline."""

    prompt: Annotated[str, Help("What to draw.")]
    seed: int = 0
    negative_prompt: Annotated[str | None, Help("What not to draw.")] = None
    height: Annotated[int | None, at_least(1), Help("In pixels.")] = None
    width: Annotated[int | None, at_least(1), Help("In pixels.")] = None
    frames: Annotated[int | None, at_least(1), Help("Frames of a video.")] = None
    steps: Annotated[int | None, at_least(1), Help("Denoising steps, up to 10,000.")] = None
    guidance: Annotated[float | None, Help("Guidance scale.")] = None
    images: Annotated[int | None, at_least(1), Help("Images of the same prompt, up to 1000.", "--num-images")] = None

    def __post_init__(self) -> None:
        check_fields(self)
        for name, value, most in (("--steps", self.steps, MOST_STEPS), ("--num-images", self.images, MOST_IMAGES)):
            if value is not None and value > most:
                raise ValueError(f"expected {name} of at most {most}; got {value}; give a smaller number")

    def arguments(self, pipe: Any, native: dict[str, Any]) -> dict[str, Any]:
        """Arguments of the pipeline's call; raises `ValueError` for those that it does not take."""
        given = {
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "height": self.height,
            "width": self.width,
            "num_frames": self.frames,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
            "num_images_per_prompt": self.images,
        }
        given = {key: value for key, value in given.items() if value is not None}
        known = inspect.signature(type(pipe).__call__).parameters
        for name in given:
            if name not in known:
                raise ValueError(f"{type(pipe).__name__} takes no {name}; leave that option out")
        scale = known.get("true_cfg_scale")
        if self.negative_prompt is not None and scale is not None and scale.default <= 1:
            raise ValueError(
                f"{type(pipe).__name__} reads a negative prompt with true_cfg_scale above 1 alone, which this command "
                "does not set: leave --negative-prompt out"
            )
        check_sides(pipe, self.height, self.width)
        generator = torch.Generator("cpu").manual_seed(self.seed)
        return {**native, **given, "generator": generator}


@dataclass(frozen=True, kw_only=True)
class Enlargement:
    """How an image becomes larger than those of training; None leaves the choice to `generate_large`."""

    size: Annotated[
        str | None,
        Help(
            "In pixels, for an image larger than those of training: drawn small by the model's own attention, then "
            "enlarged and drawn over in stages, by the mechanism or adapter.",
            metavar="HEIGHTxWIDTH",
        ),
    ] = None
    via: Annotated[
        int | None,
        at_least(1),
        Help("With --size: longer side drawn first. Default: 1024, or the bundled pipeline's own."),
    ] = None
    strength: Annotated[
        float | None, Help("With --size: share of the steps that a stage makes, up to 1. Default: 0.7.")
    ] = None
    growth: Annotated[
        float | None, Help("With --size: factor by which a stage enlarges at most; inf: at once. Default: 2.")
    ] = None

    def __post_init__(self) -> None:
        if self.size is None and (self.via, self.strength, self.growth) != (None, None, None):
            raise ValueError("--via, --strength and --growth are those of a large image: add --size")
        if self.size is not None:
            parse_size(self.size)

    @property
    def sides(self) -> tuple[int, int] | None:
        """Height and width of the large image."""
        return None if self.size is None else parse_size(self.size)

    def check(self, request: Request) -> None:
        """Raise `ValueError` for what does not go with `--size`."""
        if self.size is None:
            return
        if request.height or request.width:
            raise ValueError("--size says height and width: leave --height and --width out")
        if request.frames or request.images:
            raise ValueError("--size makes one image: leave --frames and --num-images out")

    def make(self, pipe: Any, request: Request, swap: Swap, native: dict[str, Any]) -> tuple[list[Frames], list[str]]:
        """The image, and a line on each stage; the swap is that of the stages, the first image has none."""
        assert self.size is not None
        call = request.arguments(pipe, native)
        prompt, generator = call.pop("prompt"), call.pop("generator")
        native_side = max(call.pop("height", 0), call.pop("width", 0)) or None
        options = {
            "via": self.via or native_side,
            "strength": self.strength,
            "growth": self.growth,
            "num_inference_steps": call.pop("num_inference_steps", None),
            "guidance_scale": call.get("guidance_scale"),
        }
        result = generate_large(
            pipe,
            prompt,
            size=parse_size(self.size),
            generator=generator,
            base_call=call,
            **swap.for_stages(),
            **{name: value for name, value in options.items() if value is not None},
        )
        return [[result.picture]], [
            f"{s.size[0]}x{s.size[1]}: {s.steps} steps, {s.seconds:.1f} s" for s in result.stages
        ]


def make(pipe: Any, arguments: dict[str, Any]) -> tuple[list[Frames], float]:
    """Run the pipeline: one entry per image or video, and the seconds it took."""
    start = time.perf_counter()
    output = pipe(**arguments)
    seconds = time.perf_counter() - start
    if hasattr(output, "images"):
        return [[to_image(image)] for image in output.images], seconds
    if hasattr(output, "frames"):
        return [[to_image(frame) for frame in video] for video in output.frames], seconds
    raise ValueError(f"{type(pipe).__name__} returns neither images nor frames, but {type(output).__name__}")


def make_reported(pipe: Any, request: Request, swap: Swap, native: dict[str, Any]) -> tuple[list[Frames], list[str]]:
    """What is asked for, with the swap left in place, and a line on it."""
    arguments = request.arguments(pipe, native)
    handle = swap.put(pipe)
    results, seconds = make(pipe, arguments)
    line = f"{'own attention' if handle is None else handle.layers[0].mechanism}: {seconds:.1f} s"
    return results, [line, *size_line(results, arguments, pipe)]


def make_compared(
    pipe: Any, request: Request, enlargement: Enlargement, native: dict[str, Any], results: list[Frames]
) -> tuple[list[Frames], list[str]]:
    """The same by the model's own attention, and lines that compare them."""
    if enlargement.size is not None:  # its swap was that of the stages alone
        full, lines = enlargement.make(pipe, request, Swap(None), native)
        return full, [*(f"own attention, {line}" for line in lines[1:]), f"PSNR between them {distance(results, full)}"]
    restore(pipe)
    full, seconds = make(pipe, request.arguments(pipe, native))
    lines = [f"own attention: {seconds:.1f} s; PSNR between them {distance(results, full)}"]
    if len(full[0]) > 1:
        pairs = zip(results, full, strict=True)
        lines += [f"video {i}: {VideoDistance.between(*map(stacked, pair))}" for i, pair in enumerate(pairs)]
        lines += judged(results, full) if native else []
    return full, lines


def judged(results: Sequence[Frames], full: Sequence[Frames]) -> list[str]:
    """What the videos of a bundled pipeline show, where they have its native size."""
    from ..tiny.evaluate_video import described
    from ..tiny.moving import SIDE

    if full[0][0].size != (SIDE, SIDE):
        return []
    pairs = enumerate(zip(results, full, strict=True))
    return [f"video {i}: {described(stacked(a))}; by its own: {described(stacked(b))}" for i, (a, b) in pairs]


def make_strips(results: Sequence[Frames], full: Sequence[Frames], name: str) -> Image.Image | None:
    """The first video's frames by the model's own attention and, below, by `name`; None where images were made."""
    if len(full[0]) == 1:
        return None
    return strips(full[0], {name: results[0]}, name="own attention", note="Small maps: error of the frame above.")


def distance(results: Sequence[Frames], others: Sequence[Frames]) -> str:
    """PSNR between two runs, over all their images, in words."""
    first, second = (stacked([frame for frames in run for frame in frames]) for run in (results, others))
    value = psnr(first, second)
    return "is infinite (identical)" if math.isinf(value) else f"{value:.1f} dB"


def stacked(frames: Frames) -> np.ndarray:
    """uint8 `(frames, height, width, channels)`."""
    return np.stack([np.asarray(frame) for frame in frames])
