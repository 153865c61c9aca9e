"""`pool` of the windows: what lies outside counts by means, each cell once, whatever the window."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from memory import largest_tensor
from tolerances import assert_close
from torch import Tensor

from diffattn import ClearAttention, HaloAttention, NeighborhoodAttention, TokenGrid
from diffattn.kernels.routed import gather
from diffattn.mechanisms.base import Context
from diffattn.mechanisms.parts.axes import per_axis
from diffattn.mechanisms.parts.window import Window

WINDOWS: dict[str, tuple[Window, TokenGrid]] = {
    "clear": (ClearAttention(radius=3, pool=4), TokenGrid(16, 12, before=5)),
    "clear, ragged": (ClearAttention(radius=2.5, pool=(3, 4)), TokenGrid(13, 18, before=3, after=2)),
    "clear, frames": (ClearAttention(radius=2, radius_t=2, pool=(2, 3, 3)), TokenGrid(9, 10, frames=5, before=3)),
    "halo": (HaloAttention(tile=4, pool=2), TokenGrid(16, 20, before=5)),
    "halo, ragged": (HaloAttention(tile=(4, 6), halo=(1, 0), pool=(2, 3)), TokenGrid(13, 17, after=2)),
    "neighborhood": (NeighborhoodAttention(kernel_size=5, pool=4), TokenGrid(16, 12, before=1)),
    "dilated": (NeighborhoodAttention(kernel_size=3, dilation=2, pool=3), TokenGrid(17, 14)),
}


def inputs(grid: TokenGrid, d: int = 16, heads: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(3, 2, heads, grid.tokens, d, dtype=torch.float64)
    return q, k, v


def by_hand(window: Window, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid) -> Tensor:
    """Tile of queries by tile of queries, from the window's own mask."""
    plain = replace(window, pool=None).mask(grid)
    places = torch.stack(grid.positions(), -1).tolist()
    side = per_axis(window.pool, 1)
    sides = per_axis(window.tile, 1) if isinstance(window, HaloAttention) else side
    tile_of, block_of = (
        [tuple(x // s for x, s in zip(p, part, strict=True)) for p in places] for part in (sides, side)
    )
    members: dict[tuple[int, ...], list[int]] = {}
    for cell, tile in enumerate(tile_of):
        members.setdefault(tile, []).append(cell)
    others = [token for token in range(grid.tokens) if not grid.before <= token < grid.before + grid.cells]
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    for queries in members.values():
        seen = plain[[grid.before + cell for cell in queries]][:, grid.cell_slice].any(0)
        exact = {tile_of[cell] for cell in range(grid.cells) if seen[cell]}
        cells = [grid.before + cell for cell in range(grid.cells) if tile_of[cell] in exact]
        blocks: dict[tuple[int, ...], list[int]] = {}
        for cell in range(grid.cells):
            if tile_of[cell] not in exact:
                blocks.setdefault(block_of[cell], []).append(grid.before + cell)
        keys = [k[:, :, others + cells], *(k[:, :, b].mean(2, keepdim=True) for b in blocks.values())]
        values = [v[:, :, others + cells], *(v[:, :, b].mean(2, keepdim=True) for b in blocks.values())]
        counts = torch.tensor([1] * len(others + cells) + [len(b) for b in blocks.values()], dtype=q.dtype)
        rows = [grid.before + cell for cell in queries]
        logits = q[:, :, rows] @ torch.cat(keys, 2).mT / q.shape[-1] ** 0.5 + counts.log()
        out[:, :, rows] = logits.softmax(-1) @ torch.cat(values, 2)
    return out


@pytest.mark.parametrize("name", WINDOWS)
def test_the_window_is_rounded_out_and_all_else_counts_by_its_means(name: str) -> None:
    window, grid = WINDOWS[name]
    q, k, v = inputs(grid)
    assert_close(window.attend(q, k, v, grid), by_hand(window, q, k, v, grid))


@pytest.mark.parametrize("kind", ["none", "hidden keys", "weighed keys", "rows"])
@pytest.mark.parametrize("name", WINDOWS)
def test_strips_are_the_one_softmax_of_the_reference(name: str, kind: str) -> None:
    window, grid = WINDOWS[name]
    q, k, v = inputs(grid)
    hidden, rows = torch.rand(2, 1, 1, grid.tokens) > 0.3, torch.rand(2, 1, grid.tokens, grid.tokens) > 0.3
    hidden[..., 0] = rows[..., 0] = True
    weights = torch.randn(1, 3, 1, grid.tokens, dtype=torch.float64)
    context = Context(mask={"none": None, "hidden keys": hidden, "weighed keys": weights, "rows": rows}[kind])
    reference = window.reference(q, k, v, grid, context=context, scale=0.3)
    assert_close(window.attend(q, k, v, grid, context=context, scale=0.3), reference)
    assert_close(window.attend(q.float(), k.float(), v.float(), grid, context=context, scale=0.3), reference)


@pytest.mark.parametrize("name", WINDOWS)
def test_gradients_are_those_of_the_reference(name: str) -> None:
    window, grid = WINDOWS[name]
    tensors = [tensor.requires_grad_() for tensor in inputs(grid)]
    weight = torch.randn(2, 3, grid.tokens, 16, dtype=torch.float64)
    got = torch.autograd.grad((window.attend(*tensors, grid) * weight).sum(), tensors)
    want = torch.autograd.grad((window.reference(*tensors, grid) * weight).sum(), tensors)
    for left, right in zip(got, want, strict=True):
        assert_close(left, right)


@pytest.mark.parametrize("name", WINDOWS)
def test_small_strips_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    window, grid = WINDOWS[name]
    q, k, v = (tensor.float() for tensor in inputs(grid))
    whole = window.attend(q, k, v, grid)
    monkeypatch.setattr(gather, "STRIP", {"cpu": 1})
    monkeypatch.setattr(gather, "GATHERED", {"cpu": 1})
    assert_close(window.attend(q, k, v, grid), whole)


@pytest.mark.parametrize(
    ("window", "words"),
    [
        (lambda: ClearAttention(radius=2, pool=0), "pool must be"),
        (lambda: ClearAttention(radius=2, pool=2, down_factor=2), "pool=2 and down_factor=2"),
        (lambda: HaloAttention(tile=6, pool=4), "must divide the tile"),
        (lambda: NeighborhoodAttention(kernel_size=3, pool=2, is_causal=(False, True)), "is_causal"),
    ],
)
def test_wrong_options_are_refused(window: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        window()


def test_sides_of_an_image_are_refused_on_video() -> None:
    with pytest.raises(ValueError, match=r"pool=\(1, 4, 4\)"):
        ClearAttention(radius=2, pool=(4, 4)).check(TokenGrid(8, 8, frames=3))


def test_a_mask_that_needs_a_gradient_gets_it() -> None:
    window, grid = WINDOWS["clear"]
    q, k, v = inputs(grid)
    mask = torch.zeros(1, 1, 1, grid.tokens, dtype=torch.float64, requires_grad=True)
    window.attend(q, k, v, grid, context=Context(mask=mask)).sum().backward()
    assert mask.grad is not None and mask.grad.abs().sum() > 0


@pytest.mark.parametrize("name", WINDOWS)
def test_a_window_over_everything_is_softmax_bit_by_bit(name: str) -> None:
    window, grid = WINDOWS[name]
    wide = {"radius": 100} if isinstance(window, (ClearAttention, HaloAttention)) else {"kernel_size": 100}
    wide |= {"radius_t": None} if isinstance(window, ClearAttention) else {}
    wide |= {"halo": 1} if isinstance(window, HaloAttention) else {}
    q, k, v = (tensor.float() for tensor in inputs(grid))
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert torch.equal(replace(window, **wide).attend(q, k, v, grid), exact)


def test_nothing_of_tokens_by_tokens_is_held() -> None:
    """256 x 256 cells: a bool matrix of tokens x tokens would take 4 GiB."""
    grid = TokenGrid(256, 256)
    q, k, v = torch.randn(3, 1, 1, grid.tokens, 8)
    window = HaloAttention(tile=16, halo=0, pool=16)
    with torch.no_grad():
        largest = largest_tensor(lambda: window.attend(q, k, v, grid))
    assert largest <= 2**23
    assert window.flops(grid, 1, 8) == 4 * 8 * grid.cells * (256 + 256)
