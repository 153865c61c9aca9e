"""Readers: from the arguments of a module's forward to the layout of its tokens."""

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from .layout import Arguments, Layout, Read
from .positions import picture_size, video_size


def _patch(module: nn.Module, name: str, axis: int = -1) -> int:
    """A patch size of the model's config: one for all axes, one per axis, or None for no patches."""
    config: Any = module.config
    size: Any = config[name]
    return int(size[axis] if isinstance(size, (tuple, list)) else size or 1)


def picture(argument: str = "hidden_states", before: int | None = None, after: int | None = 0) -> Read:
    """(b, c, height, width) latents in patches of `patch_size`; text before them unless told otherwise."""

    def read(module: nn.Module, call: Arguments) -> tuple[Layout, ...]:
        height, width = call[argument].shape[-2:]
        patch = _patch(module, "patch_size")
        return (Layout(height // patch, width // patch, before=before, after=after),)

    return read


def video(
    frames_axis: int,
    before: int | None = None,
    after: int | None = 0,
    patch_t: str | None = None,
    argument: str = "hidden_states",
) -> Read:
    """5-D latents with frames on `frames_axis`, in patches of `patch_size` and the frames that `patch_t` names.

    Text lies before them unless told otherwise.
    """

    def read(module: nn.Module, call: Arguments) -> tuple[Layout, ...]:
        latents = call[argument]
        height, width = latents.shape[-2:]
        patch = _patch(module, "patch_size")
        frames = latents.shape[frames_axis] // (_patch(module, patch_t, axis=0) if patch_t else 1)
        return (Layout(height // patch, width // patch, frames, before=before, after=after),)

    return read


def flux_ids(module: nn.Module, call: Arguments) -> tuple[Layout, ...]:
    """Flux's `img_ids` (n, 3 or 4) or (b, n, 3 or 4): image number, row, column, ...

    Images after the first are references, unless numbers begin with 1: then each is a grid, and the last is made
    (VisualCloze). Text comes before.
    """
    return _common(_pictures(module, ids) for ids in _samples(_values(call, "img_ids"), axes=2))


def flux2_ids(module: nn.Module, call: Arguments) -> tuple[Layout, ...]:
    """The same, where keys of references are kept: the first `num_ref_tokens`, which see themselves alone."""
    references = call.get("num_ref_tokens") or 0 if call.get("kv_cache_mode") == "extract" else 0
    samples = _samples(_values(call, "img_ids"), axes=2)
    return _common(replace(_first_picture(ids[references:]), aside=references) for ids in samples)


def flux3(joint: bool) -> Read:
    """FLUX.3: the image of `img_ids`, alone or, in joint layers, between text and the tokens of `image_cond_ids`."""

    def read(module: nn.Module, call: Arguments) -> tuple[Layout, ...]:
        references = call["image_cond_ids"] if joint else None
        after = 0 if references is None else references.shape[-2]
        before = None if joint else 0
        return tuple(Layout(image.height, image.width, before=before, after=after) for image in flux_ids(module, call))

    return read


def _pictures(module: nn.Module, ids: Tensor) -> Layout:
    """The first image, with references behind; or the last, with examples before, each a grid."""
    number = ids[:, 0]
    counts = number.unique_consecutive(return_counts=True)[1].tolist()
    if number[0] != 1 or len(counts) == 1 or not _is_a(module, "FluxTransformer2DModel"):
        return _first_picture(ids)
    *examples, made = (_first_picture(part) for part in ids.split(counts))
    also, start = [], -sum(counts[:-1])
    for count, one in zip(counts, examples, strict=False):
        also.append((start, 1, one.height, one.width))
        start += count
    return replace(made, also=tuple(also))


def _first_picture(ids: Tensor) -> Layout:
    number, rows, columns = ids[:, :3].unbind(1)
    others = torch.nonzero(number != number[0])
    tokens = int(others[0]) if len(others) else len(ids)
    size = picture_size(rows[:tokens], columns[:tokens])
    if size is None:
        raise ValueError(
            f"img_ids must list an image of {len(rows[:tokens].unique())} x {len(columns[:tokens].unique())} tokens "
            f"row by row, got {tokens} tokens, which do not"
        )
    return Layout(*size, after=len(ids) - tokens)


def _is_a(module: nn.Module, name: str) -> bool:
    return any(cls.__name__ == name for cls in type(module).__mro__)


def _config(module: nn.Module, name: str) -> Any:
    config: Any = getattr(module, "config", {})
    return config.get(name)


def _values(call: Arguments, name: str) -> Tensor:
    """An argument whose values are read, copied to the CPU at once."""
    tensor = call[name]
    if tensor is None:
        raise ValueError(f"the grid is read from {name}, which this call of the model leaves out")
    if isinstance(tensor, FakeTensor) or tensor.is_meta:
        raise ValueError(
            f"the grid is read from the values of {name}, and torch.export traces without values: export with exact "
            f"attention, or call diffattn.restore first"
        )
    values: Tensor = tensor.detach().cpu()
    return values


def _samples(values: Tensor, axes: int) -> list[Tensor]:
    """Those of a batch, each with `axes` axes; one where all are equal."""
    if values.ndim == axes:
        return [values]
    return [values[0]] if bool((values == values[:1]).all()) else list(values)


def _common(layouts: Iterable[Layout]) -> tuple[Layout, ...]:
    """One layout for the whole batch where its samples have the same."""
    first, *others = layouts
    return (first, *others) if any(other != first for other in others) else (first,)


def qwen_shapes(module: nn.Module, call: Arguments) -> tuple[Layout, ...]:
    """Qwen-Image's `img_shapes`: per sample a list of (frames, height, width), those after the first references."""
    shapes = call["img_shapes"]
    if shapes is None:
        raise ValueError("the grid is read from img_shapes, which this call of the model leaves out")
    first, *others = (
        shapes[0] if isinstance(shapes[0], (list, tuple)) and isinstance(shapes[0][0], (list, tuple)) else shapes[:1]
    )
    frames, height, width = first
    after = sum(f * h * w for f, h, w in others)
    if not _config(module, "use_layer3d_rope"):
        return (Layout(height, width, frames, after=after),)
    cells = frames * height * width  # layers that are made, then the image that they are of
    also = tuple((number * cells, *shape) for number, shape in enumerate(others[:-1], start=1))
    return (Layout(height, width, frames, after=after, also=also),)


def nucleus(module: nn.Module, call: Arguments) -> tuple[Layout, ...]:
    """Nucleus' `img_shapes`, one (frames, height, width) or a list of them, one per sample; text behind."""
    shapes = call["img_shapes"]
    each = [shapes] if isinstance(shapes[0], int) else shapes
    return _common(Layout(height, width, frames, before=0, after=None) for frames, height, width in each)


def cosmos3(module: nn.Module, call: Arguments) -> tuple[Layout, ...]:
    """Cosmos 3: `und_len` tokens of text, the video of `vision_token_shapes`, then sound and actions."""
    shapes = call["vision_token_shapes"]
    if len(shapes) != 1:
        raise NotImplementedError(
            f"the sequence holds {len(shapes)} videos, and windows are known for one: call the model for each by "
            "itself, or call diffattn.restore first"
        )
    ((frames, height, width),) = shapes
    return (Layout(height, width, frames, before=call["und_len"], after=None),)


def z_image(module: nn.Module, call: Arguments) -> tuple[Layout, ...]:
    """Z-Image's list of (c, frames, height, width), image first, then padding and text."""
    pictures = call["x"]
    if isinstance(pictures[0], list):
        raise NotImplementedError(
            "Z-Image's omni mode puts several images into one sequence: not supported, restore first"
        )
    patch, patch_t = call["patch_size"], call["f_patch_size"]
    return _common(
        Layout(height // patch, width // patch, frames // patch_t, before=0, after=None)
        for frames, height, width in (x.shape[-3:] for x in pictures)
    )


def joy_image(module: nn.Module, call: Arguments) -> tuple[Layout, ...]:
    """`shape_list`: per sample a list of (frames, height, width), the image first; references and text behind."""
    shapes = call["shape_list"]
    if shapes is None:
        raise ValueError("the grid is read from shape_list, which this call of the model leaves out")
    return _common(Layout(height, width, frames, before=0, after=None) for (frames, height, width), *_ in shapes)


def bria_fibo2(joint: bool) -> Read:
    """Fibo 2's image before the tokens of `context_latents`, and in joint layers with the gist of the text.

    The gist lies before both, or behind both where a batch has gists of several lengths.
    """

    def read(module: nn.Module, call: Arguments) -> tuple[Layout, ...]:
        patch = _patch(module, "patch_size")
        sizes = [(x.shape[-2] // patch, x.shape[-1] // patch) for x in call["context_latents"] or []]
        context = sum(height * width for height, width in sizes)
        if not joint:
            return picture(before=0, after=context)(module, call)
        before, after = (0, None) if len(set(_gist_lengths(module, call))) > 1 else (None, context)
        return picture(before=before, after=after)(module, call)

    return read


def _gist_lengths(module: nn.Module, call: Arguments) -> list[int]:
    """Tokens of each sample's gist: from the shortest to the longest text they grow evenly, in steps."""
    mask = call["encoder_attention_mask"]
    if mask is None:
        return [0]
    config: Any = module.config
    least, most, step = config["min_num_gist_tokens"], config["max_num_gist_tokens"], config["gist_step"]
    shortest, longest = config["gist_min_text_len"], config["gist_max_text_len"]
    shares = [(length - shortest) / (longest - shortest) for length in mask.sum(dim=1).tolist()]
    wanted = (math.ceil((least + min(1.0, max(0.0, share)) * (most - least)) / step) * step for share in shares)
    return [max(least, min(most, length)) for length in wanted]


def lumina(module: nn.Module, call: Arguments) -> tuple[Layout, ...]:
    """Lumina2: each sample is its own caption without padding, the image, then padding."""
    height, width = (side // _patch(module, "patch_size") for side in call["hidden_states"].shape[-2:])
    lengths = call["encoder_attention_mask"].sum(dim=1).tolist()
    return _common(Layout(height, width, before=int(length), after=None) for length in lengths)


def ltx(module: nn.Module, call: Arguments) -> tuple[Layout, ...]:
    """LTX's `video_coords` (b, 3, n), else its num_frames, height and width.

    With coordinates the model looks at nothing else. Frames that are conditions lie before the video or after it.
    """
    if call.get("video_coords") is None:
        frames, height, width = call["num_frames"], call["height"], call["width"]
        if frames is None or height is None or width is None:
            raise ValueError(
                "the grid is read from video_coords, or from num_frames, height and width, and this call of the model "
                "leaves out both"
            )
        return (Layout(height, width, frames, before=0),)
    return _common(_video(coordinates) for coordinates in _samples(_values(call, "video_coords"), axes=2))


def _video(coordinates: Tensor) -> Layout:
    size = video_size(coordinates)
    if size is None:
        counts = " x ".join(str(len(axis.unique())) for axis in coordinates)
        raise ValueError(
            f"video_coords must list a video from time 0 on, frame by frame and row by row, with other frames of its "
            f"size before or after it; got {coordinates.shape[1]} tokens with {counts} different times, rows and "
            f"columns; call diffattn.restore first"
        )
    frames, height, width, before, after = size
    return Layout(height, width, frames, before, after)


def image_or_video(module: nn.Module, call: Arguments) -> tuple[Layout, ...]:
    """(b, c, height, width), or (b, c, frames, height, width) in a refiner; text behind."""
    *frames, height, width = call["hidden_states"].shape[2:]
    sides = [size // _patch(module, "patch_size", axis) for axis, size in ((-2, height), (-1, width))]
    count = frames[0] // _patch(module, "patch_size", 0) if frames else 1
    return (Layout(sides[0], sides[1], count, before=0, after=None),)


def hidream(module: nn.Module, call: Arguments) -> tuple[Layout, ...]:
    """HiDream's (b, c, height, width), or its tokens (b, n, c) with the `img_sizes` (rows, columns) of each sample.

    Behind them lie padding up to the largest size, and text.
    """
    if call["hidden_states"].ndim == 4:
        return picture(before=0, after=None)(module, call)
    sizes = _values(call, "img_sizes") if isinstance(call["img_sizes"], Tensor) else call["img_sizes"]
    return _common(Layout(int(rows), int(columns), before=0, after=None) for rows, columns in sizes)


def last_ids(module: nn.Module, call: Arguments) -> tuple[Layout, ...]:
    """`position_ids` (n, 3) of all tokens: text first, then the cells of `hidden_states` (b, cells, c)."""
    return (_last_picture(_values(call, "position_ids"), call["hidden_states"].shape[1]),)


def ideogram(module: nn.Module, call: Arguments) -> tuple[Layout, ...]:
    """Ideogram's `position_ids` (b, n, 3) and `indicator` (b, n), which is 2 at the image's tokens: the last."""
    begins = (_values(call, "indicator") == 2).long().argmax(dim=1).tolist()
    return _common(
        _last_picture(ids, len(ids) - begin) for ids, begin in zip(_values(call, "position_ids"), begins, strict=True)
    )


def _last_picture(ids: Tensor, cells: int) -> Layout:
    _, rows, columns = ids[-cells:].unbind(1)
    size = picture_size(rows, columns)
    if size is None:
        raise ValueError(
            f"position_ids must list an image row by row at their end; the last {cells} do not: call diffattn.restore "
            "first"
        )
    return Layout(*size)


def channels_last(module: nn.Module, call: Arguments) -> tuple[Layout, ...]:
    """(b, frames, height, width, c) in patches of `patch_size`, cells alone; their own sparse modes reorder tokens."""
    if call.get("sparse_params") is not None:
        raise NotImplementedError(
            f"{type(module).__name__} computes its own sparse attention (NABLA), which reorders the tokens: leave its "
            "attention_type regular, or call diffattn.restore first"
        )
    sides = call["hidden_states"].shape[1:4]
    frames, height, width = (size // _patch(module, "patch_size", axis) for axis, size in enumerate(sides))
    return (Layout(height, width, frames, before=0),)


def vector_ids(module: nn.Module, call: Arguments) -> tuple[Layout, ...]:
    """`input_ids` (b, height, width) of a codebook's vectors, halved where the model does so at its entrance."""
    config: Any = module.config
    step = 2 if config["downsample"] else 1
    height, width = (-(-side // step) for side in call["input_ids"].shape[-2:])
    return (Layout(height, width, before=0),)


def features_in(argument: str) -> Read:
    """One level of a UNet: (b, c, height, width) features, cells alone."""

    def read(module: nn.Module, call: Arguments) -> tuple[Layout, ...]:
        height, width = call[argument].shape[-2:]
        return (Layout(height, width, before=0),)

    return read


feature_map = features_in("hidden_states")
"""The same in blocks that call them so."""


def beside_map(before: int | None, after: int | None) -> Read:
    """One level of a UNet with keys of a text beside those of the features."""

    def read(module: nn.Module, call: Arguments) -> tuple[Layout, ...]:
        height, width = call["hidden_states"].shape[-2:]
        return (Layout(height, width, before=before, after=after),)

    return read


TEXT_THEN_MAP, MAP_THEN_TEXT = beside_map(None, 0), beside_map(0, None)


def frames_of(argument: str) -> Read:
    """Temporal attention: a sequence of frames for each place; `argument` is their number, or a tensor of it."""

    def read(module: nn.Module, call: Arguments) -> tuple[Layout, ...]:
        value = call[argument]
        frames = value.shape[-1] if isinstance(value, Tensor) else value
        return (Layout(1, 1, int(frames), before=0, after=0),)

    return read


def frames_on(axis: int) -> Read:
    """The same where `hidden_states` have the frames on an axis."""

    def read(module: nn.Module, call: Arguments) -> tuple[Layout, ...]:
        return (Layout(1, 1, call["hidden_states"].shape[axis], before=0, after=0),)

    return read
