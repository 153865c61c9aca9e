"""What is special about halo attention: its tiles, ragged or not, on images and videos, and how it is given them."""

import itertools
import json

import pytest
import torch
from tolerances import assert_close
from torch import Tensor

from diffattn import ClearAttention, HaloAttention, SoftmaxAttention, TokenGrid, config
from diffattn.kernels import flex
from diffattn.kernels.blocks import block_order


def cells(grid: TokenGrid) -> list[tuple[int, int, int]]:
    return list(itertools.product(range(grid.frames), range(grid.height), range(grid.width)))


def by_hand(grid: TokenGrid, tile: tuple[int, int, int], halo: tuple[int, int, int]) -> Tensor:
    """Cell by cell: the window begins `halo` tiles before the query's tile and ends as many after it."""
    mask = torch.ones(grid.tokens, grid.tokens, dtype=torch.bool)
    for i, query in enumerate(cells(grid)):
        starts = [place - place % side - reach * side for place, side, reach in zip(query, tile, halo, strict=True)]
        sizes = [side * (2 * reach + 1) for side, reach in zip(tile, halo, strict=True)]
        for j, key in enumerate(cells(grid)):
            within = (start <= at < start + size for at, start, size in zip(key, starts, sizes, strict=True))
            mask[grid.before + i, grid.before + j] = all(within)
    return mask


@pytest.mark.parametrize(
    ("options", "grid", "tile", "halo"),
    [
        ({"tile": 2, "halo": 1}, TokenGrid(6, 8, before=3), (2, 2, 2), (1, 1, 1)),
        ({"tile": (3, 2), "halo": (0, 1)}, TokenGrid(7, 9, after=2), (1, 3, 2), (0, 0, 1)),
        ({"tile": 2, "halo": 1}, TokenGrid(5, 3, frames=5, before=1), (2, 2, 2), (1, 1, 1)),
        ({"tile": (2, 3, 4), "halo": (1, 0, 1)}, TokenGrid(7, 11, frames=3), (2, 3, 4), (1, 0, 1)),
        ({"tile": (1, 2, 2), "halo": 0}, TokenGrid(5, 4, frames=2, before=1, after=1), (1, 2, 2), (0, 0, 0)),
        ({"tile": 3, "halo": 9}, TokenGrid(7, 4), (3, 3, 3), (9, 9, 9)),
        ({}, TokenGrid(1, 1, before=2), (8, 8, 8), (1, 1, 1)),
    ],
    ids=str,
)
def test_mask_by_the_definition(options, grid, tile, halo) -> None:
    mechanism = HaloAttention(**options)
    want = by_hand(grid, tile, halo)
    assert torch.equal(mechanism.mask(grid), want)
    assert mechanism.flops(grid, 1, 1) == 4 * int(want.sum())


@pytest.mark.parametrize("backend", ["auto", "dense", "tiled"])
def test_tiles_of_a_video_equal_a_mask_by_hand(backend: str) -> None:
    """The tile of Sliding Tile Attention, on a video that it does not divide, with text."""
    grid = TokenGrid(11, 18, frames=8, before=3)
    mechanism = HaloAttention(tile=(6, 8, 8), halo=(1, 0, 1))
    q, k, v = torch.randn(3, 1, 2, grid.tokens, 4, dtype=torch.float64)
    tile_of = torch.tensor([(f // 6, y // 8, x // 8) for f, y, x in cells(grid)])
    apart = (tile_of[:, None] - tile_of[None]).abs()
    mask = torch.ones(grid.tokens, grid.tokens, dtype=torch.bool)
    mask[3:, 3:] = (apart[..., 1] == 0) & (apart[..., 2] <= 1)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert_close(mechanism.attend(q, k, v, grid, backend=backend), want)


@pytest.mark.parametrize("radius", [1, 2.5, 4])
@pytest.mark.parametrize("grid", [TokenGrid(9, 13, before=2), TokenGrid(5, 6, frames=4)], ids=str)
def test_tiles_of_one_token_make_the_ball_of_clear(grid: TokenGrid, radius: float) -> None:
    halo, clear = HaloAttention(tile=1, radius=radius), ClearAttention(radius=radius)
    assert torch.equal(halo.mask(grid), clear.mask(grid))
    assert halo.flops(grid, 2, 8) == clear.flops(grid, 2, 8)
    q, k, v = torch.randn(3, 2, 2, grid.tokens, 8, dtype=torch.float64)
    for backend in ("dense", "tiled"):
        assert_close(halo.attend(q, k, v, grid, backend=backend), clear.attend(q, k, v, grid, backend=backend))


@pytest.mark.parametrize("grid", [TokenGrid(9, 12, before=2), TokenGrid(5, 6, frames=3)], ids=str)
@pytest.mark.parametrize("options", [{"tile": 16, "halo": 0}, {"tile": 4, "halo": 2}, {"tile": 4, "radius": 99}])
def test_a_window_over_the_grid_is_softmax(options, grid: TokenGrid) -> None:
    q, k, v = torch.randn(3, 2, 2, grid.tokens, 8, dtype=torch.float64)
    mechanism = HaloAttention(**options)
    for backend in ("auto", "dense", "tiled"):
        assert_close(mechanism.attend(q, k, v, grid, backend=backend), SoftmaxAttention().attend(q, k, v, grid))
    assert mechanism.flops(grid, 2, 8) == SoftmaxAttention().flops(grid, 2, 8)


@pytest.mark.parametrize(
    ("tile", "radius", "seen"),
    # tiles of 8: (1, 1) lies 11.3 tokens away, (2, 0) 16 and (2, 1) 17.9
    [(8, 8, 1), (8, 8.1, 5), (8, 16, 9), (8, 16.1, 13), (8, 18, 21), ((8, 4), 8.5, 5 + 2)],
)
def test_the_round_set_of_tiles(tile, radius: float, seen: int) -> None:
    mechanism = HaloAttention(tile=tile, radius=radius)
    rows, columns = (tile, tile) if isinstance(tile, int) else tile
    grid = TokenGrid(7 * rows, 7 * columns)
    mask = mechanism.mask(grid).view(grid.height, grid.width, grid.height, grid.width)
    window = mask[3 * rows + 1, 3 * columns + 2]
    assert int(window.sum()) == seen * rows * columns
    assert window.equal(window.flip(0).flip(1))


@pytest.mark.parametrize("options", [{"halo": 2}, {"radius": 16}, {"tile": (4, 16), "halo": (3, 1)}, {"tile": 12}])
def test_every_block_is_full(options) -> None:
    """On a grid that the tile divides nothing is computed in vain, by FlexAttention and by gathered blocks."""
    grid, mechanism = TokenGrid(48, 96, before=30), HaloAttention(**options)
    shared = flex.plan(mechanism.pattern(grid), grid.shape, grid.before, torch.device("cpu"))
    assert int(shared.blocks.lists.partial_count.sum()) == 0
    order = shared.order
    further = order.tiles * -(-grid.before // order.block)
    pairs = (int(shared.blocks.lists.full_count.sum()) - further) * order.block**2
    assert pairs == mechanism.pattern(grid).pairs(TokenGrid(48, 96))
    assert block_order(mechanism.pattern(grid), grid) == order


def test_frames_of_a_picture_and_of_a_video() -> None:
    """One int is the side along all axes; (rows, columns) say nothing of a video's frames."""
    video = TokenGrid(4, 4, frames=4)
    assert int(HaloAttention(tile=2, halo=0).mask(video)[0].sum()) == 8
    assert int(HaloAttention(tile=(1, 2, 2), halo=0).mask(video)[0].sum()) == 4
    with pytest.raises(ValueError, match=r"tile=\(2, 2\) says nothing of frames.* has 4; .*such as tile=\(1, 2, 2\)"):
        HaloAttention(tile=(2, 2)).check(video)
    with pytest.raises(ValueError, match=r"halo=\(1, 1\) says nothing of frames.*such as halo=\(0, 1, 1\)"):
        HaloAttention(halo=(1, 1)).check(video)
    HaloAttention(tile=(2, 2), halo=(1, 1)).check(TokenGrid(4, 4))
    HaloAttention(tile=(6, 8, 8), halo=(1, 1, 1)).check(TokenGrid(4, 4))


def test_lists_are_tuples() -> None:
    mechanism = config.from_dict(json.loads('{"type": "halo", "tile": [6, 8, 8], "halo": [1, 1, 1]}'))
    assert mechanism == HaloAttention(tile=[6, 8, 8], halo=(1, 1, 1))  # type: ignore[arg-type]
    assert hash(mechanism) == hash(HaloAttention(tile=(6, 8, 8), halo=(1, 1, 1)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile": 0}, "tile must be an int of at least 1, .* got 0"),
        ({"tile": 8.0}, "tile must be an int of at least 1, .* got 8.0"),
        ({"tile": True}, "tile must be an int of at least 1, .* got True"),
        ({"tile": (8,)}, r"tile must be .*\(rows, columns\).* got \(8,\)"),
        ({"tile": (1, 6, 8, 8)}, "tile must be"),
        ({"tile": (8, 0)}, "tile must be"),
        ({"tile": "8"}, "tile must be .* got '8'"),
        ({"halo": -1}, "halo must be an int of at least 0, .* got -1"),
        ({"halo": (1, None)}, "halo must be"),
        ({"radius": 0}, "radius must be a positive number, got 0"),
        ({"radius": float("inf")}, "radius must be a positive number, got inf"),
        ({"radius": True}, "radius must be a positive number, got True"),
        ({"radius": 16, "halo": 2}, "radius=16 takes the place of halo=2; give one of the two"),
    ],
)
def test_bad_options(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HaloAttention(**options)
