"""The geometry of one attention call.

Axis legend, used in every module of the maths:

    b batch    h heads    n queries    m keys    d head dimension    c value dimension
    f frames   y rows     x columns    (always in this order, flattened row-major)

Queries, keys and values are `(b, h, n, d)`. A sequence is `before` other tokens, then the `f * y * x` cells of the
grid in row-major order, then `after` other tokens. "Other" tokens are text, reference images or padding: they have
no place on the grid, so every mechanism lets them see, and be seen by, all tokens unless a mask says otherwise.

A call may have fewer queries than keys (kept keys, text that is only looked at). Then its first and its last tokens, so
many as `silent` says, do not ask: they are others, and what they would get is nobody's.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenGrid:
    """`before` other tokens, `frames x height x width` cells, `after` other tokens; all counted in tokens.

    `silent` are how many of the first and of the last tokens do not ask.

    >>> TokenGrid(64, 48, before=512).tokens
    3584
    """

    height: int
    width: int
    frames: int = 1
    before: int = 0
    after: int = 0
    silent: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        for name, smallest in (("height", 1), ("width", 1), ("frames", 1), ("before", 0), ("after", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"TokenGrid.{name} must be an int, got {value!r}")
            if value < smallest:
                raise ValueError(f"TokenGrid.{name} must be at least {smallest}, got {value}")
        if self.silent != (0, 0) and not (0 <= self.silent[0] <= self.before and 0 <= self.silent[1] <= self.after):
            raise ValueError(
                f"TokenGrid.silent must be at most the other tokens on each side, ({self.before}, {self.after}), got "
                f"{self.silent}"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(frames, height, width)`."""
        return self.frames, self.height, self.width

    @property
    def cells(self) -> int:
        """Tokens that lie on the grid."""
        return self.frames * self.height * self.width

    @property
    def others(self) -> int:
        """Tokens that do not: `before + after`."""
        return self.before + self.after

    @property
    def tokens(self) -> int:
        """All tokens of the call."""
        return self.cells + self.others

    @property
    def queries(self) -> int:
        """Tokens that ask."""
        return self.tokens - sum(self.silent)

    @property
    def query_slice(self) -> slice:
        """Where they lie in the sequence."""
        return slice(self.silent[0], self.tokens - self.silent[1])

    @property
    def pairs(self) -> int:
        """All pairs of a query and a key."""
        return self.queries * self.tokens

    @property
    def other_pairs(self) -> int:
        """Those with another token on a side."""
        return self.pairs - self.cells**2

    @property
    def cell_slice(self) -> slice:
        """Where the cells lie in the sequence."""
        return slice(self.before, self.before + self.cells)

    def positions(self, device: torch.device | str | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Frame, row and column of every cell, each `(cells,)` int64."""
        index = torch.arange(self.cells, device=device)
        return index // (self.height * self.width), index // self.width % self.height, index % self.width

    def split(self, tokens: Tensor, dim: int = -2) -> tuple[Tensor, Tensor]:
        """Part a sequence into its cells and its other tokens (those before, then those after)."""
        before, cells, after = tokens.split([self.before, self.cells, self.after], dim=dim)
        return cells, torch.cat([before, after], dim=dim)

    def join(self, cells: Tensor, others: Tensor, dim: int = -2) -> Tensor:
        """Undo `split`: `(..., tokens, d)` of `(..., cells, d)` and `(..., before + after, d)`, tokens along `dim`."""
        before, after = others.split([self.before, self.after], dim=dim)
        return torch.cat([before, cells, after], dim=dim)

    def with_exact_frames(self, first: int, last: int) -> "TokenGrid":
        """The same tokens, those of the first and last frames no longer on the grid, so that all see them and they all.

        Raises `ValueError` where no frame would be left; the grid of a single frame stays as it is.

        >>> print(TokenGrid(12, 12, frames=9).with_exact_frames(1, 1))
        144+7x12x12+144
        """
        if self.frames == 1 or not first + last:
            return self
        if first + last >= self.frames:
            raise ValueError(
                f"exact_frames=({first}, {last}) leaves none of the {self.frames} frames of the grid {self}; give fewer"
            )
        frame = self.height * self.width
        return TokenGrid(
            self.height,
            self.width,
            self.frames - first - last,
            before=self.before + first * frame,
            after=self.after + last * frame,
            silent=self.silent,
        )

    def check(self, query: Tensor, key: Tensor) -> None:
        """Raise `ValueError` where the tokens of a self-attention call are not those of this grid.

        Both are (..., tokens, d). Queries of silent tokens are among those of a call, of any value.
        """
        if query.shape[-2] != self.tokens or key.shape[-2] != self.tokens:
            raise ValueError(
                f"{self} has {self.tokens} tokens, but the queries have {query.shape[-2]} and the keys "
                f"{key.shape[-2]}; count the text tokens in `before` or `after`"
            )

    def __str__(self) -> str:
        frames = f"{self.frames}x" if self.frames > 1 else ""
        before = f"{self.before}+" if self.before else ""
        after = f"+{self.after}" if self.after else ""
        return f"{before}{frames}{self.height}x{self.width}{after}"
