"""Dual-scope attention's choice by content, its rotation and its memory: against their definitions by hand."""

import math
from typing import Any

import models
import pytest
import torch
from tolerances import assert_close
from torch import Tensor
from torch.nn import functional as F

import diffattn
from diffattn import TokenGrid
from diffattn.mechanisms import Context, DualScopeAttention
from diffattn.mechanisms.parts.scopes.frames import global_frames
from diffattn.mechanisms.parts.scopes.memory import runs_of

FREE: dict[str, Any] = {"local_phase": None, "global_phase": None}
GRIDS = [
    TokenGrid(1, 1, frames=23),
    TokenGrid(2, 3, frames=11, before=3, after=1),
    TokenGrid(8, 9, frames=5, after=1),  # one frame to a block
    TokenGrid(1, 1, frames=2),
]
SETTINGS: dict[str, dict[str, Any]] = {
    "content": {"chosen_by": "content"},
    "content, all": {"chosen_by": "content", "top_k": 200},
    "content, twice": {"chosen_by": "content", "duplicates": True},
    "content, global first": {"chosen_by": "content", "global_phase": (None, 0, 1.5), "token_num_scale": True},
    "memory of single frames": {"memory": 1, "forget": 0.1},
    "memory": {"memory": 4, "forget": 0.3, "token_num_scale": True},
    "memory, local first": {"memory": 5, "local_phase": (None, 1.0, -0.5)},
    "memory of everything": {"memory": 1000},
    "memory alone": {"memory": 3, "top_k": 0},
    "memory and content": {"memory": 4, "chosen_by": "content", "attn_scale": 1.3, "global_phase": (None, 0, 0.7)},
    "memory, wide window": {"memory": 3, "padding": 200},
    "rotation": {"rotation": 2.3},
    "rotation and memory": {"rotation": -0.7, "memory": 4},
}


def mechanism_of(name: str) -> DualScopeAttention:
    return DualScopeAttention(**{"padding": 2, "top_k": 3, **FREE, **SETTINGS[name]})


def inputs(grid: TokenGrid, dtype: torch.dtype = torch.float64, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(3, batch, 3, grid.tokens, 8, dtype=torch.float64).to(dtype)
    return q, k, v


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", SETTINGS)
def test_fast_form_is_the_reference_with_masks_and_gradients(name: str, grid: TokenGrid) -> None:
    mechanism, (q, k, v) = mechanism_of(name), (x.requires_grad_() for x in inputs(grid))
    masks = [None, torch.rand(2, 1, 1, grid.tokens) > 0.3, torch.randn(1, 3, 1, grid.tokens, dtype=torch.float64)]
    for mask in masks:
        context = Context(mask=mask, progress=0.4)
        with torch.no_grad():
            alone = mechanism.attend(q, k, v, grid, context=context)
        out, want = (f(q, k, v, grid, context=context) for f in (mechanism.attend, mechanism.reference))
        assert_close(out, want)
        assert_close(alone, want)
    weight = torch.randn_like(out)
    got = torch.autograd.grad((out * weight).sum(), (q, k, v))
    for left, right in zip(got, torch.autograd.grad((want * weight).sum(), (q, k, v)), strict=True):
        assert_close(left, right, "gradient")


@torch.no_grad()
@pytest.mark.parametrize("name", ["memory", "memory and content", "content, global first"])
def test_several_blocks_of_frames(name: str) -> None:
    grid = TokenGrid(1, 1, frames=135)
    q, k, v = inputs(grid, batch=1)
    assert_close(mechanism_of(name).attend(q, k, v, grid), mechanism_of(name).reference(q, k, v, grid))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["memory", "memory and content", "content, global first"])
def test_lower_precision(name: str, dtype: torch.dtype) -> None:
    for grid in GRIDS[:3]:
        q, k, v = inputs(grid, dtype)
        out = mechanism_of(name).attend(q, k, v, grid)
        assert out.dtype == dtype
        assert_close(out, mechanism_of(name).reference(q.double(), k.double(), v.double(), grid))


@pytest.mark.parametrize("name", ["content", "memory and content", "memory"])
def test_a_sample_alone_is_what_it_is_in_a_batch(name: str) -> None:
    grid = TokenGrid(2, 1, frames=19, before=2)
    q, k, v = inputs(grid, batch=5)
    together = mechanism_of(name).attend(q, k, v, grid)
    for i in range(5):
        own = [x[i : i + 1] for x in (q, k, v)]
        assert_close(together[i : i + 1], mechanism_of(name).attend(*own, grid))


@pytest.mark.parametrize("name", SETTINGS)
def test_one_frame_is_exact_attention(name: str) -> None:
    grid = TokenGrid(3, 5, before=2)
    q, k, v = inputs(grid)
    assert_close(mechanism_of(name).attend(q, k, v, grid), F.scaled_dot_product_attention(q, k, v))


# ---- the choice


def seen_frames(mechanism: DualScopeAttention, grid: TokenGrid, q: Tensor, k: Tensor) -> list[list[int]]:
    """The frames that the last query frame of each sample sees."""
    size = grid.height * grid.width
    keys = mechanism.seen(q, k, k, grid).keys[:, 0, grid.cell_slice.stop - 1, grid.cell_slice]
    return [own.view(-1, size).all(-1).nonzero().flatten().tolist() for own in keys]


def test_frames_that_queries_look_for_are_chosen() -> None:
    grid = TokenGrid(1, 2, frames=20, after=1)
    q, k, v = inputs(grid)
    look = torch.ones(8, dtype=torch.float64)
    q = 0.1 * q + look
    k[0, :, [6, 7, 10, 11]] += 3 * look  # frames 3 and 5
    k[1, :, [22, 23, 0, 1]] += 3 * look  # frames 11 and 0
    mechanism = DualScopeAttention(padding=1, top_k=2, chosen_by="content", **FREE)
    assert seen_frames(mechanism, grid, q, k) == [[3, 5, 18, 19], [0, 11, 18, 19]]
    v[0, :, 2 * 12 : 2 * 13] = 1e3  # frame 12, chosen in neither
    assert mechanism.attend(q, k, v, grid)[0, :, :20].abs().max() < 100


def test_equal_frames_are_chosen_from_the_start() -> None:
    q = torch.zeros(1, 1, 9, 4)
    mechanism = DualScopeAttention(padding=9, top_k=3, chosen_by="content", **FREE)
    chosen = mechanism.chosen_frames(q, q, 1.0)
    assert chosen.tolist() == [[0, 1, 2]], "all see all in their windows, so none weighs more"


def test_the_window_of_a_frame_does_not_count_for_it() -> None:
    """Frames that look for themselves alone would fill the choice with what they see anyway."""
    own = 8.0 * torch.eye(12, dtype=torch.float64)[None, None]
    k = own.clone()
    k[..., 7] += 0.5 * own.sum(-1)  # all look a little for frame 7's direction
    k[:, :, 4] += 0.5 * torch.ones(12, dtype=torch.float64)
    mechanism = DualScopeAttention(padding=1, top_k=1, chosen_by="content", **FREE)
    assert mechanism.chosen_frames(own, k, 1.0).tolist() == [[4]]


# ---- rotation


def test_rotation_moves_the_frames_and_comes_round() -> None:
    mechanism = DualScopeAttention(padding=0, top_k=4, rotation=1.0, **FREE)
    places = [mechanism.global_frames(16, Context(progress=p)) for p in (0.0, 0.25, 0.5, 0.75)]
    assert places == [(0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15)]
    backwards = DualScopeAttention(padding=0, top_k=4, rotation=-1.0, **FREE)
    assert backwards.global_frames(16, Context(progress=0.25)) == (15, 3, 7, 11)
    assert global_frames(3, 8, turn=0.5) == (0, 1, 2)
    assert global_frames(5, 0, turn=0.5) == ()


def test_rotation_needs_the_steps_of_a_pipeline() -> None:
    mechanism = DualScopeAttention(top_k=2, rotation=1, **FREE)
    assert mechanism.needs == {"progress"} and mechanism.needs_steps
    grid = TokenGrid(1, 1, frames=6)
    with pytest.raises(ValueError, match="needs the progress of every call"):
        mechanism.attend(*inputs(grid), grid)
    with pytest.raises(ValueError, match="pass the pipeline, not its model"):
        diffattn.apply(models.wan().model, mechanism)


# ---- memory


def by_hand(q: Tensor, k: Tensor, v: Tensor, frame: int, size: int, forget: float) -> Tensor:
    """One query of 10 frames with window 1 and global frame 0, one head, one cell; groups of `size`."""
    keys, values, bias = [], [], []
    for other in {0, frame - 1, frame, frame + 1} & set(range(10)):
        keys.append(k[other]), values.append(v[other]), bias.append(0.0)
    for group in range(0, 10, size):
        members = [f for f in range(group, min(group + size, 10)) if f != 0]
        for side in ([f for f in members if f < frame - 1], [f for f in members if f > frame + 1]):
            if side:
                keys.append(k[side].mean(0)), values.append(v[side].mean(0))
                away = min(abs(f - frame) - 1 for f in side)
                bias.append(math.log(len(side)) - forget * away)
    logits = torch.stack(keys) @ q[frame] / 2 + torch.tensor(bias, dtype=q.dtype)
    return logits.softmax(0) @ torch.stack(values)


@pytest.mark.parametrize(("size", "forget"), [(1, 0.0), (3, 0.0), (4, 0.5), (20, 0.25)])
def test_what_left_the_window_counts_by_means(size: int, forget: float) -> None:
    grid = TokenGrid(1, 1, frames=10)
    q, k, v = torch.randn(3, 10, 4, dtype=torch.float64)
    mechanism = DualScopeAttention(padding=1, top_k=1, memory=size, forget=forget, **FREE)
    out = mechanism.attend(q[None, None], k[None, None], v[None, None], grid)[0, 0]
    assert_close(out, torch.stack([by_hand(q, k, v, frame, size, forget) for frame in range(10)]))


def test_a_memory_of_single_frames_is_full_attention() -> None:
    grid = TokenGrid(2, 3, frames=9, before=1)
    q, k, v = inputs(grid)
    out = DualScopeAttention(padding=1, top_k=2, memory=1, **FREE).attend(q, k, v, grid)
    assert_close(out, F.scaled_dot_product_attention(q, k, v))


def test_a_memory_of_equal_frames_is_full_attention() -> None:
    grid = TokenGrid(2, 1, frames=12)
    q = inputs(grid)[0]
    k, v = (x[:, :, :2].repeat(1, 1, 12, 1) for x in inputs(grid)[1:])
    out = DualScopeAttention(padding=1, top_k=2, memory=5, **FREE).attend(q, k, v, grid)
    assert_close(out, F.scaled_dot_product_attention(q, k, v))


def test_runs_are_cut_by_the_window_and_counted_from_the_first_frame() -> None:
    assert runs_of(0, 5, size=2, padding=0) == [(range(1, 2), 1), (range(2, 4), 2), (range(4, 5), 4)]
    assert runs_of(6, 10, size=20, padding=1) == [(range(0, 5), 1), (range(8, 10), 1)]
    assert runs_of(3, 7, size=3, padding=6) == []


def test_keys_that_the_mask_hides_are_not_remembered() -> None:
    grid = TokenGrid(1, 1, frames=16)
    q, k, v = inputs(grid)
    mask = torch.ones(2, 1, 1, 16, dtype=torch.bool)
    mask[0, ..., 9:12], mask[1, ..., 0:4] = False, False  # of the second sample a whole group
    mechanism = DualScopeAttention(padding=1, top_k=1, memory=4, **FREE)
    out = mechanism.attend(q, k, v, grid, context=Context(mask=mask))
    hidden = ~mask[:, :, 0, :, None]
    other = mechanism.attend(q, k + 9 * hidden, v + 9 * hidden, grid, context=Context(mask=mask))
    assert_close(other, out)


def test_a_mask_for_each_query_is_refused() -> None:
    grid = TokenGrid(1, 1, frames=8)
    mechanism = DualScopeAttention(padding=1, top_k=1, memory=4, **FREE)
    assert mechanism.one_mask and not DualScopeAttention().one_mask
    for compute in (mechanism.attend, mechanism.reference):
        with pytest.raises(ValueError, match="a mask must be one over the keys"):
            compute(*inputs(grid), grid, context=Context(mask=torch.ones(8, 8, dtype=torch.bool)))


# ---- what it says of itself


@pytest.mark.parametrize("name", ["content", "memory", "memory and content", "rotation and memory"])
def test_seen_says_what_changes_an_output(name: str) -> None:
    grid = TokenGrid(1, 2, frames=12, after=1)
    mechanism, (q, k, v) = mechanism_of(name), inputs(grid, batch=2)
    context = Context(progress=0.3)
    seen = mechanism.seen(q, k, v, grid, context=context)
    through = (seen.means.float() @ seen.blocks.float()) > 0
    cells = (seen.keys[..., grid.cell_slice] | through).expand(2, -1, -1, -1)
    v.requires_grad_()
    out = mechanism.attend(q, k, v, grid, context=context)
    for query in range(0, 24, 5):
        (grad,) = torch.autograd.grad(out[:, 0, query].sum(), v, retain_graph=True)
        assert torch.equal(grad[:, 0, grid.cell_slice].abs().sum(-1) > 0, cells[:, 0, query])


def test_operations_count_means_and_the_choice() -> None:
    grid, one = TokenGrid(2, 1, frames=12), 4 * 2**2 * 3 * 16
    assert DualScopeAttention(padding=0, top_k=0, memory=4, **FREE).flops(grid, 3, 16) == 12 * one + one * sum(
        len(runs_of(frame, 12, 4, 0)) for frame in range(12)
    )
    by_content = DualScopeAttention(padding=0, top_k=3, chosen_by="content", **FREE).flops(grid, 3, 16)
    assert by_content == 12 * (1 + 3) * one + 2 * 12**2 * 3 * 16
    for options in ({"memory": 3}, {"chosen_by": "content"}, {"rotation": 1.0}):
        with pytest.raises(NotImplementedError, match="ask seen"):
            DualScopeAttention(**options).mask(grid)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chosen_by": "chance"}, "chosen_by must be 'place' or 'content'"),
        ({"rotation": float("nan")}, "rotation must be a finite number"),
        ({"memory": 0}, "memory must be an int of at least 1"),
        ({"memory": 4, "forget": -1.0}, "forget must be a number of at least 0"),
        ({"forget": 0.5}, "give memory="),
        ({"chosen_by": "content", "rotation": 1.0}, "leave one of them out"),
        ({"chosen_by": "content", "top_k": 0}, "top_k=0 has none"),
        ({"rotation": 1.0, "top_k": 0}, "top_k=0 has none"),
        ({"official": True, "chosen_by": "content"}, "has no chosen_by='content'"),
        ({"official": True, "rotation": 1.0}, "has no rotation=1"),
        ({"official": True, "memory": 4}, "has no memory=4"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DualScopeAttention(**options)
