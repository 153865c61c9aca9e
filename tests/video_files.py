"""Video files with what a test asks for: times, tags, tracks. Made by PyAV, not by the code under test."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

COLOURS = np.array([(220, 30, 40), (40, 200, 90), (30, 60, 210), (235, 235, 235)], dtype=np.uint8)


def picture(number: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Four quarters in colours of their own, and the frame's number as a bar from the left, up to 15."""
    rows, columns = np.indices((height, width))
    frame = COLOURS[2 * (rows >= height // 2) + (columns >= width // 2)]
    frame[: height // 4, : 4 * number] = 10
    return frame


def number_of(frame: np.ndarray) -> int:
    """What `picture` was asked for."""
    return int((frame[2].max(-1) < 90).sum() + 2) // 4


def noise(count: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def silence(container: Any, stream: Any, seconds: float) -> None:
    """Sound without any, in a stream of 48 kHz."""
    for start in range(0, round(48000 * seconds), 1024):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate, frame.pts = 48000, start
        container.mux(stream.encode(frame))
    container.mux(stream.encode())


def encode(
    path: Path,
    frames: Sequence[np.ndarray] | np.ndarray,
    *,
    ticks: Sequence[int] | None = None,
    rate: int = 25,
    kind: str = "libx264",
    pix_fmt: str = "yuv420p",
    tags: tuple[int, int, int, int] | None = None,
    aspect: Fraction | None = None,
    sound: float = 0.0,
    **options: str,
) -> Path:
    """Frames at times in units of 1 / rate.

    Args:
        path: its ending is the container.
        frames: RGB.
        ticks: times; None for one after the other.
        rate: frames, or ticks, per second.
        kind: encoder.
        pix_fmt: what is encoded.
        tags: matrix, primaries, transfer and range, by which levels are computed too.
        aspect: of a pixel.
        sound: seconds of silence in AAC.
        options: of the encoder.
    """
    height, width = frames[0].shape[:2]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(kind, rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = height, width, pix_fmt
        context = stream.codec_context
        context.time_base = Fraction(1, rate)
        if tags is not None:
            context.colorspace, context.color_primaries, context.color_trc, context.color_range = tags
        if aspect is not None:
            context.sample_aspect_ratio = aspect
        voice = container.add_stream("aac", rate=48000, layout="mono") if sound else None
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            if tags is not None:
                frame = frame.reformat(format=pix_fmt, dst_colorspace=tags[0], dst_color_range=tags[3])
            frame.pts, frame.time_base = number if ticks is None else ticks[number], Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if voice is not None:
            silence(container, voice, sound)
    return path
