"""What is special about global context: regions of any grid, global queries of every second layer, hidden cells."""

import itertools

import pytest
import torch
from tolerances import TOLERANCE, assert_close
from torch import Tensor
from torch.nn import functional as F

from diffattn import GlobalContextAttention, HaloAttention, SoftmaxAttention, TokenGrid
from diffattn.mechanisms.base import Context
from diffattn.mechanisms.sequences import attend_sequence, reference_sequence

ODD = Context(call_index=3)
GRIDS = [
    TokenGrid(6, 9),
    TokenGrid(11, 7, before=5),
    TokenGrid(4, 6, before=3, after=2),
    TokenGrid(3, 5, frames=4, before=2),
    TokenGrid(1, 1, before=3),
    TokenGrid(1, 13),
    TokenGrid(17, 1, after=1),
]


def inputs(grid: TokenGrid, dtype: torch.dtype = torch.float64, heads: int = 3) -> list[Tensor]:
    return [torch.randn(2, heads, grid.tokens, 8, dtype=torch.float64).to(dtype) for _ in range(3)]


def places(grid: TokenGrid) -> list[tuple[int, int, int]]:
    return list(itertools.product(range(grid.frames), range(grid.height), range(grid.width)))


def members(grid: TokenGrid, counts: tuple[int, int, int]) -> list[list[int]]:
    """The cells of each region: along an axis of n cells, region i of a begins at i n / a and ends at (i + 1) n / a."""
    found = []
    for region in itertools.product(*map(range, counts)):
        bounds = [(i * n // a, -(-(i + 1) * n // a)) for i, n, a in zip(region, grid.shape, counts, strict=True)]
        inside = (
            all(low <= at < high for at, (low, high) in zip(place, bounds, strict=True)) for place in places(grid)
        )
        found.append([cell for cell, here in enumerate(inside) if here])
    return found


def windows(grid: TokenGrid, sides: tuple[int, int, int]) -> Tensor:
    """Which cells are in one window."""
    own = torch.tensor([[at // side for at, side in zip(place, sides, strict=True)] for place in places(grid)])
    return (own[:, None] == own[None]).all(-1)


def seen(grid: TokenGrid, sides: tuple[int, int, int]) -> Tensor:
    mask = torch.ones(grid.tokens, grid.tokens, dtype=torch.bool)
    mask[grid.cell_slice, grid.cell_slice] = windows(grid, sides)
    return mask


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("backend", ["auto", "tiled"])
@pytest.mark.parametrize("size", [None, (2, 3, 2), 1])
def test_keys_by_the_definition(grid: TokenGrid, size, backend: str) -> None:
    sides = (2, 3, 4)
    asked = sides if size is None else (1, 1, 1) if size == 1 else size
    counts = tuple(min(most, whole) for most, whole in zip(asked, grid.shape, strict=True))
    q, k, v = inputs(grid)
    groups = members(grid, counts)
    means = [torch.stack([grid.split(x)[0][:, :, group].mean(2) for group in groups], 2) for x in (k, v)]
    mask = F.pad(seen(grid, sides), (0, len(groups)))
    mask[grid.cell_slice, grid.tokens :] = True
    keys, values = torch.cat([k, means[0]], 2), torch.cat([v, means[1]], 2)
    want = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
    mechanism = GlobalContextAttention(window=sides, size=size)
    assert_close(mechanism.attend(q, k, v, grid, backend=backend), want)
    assert torch.equal(mechanism.mask(grid), mask)
    found = mechanism.seen(q, k, v, grid)
    assert torch.equal(torch.cat([found.keys, found.means], -1)[0, 0], mask)
    assert [row.nonzero().flatten().tolist() for row in found.blocks[0, 0]] == groups


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("backend", ["auto", "tiled"])
def test_queries_by_the_definition(grid: TokenGrid, backend: str) -> None:
    """Even layers are plain windows; in odd ones all cells at one place of a window ask the same."""
    sides = (2, 3, 4)
    counts = tuple(min(most, whole) for most, whole in zip(sides, grid.shape, strict=True))
    q, k, v = inputs(grid)
    mechanism = GlobalContextAttention(window=sides, by="queries")
    mask = seen(grid, sides)
    for layer in (0, 2):
        want = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        assert_close(mechanism.attend(q, k, v, grid, backend=backend, context=Context(call_index=layer)), want)
    shared = [grid.split(q)[0][:, :, group].mean(2) for group in members(grid, counts)]
    regions = list(itertools.product(*map(range, counts)))
    asking = q.clone()
    for cell, place in enumerate(places(grid)):
        own = regions.index(tuple(at % side for at, side in zip(place, sides, strict=True)))
        asking[:, :, grid.before + cell] = shared[own]
    want = F.scaled_dot_product_attention(asking, k, v, attn_mask=mask)
    assert_close(mechanism.attend(q, k, v, grid, backend=backend, context=ODD), want)
    assert_close(mechanism.reference(q, k, v, grid, context=ODD), want)
    assert torch.equal(mechanism.mask(grid), mask)


@pytest.mark.parametrize("options", [{}, {"pool": (1, 1, 2)}], ids=str)
@pytest.mark.parametrize("grid", GRIDS[:4], ids=str)
def test_gradients_of_global_queries(grid: TokenGrid, options) -> None:
    mechanism = GlobalContextAttention(window=(1, 3, 4), by="queries", **options)
    leaves = [x.requires_grad_() for x in inputs(grid)]
    out, reference = (f(*leaves, grid, context=ODD) for f in (mechanism.attend, mechanism.reference))
    assert_close(out, reference)
    weight = torch.randn_like(out)
    for own, other in zip(*(torch.autograd.grad((x * weight).sum(), leaves) for x in (out, reference)), strict=True):
        assert_close(own, other)


def test_global_queries_with_pool_ask_the_rest_too() -> None:
    """With blocks of one cell nothing is left out: full attention of the global queries."""
    grid = TokenGrid(5, 7, before=2)
    q, k, v = inputs(grid)
    mechanism = GlobalContextAttention(window=3, by="queries", pool=1)
    asking = mechanism.asking(q, grid, ODD)
    assert_close(mechanism.attend(q, k, v, grid, context=ODD), SoftmaxAttention().attend(asking, k, v, grid))
    assert_close(mechanism.attend(q, k, v, grid), SoftmaxAttention().attend(q, k, v, grid))


@pytest.mark.parametrize("additive", [False, True], ids=["bool", "additive"])
@pytest.mark.parametrize("options", [{}, {"size": 2}, {"by": "queries"}, {"by": "queries", "pool": 2}], ids=str)
def test_hidden_cells_are_in_no_mean(options, additive: bool) -> None:
    """Nor is a region that is all hidden, as in images that were padded."""
    grid = TokenGrid(6, 8, before=2)
    q, k, v = inputs(grid)
    visible = torch.ones(2, 1, 1, grid.tokens, dtype=torch.bool)
    visible[0, ..., 1:2] = False
    visible[1, 0, 0, grid.cell_slice].view(6, 8)[:, 5:] = False
    mask = torch.zeros(visible.shape).masked_fill(~visible, -torch.inf) if additive else visible
    mechanism, context = GlobalContextAttention(window=4, **options), Context(mask=mask, call_index=1)
    out = mechanism.attend(q, k, v, grid, context=context)
    assert_close(out, mechanism.reference(q, k, v, grid, context=context))
    hidden = ~visible[:, 0, 0]
    noise = [x + 10 * torch.randn_like(x) * hidden[:, None, :, None] for x in (q, k, v)]
    other = mechanism.attend(*noise, grid, context=context)
    for i in range(2):
        assert_close(other[i][:, ~hidden[i]], out[i][:, ~hidden[i]])


@pytest.mark.parametrize("options", [{}, {"by": "queries"}], ids=str)
def test_masks_of_single_queries(options) -> None:
    """A mean that a query sees nothing of is hidden from it, and what no query sees is in no mean."""
    grid = TokenGrid(6, 8, before=2, after=1)
    q, k, v = inputs(grid)
    mask = torch.ones(1, 1, grid.tokens, grid.tokens, dtype=torch.bool)
    mask[..., 5:20, 2:26] = False
    mask[..., 30:34] = False
    mechanism, context = GlobalContextAttention(window=(3, 4), **options), Context(mask=mask, call_index=1)
    out = mechanism.attend(q, k, v, grid, context=context)
    assert_close(out, mechanism.reference(q, k, v, grid, context=context))
    noise = [x.index_add(2, torch.arange(30, 34), torch.randn(2, 3, 4, 8, dtype=x.dtype)) for x in (k, v)]
    assert_close(mechanism.attend(q, *noise, grid, context=context), out)


@pytest.mark.parametrize("options", [{}, {"by": "queries"}], ids=str)
def test_text_that_does_not_ask(options) -> None:
    grid, mechanism = TokenGrid(6, 5, before=3, after=2, silent=(3, 1)), GlobalContextAttention(window=4, **options)
    q, k, v = inputs(grid)
    q = q[:, :, grid.query_slice]
    want = reference_sequence(mechanism, q, k, v, [grid], context=ODD)
    for backend in ("dense", "tiled"):
        assert_close(attend_sequence(mechanism, q, k, v, [grid], backend=backend, context=ODD), want)
    pairs = int(mechanism.mask(grid)[grid.query_slice].sum())
    assert mechanism.flops(grid, 1, 1) == 4 * pairs


def test_lower_precision_and_fewer_heads_of_keys() -> None:
    grid = TokenGrid(9, 7, frames=2, before=3)
    mask = torch.ones(grid.tokens, dtype=torch.bool)
    mask[1], mask[20:30] = False, False
    context = Context(mask=mask, call_index=1)
    for by in ("keys", "queries"):
        mechanism = GlobalContextAttention(window=(1, 4, 4), by=by)
        q, k, v = inputs(grid, torch.bfloat16)
        want = mechanism.reference(q.double(), k.double(), v.double(), grid, context=context)
        out = mechanism.attend(q, k, v, grid, context=context)
        assert out.dtype == torch.bfloat16 and (out - want).abs().max() < 2 * TOLERANCE[torch.bfloat16]
    assert not GlobalContextAttention().grouped_heads
    queries = GlobalContextAttention(window=(1, 4, 4), by="queries")
    assert queries.grouped_heads
    q, k, v = inputs(grid, heads=4)
    few = [x[:, :2] for x in (k, v)]
    every = [x.repeat_interleave(2, 1) for x in few]
    assert_close(queries.attend(q, *few, grid, context=ODD), queries.attend(q, *every, grid, context=ODD))


def test_a_window_over_the_grid_is_softmax_where_nothing_is_global() -> None:
    grid = TokenGrid(4, 5, before=2)
    q, k, v = inputs(grid)
    softmax = SoftmaxAttention().attend(q, k, v, grid)
    queries = GlobalContextAttention(window=9, by="queries")
    assert_close(queries.attend(q, k, v, grid), softmax)
    # regions of single cells: each asks as itself
    assert_close(queries.attend(q, k, v, grid, context=ODD), softmax)
    assert_close(
        GlobalContextAttention(window=2, by="queries").attend(q, k, v, grid),
        HaloAttention(tile=2, halo=0).attend(q, k, v, grid),
    )


def test_what_it_reads_and_promises() -> None:
    assert GlobalContextAttention().needs == frozenset()
    assert GlobalContextAttention(by="queries").needs == {"call_index"}
    assert not GlobalContextAttention(by="queries", pool=4).approximates
    assert GlobalContextAttention(window=7).regions(TokenGrid(32, 5)) == 7 * 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window must be an int of at least 1, .* got 0"),
        ({"window": (8,)}, r"window must be .*\(rows, columns\).* got \(8,\)"),
        ({"size": 0}, "size must be .* got 0"),
        ({"by": "values"}, "by must be 'keys' or 'queries', got 'values'"),
        ({"pool": 4}, "pool=4 and the regions of by='keys' both stand for.*leave pool out, or give by='queries'"),
        ({"by": "queries", "size": 4}, ".*one global query for each place in a window, so size=4.*leave it out"),
    ],
    ids=str,
)
def test_wrong_options(options, message: str) -> None:
    with pytest.raises(ValueError, match=f"global_context: {message}"):
        GlobalContextAttention(**options)


def test_options_that_say_nothing_of_frames() -> None:
    video = TokenGrid(4, 4, frames=2)
    with pytest.raises(ValueError, match=r"window=\(2, 2\) says nothing of frames.* has 2; .*window=\(1, 2, 2\)"):
        GlobalContextAttention(window=(2, 2)).attend(*inputs(video), video)
    with pytest.raises(ValueError, match=r"size=\(2, 2\) says nothing of frames"):
        GlobalContextAttention(window=2, size=(2, 2)).check(video)
    GlobalContextAttention(window=(2, 2), size=(1, 1)).check(TokenGrid(4, 4))
