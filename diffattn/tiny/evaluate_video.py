"""How often the tiny video pipeline shows what the caption says, on combinations that training never saw."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffattn.tiny import defaults
from diffattn.tiny.moving import MovingScene
from diffattn.tiny.track import Figures, Sighting, figures, follow, majority, motion


def generate_videos(
    pipeline: Any, texts: Sequence[str], *, name: str = "video", seed: int = 0, batch: int = 8, **overrides: Any
) -> list[np.ndarray]:
    """Draw every caption, uint8 RGB (frames, SIDE, SIDE, 3) each; video i starts from noise of `seed` + i.

    `overrides` replace the default call arguments of the bundled pipeline `name`.
    """
    videos: list[np.ndarray] = []
    for start in range(0, len(texts), batch):
        part = list(texts[start : start + batch])
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
        frames = pipeline(part, generator=generators, output_type="np", **(defaults(name) | overrides)).frames
        videos += [np.round(255 * video).astype(np.uint8) for video in frames]
    return videos


@dataclass(frozen=True, kw_only=True)
class VideoFinding:
    """Which promises of its caption a video keeps."""

    colour_kept: bool
    """Most frames show an object of the promised colour; the same for `shape_kept` and `background_kept`."""
    shape_kept: bool
    background_kept: bool
    motion_kept: bool
    """The object moves along the promised axis."""

    @property
    def kept(self) -> bool:
        """True when every promise is kept."""
        return self.colour_kept and self.shape_kept and self.background_kept and self.motion_kept


def check(sightings: Sequence[Sighting], scene: MovingScene) -> VideoFinding:
    """Compare what a video shows with the scene of its caption."""
    return VideoFinding(
        colour_kept=majority([sighting.colour for sighting in sightings]) == scene.colour,
        shape_kept=majority([sighting.shape for sighting in sightings]) == scene.shape,
        background_kept=majority([sighting.background for sighting in sightings]) == scene.background,
        motion_kept=motion(sightings) == scene.motion,
    )


def judge_videos(
    videos: Sequence[np.ndarray], scenes: Sequence[MovingScene]
) -> tuple[list[VideoFinding], list[Figures]]:
    """What each video keeps of its scene, and how well its object lasts."""
    seen = [follow(video) for video in videos]
    findings = [check(sightings, scene) for sightings, scene in zip(seen, scenes, strict=True)]
    return findings, [figures(sightings) for sightings in seen]


def described(video: np.ndarray) -> str:
    """What a video shows, in words: "a red circle on blue, the same in 100% of the frames, moving sideways"."""
    sightings = follow(video)
    colour, shape, background = (
        majority([getattr(sighting, part) for sighting in sightings]) for part in ("colour", "shape", "background")
    )
    if not colour:
        return f"nothing on {background}"
    way = motion(sightings)
    return (
        f"a {colour} {shape} on {background}, the same in {figures(sightings).identity:.0%} of the frames, "
        f"{'still or astray' if way is None else f'moving {way}'}"
    )


def write_strips(videos: Sequence[np.ndarray], file: Path) -> None:
    """Save each video as one row of its frames."""
    rows = [np.pad(np.concatenate(list(video), axis=1), ((0, 2), (0, 0), (0, 0))) for video in videos]
    Image.fromarray(np.concatenate(rows)).save(file)
