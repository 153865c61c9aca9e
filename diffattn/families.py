"""One row per diffusers model family: which layers may be swapped, and where their tokens lie.

A row names the model classes, the attention layers (regular expressions on dotted module names, with the kind of each)
and the reader that turns the arguments of a module's forward into a `Layout`. Nothing else of a family is needed:
projections, norms, rotary embeddings and masks stay with its own processor (`diffattn.intercept`).

A layer's tokens are its grid cells and the rest, on one side or both. The grid comes from the reader, the number of
tokens from the call itself, so text lengths are never read.
"""

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .grid import TokenGrid

Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class Layout:
    """A grid whose other tokens are partly unknown until the call: `before` or `after` is None and takes the rest."""

    height: int
    width: int
    frames: int = 1
    before: int | None = None
    after: int | None = 0

    def grid(self, tokens: int) -> TokenGrid:
        """The grid of a call with this many tokens; layers that see the cells alone have no others."""
        rest = tokens - self.frames * self.height * self.width
        if rest < 0 or (self.before is not None and self.after is not None and rest != self.before + self.after):
            raise ValueError(
                f"the layer sees {tokens} tokens, but the model was called for a grid of "
                f"{self.frames} x {self.height} x {self.width} = {tokens - rest} cells"
            )
        if self.before is not None:
            before = min(self.before, rest)
            return TokenGrid(self.height, self.width, self.frames, before, rest - before)
        after = min(self.after or 0, rest)
        return TokenGrid(self.height, self.width, self.frames, rest - after, after)


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
    """(b, c, height, width) latents in patches of `patch_size`."""

    def read(module: nn.Module, call: Arguments) -> tuple[Layout, ...]:
        height, width = call[argument].shape[-2:]
        patch = _patch(module, "patch_size")
        return (Layout(height // patch, width // patch, before=before, after=after),)

    return read


def video(frames_axis: int, before: int | None = None, after: int | None = 0, patch_t: str | None = None) -> Read:
    """5-D latents with frames on `frames_axis`, in patches of `patch_size` and the frames that `patch_t` names."""

    def read(module: nn.Module, call: Arguments) -> tuple[Layout, ...]:
        latents = call["hidden_states"]
        height, width = latents.shape[-2:]
        patch = _patch(module, "patch_size")
        frames = latents.shape[frames_axis] // (_patch(module, patch_t, axis=0) if patch_t else 1)
        return (Layout(height // patch, width // patch, frames, before=before, after=after),)

    return read


def flux_ids(module: nn.Module, call: Arguments) -> tuple[Layout, ...]:
    """Flux's `img_ids` (n, 3 or 4): picture number, row, column, ...; pictures after the first are references."""
    ids = call["img_ids"]
    ids = ids[0] if ids.ndim == 3 else ids
    first = ids[ids[:, 0] == ids[0, 0]]
    height, width = (int(first[:, axis].max() - first[:, axis].min()) + 1 for axis in (1, 2))
    rows, columns = TokenGrid(height, width).positions(ids.device)[1:]
    at = first[:, 1:3] - first[0, 1:3]
    if len(first) != height * width or not torch.equal(at.long(), torch.stack([rows, columns], dim=1)):
        raise ValueError(
            f"img_ids must list a picture of {height} x {width} tokens row by row, got {len(first)} tokens"
        )
    return (Layout(height, width, after=len(ids) - len(first)),)


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
    layouts = tuple(
        Layout(height // patch, width // patch, frames // patch_t, before=0, after=None)
        for frames, height, width in (x.shape[-3:] for x in pictures)
    )
    return layouts[:1] if len(set(layouts)) == 1 else layouts


def lumina(module: nn.Module, call: Arguments) -> tuple[Layout, ...]:
    """Lumina2: each sample is its own caption without padding, the picture, then padding."""
    height, width = (side // _patch(module, "patch_size") for side in call["hidden_states"].shape[-2:])
    lengths = call["encoder_attention_mask"].sum(dim=1).tolist()
    layouts = tuple(Layout(height, width, before=int(length), after=None) for length in lengths)
    return layouts[:1] if len(set(layouts)) == 1 else layouts


def ltx(module: nn.Module, call: Arguments) -> tuple[Layout, ...]:
    """LTX's num_frames, height and width."""
    frames, height, width = call["num_frames"], call["height"], call["width"]
    if frames is None or height is None or width is None:
        raise ValueError("the grid is read from num_frames, height and width, which this call of the model leaves out")
    return (Layout(height, width, frames),)


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


_SD3_LAYERS = r"transformer_blocks\.\d+\.attn2?"

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
    Family("SD3", ("SD3Transformer2DModel",), _dit(_SD3_LAYERS, picture(before=0, after=None))),
    Family(
        "SD3 ControlNet",
        ("SD3ControlNetModel",),
        # its hidden_states may be tokens already
        _dit(_SD3_LAYERS, picture("controlnet_cond", before=0, after=None)),
    ),
    Family("Wan", ("WanTransformer3DModel",), _dit(r"blocks\.\d+\.attn1", video(2, patch_t="patch_size"))),
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
    Family("Qwen-Image", ("QwenImageTransformer2DModel",), _dit(r"transformer_blocks\.\d+\.attn", qwen_shapes)),
    Family(
        "Z-Image", ("ZImageTransformer2DModel",), _dit(r"(noise_refiner|layers)\.\d+\.attention", z_image), timestep="t"
    ),
    Family("PixArt", ("PixArtTransformer2DModel",), _dit(r"transformer_blocks\.\d+\.attn1", picture())),
    Family("Sana", ("SanaTransformer2DModel",), _dit(r"transformer_blocks\.\d+\.attn1", picture())),
    Family("Lumina2", ("Lumina2Transformer2DModel",), _dit(r"(noise_refiner|layers)\.\d+\.attn", lumina)),
    Family(
        "Mochi", ("MochiTransformer3DModel",), _dit(r"transformer_blocks\.\d+\.attn1", video(2, before=0, after=None))
    ),
    Family("HunyuanDiT", ("HunyuanDiT2DModel",), _dit(r"blocks\.\d+\.attn1", picture())),
    Family("Stable Diffusion UNet", ("UNet2DConditionModel", "ControlNetModel"), _UNET_LAYERS, latent="sample"),
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
