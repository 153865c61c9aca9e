"""Pipelines of diffusers as a whole, on tiny random components: two steps, prompts as embeddings.

Each says where the tokens of its models' self-attention lie, by hand. `tests/swap/test_whole_pipelines.py` runs them.
"""

from collections.abc import Callable

from . import flux_like, further, images, stable_diffusion, videos
from .case import Whole

WHOLE: dict[str, Callable[[], Whole]] = {
    **flux_like.CASES,
    **images.CASES,
    **further.CASES,
    **stable_diffusion.CASES,
    **videos.CASES,
}
"""Name of the pipeline's class, with what is special about it behind a comma -> builder."""

__all__ = ["WHOLE", "Whole"]
