"""How x264 is told to encode: the same frames give the same bytes on every machine."""

import platform
from fractions import Fraction
from typing import Any

ENDINGS = (".mp4", ".mov", ".mkv")
"""Endings of the names that `VideoWriter` takes."""

LONGEST_SIDE = 16384
"""That x264 encodes, in pixels."""

QUALITY = "18"
"""Constant rate factor of x264: visually without loss."""

_X86 = ("x86_64", "AMD64", "i386", "i686")


def reproducible(codec: str) -> dict[str, str]:
    """Options of an encoder of FFmpeg by which its output depends on the frames alone, with one thread to encode.

    x264's `cpu-independent` leaves out code that rounds otherwise on other CPUs. Its code for AVX-512 does not repeat
    itself with B-frames; SSE 4.2 is on every x86 that torch runs on. Elsewhere than on x86 there is no code by that
    name, and asking for it would turn off all there is.
    """
    if codec != "libx264":
        return {}
    return {"x264-params": "cpu-independent=1" + (":asm=SSE4.2" if platform.machine() in _X86 else "")}


def open_encoder(container: Any, rate: Fraction | int, **options: str) -> Any:
    """A stream of H.264, yuv420p, in a container that is written.

    Chroma lies in the middle of its four pixels, and the file says so.
    """
    parameters = reproducible("libx264")["x264-params"]
    stream = container.add_stream("libx264", rate=rate, options={"x264-params": f"{parameters}:chromaloc=1", **options})
    stream.pix_fmt = "yuv420p"
    stream.codec_context.thread_count = 1
    return stream
