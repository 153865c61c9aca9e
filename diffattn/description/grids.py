"""A grid among the arguments of a forward: where its cells lie there, and what a layer may see of it."""

import keyword
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..families import Layout, readers, video_readers

Size = tuple[int, int, int]
"""frames, height, width"""
USUAL = "hidden_states", "sample", "x", "latents"
"""Names of the argument that holds what is denoised."""


@dataclass(frozen=True)
class Source:
    """A grid, and where its cells lie in an argument."""

    argument: str
    size: Size
    samples: int
    axes: tuple[int | None, int, int] | None = None
    """Axes of frames, height and width; None: tokens (b, n, c), the grid's first."""
    patch: Size = (1, 1, 1)
    reader: str = ""
    """Name of the reader that found it; empty for latents."""
    code: str = ""
    """Source of that reader where it has to be written; "{sides}" stands for what lies beside the cells."""
    told: str = ""
    """In words."""
    doubt: str = ""
    """What else the arguments may mean."""

    @property
    def usual(self) -> bool:
        """Is it in an argument with one of the usual names?"""
        return self.argument in USUAL

    def disturbed(self, value: Tensor, chosen: Tensor) -> Tensor:
        """The argument with other numbers in the cells `chosen`, (frames, height, width)."""
        noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(1)).to(value)
        mask = self._mask(chosen, value.shape).to(value.device)
        return torch.where(mask, value + noise * value.std().clamp(min=0.1), value)

    def _mask(self, chosen: Tensor, shape: torch.Size) -> Tensor:
        """`chosen` laid out like the argument."""
        if self.axes is None:
            mask = torch.zeros(shape[1], dtype=torch.bool)
            mask[: chosen.numel()] = chosen.flatten()
            return mask[None, :, None]
        for number, size in enumerate(self.patch):
            chosen = chosen.repeat_interleave(size, dim=number)
        lengths = [1 if axis is None else shape[axis] for axis in self.axes]
        mask = torch.zeros(lengths, dtype=torch.bool)
        mask[tuple(slice(size) for size in chosen.shape)] = chosen
        places = [1] * len(shape)
        for axis, length in zip(self.axes, lengths, strict=True):
            if axis is not None:
                places[axis] = length
        return mask.reshape(places)  # the axes rise in all layouts of latents


@dataclass(frozen=True)
class View:
    """The cells that a layer's sequence holds: the whole grid, one frame of it, or one place in all frames."""

    name: str
    size: Callable[[Size], Size]
    sequences: Callable[[Size], int]
    """Sequences for each sample."""

    def fits(self, source: Source, query: tuple[int, ...]) -> bool:
        """May a call with queries of this shape see the source's cells so?"""
        if self.name != "whole" and source.size[0] == 1:
            return False
        batches = {source.samples * self.sequences(source.size)}
        if self.name == "whole":
            batches.add(1)  # some families call sample by sample
        return query[0] in batches and query[-2] >= math.prod(self.size(source.size))


VIEWS = (
    View("whole", lambda size: size, lambda size: 1),
    View("frame", lambda size: (1, *size[1:]), lambda size: size[0]),
    View("along frames", lambda size: (size[0], 1, 1), lambda size: size[1] * size[2]),
)


def patches(model: nn.Module) -> list[Size]:
    """Patches (frames, height, width) by the config, then those that are usual."""
    options = config_of(model)
    size = options.get("patch_size")
    usual = [(1, size, size) for size in (1, 2, 4, 8, 16)]
    if size is None:
        return usual
    across = tuple(size)[-2:] if isinstance(size, (list, tuple)) and len(size) > 1 else (_number(size),) * 2
    key = frames_key(model)
    along = 1 if key is None else _number(options[key])
    told = along, int(across[0]), int(across[1])
    return [told, *(patch for patch in usual if patch != told)]


def frames_key(model: nn.Module) -> str | None:
    """The entry of the config that tells how many frames a patch has."""
    options = config_of(model)
    size = options.get("patch_size")
    if isinstance(size, (list, tuple)) and len(size) == 3:
        return "patch_size"
    return next((key for key in ("patch_size_t", "patch_size_temporal", "temporal_patch_size") if key in options), None)


def _number(size: Any) -> int:
    return int(size[0] if isinstance(size, (list, tuple)) else size or 1)


def config_of(model: nn.Module) -> Mapping[str, Any]:
    """The model's config; empty where it has none."""
    config: Any = getattr(model, "config", {})
    return config if isinstance(config, Mapping) else vars(config)


def short_name(model: nn.Module) -> str:
    """What a family is called after its class."""
    name = type(model).__name__.removesuffix("Model")
    return re.sub(r"Transformer\d?D?$", "", name) or name


def snake_name(model: nn.Module) -> str:
    """What a reader of its own is called."""
    return free_name(re.sub(r"(?<=[a-z0-9])(?=[A-Z][a-z])", "_", short_name(model)).lower())


def free_name(name: str) -> str:
    """The name, or another where a module of readers has it."""
    taken = hasattr(readers, name) or hasattr(video_readers, name) or keyword.iskeyword(name)
    return f"{name}_cells" if taken else name


def spoken(layout: Layout | Size) -> str:
    """`3 x 4 x 5`, or `6 x 9` for one frame."""
    frames, height, width = (layout.frames, layout.height, layout.width) if isinstance(layout, Layout) else layout
    return f"{height} x {width}" if frames == 1 else f"{frames} x {height} x {width}"
