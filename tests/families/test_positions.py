"""Grids read from position ids: whatever the ids' scale, offset and dtype, and never a grid that is not there."""

import pytest
import torch
from torch import Tensor

from diffattn.families.positions import picture_size, video_size

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32]
SIZES = [(6, 9), (9, 6), (1, 9), (9, 1), (1, 1), (2, 2), (4, 130), (4, 260), (4, 2080), (300, 1), (2100, 1), (1, 300)]
SIZES += [(260, 3), (258, 514), (512, 512)]


def ids(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Row and column of every cell, row by row."""
    return torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_picture_in_any_dtype(size: tuple[int, int], dtype: torch.dtype) -> None:
    rows, columns = (axis.to(dtype) for axis in ids(*size))
    assert picture_size(rows, columns) == size


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("change", [(0.5, 0), (1.7, 0), (1 / 3, -5)])
@pytest.mark.parametrize("size", [(6, 9), (1, 9), (9, 1), (4, 130), (130, 4), (64, 600)], ids=str)
def test_scaled_ids(size: tuple[int, int], change: tuple[float, float], dtype: torch.dtype) -> None:
    scale, offset = change
    rows, columns = ((axis.double() * scale + offset).to(dtype) for axis in ids(*size))
    assert picture_size(rows, columns) == size


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(6, 9), (1, 60), (60, 1), (4, 130), (4, 60), (2, 300)], ids=str)
@pytest.mark.parametrize("offset", [7, 100, 512])
def test_offset_ids(size: tuple[int, int], offset: int, dtype: torch.dtype) -> None:
    """Two to four rows from 512 on share one id in bfloat16."""
    rows, columns = ((axis + offset).to(dtype) for axis in ids(*size))
    assert picture_size(rows, columns) == size


def wrong_orders() -> dict[str, tuple[Tensor, Tensor]]:
    rows, columns = ids(6, 9)
    shuffled = torch.randperm(54, generator=torch.Generator().manual_seed(0))
    stacked = torch.cat([rows, rows[:27]]), torch.cat([columns, columns[:27]])
    return {
        "column by column": (rows.view(6, 9).T.flatten(), columns.view(6, 9).T.flatten()),
        "backwards": (rows.flip(0), columns.flip(0)),
        "right to left": (rows, columns.view(6, 9).flip(1).flatten()),
        "upside down": (rows.flip(0), columns),
        "shuffled": (rows[shuffled], columns[shuffled]),
        "one token short": (rows[:-1], columns[:-1]),
        "first token missing": (rows[1:], columns[1:]),
        "one token more": (torch.cat([rows, rows[-1:]]), torch.cat([columns, columns[-1:]])),
        "two images": stacked,
        "two images side by side": (rows, torch.cat([columns.view(6, 9), columns.view(6, 9)]).flatten()[:54] % 5),
        "rows in no order": (rows.view(6, 9)[[0, 2, 1, 3, 4, 5]].flatten(), columns),
        "every row at one place": (torch.zeros(54), columns),
        "all tokens at one place": (torch.zeros(54), torch.zeros(54)),
        "a diagonal": (torch.arange(9), torch.arange(9)),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", wrong_orders())
def test_no_picture(order: str, dtype: torch.dtype) -> None:
    rows, columns = wrong_orders()[order]
    assert picture_size(rows.to(dtype), columns.to(dtype)) is None


def frames(times: list[float], rows: int = 2, columns: int = 3) -> Tensor:
    """Coordinates (3, n) of frames at these times."""
    cells = torch.stack(ids(rows, columns)).double() * 32
    return torch.cat([torch.cat([torch.full((1, cells.shape[1]), time), cells]) for time in times], dim=1).float()


OWN = [0, 1 / 25, 9 / 25, 17 / 25]


@pytest.mark.parametrize(
    ("times", "before", "after"),
    [
        (OWN, 0, 0),
        ([0], 0, 0),
        ([16 / 25, *OWN], 1, 0),
        ([8 / 25, 9 / 25, 16 / 25, 24 / 25, 1.4, *OWN], 5, 0),
        ([16 / 25, 16 / 25, *OWN], 2, 0),
        ([-1, *OWN], 1, 0),
        ([*OWN, 0, 1 / 25], 0, 2),
        ([*OWN, *OWN, -8 / 25], 0, 5),
        ([*OWN, 0, 1 / 25, 9 / 25, -8 / 25], 0, 4),
        ([0, 0], 0, 1),
        ([3, 4, 5], 0, 0),
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [(2, 3), (1, 3), (3, 1), (1, 1), (5, 40)], ids=str)
def test_a_video_among_other_frames(times: list[float], before: int, after: int, size: tuple[int, int]) -> None:
    cells = size[0] * size[1]
    want = len(times) - before - after, *size, before * cells, after * cells
    assert video_size(frames(times, *size)) == want


def test_no_video() -> None:
    whole = frames(OWN)
    for wrong in (whole[:, :-1], whole[:, 1:], whole[[1, 0, 2]], frames([3, 4, 2, 3])):
        assert video_size(wrong) is None
    moved = whole.clone()
    moved[1, 7] += 1
    assert video_size(moved) is None
