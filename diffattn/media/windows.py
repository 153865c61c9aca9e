"""Windows along an axis, tiles of an image, and the blend of what was computed in each.

    n       = least number with (n - 1)(size - overlap) + size >= length
    start_k = min(k (size - overlap), length - size)                       k = 0 .. n - 1
    y       = sum_k w_k y_k / sum_k w_k

Spread evenly, start_k = round(k (length - size) / (n - 1)): as many windows, and no overlap much longer than another.

Sources: MultiDiffusion, Bar-Tal, Yariv, Lipman, Dekel, 2023, https://arxiv.org/abs/2302.08113, for the blend; the
starts and the Gaussian weights as released with PASD, Yang, Wu, Ren, Xie, Zhang, 2024, https://arxiv.org/abs/2308.14469.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def starts(length: int, size: int, overlap: int, *, even: bool = False) -> list[int]:
    """Where windows of `size` begin so that they cover `length` and overlap by at least `overlap`.

    A length of at most `size` gives the single start 0, and the caller's window ends with the length.

    >>> starts(40, 16, 4), starts(40, 16, 4, even=True), starts(9, 16, 4)
    ([0, 12, 24], [0, 12, 24], [0])
    >>> starts(29, 16, 4), starts(29, 16, 4, even=True)
    ([0, 12, 13], [0, 7, 13])

    Args:
        even: spread the windows, instead of pushing the last one back into the length.
    """
    if length < 1 or not 0 <= overlap < size:
        raise ValueError(
            f"expected a length of at least 1 and an overlap from 0 to size - 1; got length {length}, size {size}, "
            f"overlap {overlap}; make the windows longer or overlap them less"
        )
    step, last = size - overlap, max(0, length - size)
    gaps = -(-last // step)
    if even:
        return [0] + [(2 * k * last + gaps) // (2 * gaps) for k in range(1, gaps + 1)]
    return [min(k * step, last) for k in range(gaps + 1)]


@dataclass(frozen=True)
class Tile:
    """A rectangle of an image, in pixels or latent cells."""

    top: int
    left: int
    height: int
    width: int

    @property
    def slices(self) -> tuple[slice, slice]:
        """Index of the last two axes, rows and columns."""
        return slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)

    def scaled(self, factor: float) -> "Tile":
        """The same rectangle of an image `factor` times as large, with its edges rounded down."""
        edges = (self.top, self.left, self.top + self.height, self.left + self.width)
        top, left, bottom, right = (math.floor(edge * factor) for edge in edges)
        return Tile(top, left, bottom - top, right - left)


def tiles(
    height: int, width: int, size: int, overlap: int, *, even: bool = True, columns_first: bool = False
) -> list[Tile]:
    """Tiles of `size` a side, or of the whole side where that is shorter, that cover an image.

    Args:
        columns_first: go down each column before the next, instead of along each row.
    """
    tops, lefts = (starts(side, size, overlap, even=even) for side in (height, width))
    rows, columns = min(size, height), min(size, width)
    if columns_first:
        return [Tile(top, left, rows, columns) for left in lefts for top in tops]
    return [Tile(top, left, rows, columns) for top in tops for left in lefts]


def official_tiles(height: int, width: int, size: int, overlap: int) -> list[Tile]:
    """The tiles of the released PASD: square, of the shortest of `size` and both sides, column by column.

    They differ from `tiles` in what is not cut: an image of up to size^2 cells, however long, stays whole.
    """
    if height * width <= size**2:
        return [Tile(0, 0, height, width)]
    return tiles(height, width, min(size, height, width), overlap, even=False, columns_first=True)


def gaussian_weights(height: int, width: int, variance: float = 0.01, official: bool = False) -> Tensor:
    """Weights of a tile that fall towards its edges, float64 `(height, width)`.

        w(y, x) = g(y; height) g(x; width),    g(i; n) = exp(-((i - m) / n)^2 / (2 variance)) / sqrt(2 pi variance)

    with m = (n - 1) / 2, the middle.

    Args:
        variance: of the Gaussian, in squared sides of the tile.
        official: m = height / 2 for the rows, half a cell off the middle, as released with PASD.
    """
    if min(height, width) < 1 or not variance > 0:
        raise ValueError(
            f"expected a tile of at least 1 x 1 and a variance above 0; got {height} x {width} and {variance}; "
            "give the size of the tiles and a variance around 0.01"
        )

    def profile(n: int, middle: float) -> Tensor:
        distance = (torch.arange(n, dtype=torch.float64) - middle) / n
        return torch.exp(-(distance**2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)

    rows = profile(height, height / 2 if official else (height - 1) / 2)
    return torch.outer(rows, profile(width, (width - 1) / 2))


def ramp_weights(begins: Sequence[int], size: int, length: int) -> Tensor:
    """Weights of windows that cross-fade linearly where neighbours overlap, float64 `(windows, size)`.

    In an overlap of o places the later window rises as 1/(o+1), 2/(o+1), .., o/(o+1), and the earlier one falls so. The
    ends of the length do not fade. At every place the weights of all windows sum to 1.

    Args:
        begins: what `starts` gave for this size and length, ascending.
    """
    size = min(size, length)
    if not begins or begins[0] != 0 or begins[-1] != length - size or max(_steps(begins), default=1) > size:
        raise ValueError(
            f"expected windows of {size} that cover {length} places; got the starts {list(begins)}; take them from "
            "starts()"
        )
    place = torch.arange(size, dtype=torch.float64)
    weights = torch.ones(len(begins), size, dtype=torch.float64)
    for k, step in enumerate(_steps(begins)):
        fade = size - step + 1
        weights[k + 1] = torch.minimum(weights[k + 1], (place + 1) / fade)
        weights[k] = torch.minimum(weights[k], (size - place) / fade)
    places = [(slice(begin, begin + size),) for begin in begins]
    return torch.stack(_shares(places, weights, (length,)))


def _steps(begins: Sequence[int]) -> list[int]:
    return [later - earlier for earlier, later in pairwise(begins)]


def blend_tiles(parts: Iterable[Tensor], places: Sequence[Tile], weights: Tensor, height: int, width: int) -> Tensor:
    """Join tiles `(..., rows, columns)` into `(..., height, width)`, by weights that all tiles share.

    Summed in float32 or wider and returned in the parts' dtype. The parts may come from a generator, one at a time.
    """
    return _blend(parts, [tile.slices for tile in places], [weights] * len(places), (height, width))


def blend_windows(
    parts: Iterable[Tensor], places: Sequence[Sequence[int]], weights: Sequence[Tensor] | Tensor, length: int, dim: int
) -> Tensor:
    """Join windows along the axis `dim`, of `length` in the whole.

    Summed in float32 or wider and returned in the parts' dtype. The parts may come from a generator, one at a time.

    Args:
        places: numbers in the whole of what each part holds, none twice; they may go round the end to the beginning.
        weights: of each part's places, `(size,)` each, as from `ramp_weights`.
    """
    indices = [(torch.tensor(list(numbers)),) for numbers in places]
    joined = _blend((part.movedim(dim, -1) for part in parts), indices, weights, (length,))
    return joined.movedim(-1, dim)


def _blend(
    parts: Iterable[Tensor], places: Sequence[tuple[Any, ...]], weights: Iterable[Tensor], shape: tuple[int, ...]
) -> Tensor:
    """Weighted mean of parts, where `places` index the last axes, of `shape`."""
    total: Tensor | None = None
    for part, place, share in zip(parts, places, _shares(places, weights, shape), strict=True):
        wide = torch.promote_types(part.dtype, torch.float32)
        if total is None:
            total, dtype = part.new_zeros(*part.shape[: -len(shape)], *shape, dtype=wide), part.dtype
        total[(..., *place)] += part * share.to(wide).to(part.device)
    assert total is not None  # _shares refuses to cover a shape with nothing
    return total.to(dtype)


def _shares(places: Sequence[tuple[Any, ...]], weights: Iterable[Tensor], shape: tuple[int, ...]) -> list[Tensor]:
    """Each part's weights over the sum of all weights at the same place."""
    total = torch.zeros(shape, dtype=torch.float64)
    weights = list(weights)
    for place, weight in zip(places, weights, strict=True):
        total[place] += weight
    if not bool((total > 0).all()):
        raise ValueError(
            f"expected parts that cover all of {shape} with weights above 0; got {int((total <= 0).sum())} places "
            "without any; take the places from starts() or tiles()"
        )
    return [weight / total[place] for place, weight in zip(places, weights, strict=True)]
