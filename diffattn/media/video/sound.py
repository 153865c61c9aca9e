"""The sound of a file, copied without encoding it anew, and what else of it is left out."""

import contextlib
import io
import logging
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

from .encoder import ENDINGS, open_encoder
from .opening import pictures_of, pyav
from .timing import timing_of

logger = logging.getLogger("diffattn")


class Sound:
    """Packets of a file's default track of sound, from a moment of its images on.

    Args:
        source: video or sound file; one without sound gives none.
        begin: seconds that lie before the first packet, from the first frame that can be read on.

    Raises:
        ValueError: a source that cannot be opened.
    """

    def __init__(self, source: str | Path, begin: float, stack: contextlib.ExitStack) -> None:
        av = pyav()
        try:
            self._file = stack.enter_context(av.open(f"file:{source}"))
        except (av.FFmpegError, OSError) as error:
            raise ValueError(f"expected sound in {source}; got: {error.strerror}; name another") from error
        self.source, self._begin = source, Fraction(begin)
        self.stream = default_of(self._file.streams.audio)
        self._pictures = pictures_of(self._file)

    def check(self, ending: str) -> None:
        """Raise `ValueError` where files of this ending cannot hold the track, and say which can."""
        if self.stream is None or holds(ending, self.stream):
            return
        others = [other for other in reversed(ENDINGS) if other != ending and holds(other, self.stream)]
        can = " or ".join(f"a {other}" for other in others)
        todo = f"write {can}" if can else "encode the sound anew first, as AAC"
        name = self.stream.codec_context.name if self.stream.codec_context else "an unknown codec"
        raise ValueError(f"expected sound that {ending} files hold; got {name} in {self.source}; {todo}")

    def packets(self, copy: Any) -> Iterator[tuple[Fraction, Any]]:
        """Each packet, moved to the stream `copy`, with its time in what is written."""
        if self._pictures is not None:
            begin = timing_of(self.source).begin
        else:
            begin = Fraction((self.stream.start_time or 0) * self.stream.time_base)
        begin += self._begin
        for packet in self._file.demux(self.stream):
            if packet.dts is None or packet.pts is None:
                continue
            time = Fraction(packet.pts * packet.time_base) - begin
            if time >= 0:
                shift = round(begin / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copy
                yield time, packet

    def tell_rest(self) -> None:
        """Say in the log which tracks are not taken over."""
        kept = [stream for stream in (self.stream, self._pictures) if stream is not None]
        cover = pyav().stream.Disposition.attached_pic
        rest = [stream for stream in self._file.streams if stream not in kept and not stream.disposition & cover]
        counts = {kind: sum(stream.type == kind for stream in rest) for kind in ("video", "audio", "subtitle", "data")}
        words = [f"{count} {kind} track{'s' * (count > 1)}" for kind, count in counts.items() if count]
        chapters = len(self._file.chapters())
        words += [f"{chapters} chapter{'s' * (chapters > 1)}"] if chapters else []
        if words:
            logger.warning("%s: not taken over: %s", self.source, ", ".join(words))


def default_of(streams: Any) -> Any:
    """The track that the file says is to be heard, else the first; None without any."""
    default = pyav().stream.Disposition.default
    return next((stream for stream in streams if stream.disposition & default), next(iter(streams), None))


def holds(ending: str, stream: Any) -> bool:
    """Whether files of this ending hold such a track beside H.264: tried, as FFmpeg's own lists promise too much."""
    if stream.codec_context is None:
        return False
    kind = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska"}[ending]
    try:
        with pyav().open(io.BytesIO(), "w", format=kind) as trial:
            video = open_encoder(trial, 25)
            video.height = video.width = 16
            trial.add_stream_from_template(stream)
            trial.start_encoding()
    except (pyav().FFmpegError, ValueError):
        return False
    return True
