"""A video file in parts: every rank writes its own frames, and the first joins the parts without encoding anew.

A part is a whole file by itself, with a key frame first and no frames that lean on later ones, so the packets of the
next can follow. Nobody holds more than one frame and one packet. An output without an ending is a folder of PNG files.
"""

import tempfile
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diffattn.files import written
from diffattn.video import ENDINGS, VideoWriter, pyav


def check_output(output: Path, height: int, width: int) -> None:
    """Raise before the work where `output` could not be written after it."""
    if output.suffix == "":
        if output.exists() and not output.is_dir():
            raise ValueError(f"--output {output} is a file, expected a folder for pictures, or a name in {ENDINGS}")
        folder = output
    else:
        if output.suffix.lower() not in ENDINGS:
            raise ValueError(f"--output must end in {', '.join(ENDINGS)}, or be a folder for pictures, got {output}")
        if output.is_dir():
            raise ValueError(f"--output {output} is a folder; give the name of a file in it")
        if height % 2 or width % 2:
            raise ValueError(f"a video file needs even sides, got {height} x {width} pixels; give a folder")
        pyav()
        folder = output.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"--output: cannot write into {folder}: {error.strerror or error}") from error


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
