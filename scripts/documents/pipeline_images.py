"""The images of the pipelines' pages that need no trained weights: what each pipeline is given, from one photo.

    PYTHONPATH=. python scripts/documents/pipeline_images.py

super-resolution.png and video-super-resolution.png have what their training undoes, portrait-animation.png the control
images of a face. The photo is that of the tests (tests/data/README.md).
"""

from pathlib import Path

import numpy as np
import torch
from diffattn.pipelines.pixel_aware_sr.training.degrade import degrade
from diffattn.pipelines.portrait_animation.face.detection import draw_landmarks
from diffattn.pipelines.portrait_animation.face.patches import local_control
from diffattn.pipelines.portrait_animation.face.with_dlib import DlibLandmarks
from diffattn.pipelines.video_sr.training.degrade import degrade_clip
from PIL import Image
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
PHOTO = ROOT / "tests" / "data" / "astronaut.jpg"
SIDE, GAP = 256, 4
"""Pixels of a panel, and between two."""
SEEDS = 3, 11, 14
FRAMES, PAN = 4, 16
"""Of a clip that pans over the photo, so many pixels a frame."""


def photo() -> Tensor:
    """(3, rows, columns) from 0 to 1."""
    return torch.tensor(np.asarray(Image.open(PHOTO).convert("RGB"))).permute(2, 0, 1).float() / 255


def row(pictures: list[Tensor | np.ndarray]) -> Image.Image:
    """Panels side by side, each enlarged or reduced to one size."""
    sheet = Image.new("RGB", (len(pictures) * (SIDE + GAP) - GAP, SIDE), "white")
    for number, picture in enumerate(pictures):
        if isinstance(picture, Tensor):
            picture = picture.permute(1, 2, 0).numpy()
        pixels = picture if picture.dtype == np.uint8 else (picture.clip(0, 1) * 255).round().astype(np.uint8)
        panel = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        sheet.paste(panel, (number * (SIDE + GAP), 0))
    return sheet


def super_resolution() -> Image.Image:
    """A part of the photo, and what three draws of the degradation make of it."""
    part = photo()[:, 20:276, 100:356]
    return row([part, *(degrade(part, seed=seed) for seed in SEEDS)])


def video_super_resolution() -> Image.Image:
    """First and last frame of a clip, and of what a degradation makes of it."""
    starts = range(60, 60 + FRAMES * PAN, PAN)
    clip = torch.stack([photo()[:, 20:276, start : start + 256] for start in starts])
    bad = degrade_clip(clip, seed=5)
    return row([clip[0], bad[0], clip[-1], bad[-1]])


def portrait_animation() -> Image.Image:
    """A frame, the face found in it, and the local control image: the second image that a frame gives."""
    frame = np.ascontiguousarray((photo()[:, :256, 96:352] * 255).round().byte().permute(1, 2, 0).numpy())
    frame = np.asarray(Image.fromarray(frame).resize((512, 512), Image.Resampling.LANCZOS))
    (faces,) = DlibLandmarks().landmarks([frame])
    if faces is None:
        raise RuntimeError("dlib finds no face in the photo of the tests")
    return row([frame, draw_landmarks(frame, faces[0]), local_control(frame.astype(np.float32) / 255, faces[0])])


def main() -> None:
    for draw in (super_resolution, video_super_resolution, portrait_animation):
        file = ROOT / "docs" / f"{draw.__name__.replace('_', '-')}.png"
        draw().quantize(128, dither=Image.Dither.FLOYDSTEINBERG).save(file, optimize=True)


if __name__ == "__main__":
    main()
