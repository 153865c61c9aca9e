"""One row per diffusers model family: which layers may be swapped, and where their tokens lie.

A row names the model classes, the attention layers (regular expressions on dotted module names, with the kind of each)
and the reader that turns the arguments of a module's forward into a `Layout`. Nothing else of a family is needed:
projections, norms, rotary embeddings and masks stay with its own processor (`diffattn.intercept`).

A layer's tokens are its grid cells and the rest, on one side or both. The grid comes from the reader, the number of
tokens from the call itself, so text lengths are never read. Where no other tokens come along, the row says so, and any
that come are an error: they would be taken for text.
"""

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from .grid import TokenGrid
from .positions import picture_size, video_size

Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class Layout:
    """A grid and how many other tokens lie on its sides: None is unknown until the call, and takes what is left.

    With 0 on both sides the layer sees the cells alone.
    """

    height: int
    width: int
    frames: int = 1
    before: int | None = None
    after: int | None = 0

    def grid(self, tokens: int) -> TokenGrid:
        """The grid of a call with this many tokens; raises `ValueError` where they are not the layout's."""
        cells = self.frames * self.height * self.width
        known = (self.before or 0) + (self.after or 0)
        rest = tokens - cells - known
        if rest < 0 or (rest and self.before is not None and self.after is not None):
            raise ValueError(
                f"the layer sees {tokens} tokens, but the model was called for a grid of "
                f"{self.frames} x {self.height} x {self.width} = {cells} cells{self._others(known)}: a use of the "
                f"model that is not known; call diffattn.restore first"
            )
        before = rest if self.before is None else self.before
        return TokenGrid(self.height, self.width, self.frames, before, tokens - cells - before)

    def _others(self, known: int) -> str:
        if self.before is None or self.after is None:
            return f" and {known} or more other tokens" if known else ""
        return f" and {known} other tokens" if known else " and no other tokens"


Read = Callable[[nn.Module, Arguments], tuple[Layout, ...]]
"""Module and the named arguments of its forward -> one layout for the whole batch, or one per sample."""


@dataclass(frozen=True)
class Layers:
    """Attention layers of one kind: those whose dotted name matches `name` as a whole."""

    name: str
    kind: str
    read: Read
    owner: str | None = None
    """Regular expression for the module whose forward is read: a group of `name`'s match start; None: the model."""
    has_features: bool = True
    """Is the first argument of the block around the layer its input, which some mechanisms compare?"""


@dataclass(frozen=True)
class Family:
    """One row."""

    name: str
    models: tuple[str, ...]
    """Class names of the models, subclasses included."""
    layers: tuple[Layers, ...]
    timestep: str = "timestep"
    """Argument of the model's forward that carries the timestep."""
    rope: str | None = None
    """Dotted name of a rotary embedding whose `theta` is read at every forward."""
    latent: str | None = None
    """Argument of the model's forward that holds the latent picture (..., height, width), where levels differ."""


def arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """The arguments of one forward by name; also where a hook has replaced `module.forward`."""
    bound = inspect.signature(type(module).forward).bind_partial(module, *args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


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


def video(frames_axis: int, before: int | None = None, after: int | None = 0, patch_t: str | None = None) -> Read:
    """5-D latents with frames on `frames_axis`, in patches of `patch_size` and the frames that `patch_t` names.

    Text lies before them unless told otherwise.
    """

    def read(module: nn.Module, call: Arguments) -> tuple[Layout, ...]:
        latents = call["hidden_states"]
        height, width = latents.shape[-2:]
        patch = _patch(module, "patch_size")
        frames = latents.shape[frames_axis] // (_patch(module, patch_t, axis=0) if patch_t else 1)
        return (Layout(height // patch, width // patch, frames, before=before, after=after),)

    return read


def flux_ids(module: nn.Module, call: Arguments) -> tuple[Layout, ...]:
    """Flux's `img_ids` (n, 3 or 4) or (b, n, 3 or 4): picture number, row, column, ...

    Pictures after the first are references. Text comes before.
    """
    return _common(_first_picture(module, ids) for ids in _samples(_values(call, "img_ids"), axes=2))


def _first_picture(module: nn.Module, ids: Tensor) -> Layout:
    number, rows, columns = ids[:, :3].unbind(1)
    others = torch.nonzero(number != number[0])
    tokens = int(others[0]) if len(others) else len(ids)
    if len(others) and number[0] == 1 and _is_a(module, "FluxTransformer2DModel"):
        raise ValueError(
            f"img_ids list {len(number.unique())} pictures that begin with number 1, as those of VisualCloze do: "
            f"examples first, what is made last; a window would lie on an example: call diffattn.restore first"
        )
    size = picture_size(rows[:tokens], columns[:tokens])
    if size is None:
        raise ValueError(
            f"img_ids must list a picture of {len(rows[:tokens].unique())} x {len(columns[:tokens].unique())} tokens "
            f"row by row, got {tokens} tokens, which do not"
        )
    return Layout(*size, after=len(ids) - tokens)


def _is_a(module: nn.Module, name: str) -> bool:
    return any(cls.__name__ == name for cls in type(module).__mro__)


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
    return (Layout(height, width, frames, after=sum(f * h * w for f, h, w in others)),)


def z_image(module: nn.Module, call: Arguments) -> tuple[Layout, ...]:
    """Z-Image's list of (c, frames, height, width), picture first, then padding and text."""
    pictures = call["x"]
    if isinstance(pictures[0], list):
        raise NotImplementedError(
            "Z-Image's omni mode puts several pictures into one sequence: not supported, restore first"
        )
    patch, patch_t = call["patch_size"], call["f_patch_size"]
    return _common(
        Layout(height // patch, width // patch, frames // patch_t, before=0, after=None)
        for frames, height, width in (x.shape[-3:] for x in pictures)
    )


def lumina(module: nn.Module, call: Arguments) -> tuple[Layout, ...]:
    """Lumina2: each sample is its own caption without padding, the picture, then padding."""
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


def feature_map(module: nn.Module, call: Arguments) -> tuple[Layout, ...]:
    """One level of a UNet: (b, c, height, width) features."""
    height, width = call["hidden_states"].shape[-2:]
    return (Layout(height, width, after=0, before=0),)


def frames_of(argument: str) -> Read:
    """Temporal attention: a sequence of frames for each place; `argument` is their number, or a tensor of it."""

    def read(module: nn.Module, call: Arguments) -> tuple[Layout, ...]:
        value = call[argument]
        frames = value.shape[-1] if isinstance(value, Tensor) else value
        return (Layout(1, 1, int(frames), before=0, after=0),)

    return read


_BLOCK = r"\.transformer_blocks\.\d+\."
_UNET_LAYERS = (
    Layers(rf".*motion_modules\.\d+{_BLOCK}attn[12]", "temporal", frames_of("num_frames"), rf"(.*){_BLOCK}.*"),
    Layers(
        rf"(?:.*\.)?(?:temp_attentions\.\d+|transformer_in){_BLOCK}attn[12]",
        "temporal",
        frames_of("num_frames"),
        rf"(.*){_BLOCK}.*",
    ),
    Layers(
        r".*attentions\.\d+\.temporal_transformer_blocks\.\d+\.attn1",
        "temporal",
        frames_of("image_only_indicator"),
        r"(.*)\.temporal_transformer_blocks\.\d+\..*",
    ),
    Layers(rf".*attentions\.\d+{_BLOCK}attn1", "spatial", feature_map, rf"(.*){_BLOCK}.*"),
    # PASD's attention to the ControlNet's residual, which has a token for each of the features' own
    Layers(
        rf".*(pixel_attentions\.\d+{_BLOCK}attn2|attentions\.\d+{_BLOCK}attn2_plus)",
        "spatial",
        feature_map,
        rf"(.*){_BLOCK}.*",
    ),
)


def _dit(pattern: str, read: Read) -> tuple[Layers, ...]:
    return (Layers(pattern, "spatial", read),)


def _sd3(argument: str) -> tuple[Layers, ...]:
    """Text behind the picture in `attn`, the picture alone in `attn2`."""
    return (
        Layers(r"transformer_blocks\.\d+\.attn", "spatial", picture(argument, before=0, after=None)),
        Layers(r"transformer_blocks\.\d+\.attn2", "spatial", picture(argument, before=0)),
    )


FAMILIES: list[Family] = [
    Family(
        "Flux",
        ("FluxTransformer2DModel", "FluxControlNetModel"),
        _dit(r"(single_)?transformer_blocks\.\d+\.attn", flux_ids),
        rope="pos_embed",
    ),
    Family(
        "Flux2",
        ("Flux2Transformer2DModel",),
        _dit(r"(single_)?transformer_blocks\.\d+\.attn", flux_ids),
        rope="pos_embed",
    ),
    Family("SD3", ("SD3Transformer2DModel",), _sd3("hidden_states")),
    # its hidden_states may be tokens already
    Family("SD3 ControlNet", ("SD3ControlNetModel",), _sd3("controlnet_cond")),
    Family("Wan", ("WanTransformer3DModel",), _dit(r"blocks\.\d+\.attn1", video(2, before=0, patch_t="patch_size"))),
    Family(
        "HunyuanVideo",
        ("HunyuanVideoTransformer3DModel",),
        _dit(r"(single_)?transformer_blocks\.\d+\.attn", video(2, before=0, after=None, patch_t="patch_size_t")),
        rope="rope",
    ),
    Family("LTX", ("LTXVideoTransformer3DModel",), _dit(r"transformer_blocks\.\d+\.attn1", ltx), rope="rope"),
    Family(
        "CogVideoX",
        ("CogVideoXTransformer3DModel",),
        _dit(r"transformer_blocks\.\d+\.attn1", video(1, patch_t="patch_size_t")),
    ),
    Family(
        "Qwen-Image",
        ("QwenImageTransformer2DModel", "QwenImageControlNetModel"),
        _dit(r"transformer_blocks\.\d+\.attn", qwen_shapes),
    ),
    Family(
        "Z-Image",
        # the ControlNet shares the transformer's noise_refiner
        ("ZImageTransformer2DModel", "ZImageControlNetModel"),
        (
            Layers(r"(noise_refiner|layers)\.\d+\.attention", "spatial", z_image),
            # their blocks get the results of all blocks before in one tensor
            Layers(r"control_(noise_refiner|layers)\.\d+\.attention", "spatial", z_image, has_features=False),
        ),
        timestep="t",
    ),
    Family("PixArt", ("PixArtTransformer2DModel",), _dit(r"transformer_blocks\.\d+\.attn1", picture(before=0))),
    Family("Sana", ("SanaTransformer2DModel",), _dit(r"transformer_blocks\.\d+\.attn1", picture(before=0))),
    Family(
        "Lumina2",
        ("Lumina2Transformer2DModel",),
        (
            Layers(r"noise_refiner\.\d+\.attn", "spatial", picture(before=0)),
            Layers(r"layers\.\d+\.attn", "spatial", lumina),
        ),
    ),
    Family(
        "Mochi", ("MochiTransformer3DModel",), _dit(r"transformer_blocks\.\d+\.attn1", video(2, before=0, after=None))
    ),
    Family(
        "HunyuanDiT",
        ("HunyuanDiT2DModel", "HunyuanDiT2DControlNetModel"),
        _dit(r"blocks\.\d+\.attn1", picture(before=0)),
    ),
    Family(
        "Stable Diffusion UNet",
        ("UNet2DConditionModel", "ControlNetModel", "ControlNetUnionModel"),
        _UNET_LAYERS,
        latent="sample",
    ),
    Family("AnimateDiff", ("UNetMotionModel",), _UNET_LAYERS, latent="sample"),
    Family("SVD", ("UNetSpatioTemporalConditionModel",), _UNET_LAYERS, latent="sample"),
    Family("I2VGen-XL", ("I2VGenXLUNet",), _UNET_LAYERS, latent="sample"),
    Family("UNet3D", ("UNet3DConditionModel", "STARControlNetModel"), _UNET_LAYERS, latent="sample"),
]
"""All known families; `FAMILIES.append(Family(...))` adds one at run time."""


def family_of(model: nn.Module) -> Family:
    """The row of a model, by the names of its class and base classes; unknown ones raise `ValueError`."""
    names = {cls.__name__ for cls in type(model).__mro__}
    for family in FAMILIES:
        if names & set(family.models):
            return family
    known = ", ".join(sorted(name for family in FAMILIES for name in family.models))
    raise ValueError(
        f"{type(model).__name__} belongs to no known model family; known: {known}. "
        f"A family is one row: see CONTRIBUTING.md, and diffattn.families.FAMILIES"
    )


def find_layers(family: Family, names: Iterable[str]) -> dict[str, Layers]:
    """Dotted names of the attention layers that the family's row describes; the first matching entry counts."""
    found = {}
    for name in names:
        for layers in family.layers:
            if re.fullmatch(layers.name, name):
                found[name] = layers
                break
    return found


def owner_of(layers: Layers, name: str) -> str:
    """Dotted name of the module whose forward tells the grid of layer `name`; "" is the model itself."""
    if layers.owner is None:
        return ""
    match = re.fullmatch(layers.owner, name)
    assert match is not None
    return match[1]
