"""What `diffattn animate` does: faces found and control images kept in a file, steps, frames written as they come.

    animation = Animation(source=..., driving=Clip(path=...), checkpoint=..., output=..., settings=Settings())
    with animation.prepared(LandmarkFile("points.npy"), device, dtype) as run:
        run.write(run.denoise())

The steps are those of `XPortraitPipeline`, whose random numbers come in the same order; but control images stay on
the disk, and a run that was stopped goes on after its last whole step.
"""

import contextlib
import functools
import inspect
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffattn.media.clip import Clip, digest, read_opaque
from diffattn.media.outputs import VIDEO_ENDINGS, check_file, check_video_size
from diffattn.media.pictures import side_by_side
from diffattn.media.video import VideoWriter, pyav
from diffattn.media.work import CONTENTS, digest_folder

from ..checkpoint.opening import open_pipeline, unet_number
from ..checks import check_windows
from ..face.alignment import Picture, resize
from ..face.detection import LandmarkFile, LandmarkFinder, Pixels, Points, choose_face, draw_landmarks, fill_missing
from ..face.hints import control_pictures, plan_alignment
from ..face.paste import Box, crop, face_box, paste
from ..sampling.denoiser import Condition, Denoiser, Networks
from ..sampling.features import CELL, EncodedWhenRead
from ..sampling.start import set_timesteps
from .settings import Settings
from .work import Controls, WorkFolder

LABELS = ("source", "driving", "control", "eyes and mouth", "result")
"""Of the preview, from left to right."""
CHUNK = 8
"""Frames that are decoded together."""


def plain(frames: Iterable[Any], label: str, total: int | None) -> Iterable[Any]:
    """Shows nothing."""
    return frames


Progress = Callable[[Iterable[Any], str, int | None], Iterable[Any]]
"""Gets what takes long, a word for it and how many there are, if that is known; gives the same back."""


@dataclass(frozen=True, kw_only=True)
class Animation:
    """What is to be made of what; raises `ValueError` for what cannot be, before anything is opened for long."""

    source: Path
    driving: Clip
    checkpoint: Path
    """Folder from `convert`."""
    output: Path
    settings: Settings
    preview: Path | None = None
    """A video of all that plays a part, side by side."""
    faces: str = ""
    """Tells what finds the faces apart from other finders, for a run that is resumed."""
    resume: bool = False
    overwrite: bool = False
    """Replace an output, and a preview, that are there."""

    def __post_init__(self) -> None:
        check_windows(
            self.settings.window, self.settings.overlap, unet_number(self.checkpoint, "motion_max_seq_length")
        )
        taken = {self.source.resolve(): "the source", self.driving.path.resolve(): "the driving video"}
        for name, path in (("--output", self.output), ("--preview", self.preview)):
            if path is None:
                continue
            if path.resolve() in taken:
                raise ValueError(f"{name} {path} is {taken[path.resolve()]}; give another name")
            taken[path.resolve()] = name
            own = self.resume and path == self.output and self.work.wrote_output
            check_file(path, VIDEO_ENDINGS, overwrite=self.overwrite, own=own, option=name)
        pyav()

    @property
    def side(self) -> int:
        """Of what the networks make, in pixels."""
        return CELL * unet_number(self.checkpoint, "sample_size")

    @functools.cached_property
    def work(self) -> WorkFolder:
        """Where the run keeps what it has."""
        return WorkFolder(self.output)

    @contextlib.contextmanager
    def prepared(
        self, finder: LandmarkFinder, device: torch.device, dtype: torch.dtype, progress: Progress = plain
    ) -> Iterator["Run"]:
        """Everything up to the first step; a run that ends in the block without an error has its work removed.

        Args:
            finder: of faces; a `LandmarkFile` has the source's before those of the driving frames used.
            device: of the networks.
            dtype: of the networks.
            progress: goes through the frames of everything that takes long, and may show how far.

        Raises `ValueError` for a checkpoint, images, faces or a work folder that do not fit; nothing is left then.
        """
        source = read_opaque(self.source)
        self._check_sizes(source)
        self.work.open(self._fingerprint(device, dtype), self.resume)
        try:
            pipe = open_pipeline(self.checkpoint, device, dtype)
            self._try_writing()
            ready = self.work.controls.is_dir()
            controls = self.work.read_controls() if ready else self._write_controls(source, finder, progress)
            run = Run(self, pipe, source, controls, progress)
        except Exception:
            if not self.resume:
                self.work.remove()
            raise
        yield run
        self.work.remove()

    def _fingerprint(self, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        """What the video depends on, as JSON has it."""
        return {
            **asdict(self.settings),
            "paste": self.settings.pastes,
            CONTENTS: {
                "source": digest(self.source),
                "driving video": self.driving.digest(),
                "checkpoint": digest_folder(self.checkpoint),
            },
            "start": self.driving.start,
            "frames": self.driving.count,
            "skip": self.driving.skip,
            "rate": str(self.driving.rate),
            "faces": self.faces,
            "device": device.type,
            "dtype": str(dtype),
        }

    def _check_sizes(self, source: Pixels) -> None:
        """Raise where the frames are too large for a video file."""
        check_video_size(*(source.shape[:2] if self.settings.pastes else (self.side, self.side)))
        if self.preview is not None:
            square = np.zeros((self.side, self.side, 3), dtype=np.uint8)
            result = source if self.settings.pastes else square
            row = [source, next(self.driving.frames()), square, square, result]
            widths = sum(max(1, round(pixels.shape[1] * self.side / pixels.shape[0])) for pixels in row)
            check_video_size(self.side, widths)

    def _try_writing(self) -> None:
        """Raise where a video of this kind cannot be written with that sound."""
        trial = self.work.path / f"trial{self.output.suffix}"
        with VideoWriter(trial, self.driving.rate, self.driving.sound, self.driving.begin) as video:
            video.write(np.zeros((self.side, self.side, 3), dtype=np.uint8))
        trial.unlink()

    def _write_controls(self, source: Pixels, finder: LandmarkFinder, progress: Progress) -> Controls:
        """Find the faces, then align the frames; both go through the driving video once."""
        settings, side = self.settings, self.side
        target = find_source(finder, source)
        if target is None and (settings.pastes or settings.best_frame != "none"):
            raise ValueError(
                f"expected a face in {self.source}; got none; crop nearer, or give --no-paste --best-frame none"
            )
        size = next(self.driving.frames()).shape[:2]
        shown = progress(self.driving.frames(), "faces", None)
        found = finder.landmarks(itertools.chain([source], shown))[1:]
        chosen = choose_face(found, "largest" if settings.face is None else settings.face)
        points = fill_missing(chosen, settings.no_face)
        alignment = None
        if target is not None and settings.best_frame != "none":
            box = box_of(source, target, settings.pastes)
            view = source.shape[:2] if box is None else (box.side, box.side)
            placed = target if box is None else target - (box.left, box.top)
            alignment = plan_alignment(placed, view, points, size, settings.best_frame, height=side, width=side)
        shown = progress(self.driving.frames(), "alignment", len(points))
        pictures = control_pictures(shown, points, alignment, height=side, width=side, scaled=settings.scale_patches)
        return self.work.write_controls(pictures, points, target)


class Run:
    """An animation whose steps can begin, or go on."""

    def __init__(
        self, animation: Animation, pipe: Any, source: Pixels, controls: Controls, progress: Progress = plain
    ) -> None:
        """Raises `ValueError` for settings that do not go with so many frames."""
        settings, self.progress = animation.settings, progress
        self.animation, self.pipe, self.source, self.controls = animation, pipe, source, controls
        self.box = box_of(source, controls.source, settings.pastes)
        self.generator = torch.Generator().manual_seed(settings.seed)
        set_timesteps(pipe.scheduler, settings.steps, pipe.device)
        frames = len(controls.driving)
        self.windows = pipe.plan_windows(
            frames, settings.window, settings.overlap, settings.official, None, self.generator
        )

    @torch.no_grad()
    def denoise(self) -> Tensor:
        """Latents of all frames, (frames, 4, rows, columns); they are kept after each step."""
        pipe, scheduler, work = self.pipe, self.pipe.scheduler, self.animation.work
        references = pipe.encode(self._reference().to(pipe.device), self.generator)
        begin, latents = work.read_state(self.generator) or (
            0,
            pipe.start_latents(references[:1], len(self.controls.driving), self.generator),
        )
        latents = latents.to(pipe.device, pipe.unet.dtype)
        text = pipe.null_text().to(pipe.device)
        denoiser = Denoiser(
            Networks(pipe.unet, pipe.reference_unet, pipe.controlnet),
            Condition(references[:, None], self._features(), text, text),
            guidance_scale=self.animation.settings.guidance,
        )
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin)
        takes = inspect.signature(scheduler.step).parameters
        options = {"generator": self.generator} if "generator" in takes else {}
        for step in pipe.progress_bar(range(begin, len(self.windows))):
            timestep = scheduler.timesteps[step]
            noise = denoiser(scheduler.scale_model_input(latents, timestep), timestep, self.windows[step])
            latents = scheduler.step(noise, timestep, latents, **options, return_dict=False)[0]
            if not latents.isfinite().all():
                raise RuntimeError(f"step {step + 1} gave numbers that are not finite in {latents.dtype}: take float32")
            work.write_state(step + 1, latents, self.generator)
        return latents

    def write(self, latents: Tensor) -> None:
        """Decode a few frames at a time, and write the video and its preview."""
        animation, driving = self.animation, self.animation.driving
        made = animation.work.path / f"video{animation.output.suffix}"
        shown = itertools.repeat(self.source) if animation.preview is None else driving.frames()
        with contextlib.ExitStack() as stack:
            video, *preview = (
                stack.enter_context(VideoWriter(path, driving.rate, driving.sound, driving.begin))
                for path in (made, animation.preview)
                if path is not None
            )
            faces = self.progress(self._decode(latents), "frames", len(latents))
            for number, (face, frame) in enumerate(zip(faces, shown, strict=False)):
                result = self._place(face)
                video.write(result)
                for writer in preview:
                    writer.write(self._sheet(number, frame, result))
        os.replace(made, animation.output)
        animation.work.note_output()

    def _features(self) -> tuple[EncodedWhenRead, EncodedWhenRead]:
        """Of the control images, which stay on the disk."""
        pipe, stored = self.pipe, (self.controls.driving, self.controls.local)
        driving, local = (
            EncodedWhenRead(net.controlnet_cond_embedding, pictures, pipe.device, pipe.unet.dtype)
            for net, pictures in zip(pipe.controlnet.nets, stored, strict=True)
        )
        return driving, local

    def _reference(self) -> Tensor:
        """The source, or the square around its face, (1, 3, side, side) in -1..1."""
        side = self.animation.side
        picture = resize(self.source, side, side) if self.box is None else crop(self.source, self.box, side)
        return torch.from_numpy(picture).permute(2, 0, 1)[None] * 2.0 - 1.0

    def _decode(self, latents: Tensor) -> Iterator[Picture]:
        for part in latents.split(CHUNK):
            with torch.no_grad():
                pixels = self.pipe.decode(part, CHUNK)
            yield from (pixels / 2.0 + 0.5).clamp(0.0, 1.0).permute(0, 2, 3, 1).numpy()

    def _place(self, face: Picture) -> Pixels:
        """A frame of the result."""
        if self.box is None:
            return np.round(255.0 * face).astype(np.uint8)
        return paste(self.source, face, self.box)

    def _sheet(self, number: int, frame: Pixels, result: Pixels) -> Pixels:
        """A frame of the preview."""
        points = self.controls.points[number]
        marked = frame if points is None else draw_landmarks(frame, points)
        controls = (np.asarray(stored.pixels[number]) for stored in (self.controls.driving, self.controls.local))
        return side_by_side([self.source, marked, *controls, result], LABELS, self.animation.side)


def find_source(finder: LandmarkFinder, source: Pixels) -> Points | None:
    """The largest face of the source; a file's first entry is of the source."""
    found = finder.found[:1] if isinstance(finder, LandmarkFile) else finder.landmarks([source])
    return choose_face(found or [None])[0]


def box_of(source: Pixels, face: Points | None, pasted: bool) -> Box | None:
    """The square of the source that is animated; None for all of it."""
    return face_box(face, *source.shape[:2]) if pasted and face is not None else None
