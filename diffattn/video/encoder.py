"""How x264 is told to encode: the same frames give the same bytes on every machine."""

import platform
from typing import Any

ENDINGS = (".mp4", ".mov", ".mkv")
"""Endings of the names that `VideoWriter` takes."""

LONGEST_SIDE = 16384
"""That x264 encodes, in pixels."""

QUALITY = "18"
"""Constant rate factor of x264: visually without loss."""

ENCODER = "libx264"

_X86 = ("x86_64", "AMD64", "i386", "i686")


def open_encoder(container: Any, rate: Any, **options: str) -> Any:
    """A stream of x264 in a container that is written, whose output depends on the frames and `options` alone.

    `cpu-independent` leaves out code that rounds otherwise on other CPUs, and one thread takes the number of cores out.
    x264's code for AVX-512 does not repeat itself with B-frames; SSE 4.2 is on every x86 that torch runs on.
    Elsewhere than on x86 there is no code by that name, and asking for it would turn off all there is.
    Chroma lies in the middle of its four pixels, and the file says so.
    """
    parameters = "chromaloc=1:cpu-independent=1" + (":asm=SSE4.2" if platform.machine() in _X86 else "")
    stream = container.add_stream(ENCODER, rate=rate, options={"x264-params": parameters, **options})
    stream.pix_fmt = "yuv420p"
    stream.codec_context.thread_count = 1
    return stream
