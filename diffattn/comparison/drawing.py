"""One call of a pipeline under a setting, and what it took."""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..measure import peak_memory, synchronize
from ..measure.draws import Draws
from ..swap.report import summary
from .setting import Setting


@dataclass(frozen=True)
class Drawn:
    """An image, or a video, and what it took."""

    pixels: np.ndarray
    """Float in 0-1: `(height, width, 3)`, of a video with frames first."""
    seconds: float
    peak_bytes: int | None
    computed: float
    """Share of the attention that was computed."""


def draw(draws: Draws, number: int, setting: Setting, **options: Any) -> Drawn:
    """Number `number` of `draws` under a setting; the pipeline is left as it was, after an error too.

    `options` are further arguments of the pipeline's call.
    """
    with setting.on(draws.pipe):
        with peak_memory(draws.pipe.device) as memory:
            synchronize(draws.pipe.device)
            start = time.perf_counter()
            pixels = draws.draw(number, **options)
            synchronize(draws.pipe.device)
            seconds = time.perf_counter() - start
        computed = None if setting.mechanism is None else summary(draws.pipe).computed
    return Drawn(pixels, seconds, memory.bytes, 1.0 if computed is None else computed)
