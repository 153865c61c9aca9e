"""What a video codec leaves of a clip: encoded in memory at a low bit rate, and decoded.

Frames lean on their neighbours: a later one inherits the faults of an earlier one, its quality falls and recovers as
the encoder keeps to its budget, and slow motion sticks. JPEG has none of that.
PyAV, the extra `video`, is imported where a clip is compressed.
"""

import io
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from diffattn.pipelines.pixel_aware_sr.training.blur_kernels import (
    Span,
    check_probabilities,
    check_probability,
    check_span,
)
from diffattn.pipelines.pixel_aware_sr.training.degrade import quantise
from torch import Tensor

from diffattn.media.video import READ, WRITE, Pixels, pyav, reproducible


@dataclass(frozen=True, kw_only=True)
class CodecRanges:
    """How codecs are drawn; the defaults are STAR's, for which x264 goes by two of three names."""

    codecs: tuple[str, ...] = ("libx264", "mpeg4")
    """Encoders of FFmpeg that take yuv420p."""
    probabilities: tuple[float, ...] = (2 / 3, 1 / 3)
    """Of each encoder."""
    bitrate: Span = (1e4, 1e5)
    """In bits per second of a clip of one frame per second: bits per frame, whatever its size."""
    probability: float = 1.0
    """Of any compression."""

    def __post_init__(self) -> None:
        check_probabilities("probabilities", self.probabilities, len(self.codecs))
        check_span("bitrate", self.bitrate, least=1)
        check_probability("probability", self.probability)


@dataclass(frozen=True, kw_only=True)
class DrawnCodec:
    """One compression, settled."""

    name: str
    bitrate: int
    """Bits per frame, on average; encoders exceed it where their coarsest quantiser needs more."""


def draw_codec(rng: np.random.Generator, ranges: CodecRanges) -> DrawnCodec | None:
    """One codec for a whole clip, or None for none."""
    name = ranges.codecs[rng.choice(len(ranges.codecs), p=ranges.probabilities)]
    bitrate = round(rng.uniform(*ranges.bitrate))
    return DrawnCodec(name=name, bitrate=bitrate) if rng.uniform() < ranges.probability else None


def check_codec(name: str) -> None:
    """Raise `ImportError` without PyAV, `ValueError` where its FFmpeg has no video encoder of this name."""
    av = pyav()
    try:
        kind = av.codec.Codec(name, "w").type
    except ValueError:
        kind = None
    if kind != "video":
        raise ValueError(
            f"expected a video encoder of PyAV's FFmpeg; got {name!r}, which is none or was left out of this build; "
            "install PyAV's wheel (pip install --force-reinstall av), or name another in the ranges"
        )


def recompress(frames: Iterable[Tensor], codec: DrawnCodec | None) -> Iterator[Tensor]:
    """Frames as they come back from a codec; None hands them on.

    All are encoded before the first comes back, but never held as images: memory is that of one and the file.
    Encoding takes one thread and no code of one kind of CPU, so that the result is the same on every machine. An odd
    side gets its last row or column twice, and loses it again.

    Args:
        frames: at least one, values in 0..1, cut off beyond; (3, rows, columns) each, of one size.

    Returns:
        Multiples of 1/255 in float32, of the same number and size.

    Raises:
        ValueError: on the first frame, where the encoder is missing or refuses yuv420p or the bit rate.
    """
    if codec is None:
        yield from frames
        return
    check_codec(codec.name)
    file = io.BytesIO()
    try:
        rows, columns = _encode(file, frames, codec)
    except pyav().FFmpegError as error:
        raise ValueError(
            f"expected an encoder of yuv420p at one frame per second; got {codec} and {error.strerror}; take libx264"
        ) from error
    file.seek(0)
    with pyav().open(file) as container:
        for image in container.decode(video=0):
            pixels = image.to_ndarray(format="rgb24", interpolation=READ)[:rows, :columns]
            yield torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def _encode(file: io.BytesIO, frames: Iterable[Tensor], codec: DrawnCodec) -> tuple[int, int]:
    """Write frames and return their rows and columns."""
    clip = (_pixels(frame) for frame in frames)
    first = next(clip)
    rows, columns = first.shape[:2]
    with pyav().open(file, "w", format="matroska") as container:
        stream = container.add_stream(codec.name, rate=1, options=reproducible(codec.name))
        stream.height, stream.width = rows + rows % 2, columns + columns % 2
        stream.pix_fmt, stream.bit_rate = "yuv420p", codec.bitrate
        stream.codec_context.thread_count = 1
        for pixels in itertools.chain([first], clip):
            even = np.pad(pixels, ((0, rows % 2), (0, columns % 2), (0, 0)), mode="edge")
            frame = pyav().VideoFrame.from_ndarray(np.ascontiguousarray(even), format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p", interpolation=WRITE)))
        container.mux(stream.encode())
    return rows, columns


def _pixels(frame: Tensor) -> Pixels:
    return (255 * quantise(frame)).round().byte().permute(1, 2, 0).numpy()
