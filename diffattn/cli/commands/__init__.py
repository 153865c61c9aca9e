"""The commands, one file each. They read options, call the library and print; heavy modules are imported inside."""

from . import (
    animate,
    demo,
    distill,
    env,
    generate,
    inspect_star,
    list_,
    long_video,
    measuring,
    upscale,
    video_upscale,
    web,
)

__all__ = [
    "animate",
    "demo",
    "distill",
    "env",
    "generate",
    "inspect_star",
    "list_",
    "long_video",
    "measuring",
    "upscale",
    "video_upscale",
    "web",
]
