"""The commands, one file each. They read options, call the library and print; heavy modules are imported inside."""

from . import (
    animate,
    bench,
    calibrate,
    demo,
    distill,
    estimate,
    generate,
    inspect_star,
    list_,
    long_video,
    mask,
    summary,
    upscale,
    video_upscale,
)

__all__ = [
    "animate",
    "bench",
    "calibrate",
    "demo",
    "distill",
    "estimate",
    "generate",
    "inspect_star",
    "list_",
    "long_video",
    "mask",
    "summary",
    "upscale",
    "video_upscale",
]
