"""What a video file holds, and its frames one by one."""

import itertools
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from .colours import Shown
from .opening import Pixels, opened, pyav, whole_packets
from .timing import LATE, Timing, timing_of

logger = logging.getLogger("diffattn")

OnError = Literal["raise", "hold"]

UNEVEN = "frames are not evenly spaced"


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """What a video file says of itself."""

    width: int
    """Of a frame as it is shown, turned, in pixels."""
    height: int
    """The same."""
    frames: int | None
    """How many `read_frames` gives; None where the file does not tell."""
    rate: Fraction
    """Of what `read_frames` gives, per second."""
    duration: float | None
    """Seconds."""
    rotation: int
    """Degrees that stored frames are turned by to be shown, counter-clockwise: 0, 90, 180 or 270."""
    audio: bool
    """There is sound."""
    aspect: Fraction = Fraction(1)
    """Width of a pixel as it is shown to its height."""


def probe(path: str | Path) -> VideoInfo:
    """Look at the packets and the first frame of a video file; at all frames where they are not evenly spaced.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a video, or none that can be decoded.
    """
    with opened(path) as (container, stream):
        first = next(_decode(container, stream, path, "raise", told=False), None)
        if first is None:
            raise ValueError(f"expected a video with frames in {path}; got none; make the file anew")
        timing = timing_of(path)
        aspect, turned = Fraction(stream.sample_aspect_ratio or 1), first.rotation % 180 == 90
        height, width = (first.width, first.height) if turned else (first.height, first.width)
        return VideoInfo(
            width=width,
            height=height,
            frames=timing.length,
            rate=timing.rate,
            duration=None if timing.length is None else float(timing.length / timing.rate),
            rotation=first.rotation % 360,
            audio=bool(container.streams.audio),
            aspect=1 / aspect if turned else aspect,
        )


def read_frames(
    path: str | Path, start: int = 0, count: int | None = None, skip: int = 0, on_error: OnError = "raise"
) -> Iterator[Pixels]:
    """Frames of a video file one by one, uint8 RGB `(height, width, 3)`, turned and mirrored as they are shown.

    They come at a constant rate, see `timing`: where the file's frames are not evenly spaced, some repeat, and the log
    says so. Every frame of the file is among them, but for those that come faster than any rate.
    Colours are those of BT.709 or sRGB, see `colours`. Pixels that are not square are left as stored.
    Frames before `start` are decoded too, so it costs time. A Matroska file that was cut off merely ends earlier. One
    that begins between two key frames begins with the first.

    Args:
        start: number of the first frame.
        count: most frames to give; None for all.
        skip: frames left out after each that is given. The rate of what is given is `rate / (skip + 1)`.
        on_error: where the file is corrupt or cut off, "raise", or "hold" the last whole frame, up to the next key
            frame or to the end.

    Raises:
        FileNotFoundError: no such file; raised by the call, before any frame.
        ValueError: not a video (raised by the call), a corrupt one (from the frame on that is broken), or colours that
            have no conversion (from the first frame on).
    """
    for name, number, least in (("start", start, 0), ("count", count, 1), ("skip", skip, 0)):
        if number is not None and number < least:
            raise ValueError(f"expected {name} of at least {least}; got {number}; count frames from 0")
    if on_error not in ("raise", "hold"):
        raise ValueError(f"expected on_error 'raise' or 'hold'; got {on_error!r}; pick one")
    with opened(path):
        pass
    stop = None if count is None else start + (count - 1) * (skip + 1) + 1
    return map(Shown(path), itertools.islice(_read(path, on_error), start, stop, skip + 1))


def _read(path: str | Path, on_error: OnError) -> Iterator[Any]:
    """The decoded frame of each tick."""
    timing = timing_of(path)
    with opened(path) as (container, stream):
        yield from _spread(_decode(container, stream, path, on_error), timing, path)


def _spread(frames: Iterable[Any], timing: Timing, path: str | Path) -> Iterator[Any]:
    """Each frame from its tick (see `ticks`) up to that of the next; the last one, or one before a None, to the end."""
    shown, tick, told = None, -1, set[str]()

    def tell(what: str) -> None:
        if what not in told:
            told.add(what)
            logger.warning("%s: %s; shown at %s per second", path, what, timing.rate)

    for frame in frames:
        if frame is None:
            yield from itertools.repeat(shown, (timing.length or 0) - tick - 1)
            return
        due = tick + 1 if frame.pts is None else round((frame.pts * frame.time_base - timing.begin) * timing.rate)
        if tick + 1 - due > LATE:
            tell("some frames come too fast and are left out")
            continue
        if shown is not None and due > tick + 1:
            tell(UNEVEN)
            yield from itertools.repeat(shown, due - tick - 1)
        shown, tick = frame, max(tick + 1, due)
        yield frame
    if timing.length is not None and timing.length > tick + 1 > 0:
        tell(UNEVEN)
        yield from itertools.repeat(shown, timing.length - tick - 1)


def _decode(container: Any, stream: Any, path: str | Path, on_error: OnError, told: bool = True) -> Iterator[Any]:
    """Frames in the order they are shown in; broken ones raise, or are left out up to the next key frame.

    A None follows where no key frame came any more.
    """
    av, packets, number, broken = pyav(), whole_packets(container, stream, path, told), 0, False
    while True:
        try:
            packet = next(packets, None)
            if packet is None:
                break
            frames = packet.decode()
            if packet.is_corrupt or any(frame.is_corrupt for frame in frames):
                raise av.InvalidDataError(0, "part of it is missing")
        except av.FFmpegError as error:
            if on_error == "raise" or number == 0:
                raise ValueError(
                    f"expected a whole video in {path}; got one that is broken at or soon after frame {number}: "
                    f"{error.strerror}; make the file anew, or use what comes before"
                ) from error
            if not broken:
                logger.warning("%s: broken at or soon after frame %d; the frame before is held", path, number)
            broken = True
            continue
        for frame in frames:
            broken = broken and not frame.key_frame
            if not broken:
                number += 1
                yield frame
    if broken:
        yield None
