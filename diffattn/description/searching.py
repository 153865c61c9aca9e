"""Grids among the arguments of a forward: tokens with position ids or sizes in numbers, latents in patches."""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from ..families import Arguments, Read, readers, video_readers
from ..families.positions import picture_size, video_size
from .grids import USUAL, Size, Source, free_name, patches, snake_name, spoken

_TOLD: tuple[tuple[str, Read, str], ...] = (
    ("flux_ids", readers.flux_ids, "img_ids"),
    ("last_ids", readers.last_ids, "position_ids"),
    ("qwen_shapes", readers.qwen_shapes, "img_shapes"),
    ("ltx", readers.ltx, "video_coords"),
    ("ltx", readers.ltx, "num_frames"),
    ("ltx2", video_readers.ltx2, "num_frames"),
    ("hidream", readers.hidream, "img_sizes"),
)
"""Readers of grids whose cells come as tokens, and the argument that tells them."""


def sources(model: nn.Module, given: Arguments) -> list[Source]:
    """Every grid that the arguments may tell, the likeliest first: those in arguments with the usual names."""
    return sorted([*_tokens(model, given), *_latents(model, given)], key=lambda source: not source.usual)


def _tokens(model: nn.Module, given: Arguments) -> Iterator[Source]:
    """Grids of tokens, by the readers of the library, by position ids under other names, and by numbers."""
    for name, read, argument in _TOLD:
        if given.get(argument) is None:
            continue
        try:
            layout = read(model, given)[0]
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            continue  # of another form than that reader knows
        size = layout.frames, layout.height, layout.width
        yield from _likeliest(
            _listed_by(argument, tokens, value, size, name, doubt=_surplus(name, tokens, value, math.prod(size)))
            for tokens, value in _tensors(given, 3)
            if value.shape[1] >= math.prod(size)
        )
    yield from _ids(given)
    yield from _numbers(model, given)


def _surplus(reader: str, tokens: str, value: Tensor, cells: int) -> str:
    """What is not known where numbers tell fewer cells than there are tokens."""
    if reader not in ("ltx2", "hidream") or value.shape[1] == cells:
        return ""
    return f"{cells} of the {value.shape[1]} tokens of {tokens}, the first, were taken for the cells"


def _listed_by(
    argument: str, tokens: str, value: Tensor, size: Size, reader: str, code: str = "", doubt: str = ""
) -> Source:
    told = f"{argument} for the tokens of {tokens} {tuple(value.shape)}"
    return Source(tokens, size, len(value), reader=reader, code=code, told=told, doubt=doubt)


def _likeliest(found: Iterable[Source]) -> Iterator[Source]:
    """Of one grid with several arguments (b, n, c) the usual one, or all, with a doubt about each."""
    sources = sorted(found, key=_rank)
    names = list(dict.fromkeys(source.argument for source in sources))
    for source in sources:
        if names[0] not in USUAL and len(names) > 1:
            many = f"{' and '.join(names)} have tokens enough for the cells: {source.argument} was taken"
            source = dataclasses.replace(source, doubt="; ".join(filter(None, (source.doubt, many))))
        if names[0] not in USUAL or source.argument == names[0]:
            yield source


def _rank(source: Source) -> int:
    return USUAL.index(source.argument) if source.argument in USUAL else len(USUAL)


def _ids(given: Arguments) -> Iterator[Source]:
    """Position ids under other names, of the cells or of all tokens: number of frame or image, row and column."""
    for name, ids in given.items():
        if not isinstance(ids, Tensor) or name == "img_ids" or not re.search("ids|pos|coord", name):
            continue
        if ids.ndim in (2, 3) and 3 <= ids.shape[-1] <= 4:
            first = ids if ids.ndim == 2 else ids[0]
            found = (_among(name, first, tokens, value) for tokens, value in _tensors(given, 3))
            yield from _likeliest(itertools.chain.from_iterable(found))


def _among(name: str, ids: Tensor, tokens: str, value: Tensor) -> Iterator[Source]:
    """The grid of these tokens, if the ids of just as many list one: all, the last or the first."""
    count, length = value.shape[1], f'call["{tokens}"].shape[1]'
    for part, own in {"": ids, f"[-{length} :]": ids[-count:], f"[: {length}]": ids[:count]}.items():
        found = _listed(name, own, part) if len(own) == count else None
        if found is not None:
            size, code, doubt = found
            yield _listed_by(name, tokens, value, size, free_name(name), code=code, doubt=doubt)
            return


def _listed(name: str, ids: Tensor, part: str) -> tuple[Size, str, str] | None:
    """Size of the image or video that these ids of an argument list, its reader, and what else they may mean."""
    image, video = picture_size(ids[:, 1], ids[:, 2]), video_size(ids[:, :3].T)
    code = _IDS.replace("{reader}", free_name(name)).replace("{name}", name)
    if image is not None and min(image) > 1 and bool((ids[:, 0] == ids[0, 0]).all()):
        return (1, *image), code.replace("{found}", f"_first_picture(ids{part})").replace("{size}", ""), ""
    if video is None or video[0] == 1 or min(video[1:3]) == 1 or any(video[3:]):
        return None
    code = code.replace("{found}", f"_video(ids{part}[:, :3].T)").replace("{size}", ", own.frames")
    frames, height, width = video[:3]
    return video[:3], code, f"{name} list {frames} times {height} x {width} tokens: taken for the frames of a video"


_IDS = '''def {reader}(module: nn.Module, call: Arguments) -> tuple[Layout, ...]:
    """Those of the cells among {name}."""
    samples = _samples(_values(call, "{name}"), axes=2)
    grids = ({found} for ids in samples)
    return _common(Layout(own.height, own.width{size}{sides}) for own in grids)
'''


def _numbers(model: nn.Module, given: Arguments) -> Iterator[Source]:
    """Sizes that are given as numbers: height and width, and frames where there are any; or all in one argument."""
    frames = next((name for name in ("num_frames", "frames") if _is_size(given.get(name))), None)
    if all(_is_size(given.get(name)) for name in ("height", "width")):
        names = ["height", "width", *([frames] if frames else [])]
        texts = [f'call["{name}"]' for name in names]
        yield from _sized(model, given, [given[name] for name in names], " and ".join(names), ", ".join(texts))
    for name, value in given.items():
        if isinstance(value, (list, tuple)) and len(value) in (2, 3) and all(map(_is_size, value)):
            axes = (0, 1) if len(value) == 2 else (1, 2, 0)
            texts = [f'call["{name}"][{axis}]' for axis in axes]
            yield from _sized(model, given, [value[axis] for axis in axes], name, ", ".join(texts))


def _sized(model: nn.Module, given: Arguments, sides: list[int], told: str, sizes: str) -> Iterator[Source]:
    height, width, frames = [*sides, 1][:3]
    name, size = snake_name(model), (frames, height, width)
    code = _NUMBERS.replace("{name}", name).replace("{told}", told).replace("{sizes}", sizes)
    yield from _likeliest(
        _listed_by(told, tokens, value, size, name, code=code.replace("{tokens}", tokens))
        for tokens, value in _tensors(given, 3)
        if value.shape[1] == math.prod(size)
    )


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


_NUMBERS = '''def {name}(module: nn.Module, call: Arguments) -> tuple[Layout, ...]:
    """{told} of the tokens of {tokens} (b, n, c)."""
    return (Layout({sizes}{sides}),)
'''


def _latents(model: nn.Module, given: Arguments) -> Iterator[Source]:
    places: dict[int, tuple[tuple[int | None, int, int], ...]] = {
        4: ((None, 2, 3), (None, 1, 2)),
        5: ((2, 3, 4), (1, 3, 4), (1, 2, 3)),
    }
    for name, value in _tensors(given, 4, 5):
        if re.search("(ids|coords)$", name):
            continue
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
    return sorted(found, key=lambda item: USUAL.index(item[0]) if item[0] in USUAL else len(USUAL))
