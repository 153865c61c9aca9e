"""When frames are shown: a constant rate at which every frame has a tick of its own, and the ticks of each.

A file of a constant rate has that rate. Where frames are not evenly spaced, as in many GIFs, captures of screens and
clips of phones, the rate is the nominal one of the file if by it every frame gets a tick near to its time, and else the
lowest that does so. A frame is shown up to the tick of the next, the last one as long as the file says.
"""

import functools
import itertools
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from .opening import opened, pyav, whole_packets

LATE = 1
"""Ticks that a frame may come late for the sake of those before it."""
NEAR = Fraction(1, 20)
"""Seconds by which a frame may be shown beside its time; sound that far off is not noticed."""
HIGHEST = 240
"""Frames per second; what asks for more is a clock, not a rate."""
ALIKE = 0.02
"""Share by which two rates may differ that are taken for the same."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """When a file shows its frames."""

    rate: Fraction
    """Ticks per second."""
    begin: Fraction
    """Seconds on the file's clock at which the first frame is shown that can be decoded."""
    length: int | None
    """Ticks that the file lasts; None where it does not tell."""


def timing_of(path: str | Path) -> Timing:
    """Look at all packets of a file, and where these are not evenly spaced at all frames; once for each file."""
    with opened(path):
        state = Path(path).stat()
    return _timing(str(path), state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _timing(path: str, size: int, changed: int) -> Timing:
    with opened(path) as (container, stream):
        times, last, whole = _times_of_packets(container, stream, path)
    if times is None or not _even(times):
        with opened(path) as (container, stream):
            times = _times_of_frames(container, stream, path)
    with opened(path) as (container, stream):
        hints = [Fraction(rate) for rate in (stream.guessed_rate, stream.average_rate) if rate]
        end, first = _end_of(container, stream), _first_time(container, stream, path)
        begin = Fraction((stream.start_time or 0) * stream.time_base) if first is None else first
    times = [time - begin for time in times if time >= begin]
    rate = choose_rate(times, hints)
    if rate is None:
        raise ValueError(f"expected a frame rate in {path}; got none; write the file into a container that has one")
    lasts = None if end is None else round((end - begin) * rate)
    if not times:
        return Timing(rate=rate, begin=begin, length=lasts)
    if last is None:
        last = Fraction(0) if end is None else end - begin - times[-1]
    number = max(tick for tick in ticks(times, rate) if tick is not None)
    length = number + max(1, round(last * rate))
    return Timing(rate=rate, begin=begin, length=length if whole else max(length, lasts or 0))


def _times_of_packets(container: Any, stream: Any, path: str) -> tuple[list[Fraction] | None, Fraction | None, bool]:
    """Sorted times in seconds (None: not all are told), how long the last one is shown, and whether none is missing.

    The duration of a packet is that up to the next one in the order of decoding, so it says nothing (None) where frames
    are shown in another. Nor does it where an edit list cuts frames off.
    """
    shown, lasting, count, whole = [], [], 0, True
    try:
        for packet in whole_packets(container, stream, path, told=False):
            count, whole = count + bool(packet.size), whole and not packet.is_corrupt
            if packet.size and not packet.is_discard:
                shown.append(packet.pts)
                lasting.append(packet.duration)
    except pyav().FFmpegError:
        whole = False
    whole = whole and count >= stream.frames
    if None in shown or len(set(shown)) < len(shown):
        return None, None, whole
    last = Fraction(lasting[-1] * stream.time_base) if lasting and lasting[-1] else None
    if count > len(shown):
        last = Fraction(0)
    elif shown != sorted(shown):
        last = None
    return [Fraction(pts * stream.time_base) for pts in sorted(shown)], last, whole


def _times_of_frames(container: Any, stream: Any, path: str) -> list[Fraction]:
    """Of those that tell theirs, up to the first that is broken."""
    times: set[Fraction] = set()
    try:
        for packet in whole_packets(container, stream, path, told=False):
            times.update(Fraction(frame.pts * frame.time_base) for frame in packet.decode() if frame.pts is not None)
    except pyav().FFmpegError:
        pass  # what is broken is told when the frames are read
    return sorted(times)


def _first_time(container: Any, stream: Any, path: str) -> Fraction | None:
    """Of the first frame that comes out of the decoder."""
    try:
        for packet in whole_packets(container, stream, path, told=False):
            for frame in packet.decode():
                return None if frame.pts is None else Fraction(frame.pts * frame.time_base)
    except pyav().FFmpegError:
        pass  # likewise
    return None


def _end_of(container: Any, stream: Any) -> Fraction | None:
    """Seconds on the file's clock; the length of a whole file is that of its images where there is nothing else."""
    if stream.duration is not None:
        return Fraction(((stream.start_time or 0) + stream.duration) * stream.time_base)
    if container.duration is None or len(container.streams) > 1:
        return None
    return Fraction((container.start_time or 0) + container.duration, 1_000_000)


def _even(times: Sequence[Fraction]) -> bool:
    """Gaps alike up to what a coarse clock makes of them."""
    gaps = [after - before for before, after in itertools.pairwise(times)]
    return not gaps or max(gaps) - min(gaps) <= sum(gaps) / len(gaps) / 4


def choose_rate(times: Sequence[Fraction], hints: Sequence[Fraction]) -> Fraction | None:
    """Frames per second; None where nothing tells.

    Args:
        times: of the frames, in seconds, ascending.
        hints: what the file says, the nominal rate first; one that is near to the rate found is taken for it.
    """
    gaps = [after - before for before, after in itertools.pairwise(times)]
    if not gaps:
        return min(hints, default=None)
    usual = 1 / statistics.median(gaps)
    found = (len(gaps) / sum(gaps, Fraction()), usual, 1 / min(gaps))
    rates = sorted({_like(rate, hints) for rate in (*found, *hints)})
    nominal = [rate for rate in hints[:1] if rate <= 2 * usual]
    rates = [*nominal, *(rate for rate in rates if rate <= max(Fraction(HIGHEST), usual))]
    return next((rate for rate in rates if _fits(times, rate)), rates[-1])


def _fits(times: Sequence[Fraction], rate: Fraction) -> bool:
    return all(
        tick is not None and abs(tick / rate - time) <= NEAR
        for tick, time in zip(ticks(times, rate), times, strict=True)
    )


def _like(rate: Fraction, hints: Sequence[Fraction]) -> Fraction:
    near = (hint for hint in hints if abs(rate / hint - 1) <= ALIKE)
    return next(near, rate.limit_denominator(1001))


def ticks(times: Iterable[Fraction], rate: Fraction) -> Iterator[int | None]:
    """The tick at which each of the times is shown; None where it would come too late, and is left out."""
    tick = -1
    for time in times:
        due = round(time * rate)
        if tick + 1 - due > LATE:
            yield None
            continue
        tick = max(tick + 1, due)
        yield tick
