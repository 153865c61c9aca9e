"""Routing attention: what is chosen, what the means stand for, and how little memory it takes."""

import math
from typing import Any

import pytest
import torch
from memory import largest_tensor
from tolerances import assert_close
from torch import Tensor
from torch.nn import functional as F

from diffattn import RoutingAttention, TokenGrid
from diffattn.kernels.lse import attend_with_lse, explicit
from diffattn.kernels.routed import choose_tiles, content_order, gather, route
from diffattn.kernels.routed.call import RoutedCall, own_tiles, places
from diffattn.mechanisms.base import Context

GRIDS = {
    "divided": (TokenGrid(16, 12, before=5), {"tile": 4, "pool": 2, "share": 0.6}),
    "ragged": (TokenGrid(13, 18, before=3, after=2), {"tile": 4, "pool": 2, "share": 0.7}),
    "content": (TokenGrid(13, 18, before=3, after=2), {"tile": 4, "pool": 2, "share": 0.7, "order": "content"}),
    "centroids, weighted means": (
        TokenGrid(13, 18, before=3, after=2),
        {"tile": 4, "pool": 2, "share": 0.7, "order": "centroids", "means": "weighted"},
    ),
    "weighted means": (TokenGrid(11, 10, 2, before=3), {"tile": 4, "pool": 2, "share": 0.9, "means": "weighted"}),
    "frames": (TokenGrid(9, 10, frames=5, before=3), {"tile": (2, 4, 4), "pool": (1, 2, 2), "share": 0.7}),
    "wide queries": (TokenGrid(16, 24), {"tile": 4, "pool": 4, "query_tile": 8, "share": 0.5}),
    "narrow queries": (TokenGrid(16, 17), {"tile": 4, "pool": 4, "query_tile": (1, 2, 3), "share": 0.5}),
    "chosen by the mean": (
        TokenGrid(13, 18, before=3, after=2),
        {"tile": 4, "pool": 2, "share": 0.7, "chosen_by": "mean"},
    ),
    "tile of an image": (TokenGrid(16, 24, before=2), {"tile": (4, 8), "pool": 2, "share": 0.6}),
    "a block a tile": (TokenGrid(16, 16, after=1), {"tile": 4, "pool": 4, "top_k": 3}),
    "a number of blocks": (TokenGrid(17, 18, 2, before=2), {"tile": (1, 8, 4), "blocks": 90, "top_k": 3}),
}


def inputs(grid: TokenGrid, batch: int = 2, heads: int = 3, d: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(3, batch, heads, grid.tokens, d, dtype=torch.float64)
    return q, k, v


def masks(grid: TokenGrid) -> dict[str, Tensor | None]:
    hidden = torch.rand(2, 1, 1, grid.tokens) > 0.3
    hidden[..., 0] = True
    rows = torch.rand(2, 1, grid.tokens, grid.tokens) > 0.3
    rows[..., 0] = True
    return {
        "none": None,
        "hidden keys": hidden,
        "weighed keys": torch.randn(1, 3, 1, grid.tokens, dtype=torch.float64),
        "rows": rows,
    }


@pytest.mark.parametrize("kind", ["none", "hidden keys", "weighed keys", "rows"])
@pytest.mark.parametrize("name", GRIDS)
def test_strips_are_the_one_softmax_of_the_reference(name: str, kind: str) -> None:
    grid, options = GRIDS[name]
    mechanism, (q, k, v) = RoutingAttention(**options), inputs(grid)
    context = Context(mask=masks(grid)[kind])
    reference = mechanism.reference(q, k, v, grid, context=context, scale=0.3)
    assert_close(mechanism.attend(q, k, v, grid, context=context, scale=0.3), reference)
    low = mechanism.attend(q.float(), k.float(), v.float(), grid, context=context, scale=0.3)
    assert_close(low, reference)


@pytest.mark.parametrize("name", GRIDS)
def test_gradients_are_those_of_the_reference(name: str) -> None:
    grid, options = GRIDS[name]
    mechanism = RoutingAttention(**options)
    tensors = [tensor.requires_grad_() for tensor in inputs(grid)]
    context = Context(mask=masks(grid)["hidden keys"])
    weight = torch.randn(2, 3, grid.tokens, 16, dtype=torch.float64)
    got = torch.autograd.grad((mechanism.attend(*tensors, grid, context=context) * weight).sum(), tensors)
    want = torch.autograd.grad((mechanism.reference(*tensors, grid, context=context) * weight).sum(), tensors)
    for left, right in zip(got, want, strict=True):
        assert_close(left, right)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    grid, options = GRIDS["ragged"]
    q, k, v = (tensor.to(dtype) for tensor in inputs(grid))
    out = RoutingAttention(**options).attend(q, k, v, grid)
    assert out.dtype == dtype
    reference = RoutingAttention(**options).reference(q.double(), k.double(), v.double(), grid)
    assert (out.double() - reference).norm() / reference.norm() < {torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]


@pytest.mark.parametrize("name", GRIDS)
def test_small_strips_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    grid, options = GRIDS[name]
    mechanism, (q, k, v) = RoutingAttention(**options), inputs(grid)
    whole = mechanism.attend(q, k, v, grid)
    monkeypatch.setattr(gather, "STRIP", {"cpu": 1})
    monkeypatch.setattr(gather, "GATHERED", {"cpu": 1})
    assert_close(mechanism.attend(q, k, v, grid), whole)


@pytest.mark.parametrize("hidden", ["nothing", "some keys", "all of a sample"])
@pytest.mark.parametrize("name", GRIDS)
def test_all_at_once_is_what_the_parts_make(name: str, hidden: str, monkeypatch: pytest.MonkeyPatch) -> None:
    grid, options = GRIDS[name]
    mechanism, (q, k, v) = RoutingAttention(**options | {"chosen_by": "mean"}), inputs(grid)
    mask = torch.rand(q.shape[0], 1, 1, grid.tokens, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[0] &= hidden != "all of a sample"
    context = Context(mask=None if hidden == "nothing" else mask)
    found = mechanism.attend(q, k, v, grid, context=context)
    monkeypatch.setattr(RoutedCall, "at_once", False)
    assert_close(found, mechanism.attend(q, k, v, grid, context=context))


@pytest.mark.parametrize("name", GRIDS)
def test_the_fused_choice_is_the_plain_one(name: str) -> None:
    grid, options = GRIDS[name]
    mechanism, (q, k, v) = RoutingAttention(**options), inputs(grid)
    call = mechanism.call(q, k, v, grid, None, None, mechanism.slots(q, k, grid, Context()))
    assert torch.equal(route(call)[1], choose_tiles(call))


def test_equal_tiles_are_chosen_in_their_order_after_the_own() -> None:
    grid = TokenGrid(8, 8)
    q, k, v = torch.ones(3, 1, 1, 64, 4, dtype=torch.float64)
    chosen = RoutingAttention(tile=2, pool=2, top_k=3).choose(q, k, v, grid)[0, 0]
    for tile, own in enumerate(chosen.tolist()):
        others = [other for other in range(16) if other != tile]
        assert own == [tile, *others[:2]]


def test_the_tiles_with_the_largest_error_are_chosen() -> None:
    """Tile 5 alone has keys that spread along the queries and values that differ."""
    grid = TokenGrid(8, 8)
    slots = places(grid.shape, (1, 2, 2), (1, 2, 2), torch.device("cpu")).slots
    q = torch.ones(1, 1, 64, 4, dtype=torch.float64)
    k, v = torch.zeros_like(q), torch.zeros_like(q)
    k[0, 0, slots[5], 0] = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    v[0, 0, slots[5], 0] = torch.tensor([2.0, 0.0, 1.0, -1.0], dtype=torch.float64)
    chosen = RoutingAttention(tile=2, pool=2, top_k=2).choose(q, k, v, grid)[0, 0]
    assert all(5 in own for own in chosen.tolist())


def test_a_choice_by_the_mean_is_that_of_one_query_for_all() -> None:
    """Where the queries of a tile are alike, both choose alike; elsewhere they need not."""
    grid = TokenGrid(12, 12, before=2)
    q, k, v = inputs(grid, d=8)
    rows, columns = grid.positions()[1:]
    alike = q.clone()
    alike[:, :, grid.cell_slice] = torch.randn(2, 3, 9, 8, dtype=torch.float64)[:, :, rows // 4 * 3 + columns // 4]
    each, mean = (RoutingAttention(tile=4, pool=2, top_k=3, chosen_by=by) for by in ("queries", "mean"))
    assert torch.equal(each.choose(alike, k, v, grid), mean.choose(alike, k, v, grid))
    assert not torch.equal(each.choose(q, k, v, grid), mean.choose(q, k, v, grid))
    assert mean.flops(grid, 3, 8) < each.flops(grid, 3, 8)


@pytest.mark.parametrize("sides", [(8, 8), (9, 7)], ids=["whole blocks", "cut blocks"])
def test_means_are_exact_where_keys_are_alike_within_blocks(sides: tuple[int, int]) -> None:
    """Then log(count) makes a block count as its keys would, cut blocks at the end of the grid included."""
    grid = TokenGrid(*sides, before=3)
    q, k, v = inputs(grid, d=8)
    _, rows, columns = grid.positions()
    block = rows // 2 * 4 + columns // 2
    cells = grid.cell_slice
    k[:, :, cells] = torch.randn(2, 3, 20, 8, dtype=torch.float64)[:, :, block]
    v[:, :, cells] = torch.randn(2, 3, 20, 8, dtype=torch.float64)[:, :, block]
    exact = F.scaled_dot_product_attention(q, k, v)
    assert_close(RoutingAttention(tile=4, pool=2, top_k=1).attend(q, k, v, grid), exact)


def test_hidden_keys_count_for_nothing() -> None:
    """NaN in them would show; their numbers do not."""
    grid = TokenGrid(12, 12, before=4)
    q, k, v = inputs(grid)
    mask = torch.ones(2, 1, 1, grid.tokens, dtype=torch.bool)
    mask[..., 20:90] = False
    context, mechanism = Context(mask=mask), RoutingAttention(tile=4, pool=2, top_k=2)
    before = mechanism.attend(q, k, v, grid, context=context)
    k[..., 20:90, :], v[..., 20:90, :] = 50 * torch.randn(2, 2, 3, 70, 16, dtype=torch.float64)
    assert_close(mechanism.attend(q, k, v, grid, context=context), before)


def test_a_share_of_one_is_softmax_bit_by_bit() -> None:
    grid = TokenGrid(12, 12, before=4)
    q, k, v = inputs(grid)
    assert torch.equal(RoutingAttention(share=1).attend(q, k, v, grid), F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("share", [0.2, 0.35, 0.5, 0.8])
@pytest.mark.parametrize(
    "grid", [TokenGrid(32, 32, before=16), TokenGrid(40, 37), TokenGrid(16, 16, frames=6)], ids=str
)
def test_no_more_than_the_share_is_computed(grid: TokenGrid, share: float) -> None:
    mechanism = RoutingAttention(share=share, tile=4, pool=4)
    assert mechanism.share_on(grid) <= share
    more = RoutingAttention(top_k=mechanism.exact_tiles(grid) + 1, tile=4, pool=4)
    assert more.share_on(grid) > share or more.share_on(grid) == 1
    heads, d = 3, 16
    own = mechanism.flops(grid, heads, d) / (4 * grid.tokens**2 * heads * d)
    assert mechanism.share_on(grid) < own < 1.2 * share


@pytest.mark.parametrize(("share", "tiles"), [(0.01, 1), (0.2, 3), (0.5, 8), (1.0, 16)])
def test_a_share_of_the_tiles_fits_every_text_and_size(share: float, tiles: int) -> None:
    mechanism = RoutingAttention(top_share=share, tile=4, pool=2)
    for text in (0, 16, 500):  # with so much text no small `share` is possible
        assert mechanism.exact_tiles(TokenGrid(16, 16, before=text)) == tiles
    assert mechanism.exact_tiles(TokenGrid(32, 32)) == max(1, round(64 * share))
    assert mechanism.scales and not RoutingAttention(top_k=3).scales
    with pytest.raises(ValueError, match="not both"):
        RoutingAttention(top_k=3, top_share=0.5)


def test_a_share_below_the_floor_is_refused_with_the_floor() -> None:
    grid = TokenGrid(16, 16, before=32)
    mechanism = RoutingAttention(share=0.3, tile=4, pool=2)
    words = r"on 32\+16x16 the pairs .* are 0.\d+ of all, above share=0.3; give at least that, .* pool=.* min_tokens="
    with pytest.raises(ValueError, match=words) as error:
        mechanism.check(grid)
    floor = float(str(error.value).split(" are ")[1].split()[0])
    pairs = 288**2 - 256**2 + 256 * (64 + 16)
    assert math.isclose(floor, pairs / 288**2, abs_tol=5e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"share": 0}, "share must be a number above 0 and at most 1, got 0"),
        ({"share": 1.5}, "share must be a number above 0"),
        ({"tile": 6, "pool": 4}, "pool must divide the tile along each axis, got pool=4, tile=6"),
        ({"tile": (8, 8), "pool": (4, 3)}, "pool must divide the tile"),
        ({"order": "random"}, "order must be one of space, content, centroids"),
        ({"means": "mean"}, "means must be one of even, weighted, learned, got 'mean'"),
        ({"top_k": 0}, "top_k must be an int of at least 1, got 0"),
        ({"refresh": 0}, "refresh must be"),
        ({"blocks": 0}, "blocks must be an int of at least 1, got 0"),
        ({"blocks": 64, "pool": 2}, "give pool=2 or blocks=64, not both"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RoutingAttention(**options)


@pytest.mark.parametrize(
    ("options", "tile", "block"),
    [
        ({}, (1, 8, 8), (1, 4, 4)),
        ({"pool": 2}, (2, 8, 8), (2, 2, 2)),
        ({"pool": (3, 2, 4)}, (3, 8, 8), (3, 2, 4)),
        ({"tile": 4}, (4, 4, 4), (1, 4, 4)),
        ({"tile": (3, 6, 8)}, (3, 6, 8), (1, 6, 4)),
        ({"tile": (4, 2)}, (1, 4, 2), (1, 4, 2)),
    ],
)
def test_tiles_and_blocks_left_open_have_the_tokens_of_one_frame(options: Any, tile: Any, block: Any) -> None:
    sides = RoutingAttention(top_k=1, **options).sides(TokenGrid(24, 32, frames=9))
    assert (sides.asking, sides.tile, sides.block) == (tile, tile, block)
    flat = RoutingAttention(top_k=1, **options).sides(TokenGrid(24, 32))
    assert (flat.tile[1:], flat.block[1:]) == (tile[1:], block[1:]) and flat.tile[0] == flat.block[0] == 1


@pytest.mark.parametrize(
    ("options", "grid", "block"),
    [
        ({"blocks": 256}, TokenGrid(128, 128), (1, 8, 8)),
        ({"blocks": 255}, TokenGrid(128, 128), (1, 8, 8)),  # no larger than a tile
        ({"blocks": 256}, TokenGrid(64, 64), (1, 4, 4)),
        ({"blocks": 255}, TokenGrid(64, 64), (1, 8, 8)),
        ({"blocks": 256}, TokenGrid(32, 32), (1, 2, 2)),
        ({"blocks": 256}, TokenGrid(8, 8), (1, 2, 2)),  # and no cell
        ({"blocks": 256}, TokenGrid(12, 12, frames=9), (1, 4, 4)),
        ({"blocks": 999, "tile": (2, 6, 8)}, TokenGrid(12, 16, frames=4), (1, 3, 4)),  # 3 is not halved
    ],
)
def test_a_number_of_blocks_fits_every_size(options: dict[str, Any], grid: TokenGrid, block: Any) -> None:
    assert RoutingAttention(top_k=1, **options).sides(grid).block == block


def test_tiles_without_frames_are_refused_on_video() -> None:
    with pytest.raises(ValueError, match=r"tile=\(4, 4\) says nothing of frames.*tile=\(1, 4, 4\)"):
        RoutingAttention(tile=(4, 4), pool=(2, 2), share=0.9).check(TokenGrid(8, 8, frames=3))


def test_own_tiles_are_those_that_overlap() -> None:
    own = own_tiles((1, 6, 10), (1, 4, 4), (1, 2, 3), torch.device("cpu"))
    for number, (row, column) in enumerate((row, column) for row in (0, 4) for column in (0, 4, 8)):
        for other, (y, x) in enumerate((y, x) for y in (0, 2, 4) for x in (0, 3, 6, 9)):
            assert bool(own[number, other]) == (row < y + 2 and y < row + 4 and column < x + 3 and x < column + 4)


def test_content_order_has_each_cell_once_and_padding_at_the_end() -> None:
    keys, queries = torch.randn(2, 3, 93, 8)
    order = content_order(keys, queries, tile=16, block=4)
    assert order.shape == (3, 96)
    assert (order[:, 93:] == -1).all()
    assert torch.equal(order[:, :93].sort(dim=1).values, torch.arange(93).expand(3, -1))
    assert torch.equal(order, content_order(keys, queries, tile=16, block=4))


def test_content_order_puts_like_keys_into_one_tile() -> None:
    centres = 100 * torch.randn(8, 6)
    cluster = torch.randperm(128) % 8
    keys = centres[cluster] + torch.randn(128, 6)
    order = content_order(keys[None], torch.randn(1, 128, 6), tile=16, block=4)[0].view(8, 16)
    assert all(len(set(cluster[tile].tolist())) == 1 for tile in order)


def test_content_order_looks_along_the_queries_alone() -> None:
    """Keys that differ most where no query looks are parted where one does."""
    keys = torch.randn(1, 64, 4) * torch.tensor([100.0, 1.0, 100.0, 100.0])
    queries = torch.zeros(1, 32, 4)
    queries[..., 1] = torch.randn(1, 32)
    order = content_order(keys, queries, tile=32, block=32)[0].view(2, 32)
    seen = keys[0, :, 1]
    assert min(seen[order[0]].max(), seen[order[1]].max()) < max(seen[order[0]].min(), seen[order[1]].min())


def test_an_order_by_content_is_kept_for_refresh_calls() -> None:
    grid = TokenGrid(8, 8)
    mechanism = RoutingAttention(tile=2, pool=2, top_k=2, order="content", refresh=3)
    assert mechanism.needs == {"memory"}
    memory: dict[str, Any] = {}
    orders = []
    for _ in range(7):
        q, k, v = inputs(grid)
        mechanism.attend(q, k, v, grid, context=Context(memory=memory))
        orders.append(memory["order"])
    kept = [orders[i + 1] is orders[i] for i in range(6)]
    assert kept == [True, True, False, True, True, False]


@pytest.mark.parametrize("d", [32, 72, 160])
def test_heads_of_other_widths(d: int) -> None:
    grid, options = GRIDS["ragged"]
    q, k, v = inputs(grid, d=d)
    v = torch.cat([v, v[..., :5]], dim=-1)
    mechanism = RoutingAttention(**options)
    assert_close(mechanism.attend(q, k, v, grid), mechanism.reference(q, k, v, grid))


@pytest.mark.parametrize("chosen_by", ["queries", "mean"])
def test_nothing_of_tokens_by_tokens_is_held(chosen_by: str) -> None:
    grid = TokenGrid(96, 96)
    q, k, v = torch.randn(3, 1, 1, grid.tokens, 8)
    mechanism = RoutingAttention(share=0.1, tile=8, pool=8, chosen_by=chosen_by)
    largest = largest_tensor(lambda: mechanism.attend(q, k, v, grid))
    assert largest <= max(*gather.STRIP.values(), *gather.GATHERED.values()) < grid.tokens**2 * 4 / 4


@pytest.mark.parametrize("hidden", [False, True])
def test_the_log_sum_exp_is_right(hidden: bool) -> None:
    q, k, v = torch.randn(1, 3, 5, 16), torch.randn(1, 3, 7, 16), torch.randn(1, 3, 7, 16)
    bias = torch.zeros(1, 3, 1, 7)
    if hidden:
        bias[:, 0], bias[:, 1, :, 3:] = -torch.inf, -torch.inf
    out, lse = attend_with_lse(q, k, v, 0.3, bias)
    plain, sums = explicit(q.double(), k.double(), v.double(), 0.3, bias.double())
    assert_close(out, plain)
    assert torch.equal(lse.isinf(), sums.isinf())
    assert_close(lse[lse.isfinite()], sums[sums.isfinite()])


def test_a_query_that_may_see_nothing_gives_zeros() -> None:
    grid = TokenGrid(12, 12, before=4)
    q, k, v = inputs(grid)
    mask = torch.zeros(2, 1, 1, grid.tokens, dtype=torch.bool)
    mask[1] = True
    mechanism, context = RoutingAttention(tile=4, pool=2, top_k=2), Context(mask=mask)
    out = mechanism.attend(q, k, v, grid, context=context)
    assert (out[0, :, 4:] == 0).all()
    assert_close(out, mechanism.reference(q, k, v, grid, context=context))


@pytest.mark.parametrize("share", [0.3616, 0.36157])
def test_a_share_at_the_floor_has_the_own_tiles(share: float) -> None:
    grid = TokenGrid(28, 96, before=512)
    try:
        assert RoutingAttention(share=share).exact_tiles(grid) == 1
    except ValueError as error:
        assert "give at least that" in str(error)


def test_the_floor_in_the_error_is_enough() -> None:
    for side in range(8, 40):
        grid = TokenGrid(side, side + 1, before=7)
        try:
            RoutingAttention(share=0.01, tile=4, pool=2).check(grid)
        except ValueError as error:
            floor = float(str(error).split(" are ")[1].split()[0])
            RoutingAttention(share=floor, tile=4, pool=2).check(grid)


@pytest.mark.parametrize("grid", [TokenGrid(9, 9), TokenGrid(12, 12, before=1), TokenGrid(17, 5)], ids=str)
@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 5])
def test_an_order_by_content_has_as_many_tiles_as_it_needs(grid: TokenGrid, top_k: int) -> None:
    mechanism = RoutingAttention(order="content", top_k=top_k)
    q, k, v = inputs(grid)
    assert_close(mechanism.attend(q, k, v, grid), mechanism.reference(q, k, v, grid))
    assert mechanism.tiles_in(grid) == -(-grid.cells // 64)
    if top_k >= mechanism.tiles_in(grid):
        assert mechanism.is_exact(grid)


@pytest.mark.parametrize("backend", ["auto", "dense"])
def test_a_kept_order_is_counted_once_a_call_by_every_backend(backend: str) -> None:
    grid = TokenGrid(8, 8)
    mechanism = RoutingAttention(tile=2, pool=2, top_k=2, order="content", refresh=3)
    memory: dict[str, Any] = {}
    ages = []
    for _ in range(5):
        q, k, v = inputs(grid)
        mechanism.attend(q, k, v, grid, backend=backend, context=Context(memory=memory))
        ages.append(memory["age"])
    assert ages == [1, 2, 3, 1, 2]


def test_the_dense_backend_is_computed_in_float32() -> None:
    """Logits of some thousand overflow in half precision before they are scaled."""
    grid = TokenGrid(8, 8)
    q, k, v = (40 * tensor for tensor in inputs(grid, d=64))
    half = [tensor.half() for tensor in (q, k, v)]
    out = RoutingAttention(tile=2, pool=2, top_k=2).attend(*half, grid, backend="dense")
    assert out.isfinite().all() and out.dtype == torch.float16


def test_autocast_changes_nothing() -> None:
    grid = TokenGrid(12, 12)
    q, k, v = (tensor.float() for tensor in inputs(grid))
    for order in ("space", "content"):
        mechanism = RoutingAttention(tile=4, pool=2, top_k=2, order=order)
        with torch.autocast("cpu", torch.bfloat16):
            cast = mechanism.attend(q, k, v, grid)
        assert torch.equal(cast, mechanism.attend(q, k, v, grid))


def test_a_mask_with_a_gradient_gets_it() -> None:
    grid = TokenGrid(8, 8)
    q, k, v = inputs(grid)
    mask = torch.zeros(1, 1, 1, 64, dtype=torch.float64, requires_grad=True)
    mechanism = RoutingAttention(tile=2, pool=2, top_k=2)
    mechanism.attend(q, k, v, grid, context=Context(mask=mask)).square().sum().backward()
    assert mask.grad is not None and mask.grad.abs().max() > 0
    assert "needs a gradient" in mechanism.explain_backend(q, k, v, grid, "auto", Context(mask=mask))
