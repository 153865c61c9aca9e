"""The VAE tile by tile, each with a margin that its convolutions see and that is cropped from the result.

    inner = length - 2 margin,  n = ceil(inner / tile_size),  step = ceil(inner / n)
    write_k = [margin + k step, margin + (k + 1) step], the first from 0 and the last to the length
    read_k  = write_k and a margin on both sides

The step is rounded up to a multiple of 32 or, where that is more than tile_size, of 16, 8, 4 or 2.

The group norms of the VAE see one tile at a time, so tones may differ between tiles; the released PASD sums their
statistics over all tiles when its fast mode is off.

Source: the tiled VAE of the released PASD, Yang, Wu, Ren, Xie, Zhang, 2024, https://arxiv.org/abs/2308.14469.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from diffattn.media.windows import Tile

ENCODER_MARGIN, DECODER_MARGIN = 32, 11
"""Pixels and latent cells around a tile."""
CELL = 8
"""Pixels of a latent cell."""


@dataclass(frozen=True)
class PaddedTile:
    """A part of the input: what the network reads of it, and the part inside whose result is kept."""

    read: Tile
    write: Tile


def padded_tiles(height: int, width: int, tile_size: int, *, decoder: bool) -> list[PaddedTile]:
    """Cover an input row by row; one of up to `tile_size` and two margins a side stays whole.

    Args:
        height: of the input, pixels for the encoder, latent cells for the decoder; so are all other lengths.
        tile_size: largest step from tile to tile, without margins; a multiple of 8 for the encoder.
    """
    unit, margin = (1, DECODER_MARGIN) if decoder else (CELL, ENCODER_MARGIN)
    if min(height, width) < 1 or tile_size < 1 or tile_size % unit:
        raise ValueError(
            f"expected sides of at least 1 and a tile size that is a multiple of {unit}; got {height} x {width} and "
            f"{tile_size}; 1024 pixels or 224 latent cells are usual"
        )
    if max(height, width) <= tile_size + 2 * margin:
        whole = Tile(0, 0, height, width)
        return [PaddedTile(whole, whole)]
    rows, columns = (_intervals(side, tile_size, margin) for side in (height, width))
    return [PaddedTile(*(_tile(row, column) for row, column in zip(y, x, strict=True))) for y in rows for x in columns]


def _intervals(length: int, tile_size: int, margin: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """What each tile reads and writes along one axis."""
    inner = length - 2 * margin
    count = max(1, -(-inner // tile_size))
    step = _round_up(-(-inner // count), tile_size)
    edges = [0, *(margin + k * step for k in range(1, count)), length]
    return [((max(0, begin - margin), min(length, end + margin)), (begin, end)) for begin, end in pairwise(edges)]


def _round_up(least: int, most: int) -> int:
    """The least multiple of 32 from `least` to `most`, or else of 16, 8, 4 or 2."""
    multiples = (-(-least // unit) * unit for unit in (32, 16, 8, 4, 2))
    return next((multiple for multiple in multiples if multiple <= most), least)


def _tile(rows: tuple[int, int], columns: tuple[int, int]) -> Tile:
    return Tile(rows[0], columns[0], rows[1] - rows[0], columns[1] - columns[0])


def run_in_tiles(call: Callable[[Tensor], Tensor], x: Tensor, tiles: Sequence[PaddedTile], scale: float) -> Tensor:
    """Run an encoder or a decoder on each tile of `x`, `(batch, channels, rows, columns)`, and join the results.

    Args:
        call: takes a tile to one `scale` times as large, with its edges rounded down.
        tiles: from `padded_tiles` for the last two axes of `x`.
        scale: 8 for the decoder, 1/8 for the encoder.
    """
    whole = Tile(0, 0, x.shape[-2], x.shape[-1]).scaled(scale)
    out: Tensor | None = None
    for tile in tiles:
        part = call(x[(..., *tile.read.slices)])
        read, write = tile.read.scaled(scale), tile.write.scaled(scale)
        if part.shape[-2:] != (read.height, read.width):
            raise ValueError(
                f"expected {read.height} x {read.width} cells for a tile of {tile.read.height} x {tile.read.width}; "
                f"got {part.shape[-2]} x {part.shape[-1]}; give the scale of this VAE"
            )
        if out is None:
            out = part.new_empty(*part.shape[:-2], whole.height, whole.width)
        crop = Tile(write.top - read.top, write.left - read.left, write.height, write.width)
        out[(..., *write.slices)] = part[(..., *crop.slices)]
    if out is None:
        raise ValueError("expected at least one tile; got none; take them from padded_tiles()")
    return out
