"""Pixel-aware cross-attention (PACA): features attend to the ControlNet's residual at the same place of the U-Net.

Full (PASD, eq. 2 of https://arxiv.org/abs/2308.14469), a whole transformer after each layer of an up block:

    y = x + proj_out(blocks(proj_in(norm(x)), context))        context = residual, (b, c, h, w) as tokens (b, h w, c)

    blocks: self-attention, cross-attention to the context, feed-forward, each after a LayerNorm and added

Light, one cross-attention more in each transformer that the up block has already:

    x <- x + attn2(norm2(x), text)
    x <- x + attn2_plus(norm2_plus(x), proj_in_plus(residual))
    x <- x + ff(norm3(x))

The modules lie in stock blocks under the names of the official checkpoints, and join the computation by forward hooks.
A layer whose `residual` is None passes its input on.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, Protocol

from diffusers import Transformer2DModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

Variant = Literal["full", "light"]
UpBlock = Any
"""A stock `CrossAttnUpBlock2D` or `UpBlock2D`."""


class PixelAware(Protocol):
    """A layer that looks at a residual of the ControlNet."""

    residual: Tensor | None
    """(batch, channels, rows, columns), or None to leave the layer out."""


Layers = Sequence[PixelAware | None]
"""Of one up block: a pixel-aware layer for each resnet, or None."""


class PixelAttention(Transformer2DModel):  # type: ignore[misc]
    """The full form: a transformer whose context is the residual."""

    residual: Tensor | None = None

    def follow(self, layer: nn.Module) -> None:
        """Compute this transformer on whatever `layer` returns."""
        layer.register_forward_hook(self._add)

    def _add(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self.residual is None:
            return output
        if isinstance(output, tuple):
            return (self(output[0], as_tokens(self.residual), return_dict=False)[0], *output[1:])
        return self(output, as_tokens(self.residual), return_dict=False)[0]


class LightPixelAttention:
    """The light form in one transformer: its weights become parts of the transformer and of its blocks."""

    def __init__(self, transformer: Transformer2DModel, context_dim: int, heads: int, linear: bool) -> None:
        """Add the modules and hooks; `context_dim` is the width of the residual."""
        self.residual: Tensor | None = None
        self._context: Tensor | None = None
        transformer.proj_in_plus = (
            nn.Linear(context_dim, context_dim) if linear else nn.Conv2d(context_dim, context_dim, 1)
        )
        transformer.register_forward_pre_hook(self._project)
        for block in transformer.transformer_blocks:
            _LightBlock(self, block, context_dim, heads)

    def context(self) -> Tensor | None:
        """The projected residual as tokens."""
        return self._context

    def _project(self, transformer: Any, args: tuple[Any, ...]) -> None:
        if self.residual is None:
            self._context = None
        elif isinstance(transformer.proj_in_plus, nn.Linear):
            self._context = transformer.proj_in_plus(as_tokens(self.residual))
        else:
            self._context = as_tokens(transformer.proj_in_plus(self.residual))


class _LightBlock:
    """Adds `attn2_plus` to what `attn2` returns; the features that `attn2` is added to are those that `norm2` saw."""

    def __init__(self, layer: LightPixelAttention, block: BasicTransformerBlock, context_dim: int, heads: int) -> None:
        width = block.attn2.query_dim
        block.norm2_plus = nn.LayerNorm(width)
        block.attn2_plus = Attention(width, context_dim, heads=heads, dim_head=width // heads)
        self._layer, self._norm, self._attend = layer, block.norm2_plus, block.attn2_plus
        self._features: Tensor | None = None
        block.norm2.register_forward_pre_hook(self._keep)
        block.attn2.register_forward_hook(self._add)

    def _keep(self, norm: nn.Module, args: tuple[Any, ...]) -> None:
        self._features = args[0]

    def _add(self, attention: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        context, features, self._features = self._layer.context(), self._features, None
        if context is None or features is None:
            return output
        return output + self._attend(self._norm(features + output), context)


def as_tokens(picture: Tensor) -> Tensor:
    """(batch, channels, rows, columns) -> (batch, rows x columns, channels)."""
    return picture.flatten(2).transpose(1, 2)


def add_pixel_attention(
    block: UpBlock, variant: Variant, *, heads: int, depth: int, groups: int, linear: bool, upcast: bool = False
) -> Layers:
    """Give an up block its pixel-aware layers, untrained; one for each of its resnets, in the order of computation.

    Args:
        block: a stock up block; it is changed.
        variant: "light" adds nothing to a block without text attention.
        heads: attention heads; the features have `heads` times as many channels as a head.
        depth: transformer blocks in each layer of the full form.
        groups: groups of the group norm.
        linear: project tokens by a linear layer instead of a 1 x 1 convolution.
        upcast: compute attention scores in float32.
    """
    contexts, width = context_dims(block), block.resnets[0].out_channels
    if variant == "light":
        if not hasattr(block, "attentions"):
            return [None] * len(block.resnets)
        return [LightPixelAttention(a, dim, heads, linear) for a, dim in zip(block.attentions, contexts, strict=True)]
    layers = [
        PixelAttention(
            heads,
            width // heads,
            in_channels=width,
            num_layers=depth,
            cross_attention_dim=dim,
            norm_num_groups=groups,
            use_linear_projection=linear,
            upcast_attention=upcast,
        )
        for dim in contexts
    ]
    block.pixel_attentions = nn.ModuleList(layers)
    for layer, last in zip(layers, getattr(block, "attentions", block.resnets), strict=True):
        layer.follow(last)
    return layers


def context_dims(block: UpBlock) -> list[int]:
    """Channels of the residual that each layer looks at.

    That is the width of the skip connection, which is that of the block's output except for the last layer. A block
    without text attention has its own width throughout: the official code takes it for that of the skip.
    """
    width = block.resnets[0].out_channels
    last = block.resnets[-1].in_channels - width if hasattr(block, "attentions") else width
    return [width] * (len(block.resnets) - 1) + [last]


def hand_out(blocks: Iterable[Layers], residuals: Sequence[Tensor] | None) -> None:
    """Give each layer of each up block its residual, the last one first; None leaves all layers out."""
    left = iter(reversed(residuals or ()))
    for layers in blocks:
        for layer in layers:
            residual = None if residuals is None else next(left)
            if layer is not None:
                layer.residual = residual


def is_pixel_aware(key: str) -> bool:
    """Does the weight of this name belong to pixel-aware cross-attention, in either form?"""
    return any(part in f".{key}" for part in (".pixel_attentions.", ".proj_in_plus.", ".norm2_plus.", ".attn2_plus."))


def variant_of(keys: list[str]) -> Variant | None:
    """The form that the weights with these names have; None for those of a stock U-Net."""
    if any(".pixel_attentions." in key for key in keys):
        return "full"
    return "light" if any(is_pixel_aware(key) for key in keys) else None
