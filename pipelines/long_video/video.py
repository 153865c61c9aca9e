"""A video file in parts: every rank writes its own frames, and the first joins the parts without encoding anew.

A part is a whole file by itself, with a key frame first and no frames that lean on later ones, so the packets of the
next can follow. Nobody holds more than one frame and one packet. An output without an ending is a folder of PNG files.
"""

from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diffattn.files.writing import written
from diffattn.media.outputs import VIDEO_ENDINGS, check_file, check_frames, check_video_size
from diffattn.media.video import VideoWriter, pyav


def check_output(output: Path, height: int, width: int, *, overwrite: bool = False, count: int | None = None) -> None:
    """Raise before the work where `output` could not be written after it, or would replace another video.

    `count`: frames of a run that goes on; so many may be in a folder for images.
    """
    if output.suffix == "":
        check_frames(output, count, overwrite=overwrite)
        return
    check_file(output, VIDEO_ENDINGS, overwrite=overwrite)
    if height % 2 or width % 2:
        raise ValueError(f"a video file needs even sides, got {height} x {width} pixels; give a folder")
    check_video_size(height, width)
    pyav()


def write_pictures(frames: Iterable[NDArray[np.uint8]], folder: Path, first: int) -> None:
    """Write frames of `(height, width, 3)` as `frame-000000.png` and on, numbered in the whole video."""
    from PIL import Image

    for number, frame in enumerate(frames, first):
        with written(folder / f"frame-{number:06d}.png") as file:
            Image.fromarray(frame).save(file)


def write_part(frames: Iterable[NDArray[np.uint8]], path: Path, fps: int) -> None:
    """Encode frames of `(height, width, 3)` as they come."""
    with VideoWriter(path, fps, reordered=False) as video:
        for frame in frames:
            video.write(frame)


def join_parts(parts: Sequence[Path], lengths: Sequence[int], output: Path, fps: int) -> None:
    """Put the packets of parts of `lengths` frames one after the other into `output`."""
    av = pyav()
    with written(output) as file, av.open(str(file), "w") as joined:
        stream, first = None, 0
        for part, length in zip(parts, lengths, strict=True):
            with av.open(str(part)) as container:
                source = container.streams.video[0]
                if stream is None:
                    stream = joined.add_stream_from_template(source)
                shift = round(Fraction(first, fps) / source.time_base)
                for packet in container.demux(source):
                    if packet.dts is not None:
                        packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                        packet.stream = stream
                        joined.mux(packet)
            first += length
