"""Make images or videos with a model of any family, by efficient attention or by its own, and write them."""

import importlib.util
import inspect
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image

from ..adapters import load
from ..files.writing import written
from ..highres import generate_large
from ..measure import psnr
from ..media.outputs import (
    VIDEO_ENDINGS,
    check_file,
    check_folder,
    check_frames,
    check_picture_ending,
    check_picture_size,
    check_video_size,
    trim_frames,
)
from ..media.pixels import as_pixels
from ..media.video import VideoWriter
from ..options import Help, at_least, check_fields
from ..parallel.image import shard
from ..swap.apply import Handle, apply, restore
from .arguments import parse_mechanism, parse_options, parse_size

logger = logging.getLogger("diffattn")

MOST_STEPS, MOST_IMAGES = 10_000, 1000

Frames = list[Image.Image]
"""One result: an image, or the frames of a video."""


def check_sides(pipe: Any, height: int | None, width: int | None) -> None:
    """Raise `ValueError` for sides smaller than one token, which diffusers would round to nothing."""
    cell = int(getattr(pipe, "vae_scale_factor", None) or getattr(pipe, "vae_scale_factor_spatial", None) or 1)
    least = cell * (2 if getattr(pipe, "transformer", None) is not None else 1)
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
        check_sides(pipe, self.height, self.width)
        generator = torch.Generator("cpu").manual_seed(self.seed)
        return {**native, **given, "generator": generator}


@dataclass(frozen=True)
class Swap:
    """What to swap: a mechanism with options, or an adapter that says its own and whose options these override."""

    mechanism: str | None
    options: Sequence[str] = ()
    layers: Sequence[str] | None = None
    steps: slice | None = None
    backend: str = "auto"
    adapter: str | None = None
    weight_name: str | None = None
    reuse: int = 1
    parallel: bool = False
    """Split the rows of the image among the processes of `mesh`."""
    mesh: Any = None

    def __post_init__(self) -> None:
        if self.parallel and not self.wanted:
            raise ValueError("--parallel splits clear's local attention: add --mechanism clear or --adapter")
        if self.mechanism and self.adapter:
            raise ValueError("give --mechanism or --adapter, not both: an adapter says its own mechanism")
        if self.adapter and self.layers:
            raise ValueError("an adapter says its own layers: leave --layers out")
        if self.weight_name and not self.adapter:
            raise ValueError("--weight-name is a file of an adapter: add --adapter")
        if not self.wanted and (self.options or self.layers or self.steps or self.backend != "auto" or self.reuse > 1):
            raise ValueError("-o, --layers, --swap-steps, --backend and --reuse need a --mechanism or an --adapter")

    @property
    def wanted(self) -> bool:
        return self.mechanism is not None or self.adapter is not None

    def __str__(self) -> str:
        return self.mechanism or f"adapter {self.adapter}"

    def put(self, pipe: Any) -> Handle | None:
        """Swap the attention of `pipe`; None where nothing is to be swapped."""
        handle = self._put_whole(pipe)
        return shard(pipe, self.mesh) if self.parallel else handle

    def _put_whole(self, pipe: Any) -> Handle | None:
        if self.adapter is not None:
            options: dict[str, Any] = {**parse_options(self.options)}
            foreign = options.keys() & inspect.signature(load).parameters.keys()
            if foreign:
                raise ValueError(
                    f"-o is for options of the adapter's mechanism, and {min(foreign)} is none: leave it out"
                )
            places = {name: value for name, value in self._places.items() if name != "layers"}
            return load(pipe, self.adapter, weight_name=self.weight_name, **places, **options)
        if self.mechanism is None:
            return None
        chosen = parse_mechanism(self.mechanism, self.options)
        return apply(pipe, chosen, **self._places)

    def for_stages(self) -> dict[str, Any]:
        """The arguments of `generate_large` that swap the stages alone."""
        if self.mechanism is None or self.parallel:
            return {"mechanism": self.put if self.wanted else None}
        return {"mechanism": parse_mechanism(self.mechanism, self.options), "apply_options": self._places}

    @property
    def _places(self) -> dict[str, Any]:
        return {"layers": self.layers, "steps": self.steps, "backend": self.backend, "reuse": self.reuse}


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
        return [[_picture(image)] for image in output.images], seconds
    if hasattr(output, "frames"):
        return [[_picture(frame) for frame in video] for video in output.frames], seconds
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
    return full, [f"own attention: {seconds:.1f} s; PSNR between them {distance(results, full)}"]


def distance(results: Sequence[Frames], others: Sequence[Frames]) -> str:
    """PSNR between two runs, over all their images, in words."""
    first, second = (np.stack([np.asarray(frame) for frames in run for frame in frames]) for run in (results, others))
    value = psnr(first, second)
    return "is infinite (identical)" if math.isinf(value) else f"{value:.1f} dB"


def _picture(image: Any) -> Image.Image:
    """An image that the pipeline returns as Pillow or as an array (height, width, channels)."""
    if isinstance(image, Image.Image):
        return image
    return Image.fromarray((as_pixels(image).clip(0, 1) * 255).round().astype(np.uint8))


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the results go, tried before the work."""

    output: Path
    count: int = 1
    """Images or videos: several are numbered."""
    compare: bool = False
    """Also those by the model's own attention, with `-full` in their names."""
    overwrite: bool = False
    """May videos that are there be replaced? Images are."""

    @property
    def full(self) -> Path:
        """For those by the model's own attention."""
        return self.output.with_stem(f"{self.output.stem}-full")

    @property
    def paths(self) -> list[Path]:
        """All names, without what `save` changes in them."""
        return [
            path
            for output in ([self.output, self.full] if self.compare else [self.output])
            for path in numbered(output, self.count)
        ]

    def check(self) -> None:
        """Raise for names that are wrong for images and videos alike."""
        if not self.output.name:
            raise ValueError(f"expected a name for --output; got {self.output}, a folder that is there; name one in it")
        if self.output.suffix and self.output.suffix.lower() not in VIDEO_ENDINGS:
            check_picture_ending(self.output)
        for path in self.paths:
            check_folder(path.parent)
            if path.suffix and path.exists():
                check_file(path, overwrite=self.overwrite or path.suffix.lower() not in VIDEO_ENDINGS)

    def check_kind(self, pipe: Any, height: int | None, width: int | None) -> None:
        """Raise for names, and sizes, that are wrong for what the pipeline makes; None is a size of its own."""
        sides = height or 1, width or 1
        for path in self.paths:
            is_video = path.suffix.lower() in VIDEO_ENDINGS
            if makes_video(pipe) and is_video and can_encode():
                check_file(path, overwrite=self.overwrite)
                check_video_size(*sides)
            elif makes_video(pipe):
                check_frames(path.with_suffix(""), overwrite=self.overwrite)
            elif is_video:
                raise ValueError(
                    f"{type(pipe).__name__} makes images, and --output {path} is the name of a video: end it in .png"
                )
            else:
                check_file(named_picture(path), overwrite=True)
                check_picture_size(path, *sides)


def makes_video(pipe: Any) -> bool:
    """Whether a pipeline's call makes frames, by its arguments."""
    return bool({"num_frames", "video_length"} & inspect.signature(type(pipe).__call__).parameters.keys())


def can_encode() -> bool:
    """Whether PyAV is installed."""
    return importlib.util.find_spec("av") is not None


def named_picture(path: Path) -> Path:
    """The name with the ending of an image, where it has none or that of a video."""
    return path.with_suffix(".png") if path.suffix.lower() in ("", *VIDEO_ENDINGS) else path


def numbered(output: Path, count: int) -> list[Path]:
    """The name of each of `count` results."""
    return [output] if count == 1 else [output.with_stem(f"{output.stem}-{i}") for i in range(count)]


def save(results: Sequence[Frames], output: Path, fps: int = 8) -> list[Path]:
    """Write every result to `output`, numbered where there are several; videos as .mp4, or as a folder of frames.

    Frames become a folder where `output` has another ending, or where PyAV (extra `video`) is not installed, said in
    the log.
    """
    paths = numbered(output, len(results))
    return [save_one(frames, path, fps) for frames, path in zip(results, paths, strict=True)]


def save_one(frames: Frames, path: Path, fps: int) -> Path:
    """Write an image, a video, or a folder of frames; returns what was written.

    One frame under the name of a video becomes an image, for it is not known to be a video.
    """
    if len(frames) == 1:
        path = named_picture(path)
        with written(path) as temporary:
            frames[0].save(temporary)
        return path
    if path.suffix.lower() in VIDEO_ENDINGS and can_encode():
        with VideoWriter(path, fps) as video:
            for frame in frames:
                video.write(np.asarray(frame.convert("RGB")))
        return path
    if path.suffix.lower() in VIDEO_ENDINGS:
        logger.warning('writing a folder of frames: for %s, pip install "diffattn[video]"', path.suffix)
    folder = path.with_suffix("")
    for number, frame in enumerate(frames):
        with written(folder / f"frame-{number:04d}.png") as temporary:
            frame.save(temporary)
    trim_frames(folder, len(frames))
    return folder
