"""Chosen frames on every rank."""

import pytest
import torch
from clip_splits import SPLITS, clip_of, plan_of
from parallel_ranks import on_ranks
from tolerances import assert_close
from torch.distributed.device_mesh import DeviceMesh

from diffattn.mechanisms.parts.scopes.frames import global_frames
from diffattn.parallel.operations.gather import gather_frames
from diffattn.parallel.operations.shares import FramePlan


def gathered(mesh: DeviceMesh, lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    plan = plan_of(mesh, lengths)
    last = plan.frames - 1
    lists = [[], [0], [last], [last, 0, last], list(range(plan.frames)), [1, 0, 0, last, 1]]
    k, v = torch.randn(2, 3, plan.frames, 5).to(dtype), torch.randn(2, 3, plan.frames, 2, 2).to(dtype)
    for frames in lists:
        plan.traffic.reset()
        got = gather_frames((clip_of(k, plan, 2), clip_of(v, plan, 2)), frames, 2, plan)
        for part, whole in zip(got, (k, v), strict=True):
            torch.testing.assert_close(part, whole[:, :, frames], atol=0, rtol=0)
        share = max(sum(plan.owner(frame) == rank for frame in frames) for rank in range(plan.ranks))
        size = share * (2 * 3 * 5 + 2 * 3 * 4) * k.element_size()
        alone = plan.ranks == 1 or not frames
        assert plan.traffic.calls == ({} if alone else {"gather": 1})
        assert plan.traffic.sent.get("gather", 0) == (0 if alone else size)
        assert plan.traffic.received.get("gather", 0) == (0 if alone else size * (plan.ranks - 1))
        assert torch.equal(gather_frames(clip_of(k, plan, 2), frames, 2, plan), got[0])


@pytest.mark.dist
@pytest.mark.parametrize("lengths", SPLITS, ids=str)
def test_every_rank_gets_the_frames_in_the_order_asked_for(lengths: tuple[int, ...]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        on_ranks(len(lengths), gathered, lengths, dtype)


def bytes_of_global_frames(mesh: DeviceMesh, frames: int, top_k: int) -> tuple[int, int]:
    plan = FramePlan.split(frames, mesh)
    k = torch.zeros(3, plan.length, 5)
    gather_frames((k, k), global_frames(frames, top_k), 1, plan)
    return plan.traffic.sent["gather"], plan.traffic.received["gather"]


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [2, 4])
def test_evenly_spread_frames_cost_their_share(ranks: int) -> None:
    sent, received = 2 * (8 // ranks) * 15 * 4, 2 * 8 * (ranks - 1) // ranks * 15 * 4
    assert on_ranks(ranks, bytes_of_global_frames, 24, 8) == [(sent, received)] * ranks


def gradient(mesh: DeviceMesh, lengths: tuple[int, ...]) -> None:
    plan = plan_of(mesh, lengths)
    frames = [plan.frames - 1, 0, 0]
    x, weight = torch.randn(2, plan.frames).double(), torch.randn(plan.ranks, 2, 3).double()
    whole = x.clone().requires_grad_()
    (whole[:, frames] ** 2 * weight.sum(0)).sum().backward()
    own = clip_of(x, plan, 1).requires_grad_()
    (gather_frames(own, frames, 1, plan) ** 2 * weight[plan.rank]).sum().backward()
    assert own.grad is not None and whole.grad is not None
    assert_close(own.grad, clip_of(whole.grad, plan, 1))


@pytest.mark.dist
@pytest.mark.parametrize("lengths", SPLITS[1:], ids=str)
def test_gradients_add_up_over_the_ranks(lengths: tuple[int, ...]) -> None:
    on_ranks(len(lengths), gradient, lengths)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="frames 0 to 3, got 4"):
        gather_frames(torch.zeros(1, 4), [4], 1, FramePlan((4,)))
    with pytest.raises(ValueError, match="clip of 4 frames, got 3"):
        gather_frames(torch.zeros(1, 3), [0], 1, FramePlan((4,)))
