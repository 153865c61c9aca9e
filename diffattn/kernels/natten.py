"""NATTEN's own kernels, for patterns that are its rule.

A pattern says so by `natten`, its rule in NATTEN's options. Keys that every cell sees (text, pooled) are NATTEN's
additional keys; the queries off the grid are one plain SDPA. Axes along which a cell sees itself alone go into the
batch, as NATTEN has no window of one.

On CUDA this is what NATTEN is made for, where it was built with its library (`natten.HAS_LIBNATTEN`). Without it, and
on a CPU, NATTEN computes all scores by an uncompiled FlexAttention: the same numbers, for tests, in O(n^2) memory.
"""

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from .call import WindowCall
from .pattern import Pattern

Shape = tuple[int, int, int]

POWERS = {8, 16, 32, 64, 128, 256, 512}
"""Head sizes that NATTEN takes where it computes by FlexAttention."""


class NattenOptions(NamedTuple):
    """A rule in NATTEN's terms, for frames, rows and columns."""

    kernel_size: Shape
    dilation: Shape
    is_causal: tuple[bool, bool, bool]


def natten_options(pattern: Pattern) -> NattenOptions | None:
    """The pattern's rule in NATTEN's terms; None where it is another."""
    return getattr(pattern, "natten", None)


class Axis(NamedTuple):
    """One axis as NATTEN takes it."""

    kernel_size: int
    dilation: int
    is_causal: bool


def natten_axis(size: int, kernel_size: int, dilation: int, is_causal: bool) -> Axis | None:
    """The rule along an axis of `size` cells with a window that NATTEN takes; None where it has none.

    NATTEN asks for kernel_size * dilation <= size. A larger window is all cells of the same rest: NATTEN can say that
    where all rests have equally many.
    """
    if dilation >= size:
        return Axis(1, 1, is_causal)
    if kernel_size * dilation <= size:
        return Axis(kernel_size, dilation, is_causal)
    return Axis(min(kernel_size, size // dilation), dilation, is_causal) if size % dilation == 0 else None


def natten_axes(call: WindowCall) -> list[Axis | None]:
    """`natten_axis` of frames, rows and columns."""
    options = natten_options(call.pattern)
    assert options is not None
    return [natten_axis(*values) for values in zip(call.grid.shape, *options, strict=True)]


def has_library() -> bool:
    """Whether NATTEN is installed with its CUDA kernels."""
    try:
        import natten
    except ImportError:
        return False
    return bool(natten.HAS_LIBNATTEN)


def natten_refuses(call: WindowCall) -> str | None:
    """Why NATTEN can't serve `call`; None where it can."""
    try:
        import natten  # noqa: F401
    except ImportError as error:
        return f"natten is not installed ({error}): pip install 'diffattn[natten]'"
    if natten_options(call.pattern) is None:
        return "NATTEN computes neighborhood attention alone, and this is another pattern"
    if torch.compiler.is_compiling():
        return "an outer torch.compile is tracing"
    if call.mask is not None:
        return "NATTEN takes no mask, and the model has one"
    return _refuses_window(call) or _refuses_head_dim(call)


def _refuses_window(call: WindowCall) -> str | None:
    axes = natten_axes(call)
    if None in axes:
        return f"NATTEN needs kernel_size * dilation <= cells along each axis of the grid {call.grid}"
    inside = [(axis, size) for axis, size in zip(axes, call.grid.shape, strict=True) if axis and axis.kernel_size > 1]
    if not inside:
        return "NATTEN needs a window of more than one cell"
    whole = len(inside) == 1 and inside[0][0].kernel_size == inside[0][1] and inside[0][0].is_causal
    if whole and not call.extra_keys and call.q.device.type == "cpu":
        return "NATTEN's causal attention over a whole line does not run on a CPU"
    return None


def _refuses_head_dim(call: WindowCall) -> str | None:
    size, values = call.q.shape[-1], call.v.shape[-1]
    if has_library() and call.q.device.type == "cuda":
        needed, fits = "head sizes divisible by 8", size % 8 == 0 and values % 8 == 0
    else:
        needed, fits = "one head size, a power of two from 8 to 512", size == values and size in POWERS
    return None if fits else f"NATTEN needs {needed}, got {size} for queries and {values} for values"


def natten_attention(call: WindowCall) -> Tensor:
    """`na1d`, `na2d` or `na3d`, by the axes along which a cell sees others."""
    import natten

    axes = [axis for axis in natten_axes(call) if axis is not None]
    kept = [place for place, axis in enumerate(axes) if axis.kernel_size > 1]
    alone = [place for place in range(3) if place not in kept]
    b, h, shape = call.q.shape[0], call.q.shape[1], call.grid.shape

    def laid_out(cells: Tensor) -> Tensor:
        """`b h cells d -> (b * alone) ... h d`"""
        whole = cells.unflatten(2, shape)
        moved = whole.permute(0, *(2 + place for place in (*alone, *kept)), 1, 5).flatten(0, len(alone))
        return moved.contiguous()  # NATTEN merges text in as contiguous outputs, which are strided as the inputs are

    def for_each(extra: Tensor) -> Tensor:
        """`b h e d -> (b * alone) e h d`"""
        copies = q.shape[0] // b
        return extra.transpose(1, 2).unsqueeze(1).expand(-1, copies, -1, -1, -1).flatten(0, 1)

    q, k, v = (laid_out(call.grid.split(tensor)[0]) for tensor in (call.q, call.k, call.v))
    extra = [for_each(tensor) for tensor in call.extras()] if call.extra_keys else [None, None]
    with warnings.catch_warnings():
        # NATTEN still asks FlexAttention for its log-sum-exp in the old way, and knows that it is not compiled.
        warnings.filterwarnings("ignore", "return_lse is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile", UserWarning)
        out = (natten.na1d, natten.na2d, natten.na3d)[len(kept) - 1](
            q,
            k,
            v,
            kernel_size=tuple(axes[place].kernel_size for place in kept),
            dilation=tuple(axes[place].dilation for place in kept),
            is_causal=tuple(axes[place].is_causal for place in kept),
            scale=call.scale,
            additional_keys=extra[0],
            additional_values=extra[1],
        )
    out = out.unflatten(0, (b, *(shape[place] for place in alone)))
    back = [1 + (*alone, *kept).index(place) for place in range(3)]
    return call.join(out.permute(0, 4, *back, 5).reshape(b, h, call.grid.cells, -1))
