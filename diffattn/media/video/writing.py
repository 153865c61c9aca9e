"""Videos written frame by frame."""

import contextlib
import tempfile
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from diffattn.files.writing import written

from .colours import BT709, LIMITED, WRITE
from .encoder import ENDINGS, LONGEST_SIDE, QUALITY, open_encoder
from .opening import Pixels, pyav
from .sound import Sound


class VideoWriter:
    """Write frames as they come: H.264, yuv420p, BT.709, whole or not at all; equal frames make equal files.

        with VideoWriter("out.mp4", 25, audio_from="in.mp4") as video:
            for frame in frames:
                video.write(frame)

    The file appears at the end of the block; where the block raises, nothing is left and an older file stays.
    yuv420p needs even sides: an odd one gets its last row or column twice.
    The sound of `audio_from` is copied without encoding it anew, in packets of about 20 ms: those of its default track
    from `audio_start` up to the end of the last frame. A source without sound gives none. The log says which other
    tracks it has.

    Args:
        path: ends in one of ENDINGS.
        rate: frames per second; as a fraction where it is not whole, `Fraction(30000, 1001)`.
        audio_from: video or sound file.
        audio_start: seconds of the source, from the first frame of `read_frames` on, that lie before the first frame
            written.
        aspect: width of a pixel as it is shown to its height.
        reordered: let frames lean on later ones. Without it files are a fifth to a quarter larger, and their packets
            can follow each other in one file.

    Raises:
        ValueError: a wrong ending, a folder that cannot be written to, a rate or aspect that is not positive, a source
            that is missing, or sound that this kind of file cannot hold.
    """

    def __init__(
        self,
        path: str | Path,
        rate: Fraction | int,
        audio_from: str | Path | None = None,
        audio_start: float = 0.0,
        *,
        aspect: Fraction | int = 1,
        reordered: bool = True,
    ) -> None:
        self.path, self.rate, self.aspect = Path(path), Fraction(rate), Fraction(aspect)
        self.audio_from, self.audio_start, self.reordered = audio_from, audio_start, reordered
        if self.rate <= 0 or audio_start < 0:
            raise ValueError(f"expected rate > 0 and audio_start >= 0; got {rate} and {audio_start}; change them")
        if self.aspect <= 0:
            raise ValueError(f"expected a pixel aspect above 0; got {aspect}; 1 is square")
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
            sound = None if self.audio_from is None else Sound(self.audio_from, self.audio_start, stack)
            if sound is not None:
                sound.check(self.path.suffix.lower())
                sound.tell_rest()
            self._file = stack.enter_context(pyav().open(f"file:{file}", "w"))
            options = {"crf": QUALITY} if self.reordered else {"crf": QUALITY, "bf": "0"}
            self._video = open_encoder(self._file, self.rate, **options)
            context = self._video.codec_context
            context.time_base, context.color_range = 1 / self.rate, LIMITED
            context.colorspace = context.color_primaries = context.color_trc = BT709
            context.sample_aspect_ratio = self.aspect.limit_denominator(65535)
            self._sound: Iterator[tuple[Fraction, Any]] = iter(())
            if sound is not None and sound.stream is not None:
                self._sound = sound.packets(self._file.add_stream_from_template(sound.stream))
            self._packet = next(self._sound, None)
            self._stack = stack.pop_all()
        return self

    def write(self, frame: Pixels) -> None:
        """Append a uint8 RGB frame `(height, width, 3)`, of the size of those before; `ValueError` for any other."""
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or 0 in frame.shape:
            raise ValueError(
                f"expected a uint8 RGB frame (height, width, 3); got {frame.dtype} of shape {frame.shape}; scale "
                "floats by 255 and put the channels last"
            )
        if self._size is None:
            if max(frame.shape) > LONGEST_SIDE:
                raise ValueError(
                    f"expected sides of at most {LONGEST_SIDE} pixels for H.264; got {frame.shape[0]} x "
                    f"{frame.shape[1]}; make it smaller"
                )
            self._size = frame.shape[:2]
            self._video.height, self._video.width = (side + side % 2 for side in self._size)
        if frame.shape[:2] != self._size:
            raise ValueError(f"expected frames of {self._size} as the first; got {frame.shape[:2]}; resize it")
        even = np.pad(frame, ((0, frame.shape[0] % 2), (0, frame.shape[1] % 2), (0, 0)), mode="edge")
        picture = pyav().VideoFrame.from_ndarray(np.ascontiguousarray(even), format="rgb24")
        picture = picture.reformat(format="yuv420p", dst_colorspace=BT709, dst_color_range=LIMITED, interpolation=WRITE)
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

    def _write_sound(self) -> None:
        """Put in the sound of the frames so far."""
        while self._packet is not None and self._packet[0] < self._number / self.rate:
            self._file.mux(self._packet[1])
            self._packet = next(self._sound, None)
