"""Small trained pipelines that ship with the package, for tests and examples that run on a CPU without a download.

>>> from diffusers import FluxPipeline
>>> from diffattn import tiny
>>> pipe = FluxPipeline.from_pretrained(tiny.path("flux"))
>>> image = pipe("a red circle at the top left on a blue background", **tiny.defaults("flux")).images[0]
>>> from diffusers import TextToVideoSDPipeline
>>> pipe = TextToVideoSDPipeline.from_pretrained(tiny.path("video"))
>>> frames = pipe("a red circle moving sideways on a blue background", **tiny.defaults("video")).frames[0]
>>> from diffusers import WanPipeline
>>> pipe = WanPipeline.from_pretrained(tiny.path("wan"))
>>> frames = pipe("a red circle moving sideways on a blue background", **tiny.defaults("wan")).frames[0]
"""

from pathlib import Path
from typing import Any

NATIVE: dict[str, dict[str, Any]] = {
    "flux": {
        "height": 128,
        "width": 128,
        "max_sequence_length": 32,
        "num_inference_steps": 20,
        "guidance_scale": 0.0,
    },
    "video": {
        "height": 48,
        "width": 48,
        "num_frames": 16,
        "num_inference_steps": 20,
        "guidance_scale": 2.0,
    },
    "wan": {
        "height": 48,
        "width": 48,
        "num_frames": 33,
        "max_sequence_length": 16,
        "num_inference_steps": 20,
        "guidance_scale": 3.0,
    },
}
"""Call arguments of each pipeline at the size it was trained for; `height` and `width` are in pixels."""


def path(name: str) -> Path:
    """Folder of the pipeline `name`, for `from_pretrained`."""
    _check(name)
    return Path(__file__).parent / name


def defaults(name: str) -> dict[str, Any]:
    """A fresh copy of the call arguments that suit the pipeline `name`."""
    _check(name)
    return dict(NATIVE[name])


def _check(name: str) -> None:
    if name not in NATIVE:
        known = ", ".join(map(repr, NATIVE))
        raise ValueError(f"expected the name of a tiny pipeline, one of {known}; got {name!r}; pass a listed name")
