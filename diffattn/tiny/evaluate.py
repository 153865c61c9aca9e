"""How often the tiny pipeline draws what the caption says, on combinations that training never saw."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from diffattn.tiny import defaults
from diffattn.tiny.finder import Finding, find
from diffattn.tiny.shapes import SIDE, Scene, caption

_CAPTION_PIXELS = 36


def generate(pipeline: Any, scenes: Sequence[Scene], *, seed: int = 0, **overrides: Any) -> list[np.ndarray]:
    """Draw every scene's caption, uint8 RGB (SIDE, SIDE, 3) each; image i starts from noise of `seed` + i.

    `overrides` replace the pipeline's default call arguments.
    """
    pictures: list[np.ndarray] = []
    for start in range(0, len(scenes), 16):
        part = scenes[start : start + 16]
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
        texts = [caption(scene) for scene in part]
        drawn = pipeline(texts, generator=generators, output_type="pil", **(defaults("flux") | overrides)).images
        pictures += [np.asarray(picture) for picture in drawn]
    return pictures


def judge(pictures: Sequence[np.ndarray], scenes: Sequence[Scene]) -> tuple[list[Finding], float]:
    """Findings of all images, and the share in which every promise was kept."""
    findings = [find(picture, scene) for picture, scene in zip(pictures, scenes, strict=True)]
    return findings, sum(finding.kept for finding in findings) / len(findings)


def write_sheet(
    pictures: Sequence[np.ndarray], scenes: Sequence[Scene], findings: Sequence[Finding], file: Path, columns: int = 8
) -> None:
    """Save the images in a grid with their captions; captions of failures are red."""
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (SIDE + 8), rows * (SIDE + _CAPTION_PIXELS)), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (picture, scene, finding) in enumerate(zip(pictures, scenes, findings, strict=True)):
        x, y = index % columns * (SIDE + 8) + 4, index // columns * (SIDE + _CAPTION_PIXELS)
        sheet.paste(Image.fromarray(picture), (x, y + 2))
        place, texture = scene.place.split("the ")[1], "" if scene.texture == "plain" else "striped "
        text = f"{scene.size} {scene.colour} {scene.shape}\n{place}, {texture}{scene.background}"
        draw.text((x, y + SIDE + 4), text, fill="black" if finding.kept else "red")
    sheet.save(file)
