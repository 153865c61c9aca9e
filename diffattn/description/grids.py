"""Grids among the arguments of a forward: latents in patches, tokens with position ids, explicit sizes."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..families import Arguments, Layout, Read, flux_ids
from ..families.positions import picture_size
from ..families.readers import ltx, qwen_shapes

Size = tuple[int, int, int]
"""frames, height, width"""
_USUAL = "hidden_states", "sample", "x", "latents"
"""Names of the argument that holds what is denoised."""
_TOLD: tuple[tuple[str, Read, str], ...] = (
    ("flux_ids", flux_ids, "img_ids"),
    ("qwen_shapes", qwen_shapes, "img_shapes"),
    ("ltx", ltx, "num_frames"),
    ("ltx", ltx, "video_coords"),
)
"""Readers of grids whose cells come as tokens, and the argument that tells them."""


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
    """Source of that reader where it has to be written."""
    told: str = ""
    """In words."""

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
        for axis, size in enumerate(self.patch):
            chosen = chosen.repeat_interleave(size, dim=axis)
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


def sources(model: nn.Module, given: Arguments) -> list[Source]:
    """Every grid that the arguments may tell, the likeliest first."""
    return [*_tokens(model, given), *_latents(model, given)]


def _tokens(model: nn.Module, given: Arguments) -> Iterator[Source]:
    for name, read, argument in _TOLD:
        if given.get(argument) is None:
            continue
        try:
            layout = read(model, given)[0]
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            continue  # of another form than that reader knows
        size = (layout.frames, layout.height, layout.width)
        for tokens, value in _tensors(given, 3):
            if value.shape[1] >= math.prod(size):
                told = f"{argument} for the tokens of {tokens} {tuple(value.shape)}"
                yield Source(tokens, size, len(value), reader=name, told=told)
                break
    yield from _ids(model, given)


def _ids(model: nn.Module, given: Arguments) -> Iterator[Source]:
    """Position ids under other names, of all tokens: image number, row and column; the image's last or first."""
    for name, ids in given.items():
        if not isinstance(ids, Tensor) or not re.search("ids|pos|coord", name) or name == "img_ids":
            continue
        if ids.ndim not in (2, 3) or not 3 <= ids.shape[-1] <= 4:
            continue
        first = ids if ids.ndim == 2 else ids[0]
        for tokens, value in _tensors(given, 3):
            count = value.shape[1]
            length = f'call["{tokens}"].shape[1]'
            for own, part in ((first[-count:], f"[-{length} :]"), (first[:count], f"[: {length}]")):
                size = picture_size(own[:, 1], own[:, 2]) if len(own) == count else None
                if size is not None and min(size) > 1:
                    yield Source(
                        tokens,
                        (1, *size),
                        len(value),
                        reader=name,
                        code=_IDS.format(name=name, part=part),
                        told=f"{name} {tuple(ids.shape)} for the tokens of {tokens} {tuple(value.shape)}",
                    )


_IDS = '''def {name}(module: nn.Module, call: Arguments) -> tuple[Layout, ...]:
    """Those of the image among the ids of all tokens."""
    samples = _samples(_values(call, "{name}"), axes=2)
    return _common(_first_picture(module, ids{part}) for ids in samples)
'''


def _latents(model: nn.Module, given: Arguments) -> Iterator[Source]:
    places: dict[int, tuple[tuple[int | None, int, int], ...]] = {
        4: ((None, 2, 3), (None, 1, 2)),
        5: ((2, 3, 4), (1, 3, 4), (1, 2, 3)),
    }
    for name, value in _tensors(given, 4, 5):
        for axes in places[value.ndim]:
            for patch in patches(model):
                lengths = [1 if axis is None else value.shape[axis] for axis in axes]
                patch = (1, *patch[1:]) if axes[0] is None else patch
                frames, height, width = (length // size for length, size in zip(lengths, patch, strict=True))
                if min(frames, height, width):
                    told = f"{name} {tuple(value.shape)} in patches of {spoken(patch)}"
                    yield Source(name, (frames, height, width), len(value), axes, patch, told=told)


def _tensors(given: Arguments, *dimensions: int) -> list[tuple[str, Tensor]]:
    """Arguments of real numbers with so many axes, those with the usual names first."""
    found = [
        (name, value)
        for name, value in given.items()
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim in dimensions
    ]
    return sorted(found, key=lambda item: _USUAL.index(item[0]) if item[0] in _USUAL else len(_USUAL))


def patches(model: nn.Module) -> list[Size]:
    """Patches (frames, height, width) by the config, or those that are usual where it has none."""
    options = config_of(model)
    size = options.get("patch_size")
    if size is None:
        return [(1, 1, 1), (1, 2, 2)]
    across = tuple(size)[-2:] if isinstance(size, (list, tuple)) and len(size) > 1 else (_number(size),) * 2
    key = frames_key(model)
    along = 1 if key is None else _number(options[key])
    return [(along, int(across[0]), int(across[1]))]


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


def spoken(layout: Layout | Size) -> str:
    """`3 x 4 x 5`, or `6 x 9` for one frame."""
    frames, height, width = (layout.frames, layout.height, layout.width) if isinstance(layout, Layout) else layout
    return f"{height} x {width}" if frames == 1 else f"{frames} x {height} x {width}"
