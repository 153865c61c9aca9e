"""Files that an animation is made of: a tiny checkpoint, a driving video with sound, images, points."""

import itertools
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import tiny_portrait
from diffusers import LCMScheduler
from PIL import Image

from diffattn.media.video import VideoWriter

FACE = np.random.default_rng(5).random((68, 2))
"""In a unit square."""
SOURCE = (37, 53)
"""Height and width of the person's image, both odd; its face fills a square of 16 at row 12 and column 20."""
DRIVING = (32, 48)
SIDE = 128
"""Of what the tiny networks make."""


def face(left: float, top: float, size: float) -> np.ndarray:
    return FACE * size + (left, top)


def write_checkpoint(folder: Path, lcm: bool = False, broken: bool = False) -> Path:
    """With LCM's scheduler, which draws noise in each step, or with a U-Net whose weights are no numbers."""
    pipe = tiny_portrait.pipeline()
    if lcm:
        pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    if broken:
        pipe.unet.conv_out.weight.data.fill_(float("nan"))
    pipe.save_pretrained(folder)
    return folder


def frames(count: int) -> list[np.ndarray]:
    """No two alike."""
    return [np.asarray(one) for one in tiny_portrait.pictures(count, DRIVING[1], DRIVING[0], seed=4)]


def write_clip(
    path: Path, count: int, rate: Fraction | int = 10, sound: Path | None = None, repeat: int | None = None
) -> Path:
    """Of `count` frames, no two alike, or the first `repeat` of them over and over."""
    made = frames(repeat or count)
    with VideoWriter(path, rate, sound) as video:
        for number in range(count):
            video.write(made[number % len(made)])
    return path


def write_tone(path: Path, seconds: float) -> Path:
    with av.open(str(path), "w") as file:
        stream = file.add_stream("aac", rate=8000, layout="mono")
        wave = np.sin(np.arange(int(8000 * seconds)) * 0.3).astype(np.float32)[None]
        for begin in range(0, wave.shape[1], 1024):
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(wave[:, begin : begin + 1024]), "fltp", "mono")
            frame.sample_rate, frame.pts = 8000, begin
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def sound_of(path: Path) -> tuple[float, float] | None:
    """Where the sound of a file begins and ends, in seconds; None without any."""
    with av.open(str(path)) as file:
        if not file.streams.audio:
            return None
        packets = [packet for packet in file.demux(file.streams.audio[0]) if packet.pts is not None]
        times = [float(packet.pts * packet.time_base) for packet in packets]
        return min(times), max(times) + float(packets[-1].duration * packets[-1].time_base)


def write_source(path: Path, **options: Any) -> Path:
    tiny_portrait.pictures(1, SOURCE[1], SOURCE[0], seed=3)[0].save(path, **options)
    return path


def write_points(path: Path, count: int, missing: tuple[int, ...] = ()) -> Path:
    """The source's, then those of a face that moves; entries of the file that are `missing` are NaN."""
    points = np.stack([face(20, 12, 16), *(face(10 + number % 20, 6, 18) for number in range(count))])
    points[list(missing)] = np.nan
    np.save(path, points)
    return path


def write_folder(folder: Path, count: int) -> Path:
    """Frames as files, in an order that is not the alphabet's."""
    folder.mkdir()
    for number, frame in zip(itertools.count(8), frames(count), strict=False):
        Image.fromarray(frame).save(folder / f"{number}.png")
    return folder
