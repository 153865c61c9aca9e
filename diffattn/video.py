"""Video files as streams of frames: what a file holds, its frames as RGB the right way up, H.264 written with sound.

Nobody holds more than a few frames. PyAV, the extra `video`, is imported where a file is opened.
"""

import contextlib
import itertools
import logging
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from diffattn.files import written

logger = logging.getLogger("diffattn")

ENDINGS = (".mp4", ".mov", ".mkv")
"""Endings of the names that `VideoWriter` takes."""

QUALITY = "18"
"""Constant rate factor of x264: visually without loss."""

Pixels = NDArray[np.uint8]
OnError = Literal["raise", "hold"]

_BT709, _UNSPECIFIED, _LIMITED = 1, 2, 1
"""Numbers of ITU-T H.273: colours of high definition, none named, and luma from 16 to 235."""


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """What a video file says of itself."""

    width: int
    """Of a frame as it is shown, turned, in pixels."""
    height: int
    """The same."""
    frames: int | None
    """How many `read_frames` gives, by the duration; None where the file does not tell."""
    rate: Fraction
    """Nominal frames per second."""
    duration: float | None
    """Seconds."""
    rotation: int
    """Degrees that stored frames are turned by to be shown, counter-clockwise: 0, 90, 180 or 270."""
    audio: bool
    """There is sound."""


def probe(path: str | Path) -> VideoInfo:
    """Look at the head and the first frame of a video file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a video, or none that can be decoded.
    """
    with _opened(path) as (container, stream):
        first = next(_decode(container, stream, path, "raise"), None)
        if first is None:
            raise ValueError(f"expected a video with frames in {path}; got none; make the file anew")
        rate, seconds = _rate_of(stream, path), _seconds_of(container, stream)
        count = stream.frames or None if seconds is None else round(seconds * rate)
        height, width = (first.width, first.height) if first.rotation % 180 else (first.height, first.width)
        return VideoInfo(
            width=width,
            height=height,
            frames=count,
            rate=rate,
            duration=None if seconds is None else float(seconds),
            rotation=first.rotation % 360,
            audio=bool(container.streams.audio),
        )


def read_frames(
    path: str | Path, start: int = 0, count: int | None = None, skip: int = 0, on_error: OnError = "raise"
) -> Iterator[Pixels]:
    """Frames of a video file one by one, uint8 RGB `(height, width, 3)`, turned as they are shown.

    Where frames are not evenly spaced, each tick of the nominal rate gets the frame of that moment: some repeat, some
    are left out, and the log says so. Mirroring and pixels that are not square are left as stored.
    Frames before `start` are decoded too, so it costs time. A Matroska file that was cut off merely ends earlier.

    Args:
        start: number of the first frame.
        count: most frames to give; None for all.
        skip: frames left out after each that is given. The rate of what is given is `rate / (skip + 1)`.
        on_error: where the file is corrupt or cut off, "raise", or "hold" the last whole frame, up to the next key
            frame or to the end.

    Raises:
        FileNotFoundError: no such file; raised by the call, before any frame.
        ValueError: not a video (raised by the call), or a corrupt one (from the frame on that is broken).
    """
    for name, number, least in (("start", start, 0), ("count", count, 1), ("skip", skip, 0)):
        if number is not None and number < least:
            raise ValueError(f"expected {name} of at least {least}; got {number}; count frames from 0")
    if on_error not in ("raise", "hold"):
        raise ValueError(f"expected on_error 'raise' or 'hold'; got {on_error!r}; pick one")
    with _opened(path):
        pass
    stop = None if count is None else start + (count - 1) * (skip + 1) + 1
    return (_to_rgb(frame) for frame in itertools.islice(_read(path, on_error), start, stop, skip + 1))


def _read(path: str | Path, on_error: OnError) -> Iterator[Any]:
    """The decoded frame of each tick."""
    with _opened(path) as (container, stream):
        rate, seconds = _rate_of(stream, path), _seconds_of(container, stream)
        length = 0 if seconds is None else round(seconds * rate)
        yield from _spread(_decode(container, stream, path, on_error), rate, length, path)


def _spread(frames: Iterable[Any], rate: Fraction, length: int, path: str | Path) -> Iterator[Any]:
    """For every tick the last frame that begins by it; after a None, for what is left of `length` ticks too."""
    shown, tick, begin, told = None, 0, None, False
    for frame in frames:
        if frame is None:
            yield from itertools.repeat(shown, length - tick - 1)
            break
        if frame.pts is None:
            following = tick + (shown is not None)
        else:
            begin = frame.pts if begin is None else begin
            following = max(tick, round((frame.pts - begin) * frame.time_base * rate))
        if shown is not None and following != tick + 1 and not told:
            told = True
            logger.warning("%s: frames are not evenly spaced; shown at %s per second", path, rate)
        yield from itertools.repeat(shown, following - tick)
        shown, tick = frame, following
    if shown is not None:
        yield shown


def _decode(container: Any, stream: Any, path: str | Path, on_error: OnError) -> Iterator[Any]:
    """Frames in the order they are shown in; broken ones raise, or are left out up to the next key frame.

    A None follows where no key frame came any more.
    """
    av, packets, number, broken = pyav(), container.demux(stream), 0, False
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
                    f"{error.strerror}; make the file anew, or repeat the last whole frame with on_error='hold'"
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


def _to_rgb(frame: Any) -> Pixels:
    """A decoded frame as it is shown; high definition that names no colours is taken for BT.709, as players do."""
    named = frame.colorspace != _UNSPECIFIED or frame.height < 720
    pixels = frame.to_ndarray(format="rgb24", src_colorspace=None if named else _BT709)
    return np.ascontiguousarray(np.rot90(pixels, frame.rotation // 90))


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[tuple[Any, Any]]:
    """A container and its first video stream, that stops at errors instead of covering them up."""
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
        cover = av.stream.Disposition.attached_pic
        stream = next((stream for stream in container.streams.video if not stream.disposition & cover), None)
        if stream is None:
            raise ValueError(f"expected a video in {path}; got a file without pictures; name another")
        if stream.codec_context is None:
            raise ValueError(f"expected a video in {path} of a codec that FFmpeg knows; got another; encode it anew")
        stream.codec_context.options = {"err_detect": "explode"}
        yield container, stream


def _rate_of(stream: Any, path: str | Path) -> Fraction:
    """Nominal rate: the one that timestamps fit, unless it is a mere clock, far above the average."""
    guessed, average = stream.guessed_rate, stream.average_rate
    rate = guessed if guessed and (not average or guessed <= 2 * average) else average
    if not rate:
        raise ValueError(f"expected a frame rate in {path}; got none; write the file into a container that has one")
    return Fraction(rate)


def _seconds_of(container: Any, stream: Any) -> Fraction | None:
    if stream.duration is not None:
        return Fraction(stream.duration * stream.time_base)
    return None if container.duration is None else Fraction(container.duration, 1_000_000)


class VideoWriter:
    """Write frames as they come: H.264, yuv420p, BT.709, whole or not at all.

        with VideoWriter("out.mp4", 25, audio_from="in.mp4") as video:
            for frame in frames:
                video.write(frame)

    The file appears at the end of the block; where the block raises, nothing is left and an older file stays.
    yuv420p needs even sides: an odd one gets its last row or column twice.
    The sound of `audio_from` is copied without encoding it anew, in packets of about 20 ms: those from `audio_start` up
    to the end of the last frame. A source without sound gives none.

    Args:
        path: ends in one of ENDINGS.
        rate: frames per second; as a fraction where it is not whole, `Fraction(30000, 1001)`.
        audio_from: video or sound file.
        audio_start: seconds of the source, from its first frame on, that lie before the first frame written.

    Raises:
        ValueError: a wrong ending, a folder that cannot be written to, a rate that is not positive, a source that is
            missing, or sound that this kind of file cannot hold.
    """

    def __init__(
        self, path: str | Path, rate: Fraction | int, audio_from: str | Path | None = None, audio_start: float = 0.0
    ) -> None:
        self.path, self.rate = Path(path), Fraction(rate)
        self.audio_from, self.audio_start = audio_from, audio_start
        if self.rate <= 0 or audio_start < 0:
            raise ValueError(f"expected rate > 0 and audio_start >= 0; got {rate} and {audio_start}; change them")
        if self.path.suffix.lower() not in ENDINGS or self.path.is_dir():
            raise ValueError(f"expected a file name that ends in {', '.join(ENDINGS)}; got {path}; rename the output")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path.parent):
                pass
        except OSError as error:
            raise ValueError(f"expected a folder to write to; got {self.path.parent}: {error.strerror}") from error
        pyav()
        self._size: tuple[int, int] | None = None
        self._number = 0

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(written(self.path))
            self._file = stack.enter_context(pyav().open(f"file:{file}", "w"))
            self._video = self._file.add_stream("libx264", rate=self.rate, options={"crf": QUALITY})
            self._video.pix_fmt = "yuv420p"
            context = self._video.codec_context
            context.time_base, context.color_range = 1 / self.rate, _LIMITED
            context.colorspace = context.color_primaries = context.color_trc = _BT709
            self._sound = self._open_sound(stack)
            self._packet = next(self._sound, None)
            self._stack = stack.pop_all()
        return self

    def write(self, frame: Pixels) -> None:
        """Append a uint8 RGB frame `(height, width, 3)`, of the same size as those before."""
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or 0 in frame.shape:
            raise ValueError(
                f"expected a uint8 RGB frame (height, width, 3); got {frame.dtype} of shape {frame.shape}; scale "
                "floats by 255 and put the channels last"
            )
        if self._size is None:
            self._size = frame.shape[:2]
            self._video.height, self._video.width = (side + side % 2 for side in self._size)
        if frame.shape[:2] != self._size:
            raise ValueError(f"expected frames of {self._size} as the first; got {frame.shape[:2]}; resize it")
        even = np.pad(frame, ((0, frame.shape[0] % 2), (0, frame.shape[1] % 2), (0, 0)), mode="edge")
        picture = pyav().VideoFrame.from_ndarray(np.ascontiguousarray(even), format="rgb24")
        picture = picture.reformat(format="yuv420p", dst_colorspace=_BT709, dst_color_range=_LIMITED)
        picture.pts, picture.time_base = self._number, 1 / self.rate
        self._file.mux(self._video.encode(picture))
        self._number += 1
        self._write_sound()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._stack.__exit__(kind, error, trace)
            return
        with self._stack:
            if not self._number:
                raise ValueError(f"expected frames for {self.path}; got none; write at least one")
            self._file.mux(self._video.encode())

    def _open_sound(self, stack: contextlib.ExitStack) -> Iterator[tuple[Fraction, Any]]:
        """Packets of the source's sound, each with its time in what is written."""
        if self.audio_from is None:
            return iter(())
        av = pyav()
        try:
            source = stack.enter_context(av.open(f"file:{self.audio_from}"))
        except (av.FFmpegError, OSError) as error:
            raise ValueError(f"expected sound in {self.audio_from}; got: {error.strerror}; name another") from error
        if not source.streams.audio:
            return iter(())
        codec = source.streams.audio[0].codec_context.name
        if codec not in self._file.supported_codecs:
            raise ValueError(
                f"expected sound that {self.path.suffix} files hold; got {codec} in {self.audio_from}; write a .mkv"
            )
        return self._packets(source, source.streams.audio[0])

    def _packets(self, source: Any, stream: Any) -> Iterator[tuple[Fraction, Any]]:
        copy = self._file.add_stream_from_template(stream)
        pictures = source.streams.video[0] if source.streams.video else stream
        begin = Fraction((pictures.start_time or 0) * pictures.time_base) + Fraction(self.audio_start)
        for packet in source.demux(stream):
            if packet.dts is None:
                continue
            time = Fraction(packet.pts * packet.time_base) - begin
            if time >= 0:
                shift = round(begin / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copy
                yield time, packet

    def _write_sound(self) -> None:
        """Put in the sound of the frames so far."""
        while self._packet is not None and self._packet[0] < self._number / self.rate:
            self._file.mux(self._packet[1])
            self._packet = next(self._sound, None)


def pyav() -> Any:
    """The package `av`; raises `ImportError` that says how to get it."""
    try:
        import av
    except ImportError as error:
        need = "video files need PyAV: pip install 'diffattn[video]'; a folder of pictures does without"
        raise ImportError(need) from error
    return av
