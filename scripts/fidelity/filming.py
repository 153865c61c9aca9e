"""Videos of the bundled Wan pipeline, and what the judge makes of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import WanPipeline
from diffusers.models.embeddings import get_1d_rotary_pos_embed

from diffattn import tiny
from diffattn.measure.strips import VideoDistance
from diffattn.tiny.evaluate_video import judge_videos
from diffattn.tiny.moving import MovingScene, caption, set_apart_scenes

BEST_SEEN = 120.0
"""PSNR of equal frames."""


class Filmer:
    """Films captions that training never saw; positions of larger videos are scaled to those of training."""

    def __init__(self, count: int, seed: int) -> None:
        self.pipe = WanPipeline.from_pretrained(tiny.path("wan"))
        self.pipe.set_progress_bar_config(disable=True)
        apart = set_apart_scenes()
        chosen = np.random.default_rng(seed).permutation(len(apart))[:count]
        self.scenes: list[MovingScene] = [apart[index] for index in chosen]

    def spread(self, zoom: float) -> None:
        """Give rows and columns positions that are `zoom` times denser: those of training, on a finer grid."""
        rope = self.pipe.transformer.rope
        tables = [
            get_1d_rotary_pos_embed(
                dim,
                torch.arange(rope.max_seq_len, dtype=torch.float64) / scale,
                use_real=True,
                repeat_interleave_real=True,
                freqs_dtype=torch.float64,
            )
            for dim, scale in ((rope.t_dim, 1.0), (rope.h_dim, zoom), (rope.w_dim, zoom))
        ]
        rope.freqs_cos, rope.freqs_sin = (torch.cat(parts, dim=1) for parts in zip(*tables, strict=True))

    def film(self, number: int, **options: Any) -> np.ndarray:
        """One video, float (frames, height, width, 3) in 0-1."""
        generator = torch.Generator().manual_seed(number)
        call = {**tiny.defaults("wan"), **options}
        frames: np.ndarray = self.pipe(
            caption(self.scenes[number]), generator=generator, output_type="np", **call
        ).frames[0]
        return frames


@dataclass(frozen=True)
class Verdict:
    """What one method's videos came to, one value each."""

    name: str
    share: float
    psnr: tuple[float, ...]
    """Mean over the frames, in dB, to the video by full attention."""
    flicker: tuple[float, ...]
    kept: dict[str, int]
    """Of how many the judge finds colour, shape and motion as the caption has them."""
    identity: float | None
    """Mean share of frames whose object stays the same; None where the judge was not asked."""

    @classmethod
    def of(
        cls,
        name: str,
        share: float,
        videos: Sequence[np.ndarray],
        full: Sequence[np.ndarray],
        scenes: Sequence[MovingScene],
    ) -> "Verdict":
        """Compare videos with those by full attention, and with their captions where they have the native size."""
        distances = [VideoDistance.between(a, b) for a, b in zip(videos, full, strict=True)]
        psnr = tuple(float(np.mean(np.minimum(distance.psnr, BEST_SEEN))) for distance in distances)
        native = videos[0].shape[1] == tiny.defaults("wan")["height"]
        kept, identity = judged(videos, scenes) if native else ({}, None)
        return cls(name, share, psnr, tuple(distance.flicker for distance in distances), kept, identity)

    @property
    def line(self) -> str:
        """A row of the table."""
        kept = " | ".join(str(count) for count in self.kept.values()) if self.kept else "- | - | -"
        identity = "-" if self.identity is None else f"{self.identity:.2f}"
        return (
            f"| {self.name} | {self.share:.3f} | {np.mean(self.psnr):.1f} | {np.median(self.psnr):.1f} | "
            f"{min(self.psnr):.1f}-{max(self.psnr):.1f} | {np.mean(self.flicker):.4f} | {kept} | {identity} |"
        )


HEAD = [
    "| | share | mean | median | min-max | flicker | colour | shape | motion | identity |",
    "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
]


def judged(videos: Sequence[np.ndarray], scenes: Sequence[MovingScene]) -> tuple[dict[str, int], float]:
    """How many videos keep colour, shape and motion, and the mean share of frames with the same object."""
    findings, measured = judge_videos([np.round(255 * video).astype(np.uint8) for video in videos], scenes)
    kept = {
        part: sum(getattr(finding, f"{part}_kept") for finding in findings) for part in ("colour", "shape", "motion")
    }
    return kept, float(np.mean([figures.identity for figures in measured]))


def gains(verdicts: Sequence[Verdict], base: str) -> list[str]:
    """Gain in PSNR over the method `base`, video by video."""
    first = np.array(next(verdict.psnr for verdict in verdicts if verdict.name == base))
    text = [f"| gain over {base}, dB | mean | median | worst |", "|---|---:|---:|---:|"]
    for verdict in verdicts:
        gain = np.array(verdict.psnr) - first
        text.append(f"| {verdict.name} | {gain.mean():+.1f} | {np.median(gain):+.1f} | {gain.min():+.1f} |")
    return text
