"""What is special about criss-cross attention: its rule, and its union of partitions against the dense form."""

import itertools

import pytest
import torch
from tolerances import TOLERANCE, assert_close
from torch import Tensor
from torch.nn import functional as F

from diffattn import CrissCrossAttention, SoftmaxAttention, TokenGrid
from diffattn.kernels import flex
from diffattn.mechanisms.base import Context
from diffattn.mechanisms.sequences import attend_sequence, reference_sequence

GRIDS = [
    TokenGrid(6, 9),
    TokenGrid(11, 7, before=5),
    TokenGrid(4, 6, before=3, after=2),
    TokenGrid(3, 5, frames=4, before=2),
    TokenGrid(5, 4, frames=2),
    TokenGrid(1, 1, before=3),
    TokenGrid(1, 1),
    TokenGrid(1, 13),
    TokenGrid(17, 1, after=1),
    TokenGrid(1, 1, frames=5),
]
WIDTHS = [1, 2, (3, 2), (1, 4), 100]


def by_hand(grid: TokenGrid, rows: int, columns: int) -> Tensor:
    """Cell by cell: in the own frame the row's or the column's strip, in others the crossing of the two."""
    cells = list(itertools.product(range(grid.frames), range(grid.height), range(grid.width)))
    mask = torch.ones(grid.tokens, grid.tokens, dtype=torch.bool)
    for (i, (frame, y, x)), (j, (other, row, column)) in itertools.product(enumerate(cells), repeat=2):
        beside, above = y // rows == row // rows, x // columns == column // columns
        seen = (beside or above) if frame == other else (beside and above)
        mask[grid.before + i, grid.before + j] = seen
    return mask


def inputs(grid: TokenGrid, dtype: torch.dtype = torch.float64, batch: int = 2, heads: int = 3) -> list[Tensor]:
    return [torch.randn(batch, heads, grid.tokens, 8, dtype=torch.float64).to(dtype) for _ in range(3)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("width", WIDTHS, ids=str)
def test_mask_by_the_definition(width, grid: TokenGrid) -> None:
    mechanism = CrissCrossAttention(width=width)
    want = by_hand(grid, *(width if isinstance(width, tuple) else (width, width)))
    assert torch.equal(mechanism.mask(grid), want)
    assert mechanism.flops(grid, 1, 1) == 4 * int(want.sum())


def test_a_cell_of_the_paper_sees_height_and_width_less_one() -> None:
    grid = TokenGrid(7, 11)
    assert CrissCrossAttention().mask(grid).sum(1).unique().tolist() == [7 + 11 - 1]
    assert CrissCrossAttention().mask(TokenGrid(7, 11, frames=4)).sum(1).unique().tolist() == [7 + 11 - 1 + 3]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("width", WIDTHS, ids=str)
def test_strips_equal_the_mask(width, grid: TokenGrid) -> None:
    mechanism = CrissCrossAttention(width=width)
    q, k, v = inputs(grid)
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=mechanism.mask(grid))
    with torch.no_grad():
        assert_close(mechanism.attend(q, k, v, grid, backend="strips"), want)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, reference = mechanism.attend(*leaves, grid, backend="strips"), mechanism.reference(*leaves, grid)
    assert_close(out, reference)
    weight = torch.randn_like(out)
    for own, other in zip(*(torch.autograd.grad((x * weight).sum(), leaves) for x in (out, reference)), strict=True):
        assert_close(own, other)


@pytest.mark.parametrize("additive", [False, True], ids=["bool", "additive"])
@pytest.mark.parametrize("grid", [TokenGrid(7, 6, before=2, after=3), TokenGrid(4, 5, frames=3, before=2)], ids=str)
def test_hidden_text_and_hidden_cells(grid: TokenGrid, additive: bool) -> None:
    """Whole columns are hidden too, as in images that were padded: some parts then have no key at all."""
    mechanism = CrissCrossAttention(width=(2, 1))
    visible = torch.ones(2, 1, 1, grid.tokens, dtype=torch.bool)
    visible[0, ..., :1] = False
    cells = visible[1, 0, 0, grid.cell_slice].view(grid.shape)
    cells[:, :, -2:] = False
    mask = visible if not additive else torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)
    leaves = [x.requires_grad_() for x in inputs(grid)]
    out = mechanism.attend(*leaves, grid, backend="strips", context=Context(mask=mask))
    reference = mechanism.reference(*leaves, grid, context=Context(mask=mask))
    assert_close(out, reference)
    weight = torch.randn_like(out)
    for own, other in zip(*(torch.autograd.grad((x * weight).sum(), leaves) for x in (out, reference)), strict=True):
        assert own.isfinite().all()
        assert_close(own, other)
    with torch.no_grad():
        assert_close(mechanism.attend(*leaves, grid, backend="strips", context=Context(mask=mask)), reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_lower_precision_of_strips(dtype: torch.dtype) -> None:
    grid, mechanism = TokenGrid(5, 7, frames=2, before=3), CrissCrossAttention(width=2)
    q, k, v = inputs(grid, dtype)
    mask = torch.ones(grid.tokens, dtype=torch.bool)
    mask[1], mask[7:9] = False, False
    want = mechanism.reference(q.double(), k.double(), v.double(), grid, context=Context(mask=mask))
    out = mechanism.attend(q, k, v, grid, backend="strips", context=Context(mask=mask))
    assert out.dtype == dtype and (out - want).abs().max() < 2 * TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16] / 4)


def test_values_of_another_width_and_fewer_heads_of_keys() -> None:
    grid, mechanism = TokenGrid(6, 5, before=2), CrissCrossAttention(width=2)
    q, k, v = torch.randn(2, 4, 32, 8), torch.randn(2, 2, 32, 8), torch.randn(2, 2, 32, 5)
    full_k, full_v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    want = F.scaled_dot_product_attention(q, full_k, full_v, attn_mask=mechanism.mask(grid))
    with torch.no_grad():
        for backend in ("strips", "dense"):
            assert_close(mechanism.attend(q, k, v, grid, backend=backend), want)


def test_text_that_does_not_ask() -> None:
    grid, mechanism = TokenGrid(6, 5, before=3, after=2, silent=(3, 1)), CrissCrossAttention(width=2)
    q, k, v = inputs(grid)
    q = q[:, :, grid.query_slice]
    want = reference_sequence(mechanism, q, k, v, [grid])
    with torch.no_grad():
        for backend in ("strips", "dense", "tiled"):
            assert_close(attend_sequence(mechanism, q, k, v, [grid], backend=backend), want)
    assert mechanism.flops(grid, 1, 1) == 4 * int(mechanism.mask(grid)[grid.query_slice].sum())


@pytest.mark.parametrize("grid", [TokenGrid(12, 16, before=2), TokenGrid(10, 13, frames=2, after=1)], ids=str)
@pytest.mark.parametrize("width", [1, 4, (6, 8)], ids=str)
def test_all_kernels_are_one(width, grid: TokenGrid) -> None:
    mechanism = CrissCrossAttention(width=width)
    q, k, v = inputs(grid, torch.float32, 1, 2)
    want = mechanism.reference(q, k, v, grid)
    with torch.no_grad():
        for backend in ("auto", "strips", "dense", "tiled"):
            assert_close(mechanism.attend(q, k, v, grid, backend=backend), want)


def test_flex_computes_whole_tiles() -> None:
    grid, mechanism = TokenGrid(32, 64, before=30), CrissCrossAttention(width=8)
    lists = flex.plan(mechanism.pattern(grid), grid.shape, grid.before, torch.device("cpu")).blocks.lists
    assert int(lists.partial_count.sum()) == 0


@pytest.mark.parametrize("grid", [TokenGrid(8, 12, before=2), TokenGrid(4, 8, frames=3)], ids=str)
def test_blocks_that_divide_the_width_round_nothing_out(grid: TokenGrid) -> None:
    alone, pooled = CrissCrossAttention(width=4), CrissCrossAttention(width=4, pool=(1, 2, 4))
    assert torch.equal(pooled.mask(grid)[:, : grid.tokens], alone.mask(grid))
    assert not torch.equal(CrissCrossAttention(width=4, pool=(1, 2, 3)).mask(grid)[:, : grid.tokens], alone.mask(grid))
    assert pooled.approximates and not alone.approximates


def test_a_strip_over_the_grid_is_softmax() -> None:
    for grid in (TokenGrid(5, 6, before=2), TokenGrid(3, 4, frames=2)):
        q, k, v = inputs(grid)
        for width in ((5, 1), (1, 6)) if grid.frames == 1 else (9,):
            mechanism = CrissCrossAttention(width=width)
            assert_close(mechanism.attend(q, k, v, grid, backend="strips"), SoftmaxAttention().attend(q, k, v, grid))
            assert mechanism.flops(grid, 3, 8) == SoftmaxAttention().flops(grid, 3, 8)


def test_the_choice_is_explained() -> None:
    def explain(grid: TokenGrid, backend: str = "auto", mask: Tensor | None = None, **options) -> str:
        q, k, v = inputs(grid, torch.float32, 1, 1)
        mechanism = CrissCrossAttention(**options)
        return mechanism.explain_backend(q, k, v, grid, backend, Context(mask=mask))

    assert explain(TokenGrid(32, 32)).startswith("strips: rows")
    assert explain(TokenGrid(8, 8)) == "dense: the pattern saves nothing on 64 cells"
    assert explain(TokenGrid(32, 32), width=32) == "dense: the cross covers the grid"
    assert explain(TokenGrid(32, 32), width=16).startswith("dense: strips save too little")
    mask = torch.ones(1, 1, 1024, 1024, dtype=torch.bool)
    assert "differs from query to query" in explain(TokenGrid(32, 32), mask=mask)
    assert explain(TokenGrid(32, 32), "tiled") == "tiled"
    q, k, v = inputs(TokenGrid(32, 32), torch.float32, 1, 1)
    with pytest.raises(ValueError, match="strips.*differs from query to query; can: auto, dense"):
        CrissCrossAttention().attend(q, k, v, TokenGrid(32, 32), backend="strips", context=Context(mask=mask))


def test_auto_runs_strips(monkeypatch) -> None:
    """On a grid that is large enough, and dense where only that serves a mask."""
    ran = []
    name = "diffattn.mechanisms.patterns.criss_cross"
    monkeypatch.setattr(f"{name}.attend_strips", lambda call, tile: ran.append(tile) or call.q)
    grid = TokenGrid(21, 20)
    q, k, v = inputs(grid, torch.float32, 1, 1)
    CrissCrossAttention(width=(1, 2)).attend(q, k, v, grid)
    assert ran == [(1, 1, 2)]
    mask = torch.zeros(1, 1, 1, grid.tokens, requires_grad=True)
    CrissCrossAttention().attend(q, k, v, grid, context=Context(mask=mask)).sum().backward()
    assert len(ran) == 1 and mask.grad is not None


@pytest.mark.parametrize("width", [0, (1, 0), (1, 2, 3), 1.5, True, "1"])
def test_wrong_widths(width) -> None:
    with pytest.raises(ValueError, match=r"width must be an int of at least 1, or \(rows, columns\) of such, got"):
        CrissCrossAttention(width=width)
    with pytest.raises(ValueError, match="says nothing of frames"):
        CrissCrossAttention(pool=(2, 2)).check(TokenGrid(4, 4, frames=2))
