"""The grid of tokens that are listed by position ids, read from where the ids repeat and never from their values.

Ids may be scaled or offset, and pipelines cast them to the prompt's dtype: bfloat16 counts to 256, then neighbours
share an id, and so do rows. What stays sure of a grid listed row by row: the column id comes back to its first value
once a row, after others, and every row has the same ids as the first.
"""

import math

import torch
from torch import Tensor


def picture_size(rows: Tensor, columns: Tensor) -> tuple[int, int] | None:
    """Height and width of an image from the ids (n,) of its tokens; None unless they list one row by row."""
    width = _width(rows, columns)
    if width is None or len(columns) % width:
        return None
    down, across = rows.view(-1, width), columns.view(-1, width)
    if (down != down[:, :1]).any() or (across != across[:1]).any():
        return None
    if not (_in_order(down[:, 0]) and _in_order(across[0])):
        return None
    if len(down) > 1 and down[0, 0] == down[-1, 0] and not _are_rounded(rows):
        return None
    return len(down), width


def video_size(coordinates: Tensor) -> tuple[int, int, int, int, int] | None:
    """Frames, height and width of a video, and how many tokens lie before and after it, from its coordinates (3, n).

    They are time, row and column. Frames of one size follow each other, frame by frame and each row by row. The video's
    own begin at time 0 and get later and later; frames beside them are conditions. If several stretches of frames begin
    at 0, the longest is the video, and of equals the first. None where the coordinates tell no video.
    """
    time, rows, columns = coordinates
    size = _first_return((rows == rows[0]) & (columns == columns[0])) or len(time)
    if size == len(time) and not ((rows != rows[0]) | (columns != columns[0])).any():
        size = 1
    if len(time) % size:
        return None
    time, rows, columns = (axis.view(-1, size) for axis in coordinates)
    if (time != time[:, :1]).any() or (rows != rows[:1]).any() or (columns != columns[:1]).any():
        return None
    picture, stretch = picture_size(rows[0], columns[0]), _own_frames(time[:, 0].tolist())
    if picture is None or stretch is None:
        return None
    return len(stretch), *picture, stretch.start * size, (len(time) - stretch.stop) * size


def first_video(bounds: Tensor) -> tuple[int, int, int] | None:
    """Frames, height and width of the video that the tokens with these bounds (3, n, 2) begin with.

    They are where a token begins and ends in time, rows and columns. The video's frames follow each other without a
    gap, frame by frame and each row by row; frames behind them that do not are keyframes and references. None where the
    tokens begin with no video.
    """
    (begins, ends), rows, columns = bounds[0].unbind(-1), bounds[1, :, 0], bounds[2, :, 0]
    is_first = (rows == rows[0]) & (columns == columns[0])
    size = _first_return(is_first) or (1 if is_first.all() else len(rows))
    whole = len(rows) // size * size
    begins, ends, rows, columns = (axis[:whole].view(-1, size) for axis in (begins, ends, rows, columns))
    picture = picture_size(rows[0], columns[0])
    alike = (begins == begins[:, :1]) & (ends == ends[:, :1]) & (rows == rows[:1]) & (columns == columns[:1])
    follows = torch.cat([alike[:1, 0], begins[1:, 0] == ends[:-1, 0]])
    frames = int((alike.all(dim=1) & follows).long().cumprod(dim=0).sum())
    return (frames, *picture) if frames and picture is not None else None


def _width(rows: Tensor, columns: Tensor) -> int | None:
    """Tokens in a row; None where all columns share an id and rows do not tell."""
    width = _first_return(columns == columns[0])
    if width is not None:
        return width
    if (columns != columns[0]).any():
        return len(columns)
    begins = (torch.nonzero(rows[1:] != rows[:-1]).flatten() + 1).tolist()
    return 1 if math.gcd(len(rows), *begins) == 1 else None


def _first_return(is_first: Tensor) -> int | None:
    """Where ids are the first one again after others; `is_first` (n,) says which are."""
    back = torch.nonzero(is_first[1:] & ~is_first[:-1])
    return int(back[0]) + 1 if len(back) else None


def _in_order(ids: Tensor) -> bool:
    """Does no id fall? Neighbours may be equal."""
    return bool((ids[1:] >= ids[:-1]).all())


def _are_rounded(ids: Tensor) -> bool:
    """Are ids so large that their dtype cannot tell whole numbers apart?"""
    return ids.is_floating_point() and float(ids[0].abs()) * torch.finfo(ids.dtype).eps >= 2


def _own_frames(times: list[float]) -> range | None:
    """The video's own frames among those at `times`, see `video_size`."""
    begins = [i for i, time in enumerate(times) if i == 0 or time < times[i - 1] or time == 0]
    stretches = [range(begin, end) for begin, end in zip(begins, [*begins[1:], len(times)], strict=True)]
    if len(stretches) == 1:
        return stretches[0]
    from_zero = [stretch for stretch in stretches if times[stretch.start] == 0]
    return max(from_zero, key=len, default=None)
