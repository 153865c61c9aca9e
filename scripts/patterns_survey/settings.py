"""Every setting of the survey: the name of its row, its kind, and how a budget becomes a mechanism."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fidelity.methods import Broadcast, Method

from diffattn import RoutingAttention, SoftmaxAttention

from .cells import Cell
from .solving import Found, Solver, largest, only_video, operations, two_kinds

WINDOW, POOLED = "windows", "windows and the means of the rest"
PATTERN, PATTERN_POOLED = "fixed patterns", "fixed patterns and the means of the rest"
CHOSEN, FEW, REUSED = "chosen by content", "few keys, channels or sums", "outputs used again"
KINDS = (WINDOW, POOLED, PATTERN, PATTERN_POOLED, CHOSEN, FEW, REUSED)


@dataclass(frozen=True)
class Setting:
    """One row."""

    name: str
    kind: str
    solver: Solver | None
    """None: full attention, used again as often as the budget asks."""
    reuse: int = 1
    """Computed in one of so many steps; 0: as the budget asks."""
    broadcast: bool = False
    """Does diffusers use the outputs again?"""

    def solve(self, cell: Cell) -> "Solved":
        """Options for a cell's budget."""
        if self.solver is None:
            return self._reused(cell)
        computed = _computed(cell, self.reuse, last=True)
        found = self.solver(cell, cell.budget / computed)
        return Solved(self, cell, found, self.reuse, found.share * computed)

    def _reused(self, cell: Cell) -> "Solved":
        shares = {reuse: _computed(cell, reuse, last=not self.broadcast) for reuse in range(2, cell.steps + 1)}
        reuse = next((reuse for reuse, share in shares.items() if share <= cell.budget), None)
        note = f"its first and its last step, above {cell.budget:.0%}" if reuse is None else ""
        reuse = min(shares, key=shares.__getitem__) if reuse is None else reuse
        return Solved(self, cell, Found(SoftmaxAttention(), 1.0, note), reuse, shares[reuse])


@dataclass(frozen=True)
class Solved:
    """A setting in a cell."""

    setting: Setting
    cell: Cell
    found: Found
    reuse: int
    share: float
    """Of all pairs, over all steps."""

    @property
    def method(self) -> Method:
        """What is applied."""
        assert self.found.mechanism is not None
        kind = Broadcast if self.setting.broadcast else Method
        return kind(self.setting.name, self.found.mechanism, self.reuse)

    @property
    def facts(self) -> dict[str, Any]:
        """What is known before anything is measured."""
        mechanism = self.found.mechanism
        return {
            "cell": self.cell.name,
            "steps": self.cell.steps,
            "setting": self.setting.name,
            "kind": self.setting.kind,
            "mechanism": None if mechanism is None else str(mechanism),
            "reuse": self.reuse,
            "share": round(self.share, 4),
            "gflops": None if mechanism is None else round(operations(mechanism, self.cell) / 1e9, 4),
            "note": self.found.note,
        }


def _computed(cell: Cell, reuse: int, last: bool) -> float:
    """Share of the steps that are computed."""
    steps = {step for step in range(cell.steps) if step % reuse == 0} | ({cell.steps - 1} if last else set())
    return len(steps) / cell.steps


def _radii(cell: Cell) -> Sequence[float]:
    return [number / 10 for number in range(10, 8 * cell.side)]


def _sides(cell: Cell) -> Sequence[Any]:
    """Windows from one cell to the whole grid, across all frames or some."""
    if not cell.is_video:
        return range(1, cell.side + 1)
    return [(frames, side, side) for side in range(1, cell.side + 1) for frames in (1, 3, 5, 7, 9)]


def _widths(cell: Cell) -> Sequence[int]:
    return range(1, cell.side + 1)


def _pool(cell: Cell) -> Sequence[Any]:
    return [cell.pool]


def _pools(cell: Cell) -> Sequence[Any]:
    return [(1, 2, 2), (1, 3, 3), (3, 2, 2), (1, 4, 4)] if cell.is_video else [cell.pool]


def _halo_tiles(cell: Cell) -> Sequence[Any]:
    return (
        [(1, 4, 4), (3, 2, 2), (3, 4, 4), (9, 2, 2), (3, 3, 3)]
        if cell.is_video
        else [2, 4]
        if cell.side <= 16
        else [4, 8]
    )


def _halos(cell: Cell) -> Sequence[Any]:
    return [(along, across, across) for across in range(6) for along in range(9)] if cell.is_video else [1]


def _halo_pool(cell: Cell) -> Sequence[Any]:
    return [(1, 4, 4)] if cell.is_video else [cell.pool]


def _halo_radii(cell: Cell) -> Sequence[Any]:
    return [None] if cell.is_video else [number / 2 for number in range(3, 2 * cell.side)]


def _tile(cell: Cell) -> Sequence[Any]:
    """Of routing: the block itself where the grid is small."""
    return [(2, 2, 2)] if cell.is_video else [2 if cell.side <= 16 else 4 if cell.side <= 32 else 8]


def _block(cell: Cell) -> Sequence[Any]:
    return [(2, 2, 2)] if cell.is_video else [cell.pool]


def _agents(cell: Cell) -> Sequence[int]:
    return [number**2 for number in range(1, cell.side + 1)]


SHARES = [number / 100 for number in range(5, 100)]
UNBIASED: dict[str, Any] = {"local_phase": [None], "global_phase": [None]}
"""Of `dual_scope`: the released phases favour some frames by a bias, which is no approximation."""
RATIOS = [number / 100 for number in range(75, 4, -1)]


def _routing(**options: Any) -> Solver:
    return largest(
        "routing", ("share", SHARES), tile=_tile, pool=_block, **{name: [own] for name, own in options.items()}
    )


def _stretch(cell: Cell) -> Sequence[int]:
    """Tokens of a block of `sla`: as many as a tile has."""
    return [8 if cell.is_video else _tile(cell)[0] ** 2]


def _routings(order: Any) -> Any:
    """What a trained branch stands beside, in rising order of cost."""

    def bases(cell: Cell) -> Sequence[Any]:
        [tile], [pool] = _tile(cell), _block(cell)
        return [RoutingAttention(share=share, tile=tile, pool=pool, order=order) for share in SHARES]

    return bases


def _over(cell: Cell) -> Sequence[str]:
    """Cells in that branch: sums over the rest, tile by tile, are worth it where tiles are large."""
    return ["auto" if not cell.is_video and cell.side >= 64 else "all"]


CLEAR = largest("clear", ("radius", _radii))
SETTINGS = (
    Setting("clear", WINDOW, CLEAR),
    Setting("clear, pool", POOLED, largest("clear", ("radius", _radii), pool=_pool)),
    Setting("halo", WINDOW, largest("halo", ("radius", _halo_radii), tile=_halo_tiles, halo=_halos)),
    Setting(
        "halo, pool", POOLED, largest("halo", ("radius", _halo_radii), tile=_halo_pool, halo=_halos, pool=_halo_pool)
    ),
    Setting("neighborhood", WINDOW, largest("neighborhood", ("kernel_size", _sides))),
    Setting("neighborhood, pool", POOLED, largest("neighborhood", ("kernel_size", _sides), pool=_pool)),
    Setting("neighborhood, dilation 2", PATTERN, largest("neighborhood", ("kernel_size", _sides), dilation=[2])),
    Setting("shifted_window", PATTERN, largest("shifted_window", ("window", _sides))),
    Setting("shifted_window, pool", PATTERN_POOLED, largest("shifted_window", ("window", _sides), pool=_pools)),
    Setting("multi_axis, heads", PATTERN, largest("multi_axis", ("window", _sides), by=["heads"])),
    Setting("multi_axis, layers", PATTERN, largest("multi_axis", ("window", _sides), by=["layers"])),
    Setting(
        "multi_axis, heads, pool", PATTERN_POOLED, largest("multi_axis", ("window", _sides), by=["heads"], pool=_pools)
    ),
    Setting(
        "multi_axis, layers, pool",
        PATTERN_POOLED,
        largest("multi_axis", ("window", _sides), by=["layers"], pool=_pools),
    ),
    Setting("criss_cross", PATTERN, largest("criss_cross", ("width", _widths))),
    Setting("criss_cross, pool", PATTERN_POOLED, largest("criss_cross", ("width", _widths), pool=_pools)),
    Setting("per_head, two radii", WINDOW, two_kinds(CLEAR, CLEAR)),
    Setting("per_head, clear and routing", CHOSEN, two_kinds(CLEAR, _routing())),
    Setting("global_context, keys", PATTERN, largest("global_context", ("window", _sides), by=["keys"])),
    Setting("global_context, queries", PATTERN, largest("global_context", ("window", _sides), by=["queries"])),
    Setting(
        "global_context, queries, pool",
        PATTERN_POOLED,
        largest("global_context", ("window", _sides), by=["queries"], pool=_pools),
    ),
    Setting("window_state", FEW, largest("window_state", ("radius", _radii))),
    Setting("window_state, pool", POOLED, largest("window_state", ("radius", _radii), pool=_pool)),
    Setting(
        "dual_scope", PATTERN, only_video(largest("dual_scope", ("padding", range(9)), top_k=range(9), **UNBIASED))
    ),
    Setting(
        "dual_scope, by content",
        CHOSEN,
        only_video(largest("dual_scope", ("padding", range(9)), top_k=range(9), chosen_by=["content"], **UNBIASED)),
    ),
    Setting(
        "dual_scope, rotating",
        PATTERN,
        only_video(largest("dual_scope", ("padding", range(9)), top_k=range(9), rotation=[1.0], **UNBIASED)),
    ),
    Setting(
        "dual_scope, memory",
        PATTERN_POOLED,
        only_video(largest("dual_scope", ("padding", range(9)), top_k=range(9), memory=[1, 3, 9], **UNBIASED)),
    ),
    Setting("agent", FEW, largest("agent", ("num_agents", _agents))),
    Setting("channel", FEW, largest("channel", ("groups", [8, 5, 4, 2, 1]))),
    Setting("linear", FEW, largest("linear")),
    Setting("token_merge", FEW, largest("token_merge", ("ratio", RATIOS), proportional=[True], use_rand=[False])),
    Setting("routing", CHOSEN, _routing()),
    Setting("routing, weighted means", CHOSEN, _routing(means="weighted")),
    Setting("routing, order=content", CHOSEN, _routing(order="content")),
    Setting("routing, order=centroids", CHOSEN, _routing(order="centroids")),
    Setting("routing, order=centroids, weighted means", CHOSEN, _routing(order="centroids", means="weighted")),
    Setting("hybrid of routing", CHOSEN, largest("hybrid", ("base", _routings("space")), over=_over)),
    Setting(
        "hybrid of routing, order=centroids",
        CHOSEN,
        largest("hybrid", ("base", _routings("centroids")), over=["all"]),
    ),
    Setting("sla", CHOSEN, largest("sla", ("top_share", SHARES), tile=_stretch, query_tile=_stretch)),
    Setting("vsa", CHOSEN, largest("vsa", ("top_share", SHARES), tile=_tile)),
    Setting("routing, reuse 2", REUSED, _routing(), reuse=2),
    Setting("routing, order=content, reuse 2", REUSED, _routing(order="content"), reuse=2),
    Setting("reuse alone", REUSED, None, reuse=0),
    Setting("Pyramid Attention Broadcast", REUSED, None, reuse=0, broadcast=True),
)


def chosen(only: Sequence[str], part: str = "1/1") -> list[Setting]:
    """The settings by name, or all; of these every Nth, from the Ith, for `part` I/N."""
    known = [setting.name for setting in SETTINGS]
    wrong = [name for name in only if name not in known]
    if wrong:
        raise ValueError(f"unknown setting {wrong[0]!r}; the settings: {'; '.join(known)}")
    index, slash, count = part.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise ValueError(f"a part is I/N with I from 1 to N, such as 1/2, got {part!r}")
    several = [setting for setting in SETTINGS if not only or setting.name in only]
    return several[int(index) - 1 :: int(count)]
