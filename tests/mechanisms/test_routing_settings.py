"""Routing attention: means that weigh the keys of a block, and tiles by centroids that are kept from call to call."""

import itertools
import math
from typing import Any

import pytest
import torch
from tolerances import assert_close
from torch import Tensor
from torch.nn import functional as F

from diffattn import RoutingAttention, TokenGrid
from diffattn.mechanisms.base import Context

WEIGHTED: dict[str, Any] = {"tile": 4, "pool": 2, "means": "weighted"}


def inputs(grid: TokenGrid, batch: int = 2, heads: int = 3, d: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(3, batch, heads, grid.tokens, d, dtype=torch.float64)
    return q, k, v


def by_hand(q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, chosen: Tensor, bias: Tensor, scale: float) -> Tensor:
    """One head `(tokens, d)` on a grid of one frame in tiles of 4 x 4 and blocks of 2 x 2, cell by cell."""
    mean_query = q[grid.cell_slice].mean(0)
    out = torch.empty_like(v)
    across = -(-grid.width // 4)

    def number(row: int, column: int) -> int:
        return grid.before + row * grid.width + column

    for token in range(grid.tokens):
        cell = token - grid.before
        if not 0 <= cell < grid.cells:
            out[token] = (scale * k @ q[token] + bias).softmax(0) @ v
            continue
        row, column = divmod(cell, grid.width)
        exact = set(chosen[row // 4 * across + column // 4].tolist())
        keys = [other for other in range(grid.tokens) if not 0 <= other - grid.before < grid.cells]
        logits, values = [scale * k[other] @ q[token] + bias[other] for other in keys], [v[other] for other in keys]
        for top, left in itertools.product(range(0, grid.height, 2), range(0, grid.width, 2)):
            block = [
                number(y, x)
                for y, x in itertools.product(range(top, top + 2), range(left, left + 2))
                if y < grid.height and x < grid.width and bias[number(y, x)] > -math.inf
            ]
            if top // 4 * across + left // 4 in exact:
                logits += [scale * k[other] @ q[token] + bias[other] for other in block]
                values += [v[other] for other in block]
            elif block:
                own = scale * k[block] @ mean_query
                weights = (own + bias[block]).softmax(0)
                term = (own + bias[block]).logsumexp(0) - weights @ own
                logits.append(scale * (weights @ k[block]) @ q[token] + term)
                values.append(weights @ v[block])
        out[token] = torch.stack(logits).softmax(0) @ torch.stack(values)
    return out


@pytest.mark.parametrize("masked", [None, "hidden", "weighed"])
@pytest.mark.parametrize("grid", [TokenGrid(8, 12, before=3), TokenGrid(7, 9, before=2, after=1)], ids=str)
def test_weighted_means_are_those_of_the_definition(grid: TokenGrid, masked: str | None) -> None:
    q, k, v = inputs(grid, heads=2)
    hidden = torch.rand(grid.tokens) < 0.3
    hidden[grid.cell_slice][:2] = True
    bias = {
        None: torch.zeros(grid.tokens),
        "hidden": torch.zeros(grid.tokens).masked_fill(hidden, -math.inf),
        "weighed": torch.randn(grid.tokens),
    }[masked].double()
    context = Context(mask=None if masked is None else ~hidden if masked == "hidden" else bias)
    mechanism = RoutingAttention(top_k=2, **WEIGHTED)
    chosen = mechanism.choose(q, k, v, grid, scale=0.7, context=context)
    want = torch.stack([
        torch.stack([by_hand(*(x[b, h] for x in (q, k, v)), grid, chosen[b, h], bias, 0.7) for h in range(2)])
        for b in range(2)
    ])  # fmt: skip
    for backend in ("gather", "dense"):
        assert_close(mechanism.attend(q, k, v, grid, scale=0.7, backend=backend, context=context), want, backend)
    assert_close(mechanism.reference(q, k, v, grid, scale=0.7, context=context), want)


@pytest.mark.parametrize("order", ["space", "content", "centroids"])
def test_weighted_means_are_exact_for_queries_that_are_all_alike(order: str) -> None:
    grid = TokenGrid(9, 10, before=3)
    q, k, v = inputs(grid)
    q[:, :, grid.cell_slice] = 2 * torch.randn(2, 3, 1, 8, dtype=torch.float64)
    exact = F.scaled_dot_product_attention(q, k, v)
    mechanism = RoutingAttention(top_k=1, order=order, **WEIGHTED)
    assert_close(mechanism.attend(q, k, v, grid), exact)
    even = RoutingAttention(top_k=1, tile=4, pool=2, order=order).attend(q, k, v, grid)
    assert (even - exact).abs().max() > 1e-3


def test_weighted_means_are_right_to_first_order_around_the_mean_query() -> None:
    """The logits of blocks, that is: with values that are alike within blocks, which any weights leave as they are."""
    grid = TokenGrid(8, 8)
    q, k, v = inputs(grid)
    _, rows, columns = grid.positions()
    v = torch.randn(2, 3, 16, 8, dtype=torch.float64)[:, :, rows // 2 * 4 + columns // 2]
    around = torch.cat([torch.randn(2, 3, 32, 8, dtype=torch.float64)] * 2, dim=2)
    around[:, :, 32:] *= -1
    errors = []
    for size in (0.02, 0.01):
        near = q[:, :, :1] + size * around
        exact = F.scaled_dot_product_attention(near, k, v)
        errors.append(float((RoutingAttention(top_k=1, **WEIGHTED).attend(near, k, v, grid) - exact).norm()))
    assert 3.8 < errors[0] / errors[1] < 4.2


def test_keys_that_are_alike_have_even_weights() -> None:
    grid = TokenGrid(9, 10, before=3)
    q, k, v = inputs(grid)
    k[:, :, grid.cell_slice] = k[:, :, :1]
    even = RoutingAttention(top_k=1, tile=4, pool=2).attend(q, k, v, grid)
    assert_close(RoutingAttention(top_k=1, **WEIGHTED).attend(q, k, v, grid), even)


def test_far_logits_stay_finite() -> None:
    grid = TokenGrid(8, 12)
    q, k, v = (30 * x.float() for x in inputs(grid))
    mechanism = RoutingAttention(top_k=1, **WEIGHTED)
    for backend in ("gather", "dense"):
        assert mechanism.attend(q, k, v, grid, backend=backend).isfinite().all()


def test_the_logits_of_the_mean_query_are_counted() -> None:
    grid = TokenGrid(12, 12, before=2)
    even, weighted = (RoutingAttention(top_k=2, tile=4, pool=2, means=means) for means in ("even", "weighted"))
    assert weighted.flops(grid, 3, 8) - even.flops(grid, 3, 8) == 2 * 3 * 144 * 8
    assert weighted.share_on(grid) == even.share_on(grid)


def test_centroids_are_kept_beside_the_order_and_move_when_it_is_made() -> None:
    grid = TokenGrid(8, 9, before=2)
    mechanism = RoutingAttention(tile=2, pool=2, top_k=2, order="centroids", refresh=2, decay=0.999)
    assert mechanism.needs == {"memory"}
    memory: dict[str, Any] = {}
    seen = []
    for _ in range(5):
        mechanism.attend(*inputs(grid), grid, context=Context(memory=memory))
        seen.append((memory["order"], memory["centroids"]))
    assert seen[0][1].shape == (6, 18, 8)
    for place in (0, 1):
        assert [seen[i + 1][place] is seen[i][place] for i in range(4)] == [True, False, True, False]
    assert 0 < (seen[2][1] - seen[0][1]).abs().max() < 0.01


def test_a_decay_of_0_forgets_and_of_1_never_moves() -> None:
    grid = TokenGrid(8, 8)
    kept = {}
    for decay in (0.0, 1.0):
        torch.manual_seed(3)
        mechanism = RoutingAttention(tile=2, pool=2, top_k=2, order="centroids", decay=decay)
        memory: dict[str, Any] = {}
        for _ in range(2):
            q, k, v = inputs(grid)
            mechanism.attend(q, k, v, grid, context=Context(memory=memory))
            kept[decay, "first"] = kept.get((decay, "first"), memory["centroids"])
        kept[decay] = memory["centroids"]
        if decay == 0:
            tiles = memory["order"].flatten(0, 1).view(6, 16, 4, 1).expand(-1, -1, -1, 8)
            means = k.flatten(0, 1)[:, None].expand(-1, 16, -1, -1).gather(2, tiles).mean(2)
            assert_close(kept[decay], means)
    assert torch.equal(kept[1.0], kept[1.0, "first"])
    with pytest.raises(ValueError, match="decay must be a number from 0 to 1, got 1.5"):
        RoutingAttention(decay=1.5)


def test_a_sample_alone_gives_what_it_gives_among_others() -> None:
    grid = TokenGrid(9, 10, before=3)
    mechanism = RoutingAttention(top_k=2, order="centroids", **WEIGHTED)
    steps = [inputs(grid, batch=3) for _ in range(3)]
    memory: dict[str, Any] = {}
    together = [mechanism.attend(*step, grid, context=Context(memory=memory)) for step in steps]
    for sample in range(3):
        own: dict[str, Any] = {}
        for step, want in zip(steps, together, strict=True):
            one = [x[sample : sample + 1] for x in step]
            assert_close(mechanism.attend(*one, grid, context=Context(memory=own))[0], want[sample])


def test_a_later_call_by_kept_centroids_is_its_reference() -> None:
    grid = TokenGrid(11, 7, 2, before=3)
    mechanism = RoutingAttention(top_k=2, order="centroids", **WEIGHTED)
    steps = [inputs(grid) for _ in range(3)]
    fast: dict[str, Any] = {}
    plain: dict[str, Any] = {}
    for step in steps:
        got = mechanism.attend(*step, grid, context=Context(memory=fast))
        assert_close(got, mechanism.reference(*step, grid, context=Context(memory=plain)))
    alone = mechanism.attend(*steps[-1], grid)
    assert (alone - got).abs().max() > 1e-3  # its centroids would be others


def test_what_is_seen_leaves_the_memory_as_it_is() -> None:
    grid = TokenGrid(8, 8)
    mechanism = RoutingAttention(tile=2, pool=2, top_k=2, order="centroids")
    memory: dict[str, Any] = {}
    q, k, v = inputs(grid)
    mechanism.attend(q, k, v, grid, context=Context(memory=memory))
    before = dict(memory)
    seen = mechanism.seen(q, k, v, grid, context=Context(memory=memory))
    assert seen.keys.sum(-1).unique().tolist() == [8] and memory == before
