"""What is timed and what came out: settings, rows, cases."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from diffattn.grid import TokenGrid
from diffattn.mechanisms import Mechanism

from ..latency import Timing
from .accuracy import TOLERANCE

FULL, OFFICIAL, ROW_MAJOR = "full SDPA", "official", "row-major"
CPU = torch.device("cpu")
ROWS = {
    "official": OFFICIAL,
    "row-major": ROW_MAJOR,
    "tile": "tile order",
    "tile-once": "permuted once",
    "tiled": "SDPA on tiles",
    "dense": "dense mask",
}
"""Rows of CLEAR by their names on the command line."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to time."""

    grids: tuple[TokenGrid, ...] = (TokenGrid(128, 128),)
    radii: tuple[float, ...] = (8, 16)
    mechanisms: tuple[Mechanism, ...] = ()
    """Others beside CLEAR."""
    rows: tuple[str, ...] | None = None
    """Keys of `ROWS`; None: all that are worth their time."""
    heads: int = 4
    head_dim: int = 64
    rounds: int = 7
    seed: int = 0
    device: torch.device = CPU
    dtype: torch.dtype = torch.float32
    scaling: bool = False

    def __post_init__(self) -> None:
        unknown = [row for row in self.rows or () if row not in ROWS]
        if unknown:
            raise ValueError(f"unknown row {unknown[0]!r}; known: {', '.join(ROWS)}")

    def tensors(self, grid: TokenGrid) -> tuple[Tensor, Tensor, Tensor]:
        """Unit-normal q, k, v `(1, h, n, d)`, the same on every device."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (1, self.heads, grid.tokens, self.head_dim)
        q, k, v = (torch.randn(shape, generator=generator).to(self.device, self.dtype) for _ in range(3))
        return q, k, v

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they are saved: times in seconds."""
        plain = asdict(self)
        plain.update(grids=[str(grid) for grid in self.grids], mechanisms=[m.to_dict() for m in self.mechanisms])
        return {**plain, "device": str(self.device), "dtype": str(self.dtype).removeprefix("torch.")}


@dataclass(frozen=True)
class Row:
    """One line of a table."""

    name: str
    mechanism: str
    timing: Timing
    flops: int
    peak_bytes: int | None
    error: float
    """Largest absolute difference to the float64 reference."""
    passed: bool
    """Is the error within the tolerance?"""
    official_error: float | None
    """Largest absolute difference to the official order's output."""
    full_ratio: float | None
    """Full attention's median time over this one's; None where the row or its baseline failed."""
    official_ratio: float | None
    row_major_ratio: float | None
    """Likewise over our kernel on the official order's blocks: what the order alone gains."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they are saved: times in seconds."""
        return {**asdict(self), "timing": self.timing.to_dict()}


@dataclass(frozen=True)
class Case:
    """One window on one grid, or the other mechanisms on it."""

    grid: TokenGrid
    title: str
    rows: tuple[Row, ...]
    density: float | None
    """Share of the pairs that the window keeps; None where the case is no window."""

    @property
    def bound(self) -> float | None:
        """Seconds: full attention's median times the density."""
        return None if self.density is None else self.rows[0].timing.median * self.density

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they are saved: times in seconds."""
        return {
            "grid": str(self.grid),
            "title": self.title,
            "density": self.density,
            "bound_s": self.bound,
            "rows": [row.to_dict() for row in self.rows],
        }


@dataclass(frozen=True)
class Scaling:
    """Time per token of CLEAR at two sizes."""

    mechanism: str
    small: TokenGrid
    large: TokenGrid
    seconds_small: Timing
    seconds_large: Timing

    @property
    def ratio(self) -> float:
        """Time per token at the large size over that at the small one; 1 is linear."""
        small = self.seconds_small.median / self.small.tokens
        return self.seconds_large.median / self.large.tokens / small

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they are saved: times in seconds."""
        return {
            "mechanism": self.mechanism,
            "small": {"grid": str(self.small), **self.seconds_small.to_dict()},
            "large": {"grid": str(self.large), **self.seconds_large.to_dict()},
            "time_per_token_ratio": self.ratio,
        }


@dataclass(frozen=True)
class Result:
    """Everything that was timed."""

    settings: Settings
    machine: dict[str, Any]
    cases: tuple[Case, ...]
    scaling: tuple[Scaling, ...]
    skipped: tuple[str, ...]
    """Rows that were left out, and why."""
    elapsed: float

    @property
    def passed(self) -> bool:
        """Are all errors within the tolerance?"""
        return all(row.passed for case in self.cases for row in case.rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they are saved: times in seconds."""
        return {
            "settings": self.settings.to_dict(),
            "hardware": self.machine,
            "tolerance": TOLERANCE[self.settings.dtype],
            "passed": self.passed,
            "cases": [case.to_dict() for case in self.cases],
            "scaling": [line.to_dict() for line in self.scaling],
            "skipped": list(self.skipped),
            "elapsed_s": self.elapsed,
        }
