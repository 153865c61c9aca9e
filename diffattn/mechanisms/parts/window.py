"""What all windows are: a rule on the cells of a grid, and `pool` for what it leaves out."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from torch import Tensor, nn

from diffattn.grid import TokenGrid
from diffattn.kernels.call import WindowCall, window_call
from diffattn.kernels.choose import choose
from diffattn.kernels.flex import order_of
from diffattn.kernels.order import TileOrder
from diffattn.kernels.pattern import Pattern
from diffattn.kernels.routed import BACKENDS

from ..base import Context, Mechanism, Seen, default_scale
from .axes import PerAxis, per_axis, sizes
from .exact_tiles import Beside
from .pool_weights import PoolWeights, weighing_of
from .rounded import RoundedWindow


@dataclass(frozen=True, kw_only=True)
class Window(Mechanism):
    """Base of the windows: a subclass gives its `pattern` and how the window alone is computed."""

    pool: Annotated[PerAxis | None, sizes(1)] = None
    """Sides of the blocks whose means stand for the cells outside the window, rounded out to whole blocks: (rows,
    columns), (frames, rows, columns), or one int for all of them. None: such cells are not seen."""
    means: Literal["even", "learned"] = "even"
    """The means of a block: all its keys alike, or by trained weights, which begin even (`parts/pool_weights.py`)."""

    window_backends: ClassVar[tuple[str, ...]] = ("auto",)
    """Kernels of the window alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.means == "learned" and self.pool is None:
            raise ValueError(
                f"{self.type}: means='learned' weighs what the window leaves out; give its blocks by pool="
            )

    @property
    def approximates(self) -> bool:
        return self.pool is not None

    @property
    def only_pattern(self) -> bool:
        return self.pool is None

    @property
    def leaves_tiles(self) -> bool:
        return self.pool is not None

    @property
    def grouped_heads(self) -> bool:
        return self.pool is None

    @property
    def backends(self) -> tuple[str, ...]:
        return self.window_backends if self.pool is None else BACKENDS

    def pattern(self, grid: TokenGrid) -> Pattern:
        raise NotImplementedError

    def scale(self, q: Tensor, grid: TokenGrid, scale: float | None) -> float:
        """What multiplies the logits."""
        return default_scale(q) if scale is None else scale

    @property
    def window_tile(self) -> PerAxis | None:
        """Sides of the tiles that are seen as one; None: the blocks."""
        return None

    def rounded(self, grid: TokenGrid) -> RoundedWindow | None:
        """The window with the means of all that lies outside; None without `pool`."""
        if self.pool is None:
            return None
        return RoundedWindow.on(grid, self.pattern(grid), self.pool, self.window_tile)

    def check(self, grid: TokenGrid, *, context: Context = Context()) -> None:
        if grid.frames > 1 and isinstance(self.pool, tuple) and len(self.pool) == 2:
            raise ValueError(
                f"{self.type}: pool={self.pool} says nothing of frames, and the grid {grid} has {grid.frames}; give "
                f"(frames, rows, columns), such as pool={(1, *self.pool)}"
            )

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: TokenGrid,
        *,
        scale: float | None = None,
        backend: str = "auto",
        context: Context = Context(),
        beside: Beside | None = None,
    ) -> Tensor:
        """`beside` adds to the output of the cells, with `pool` and unless every tile is exact."""
        self.check(grid)
        scale, rounded = self.scale(q, grid, scale), self.rounded(grid)
        if rounded is None:
            return self.attend_window(q, k, v, grid, scale, backend, context)
        self.check_backend(backend)
        return rounded.attend(q, k, v, scale, backend, context, weighing_of(self.means, q, grid, context), beside)

    def weights(self, heads: int, head_dim: int) -> nn.Module | None:
        return PoolWeights(heads, head_dim, per_axis(self.pool or 1, 1)) if self.means == "learned" else None

    def left_tiles(self, grid: TokenGrid) -> tuple[int, int] | None:
        rounded = self.rounded(grid)
        return None if rounded is None or rounded.is_exact else (rounded.tiles, rounded.tiles)

    def cell_order(self, q: Tensor, grid: TokenGrid, backend: str) -> TileOrder | None:
        if self.pool is not None or backend not in ("auto", "flex") or not self.computes_in_order(grid):
            return None
        call = window_call(q, q, q, grid, self.pattern(grid), 1.0, None, None)
        return order_of(call) if backend == "flex" or choose(call).backend == "flex" else None

    def computes_in_order(self, grid: TokenGrid) -> bool:
        """Is the window all that is computed? Else the cells are wanted row by row."""
        return True

    def explain_backend(self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, backend: str, context: Context) -> str:
        rounded = self.rounded(grid)
        if rounded is not None:
            return rounded.explain(q, k, v, backend, context)
        if backend != "auto":
            return backend
        choice = choose(self.window_call(q, k, v, grid, context))
        return f"{choice.backend}: {choice.reason}"

    def reference(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: TokenGrid,
        *,
        scale: float | None = None,
        context: Context = Context(),
    ) -> Tensor:
        self.check(grid)
        scale, rounded = self.scale(q, grid, scale), self.rounded(grid)
        if rounded is None:
            return self.window_reference(q, k, v, grid, scale, context)
        return rounded.reference(
            q, k, v, scale=scale, context=context, weighing=weighing_of(self.means, q, grid, context)
        )

    def mask(self, grid: TokenGrid) -> Tensor:
        self.check(grid)
        rounded = self.rounded(grid)
        return self.window_mask(grid) if rounded is None else rounded.mask()

    def seen(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: TokenGrid,
        *,
        scale: float | None = None,
        context: Context = Context(),
    ) -> Seen:
        rounded = self.rounded(grid)
        if rounded is None or rounded.is_exact:
            return super().seen(q, k, v, grid, scale=scale, context=context)
        mask = self.mask(grid)[None, None]
        return Seen(mask[..., : grid.tokens], mask[..., grid.tokens :], rounded.members())

    def flops(self, grid: TokenGrid, heads: int, head_dim: int, *, context: Context = Context()) -> int:
        self.check(grid)
        rounded = self.rounded(grid)
        return 4 * (self.window_pairs(grid) if rounded is None else rounded.pairs()) * heads * head_dim

    def attend_window(
        self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, scale: float, backend: str, context: Context
    ) -> Tensor:
        """`attend` without `pool`."""
        raise NotImplementedError

    def window_reference(
        self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, scale: float, context: Context
    ) -> Tensor:
        """`reference` without `pool`."""
        raise NotImplementedError

    def window_call(self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, context: Context) -> WindowCall:
        """What the kernels of the window alone are asked, of any scale."""
        return window_call(q, k, v, grid, self.pattern(grid), 1.0, context.mask, None)

    def window_mask(self, grid: TokenGrid) -> Tensor:
        """`mask` without `pool`."""
        raise NotImplementedError

    def window_pairs(self, grid: TokenGrid) -> int:
        """Pairs of tokens that the window alone computes."""
        return self.pattern(grid).pairs(grid) + grid.other_pairs
