"""One pipeline with the arguments of a call, and how it is run and masked."""

import inspect
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import diffusers
import torch
from hand_masks import HandMask, Layouts
from models import Tokens
from PIL import Image
from tiny_model import flat
from torch import Tensor

STEPS = 2


@dataclass
class Whole:
    """A pipeline, the arguments of one call, and where the tokens of its models' self-attention lie."""

    pipe: Any
    call: dict[str, Any]
    layouts: dict[str, Layouts]
    """Name of a part -> regular expression on layer names -> the layouts that its calls may have, by size."""

    prompts: bool = True
    """Is a batch made of several prompts, or of several images of a prompt?"""
    single: bool = False
    """Does the pipeline make one at a time?"""
    patches: Mapping[str, Any] = field(default_factory=dict)
    """Functions of the pipeline's module that stand for others: such as choose sizes that are too large here."""

    @torch.no_grad()
    def run(self, images: int) -> Tensor:
        """What one call gives, with the same noise every time."""
        call = {**self.call, "generator": torch.Generator().manual_seed(0)}
        if self.prompts:
            call |= {key: _repeated(value, images) for key, value in call.items() if key in self.batched}
        else:
            taken = inspect.signature(type(self.pipe).__call__).parameters
            [several] = {"num_images_per_prompt", "num_videos_per_prompt"} & taken.keys()
            call[several] = images
        module = sys.modules[type(self.pipe).__module__]
        with warnings.catch_warnings(), torch.random.fork_rng(), mock.patch.dict(vars(module), self.patches):
            # some draw without the generator, and some call what is deprecated
            torch.manual_seed(0)
            warnings.simplefilter("ignore")
            return flat_output(self.pipe(**call, output_type="latent", return_dict=False)[0])

    @property
    def batched(self) -> list[str]:
        """Arguments that have a prompt's own values."""
        return [key for key, value in self.call.items() if "prompt" in key and isinstance(value, (Tensor, list))]


def _repeated(value: Any, times: int) -> Any:
    return value * times if isinstance(value, list) else value.repeat(times, *[1] * (value.ndim - 1))


def flat_output(output: Any) -> Tensor:
    """The latents, or images in lists."""
    return flat(output).float()


class MaskBySize(HandMask):
    """Hand-made masks, told by the number of tokens of each call."""

    def _tokens(self, query: Tensor, key: Tensor) -> tuple[Tokens, ...]:
        assert query.shape[2] == key.shape[2]
        found = {tokens for tokens in self._layouts[self._layer] if tokens.total == query.shape[2]}
        assert len(found) == 1, f"{self._layer} was called with {query.shape[2]} tokens"
        self.masked.add(self._layer)
        self.count += 1
        return (found.pop(),)

    count = 0
    """Calls that were masked."""


def whole(
    name: str, parts: Mapping[str, Any], pool: Mapping[str, Any], layouts: dict[str, Layouts], **options: Any
) -> Whole:
    """The pipeline class `name` of those parts that it takes, called with what it takes of `pool`."""
    kind = getattr(diffusers, name)
    wanted = inspect.signature(kind.__init__).parameters
    own = {
        key: parts.get(key)
        for key, parameter in wanted.items()
        if key in parts or (key != "self" and parameter.default is inspect.Parameter.empty)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = kind(**own)
    pipe.set_progress_bar_config(disable=True)
    taken = inspect.signature(kind.__call__).parameters
    return Whole(pipe, {key: value for key, value in pool.items() if key in taken}, layouts, **options)


def image(height: int, width: int, shade: int = 40) -> Image.Image:
    """A gradient, which an encoder tells from another one."""
    return Image.linear_gradient("L").resize((width, height)).point(lambda value: (value + shade) % 256).convert("RGB")


def mask(height: int, width: int) -> Image.Image:
    """The right half is to be made."""
    made = Image.new("L", (width, height), 0)
    made.paste(255, (width // 2, 0, width, height))
    return made
