"""Calls of a pipeline that can be made again: one for each prompt, each from noise of its own."""

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

Prompt = str | Mapping[str, Any]
"""A text, or arguments of the pipeline's call, such as an image to begin with."""


def makes_video(pipe: Any) -> bool:
    """Whether a pipeline's call makes frames, by its arguments."""
    return bool({"num_frames", "video_length"} & inspect.signature(type(pipe).__call__).parameters.keys())


def least_side(pipe: Any) -> int:
    """Pixels of a token's side, which diffusers would round to nothing below that."""
    cell = int(getattr(pipe, "vae_scale_factor", None) or getattr(pipe, "vae_scale_factor_spatial", None) or 1)
    return cell * (2 if getattr(pipe, "transformer", None) is not None else 1)


class Draws:
    """What a pipeline draws from prompts; number i starts from noise of `seed + i`."""

    def __init__(self, pipe: Any, prompts: Sequence[Prompt], seed: int, call: Mapping[str, Any]) -> None:
        if isinstance(prompts, str) or not len(prompts):
            raise ValueError(f"expected a list of prompts, got {prompts!r}")
        self.pipe, self.seed = pipe, seed
        self.calls = [{**call, **({"prompt": own} if isinstance(own, str) else own)} for own in prompts]

    def __len__(self) -> int:
        return len(self.calls)

    def draw(self, number: int, **options: Any) -> np.ndarray:
        """Float pixels in 0-1: an image `(height, width, 3)`, or a video with frames first."""
        generator = torch.Generator("cpu").manual_seed(self.seed + number)
        output = self.pipe(**{**self.calls[number], **options}, generator=generator, output_type="np")
        pixels = (output.images if hasattr(output, "images") else output.frames)[0]
        return np.asarray(pixels, dtype=np.float32)

    def describe(self) -> dict[str, Any]:
        """Plain values that tell these draws from others; images by a digest."""
        calls = [{name: _plain(value) for name, value in call.items()} for call in self.calls]
        return {"pipeline": type(self.pipe).__name__, "prompts": calls, "seed": self.seed}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    data = np.asarray(value.cpu() if isinstance(value, torch.Tensor) else value)
    return "sha256 " + hashlib.sha256(data.tobytes()).hexdigest()
