"""Blocks and dilated grids by a definition written here, per head and in turn."""

import math

import pytest
import torch
from tolerances import assert_close
from torch import Tensor

from diffattn import MultiAxisAttention, TokenGrid
from diffattn.mechanisms import Context


def _same_group(kind: str, one: tuple[int, ...], other: tuple[int, ...], sizes: tuple[int, ...], side: int) -> bool:
    for i, j, size in zip(one, other, sizes, strict=True):
        if kind == "block" and i // side != j // side:
            return False
        if kind == "grid" and i % math.ceil(size / side) != j % math.ceil(size / side):
            return False
    return True


def _by_hand(q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, kind: str, side: int, pool: int | None) -> Tensor:
    """One head `(n, d)`, query by query, cell by cell."""
    places = [(f, y, x) for f in range(grid.frames) for y in range(grid.height) for x in range(grid.width)]
    out = []
    for token in range(grid.tokens):
        cell = token - grid.before
        on_grid = 0 <= cell < grid.cells
        keys, values, bias = [], [], []
        left: dict[tuple[int, ...], list[int]] = {}
        for other in range(grid.tokens):
            place = other - grid.before
            hidden = (
                on_grid
                and 0 <= place < grid.cells
                and not _same_group(kind, places[cell], places[place], grid.shape, side)
            )
            if not hidden:
                keys.append(k[other]), values.append(v[other]), bias.append(0.0)
            elif pool is not None:
                left.setdefault(tuple(i // pool for i in places[place]), []).append(other)
        for tokens in left.values():
            keys.append(k[tokens].mean(0)), values.append(v[tokens].mean(0)), bias.append(math.log(len(tokens)))
        logits = torch.stack(keys) @ q[token] / math.sqrt(q.shape[-1]) + torch.tensor(bias, dtype=q.dtype)
        out.append(logits.softmax(0) @ torch.stack(values))
    return torch.stack(out)


@pytest.mark.parametrize("pool", [None, 2, 3])
@pytest.mark.parametrize("grid", [TokenGrid(7, 5, before=2, after=1), TokenGrid(4, 5, frames=3, before=1)], ids=str)
def test_even_heads_have_blocks_and_odd_heads_grids(grid: TokenGrid, pool: int | None) -> None:
    q, k, v = torch.randn(3, 2, 3, grid.tokens, 8, dtype=torch.float64)
    mechanism = MultiAxisAttention(window=2, pool=pool)
    for out in (mechanism.attend(q, k, v, grid), mechanism.reference(q, k, v, grid)):
        for sample in range(2):
            for head in range(3):
                own = (x[sample, head] for x in (q, k, v))
                assert_close(out[sample, head], _by_hand(*own, grid, "grid" if head % 2 else "block", 2, pool))


def test_layers_alternate_where_they_are_to() -> None:
    grid = TokenGrid(6, 9, before=2)
    q, k, v = torch.randn(3, 1, 2, grid.tokens, 8, dtype=torch.float64)
    mechanism, by_heads = MultiAxisAttention(window=3, by="layers"), MultiAxisAttention(window=3)
    assert mechanism.needs == {"call_index"} and not by_heads.needs
    for layer in range(3):
        out = mechanism.attend(q, k, v, grid, context=Context(call_index=layer))
        for head in range(2):
            one = (x[:, head : head + 1] for x in (q, k, v))
            want = by_heads.attend(*one, grid, context=Context(first_head=layer % 2))
            assert_close(out[:, head : head + 1], want)


def test_a_window_as_large_as_the_grid_is_exact() -> None:
    grid = TokenGrid(5, 9, before=3)
    q, k, v = torch.randn(3, 2, 4, grid.tokens, 8)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert_close(MultiAxisAttention(window=9, pool=2).attend(q, k, v, grid), want)


@pytest.mark.parametrize("options", [{"window": (2, 3)}, {"window": 2, "pool": (2, 2)}])
def test_sides_without_frames_are_refused_for_videos(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"multi_axis: .* says nothing of frames.* give .*\(1, 2, [23]\)"):
        MultiAxisAttention(**options).check(TokenGrid(4, 4, frames=2))  # type: ignore[arg-type]


def test_half_precision_is_near_with_means() -> None:
    grid = TokenGrid(12, 10, before=4)
    q, k, v = torch.randn(3, 1, 4, grid.tokens, 16)
    mechanism = MultiAxisAttention(window=3, pool=2)
    want = mechanism.reference(*(x.bfloat16().double() for x in (q, k, v)), grid)
    assert_close(mechanism.attend(*(x.bfloat16() for x in (q, k, v)), grid), want)


def test_what_is_computed_is_less_than_everything() -> None:
    grid = TokenGrid(64, 64)
    full = 4 * grid.tokens**2 * 8 * 64
    assert MultiAxisAttention(window=8).flops(grid, 8, 64) == full * 64 // 4096
    assert MultiAxisAttention(window=8, pool=4).flops(grid, 8, 64) == full * (64 + 256) // 4096
