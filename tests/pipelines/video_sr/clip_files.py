"""Files that an upscaling is made of: a tiny checkpoint, clips with and without sound, and broken ones."""

import itertools
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import star_runs

from diffattn.media.video import VideoWriter, read_frames

DATA = Path(__file__).resolve().parents[2] / "data"
CARPHONE = DATA / "carphone.mp4"


def write_checkpoint(folder: Path, broken: bool = False) -> Path:
    """Of tiny networks; `broken`: the U-Net gives what is no number."""
    pipe = star_runs.pipeline()
    if broken:
        pipe.unet.conv_out.weight.data.fill_(float("nan"))
    pipe.save_pretrained(folder)
    return folder


def carphone(count: int, height: int, width: int) -> list[np.ndarray]:
    """The middle of the first frames."""
    top, left = (144 - height) // 2, (176 - width) // 2
    shown = itertools.islice(read_frames(CARPHONE), count)
    return [np.ascontiguousarray(frame[top : top + height, left : left + width]) for frame in shown]


def write_clip(
    path: Path, count: int, height: int = 36, width: int = 44, sound: Path | None = None, repeat: int | None = None
) -> Path:
    """Of the first `count` frames, or of the first `repeat` over and over, at 10 a second."""
    frames = carphone(repeat or count, height, width)
    with VideoWriter(path, Fraction(10), sound) as video:
        for number in range(count):
            video.write(frames[number % len(frames)])
    return path


def write_tone(path: Path, seconds: float) -> Path:
    with av.open(str(path), "w") as file:
        stream = file.add_stream("aac", rate=8000, layout="mono")
        wave = np.sin(np.arange(int(8000 * seconds)) * 0.3).astype(np.float32)[None]
        for begin in range(0, wave.shape[1], 1024):
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(wave[:, begin : begin + 1024]), "fltp", "mono")
            frame.sample_rate, frame.pts = 8000, begin
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def sound_of(path: Path) -> tuple[float, float] | None:
    """Where the sound of a file begins and ends, in seconds; None without any."""
    with av.open(str(path)) as file:
        if not file.streams.audio:
            return None
        packets = [packet for packet in file.demux(file.streams.audio[0]) if packet.pts is not None]
        times = [float(packet.pts * packet.time_base) for packet in packets]
        return min(times), max(times) + float(packets[-1].duration * packets[-1].time_base)
