"""Open a video file by PyAV, and go through the packets of its images."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

logger = logging.getLogger("diffattn")

Pixels = NDArray[np.uint8]


def pyav() -> Any:
    """The package `av`; raises `ImportError` that says how to get it."""
    try:
        import av
    except ImportError as error:
        need = "video files need PyAV: pip install 'diffattn[video]'; a folder of images does without"
        raise ImportError(need) from error
    return av


@contextlib.contextmanager
def opened(path: str | Path) -> Iterator[tuple[Any, Any]]:
    """A container and its stream of images, that stops at errors instead of covering them up.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no video, one of an unknown codec, or an image file of several images.
    """
    av = pyav()
    if not Path(path).is_file():
        raise FileNotFoundError(f"expected a video file; got {str(path)!r}, which is none; check the name")
    try:
        container = av.open(f"file:{path}")
    except av.FFmpegError as error:
        raise ValueError(
            f"expected a video in {path}; got a file that cannot be opened as one: {error.strerror}; check the file"
        ) from error
    with container:
        if container.format.name.endswith("_pipe") or container.format.name == "image2":
            _check_single(path)
        stream = pictures_of(container)
        if stream is None:
            raise ValueError(f"expected a video in {path}; got a file without images; name another")
        if stream.codec_context is None:
            raise ValueError(f"expected a video in {path} of a codec that FFmpeg knows; got another; encode it anew")
        stream.codec_context.options = {"err_detect": "explode"}
        yield container, stream


def pictures_of(container: Any) -> Any:
    """The first video stream, or None: no cover, and no still beside the sequence that it stands for."""
    cover = pyav().stream.Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & cover]
    moving = [stream for stream in streams if stream.frames != 1]
    return next(iter(moving or streams), None)


def _check_single(path: str | Path) -> None:
    """FFmpeg takes the first image of such a file, or none."""
    try:
        with Image.open(path) as image:
            count = getattr(image, "n_frames", 1)
    except OSError:
        return
    if count > 1:
        raise ValueError(
            f"expected a video; got {count} images in {path}, of which FFmpeg reads one at most; save them as a "
            "folder of images, as .gif or as .mp4"
        )


def whole_packets(container: Any, stream: Any, path: str | Path, told: bool = True) -> Iterator[Any]:
    """Packets from the first key frame on, and without those that are shown before it: they lean on what is not there.

    The last one is empty and takes out what the decoder holds back. `told`: say in the log what is left out.
    """
    key, missed = None, False
    for packet in container.demux(stream):
        if key is None and packet.size and packet.is_keyframe and not packet.is_corrupt:
            key = packet
            if missed and told:
                logger.warning("%s: begins between two key frames; read from the first one on", path)
        leans = key is None or (packet.pts is not None and key.pts is not None and packet.pts < key.pts)
        if not packet.size or not leans:
            yield packet
        missed = missed or leans
    if key is None and missed:
        raise ValueError(
            f"expected a whole video in {path}; got one that is broken at or soon after frame 0: no frame that does "
            "not lean on others; make the file anew"
        )
