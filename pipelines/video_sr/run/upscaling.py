"""What `diffattn video-upscale` does: a clip's latents kept in files, steps, frames written as they are decoded.

    upscaling = Upscaling(clip=Clip(path=...), checkpoint=..., output=..., settings=UpscaleSettings())
    with upscaling.prepared(device, dtype) as run:
        run.make()

The steps are those of `STARPipeline`. Memory does not grow with the clip, and a run that was stopped goes on after its
last whole step.
"""

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffattn.media.clip import Clip
from diffattn.media.color import to_bytes
from diffattn.media.outputs import VIDEO_ENDINGS, check_file, check_video_size
from diffattn.media.video import VideoWriter, pyav
from diffattn.media.work import CONTENTS, digest_folder

from ..clips.store import FolderStore
from ..i2vgenxl.pipeline import STARPipeline
from ..i2vgenxl.settings import UpscaleSettings
from ..i2vgenxl.sizes import Plan, plan_upscaling
from ..i2vgenxl.text import PROMPT
from .memory import plan_memory
from .opening import check_checkpoint, count_steps, open_pipeline, untrained
from .work import WatchedStore, WorkFolder

Progress = Callable[[Iterable[Any], str, int | None], Iterable[Any]]
"""Gets what takes long, a word for it and how many there are, if that is known; gives the same back."""
Tell = Callable[[str], None]
"""Gets a line for the user."""


def plain(frames: Iterable[Any], label: str, total: int | None) -> Iterable[Any]:
    """Shows nothing."""
    return frames


def silent(text: str) -> None:
    """Tells nothing."""


@dataclass(frozen=True, kw_only=True)
class Upscaling:
    """What is to be made of what; raises `ValueError` for what cannot be, before anything is opened for long."""

    clip: Clip
    checkpoint: Path
    """Folder from `convert`."""
    output: Path
    settings: UpscaleSettings
    scale: float = 4.0
    prompt: str = PROMPT
    negative_prompt: str | None = None
    """None: the pipeline's own."""
    resume: bool = False
    overwrite: bool = False
    """Replace an output that is there."""

    def __post_init__(self) -> None:
        check_checkpoint(self.checkpoint)
        if self.output.resolve() == self.clip.path.resolve():
            raise ValueError(f"--output {self.output} is the input; give another name")
        own = self.resume and self.work.wrote_output
        check_file(self.output, VIDEO_ENDINGS, overwrite=self.overwrite, own=own)
        pyav()

    @functools.cached_property
    def work(self) -> WorkFolder:
        """Where the run keeps what it has."""
        return WorkFolder(self.output)

    @contextlib.contextmanager
    def prepared(
        self,
        device: torch.device,
        dtype: torch.dtype,
        *,
        offload: bool = False,
        force: bool = False,
        progress: Progress = plain,
        tell: Tell = silent,
    ) -> Iterator["Run"]:
        """Everything before the first frame; a run that ends in the block without an error has its work removed.

        The clip is read through once, so that a broken one is told now.

        Args:
            device: of the networks.
            dtype: of the networks.
            offload: leave parts on the CPU until they are needed.
            force: begin even if there is not enough memory or disk.
            progress: goes through the frames of everything that takes long, and may show how far.
            tell: gets a line on what the run needs, and later on how long it takes.

        Raises `ValueError` for a clip, a checkpoint or a work folder that do not fit, and for too little memory or
        disk; nothing is left then.
        """
        plan = self._plan(progress)
        check_video_size(*plan.target)
        self.work.open(self._fingerprint(device, dtype), self.resume)
        try:
            self._check_room(plan, device, dtype, offload, force, tell)
            self._try_writing(plan)
            pipe = open_pipeline(self.checkpoint, device, dtype, offload=offload)
        except BaseException:
            if not self.resume:
                self.work.remove()
            raise
        yield Run(self, plan, pipe, progress, tell)
        self.work.remove()

    def _plan(self, progress: Progress) -> Plan:
        """Sizes by all frames, which are counted."""
        frames, height, width = 0, 0, 0
        for frame in progress(self.clip.frames(), "reading", None):
            frames, (height, width) = frames + 1, frame.shape[:2]
        return plan_upscaling(
            frames,
            height,
            width,
            self.scale,
            self.settings,
            steps=count_steps(self.checkpoint, self.settings.num_inference_steps),
            downsamplings=count_downsamplings(self.checkpoint),
        )

    def _check_room(
        self, plan: Plan, device: torch.device, dtype: torch.dtype, offload: bool, force: bool, tell: Tell
    ) -> None:
        needs = plan_memory(self.checkpoint, plan, self.settings, dtype, offload=offload)
        tell(needs.describe(device, self.work.path))
        try:
            needs.check(device, self.work.path, self.work.size)
        except ValueError as error:
            if not force:
                raise
            tell(f"{error}; --force: tried all the same")

    def _fingerprint(self, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        """What the video depends on, as JSON has it."""
        return {
            **asdict(self.settings),
            "scale": self.scale,
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            CONTENTS: {"input": self.clip.digest(), "checkpoint": digest_folder(self.checkpoint)},
            "start": self.clip.start,
            "frames": self.clip.count,
            "skip": self.clip.skip,
            "rate": str(self.clip.rate),
            "device": device.type,
            "dtype": str(dtype),
        }

    def _try_writing(self, plan: Plan) -> None:
        """Raise where a video of this kind cannot be written in this size and with that sound."""
        trial = self.work.path / f"trial{self.output.suffix}"
        clip = self.clip
        with VideoWriter(trial, clip.rate, clip.sound, clip.begin, aspect=clip.aspect) as video:
            video.write(np.zeros((*plan.target, 3), dtype=np.uint8))
        trial.unlink()


class Run:
    """An upscaling whose work can begin, or go on."""

    def __init__(
        self,
        upscaling: Upscaling,
        plan: Plan,
        pipe: STARPipeline,
        progress: Progress = plain,
        tell: Tell = silent,
    ) -> None:
        self.upscaling, self.plan, self.pipe = upscaling, plan, pipe
        self.progress, self.tell = progress, tell

    def make(self) -> None:
        """Everything: what a former run has done is not done again."""
        if self.upscaling.work.steps is None:
            self.encode()
        self.denoise()
        self.write()

    def encode(self) -> None:
        """Keep the latents of all frames, and the noised start."""
        store = self._store("encoding", self.plan.frames)
        for name in ("hint", "x.0"):
            store.drop(name)
        self.pipe.encode_clip(self._source(), self.plan, self.upscaling.settings, store)
        self.upscaling.work.note(0)

    def denoise(self) -> None:
        """The steps that are left; each is noted when it is done."""
        steps = range(self.upscaling.work.steps or 0, self.plan.steps)
        if not steps:
            return
        text = self.pipe.embed(self.upscaling.prompt, self.upscaling.negative_prompt)
        store, begin = self._store("denoising", len(steps) * self.plan.frames), time.monotonic()
        for step in steps:
            self.pipe.denoise_step(step, self.plan, self.upscaling.settings, text, store)
            self.upscaling.work.note(step + 1)
            if step == steps[0] and len(steps) > 1:
                took, left = time.monotonic() - begin, len(steps) - 1
                self.tell(f"a step takes {spell(took)}; {left} more take {spell(left * took)}, then comes decoding")
        self.pipe.maybe_free_model_hooks()

    def write(self) -> None:
        """Decode a few frames at a time, and write the video."""
        clip, settings, work = self.upscaling.clip, self.upscaling.settings, self.upscaling.work
        pieces = self.pipe.decode_clip(self._source(), self.plan, settings, FolderStore(work.latents))
        frames = (frame for piece in pieces for frame in piece)
        with VideoWriter(work.video, clip.rate, clip.sound, clip.begin, aspect=clip.aspect) as video:
            for frame in self.progress(frames, "decoding", self.plan.frames):
                pixels = to_bytes(frame[None], truncate=settings.official)[0]
                video.write(pixels.permute(1, 2, 0).numpy())
        os.replace(work.video, self.upscaling.output)
        work.note_output()

    def _source(self) -> Iterator[Tensor]:
        """The clip's frames, (1, 3, rows, columns) in 0..1."""
        for frame in self.upscaling.clip.frames():
            yield torch.from_numpy(frame.transpose(2, 0, 1)[None]).float() / 255

    def _store(self, label: str, frames: int) -> WatchedStore:
        """The clip's latents; the progress is that of the frames written to it."""
        return WatchedStore(self.upscaling.work.latents, iter(self.progress(range(frames), label, frames)))


def count_downsamplings(checkpoint: Path) -> int:
    """How often the networks halve rows and columns."""
    with torch.device("meta"):
        return int(untrained(checkpoint, "unet").downsamplings)


def spell(seconds: float) -> str:
    """A duration as a person says it.

    >>> spell(0.4), spell(75), spell(3720)
    ('less than a second', 'about 1 min 15 s', 'about 1 h 2 min')
    """
    whole = round(seconds)
    if whole < 1:
        return "less than a second"
    if whole < 60:
        return f"about {whole} s"
    if whole < 3600:
        return f"about {whole // 60} min {whole % 60} s"
    return f"about {whole // 3600} h {whole % 3600 // 60} min"
