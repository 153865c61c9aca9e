"""Dual-scope attention on clips: what single-process dual-scope attention gives, whatever the split."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from clip_splits import SPLITS, clip_of, plan_of
from parallel_ranks import on_ranks
from tolerances import assert_close
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.profiler import ProfilerActivity, profile

from diffattn.grid import TokenGrid
from diffattn.mechanisms.base import Context
from diffattn.mechanisms.dual_scope import DualScopeAttention
from diffattn.mechanisms.parts.scopes.frames import Phase
from diffattn.mechanisms.softmax import softmax_reference
from diffattn.parallel.attention import ClipAttention
from diffattn.parallel.operations.shares import FramePlan

FREE = dict(local_phase=None, global_phase=None)
MECHANISMS = {
    "local": DualScopeAttention(padding=2, top_k=0, **FREE),
    "wider than the video": DualScopeAttention(padding=30, top_k=3, **FREE),
    "global alone": DualScopeAttention(padding=0, top_k=3, **FREE),
    "local first": DualScopeAttention(padding=1, top_k=4, local_phase=Phase(None, 2.0), global_phase=None),
    "global first": DualScopeAttention(padding=2, top_k=3, local_phase=None, global_phase=Phase(None, 0.0, 1.5)),
    "duplicates": DualScopeAttention(padding=3, top_k=5, duplicates=True, **FREE),
    "scaled": DualScopeAttention(padding=1, top_k=2, attn_scale=1.3, token_num_scale=True, train_frames=4, **FREE),
    "phases": DualScopeAttention(padding=2, top_k=2),
    "rotation": DualScopeAttention(padding=1, top_k=3, rotation=1.7, **FREE),
    "content": DualScopeAttention(padding=1, top_k=3, chosen_by="content", attn_scale=1.2, **FREE),
    "content, global first": DualScopeAttention(
        padding=2, top_k=2, chosen_by="content", token_num_scale=True, local_phase=None, global_phase=(None, 0, 2)
    ),
    "memory": DualScopeAttention(padding=1, top_k=2, memory=3, forget=0.2, local_phase=(None, 1, 0), global_phase=None),
    "memory alone": DualScopeAttention(padding=0, top_k=0, memory=5, **FREE),
    "memory, all of it": DualScopeAttention(padding=1, top_k=1, memory=50, **FREE),
    "content and memory": DualScopeAttention(padding=1, top_k=2, memory=2, chosen_by="content", forget=0.1, **FREE),
}
MOMENT = Context(timestep=500.0, progress=0.4)
GRIDS = {"frames alone": TokenGrid(1, 1), "cells": TokenGrid(2, 3), "with text": TokenGrid(2, 1, before=3, after=2)}


def of_video(grid: TokenGrid, frames: int) -> TokenGrid:
    return TokenGrid(grid.height, grid.width, frames, grid.before, grid.after)


def tokens_of(x: Tensor, whole: TokenGrid, plan: FramePlan) -> Tensor:
    """A rank's tokens: its frames, and all the others."""
    cells, others = whole.split(x)
    own = of_video(whole, plan.length)
    frames = clip_of(cells.unflatten(2, (whole.frames, -1)), plan, 2)
    return own.join(frames.flatten(2, 3), others)


def compared(mesh: DeviceMesh, lengths: tuple[int, ...], grid: TokenGrid, masked: bool) -> None:
    plan = plan_of(mesh, lengths)
    whole, own = of_video(grid, plan.frames), of_video(grid, plan.length)
    q, k, v = torch.randn(3, 2, 2, whole.tokens, 4).double().unbind(0)
    mask = torch.rand(2, 1, 1, whole.tokens) < 0.8 if masked else None
    parts = [tokens_of(x, whole, plan) for x in (q, k, v)]
    own_mask = None if mask is None else tokens_of(mask.mT, whole, plan).mT
    for name, mechanism in MECHANISMS.items():
        want = mechanism.reference(q, k, v, whole, context=replace(MOMENT, mask=mask))
        clips = ClipAttention(mechanism=mechanism, plan=plan)
        got = clips.attend(*parts, own, context=replace(MOMENT, mask=own_mask))
        tolerance = 2e-6 if grid.others else 1e-10  # those off the grid are merged in float32
        torch.testing.assert_close(
            got, tokens_of(want, whole, plan), atol=tolerance, rtol=0, msg=lambda t, n=name: n + t
        )


@pytest.mark.dist
@pytest.mark.parametrize("lengths", SPLITS, ids=str)
def test_clips_give_what_the_whole_gives(lengths: tuple[int, ...]) -> None:
    for grid in GRIDS.values():
        for masked in (False, True):
            on_ranks(len(lengths), compared, lengths, grid, masked)


def gradient(mesh: DeviceMesh, lengths: tuple[int, ...], name: str) -> None:
    plan, mechanism = plan_of(mesh, lengths), MECHANISMS[name]
    whole, own = TokenGrid(1, 2, plan.frames), TokenGrid(1, 2, plan.length)
    tensors = torch.randn(3, 1, 2, whole.tokens, 4).double().unbind(0)
    loss = torch.randn(1, 2, whole.tokens, 4).double()
    together = [x.clone().requires_grad_() for x in tensors]
    (mechanism.reference(*together, whole) * loss).sum().backward()
    parts = [tokens_of(x, whole, plan).requires_grad_() for x in tensors]
    out = ClipAttention(mechanism=mechanism, plan=plan).attend(*parts, own)
    (out * tokens_of(loss, whole, plan)).sum().backward()
    for x, part in zip(together, parts, strict=True):
        assert x.grad is not None and part.grad is not None
        assert_close(part.grad, tokens_of(x.grad, whole, plan))


@pytest.mark.dist
@pytest.mark.parametrize("name", ["local first", "memory", "content and memory"])
@pytest.mark.parametrize("lengths", SPLITS[1:], ids=str)
def test_gradients_are_those_of_the_whole(lengths: tuple[int, ...], name: str) -> None:
    on_ranks(len(lengths), gradient, lengths, name)


def chosen(mesh: DeviceMesh, lengths: tuple[int, ...]) -> list[list[int]]:
    plan, mechanism = plan_of(mesh, lengths), MECHANISMS["content"]
    q, k = torch.randn(2, 3, 2, plan.frames * 4, 4)
    clips = ClipAttention(mechanism=mechanism, plan=plan)
    own = [clip_of(x.unflatten(2, (plan.frames, 4)), plan, 2).flatten(2, 3) for x in (q, k)]
    return clips.choose_frames(*own, plan.length, 0.5).tolist()


@pytest.mark.dist
def test_all_ranks_choose_the_same_frames_however_many_there_are() -> None:
    found = [
        choice for lengths in ((12,), (5, 1, 6), (3, 3, 3, 3)) for choice in on_ranks(len(lengths), chosen, lengths)
    ]
    assert all(choice == found[0] for choice in found)
    assert len({tuple(own) for own in found[0]}) > 1, "samples have choices of their own"


def more_bytes(mesh: DeviceMesh, frames: int) -> dict[str, int]:
    plan = FramePlan.split(frames, mesh)
    q = torch.zeros(2, 3, plan.length * 6, 4)
    mechanism = DualScopeAttention(padding=1, top_k=8, chosen_by="content", memory=4, **FREE)
    ClipAttention(mechanism=mechanism, plan=plan).attend(q, q, q, TokenGrid(2, 3, plan.length))
    return plan.traffic.received


@pytest.mark.dist
def test_traffic_of_choice_and_memory_is_that_of_the_formula() -> None:
    frame = 2 * 3 * 6 * 4 * 4
    for frames in (32, 64):
        got = on_ranks(4, more_bytes, frames)[1]
        assert got["halo"] == 4 * (1 + 4) * frame and got["gather"] == 2 * 8 * frame
        assert got["landmarks"] == 2 * frames * 3 // 4 * frame // 6
        assert got["memory"] == frames // 4 * (2 * frame + 2 * 6 * 4)


def test_progress_is_that_of_the_plans_clock_outside_a_pipeline() -> None:
    plan, q = FramePlan((9,)), torch.randn(1, 1, 9, 4)
    clips = ClipAttention(mechanism=MECHANISMS["rotation"], plan=plan)
    with pytest.raises(ValueError, match="needs the progress"):
        clips.attend(q, q, q, TokenGrid(1, 1, 9))
    plan.clock.progress = 0.4
    assert_close(clips.attend(q, q, q, TokenGrid(1, 1, 9)), clips.attend(q, q, q, TokenGrid(1, 1, 9), context=MOMENT))


def bytes_sent(mesh: DeviceMesh, frames: int, padding: int, top_k: int) -> tuple[dict[str, int], dict[str, int]]:
    plan = FramePlan.split(frames, mesh)
    q = torch.zeros(2, 3, plan.length * 6, 4)
    mechanism = DualScopeAttention(padding=padding, top_k=top_k, **FREE)
    ClipAttention(mechanism=mechanism, plan=plan).attend(q, q, q, TokenGrid(2, 3, plan.length))
    return plan.traffic.sent, plan.traffic.received


@pytest.mark.dist
def test_traffic_is_that_of_the_formula_whatever_the_length() -> None:
    size, padding, top_k, ranks = 2 * 3 * 6 * 4 * 4, 3, 8, 4  # bytes of a frame of keys
    for frames in (16, 64):
        sent, received = on_ranks(ranks, bytes_sent, frames, padding, top_k)[1]
        assert sent == {"halo": 4 * padding * size, "gather": 2 * top_k // ranks * size}
        assert received == {"halo": 4 * padding * size, "gather": 2 * top_k * (ranks - 1) // ranks * size}


def peak_bytes(work: Callable[[], Any]) -> int:
    """The most that is allocated at once by `work`, its result included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        kept = work()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    assert kept is not None
    return max(held)


@torch.no_grad()
def memory(mesh: DeviceMesh, frames: int, batch: int, heads: int, dim: int) -> tuple[float, float]:
    """What attention needs beside its output, and what dense logits of this clip would, in bytes."""
    plan, padding, top_k = FramePlan.split(frames * mesh.size(), mesh), 8, 16
    q = torch.randn(batch, heads, frames, dim)
    clips = ClipAttention(mechanism=DualScopeAttention(padding=padding, top_k=top_k), plan=plan)
    context = Context(timestep=500.0)

    def work() -> Tensor:
        return clips.attend(q, q, q, TokenGrid(1, 1, frames), context=context)

    work()
    keys = frames + 2 * padding + top_k
    return peak_bytes(work) - q.numel() * q.element_size(), 4 * batch * heads * frames * keys


@pytest.mark.dist
@pytest.mark.parametrize(("batch", "heads", "dim"), [(48, 2, 64), (16, 8, 64), (96, 2, 16)])
def test_at_288_frames_a_tenth_of_dense_logits_is_enough(batch: int, heads: int, dim: int) -> None:
    for needed, dense in on_ranks(2, memory, 288, batch, heads, dim):
        assert 0 < needed < dense / 10, needed / dense


@pytest.mark.dist
def test_unused_keys_do_not_stop_the_backward_pass() -> None:
    """A rank that sees a global frame in its window does not use the copy; the other does."""
    on_ranks(2, unused_backward)


def unused_backward(mesh: DeviceMesh) -> None:
    plan, mechanism = FramePlan.split(8, mesh), DualScopeAttention(padding=4, top_k=1, **FREE)
    q = torch.randn(1, 1, 8, 4).double()
    whole, own = q.clone().requires_grad_(), clip_of(q, plan, 2).requires_grad_()
    mechanism.reference(whole, whole, whole, TokenGrid(1, 1, 8)).square().sum().backward()
    ClipAttention(mechanism=mechanism, plan=plan).attend(own, own, own, TokenGrid(1, 1, 4)).square().sum().backward()
    assert own.grad is not None and whole.grad is not None
    assert_close(own.grad, clip_of(whole.grad, plan, 2))


def test_a_window_over_everything_is_softmax() -> None:
    plan = FramePlan((5,))
    q, k, v = torch.randn(3, 1, 2, 10, 4).unbind(0)
    mechanism = DualScopeAttention(padding=5, top_k=0, **FREE)
    got = ClipAttention(mechanism=mechanism, plan=plan).attend(q, k, v, TokenGrid(1, 2, 5))
    assert_close(got, softmax_reference(q, k, v))


def test_operations_of_all_clips_are_those_of_the_whole() -> None:
    for mechanism in MECHANISMS.values():
        for grid in (TokenGrid(1, 1), TokenGrid(2, 3)):
            clips = [ClipAttention(mechanism=mechanism, plan=FramePlan((5, 1, 6), rank)) for rank in range(3)]
            total = sum(clip.flops(of_video(grid, clip.plan.length), 2, 4, context=MOMENT) for clip in clips)
            again = 2 * mechanism.choice_pairs(12) * 2 * 4  # every rank chooses
            assert total == mechanism.flops(of_video(grid, 12), 2, 4, context=MOMENT) + again


def test_it_says_what_it_is() -> None:
    clips = ClipAttention(mechanism=MECHANISMS["local"], plan=FramePlan((5, 3), rank=1))
    assert str(clips).endswith(" on frames 5 to 7 of 8")
    assert clips.to_dict() == MECHANISMS["local"].to_dict()
    q = torch.zeros(1, 1, 3, 4)
    assert "clip 2 of 2" in clips.explain_backend(q, q, q, TokenGrid(1, 1, 3), "auto", Context())
    assert ClipAttention(mechanism=MECHANISMS["phases"], plan=FramePlan((5,))).needs == {"timestep"}


def test_what_does_not_fit_is_refused() -> None:
    q = torch.zeros(1, 1, 4, 4)
    clips = ClipAttention(mechanism=MECHANISMS["local"], plan=FramePlan((5, 3)))
    with pytest.raises(ValueError, match="clip of 5 frames, got 4"):
        clips.attend(q, q, q, TokenGrid(1, 1, 4))
    with pytest.raises(ValueError, match="those of equal clips|that of equal clips"):
        ClipAttention(mechanism=DualScopeAttention(official=True, padding=2, clips=2), plan=FramePlan((5, 3)))
    with pytest.raises(ValueError, match="clips=1"):
        ClipAttention(mechanism=DualScopeAttention(official=True, padding=2), plan=FramePlan((4, 4)))
    q = torch.zeros(1, 1, 5, 4)
    with pytest.raises(NotImplementedError, match="over the keys"):
        clips.attend(q, q, q, TokenGrid(1, 1, 5), context=Context(mask=torch.ones(5, 5, dtype=torch.bool)))
