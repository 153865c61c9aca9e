"""The frames around a clip, from as many ranks as it takes."""

import pytest
import torch
from clip_splits import SPLITS, clip_of, plan_of
from parallel_ranks import on_ranks
from tolerances import assert_close
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from diffattn.parallel.operations.halo import halo_exchange, pad_frames
from diffattn.parallel.operations.shares import FramePlan

HALOS = [(0, 0), (1, 1), (3, 0), (0, 2), (4, 5), (40, 40)]


def windows(mesh: DeviceMesh, lengths: tuple[int, ...], dim: int, dtype: torch.dtype) -> None:
    plan = plan_of(mesh, lengths)
    shape = [2, 3, 2]
    shape.insert(dim % 4, plan.frames)
    k, v = torch.randn(shape).to(dtype), torch.randn(*shape, 2).to(dtype)
    for left, right in HALOS:
        own_k, own_v = clip_of(k, plan, dim), clip_of(v, plan, dim % 4)
        plan.traffic.reset()
        (got_k, got_v), frames = halo_exchange((own_k, own_v), left, right, dim % 4, plan)
        assert frames == plan.window(left, right)
        for got, whole in ((got_k, k), (got_v, v)):
            torch.testing.assert_close(got, whole.narrow(dim % 4, frames.start, len(frames)), atol=0, rtol=0)
        alone, _ = halo_exchange(own_k, left, right, dim, FramePlan(plan.lengths, plan.rank, plan.group))
        assert torch.equal(alone, got_k)
        size = k.element_size() * (k.numel() + v.numel()) // plan.frames
        needed = sum(len(set(plan.window(left, right, r)) & set(plan.own)) for r in range(plan.ranks) if r != plan.rank)
        assert plan.traffic.sent.get("halo", 0) == size * needed
        assert plan.traffic.received.get("halo", 0) == size * (len(frames) - plan.length)


@pytest.mark.dist
@pytest.mark.parametrize("lengths", SPLITS, ids=str)
def test_a_window_holds_the_frames_of_the_whole(lengths: tuple[int, ...]) -> None:
    for dim, dtype in ((0, torch.float32), (2, torch.float32), (-1, torch.float32), (1, torch.bfloat16)):
        on_ranks(len(lengths), windows, lengths, dim, dtype)


def bytes_of_an_inner_rank(mesh: DeviceMesh, frames: int, padding: int) -> tuple[int, int, int]:
    plan = FramePlan.split(frames, mesh)
    k = torch.zeros(2, 3, plan.length, 4)
    halo_exchange((k, k), padding, padding, 2, plan)
    return plan.traffic.sent["halo"], plan.traffic.received["halo"], plan.traffic.calls["halo"]


@pytest.mark.dist
def test_an_inner_rank_sends_four_paddings_of_keys_whatever_the_length() -> None:
    for frames in (9, 30):
        assert on_ranks(3, bytes_of_an_inner_rank, frames, 3)[1] == (4 * 3 * 4 * 24, 4 * 3 * 4 * 24, 1)


def gradient(mesh: DeviceMesh, lengths: tuple[int, ...], left: int, right: int) -> list[Tensor]:
    plan = plan_of(mesh, lengths)
    xs = [torch.randn(2, plan.frames, 3, dtype=torch.float64) for _ in range(2)]
    weights = [torch.randn(plan.ranks, 2, plan.frames, 3, dtype=torch.float64) for _ in range(2)]
    whole = [x.clone().requires_grad_() for x in xs]
    windows = [plan.window(left, right, rank) for rank in range(plan.ranks)]
    for x, weight in zip(whole, weights, strict=True):
        sum(
            (x[:, w.start : w.stop] ** 2 * weight[r, :, w.start : w.stop]).sum() for r, w in enumerate(windows)
        ).backward()
    own = [clip_of(x, plan, 1).requires_grad_() for x in xs]
    parts, w = halo_exchange(own, left, right, 1, plan)
    sum((p**2 * g[plan.rank, :, w.start : w.stop]).sum() for p, g in zip(parts, weights, strict=True)).backward()
    for x, part in zip(whole, own, strict=True):
        assert_close(part.grad, clip_of(x.grad, plan, 1))
    return [x.grad for x in own]


@pytest.mark.dist
@pytest.mark.parametrize("lengths", SPLITS[1:], ids=str)
def test_gradients_come_back_from_every_rank_that_had_a_frame(lengths: tuple[int, ...]) -> None:
    for left, right in ((1, 1), (3, 0), (5, 5)):
        on_ranks(len(lengths), gradient, lengths, left, right)


def test_zeros_stand_for_frames_beyond_the_ends() -> None:
    x = torch.ones(2, 3, 4)
    padded = pad_frames(x, range(0, 3), range(-2, 4), 1)
    assert padded.shape == (2, 6, 4)
    assert padded[0, :, 0].tolist() == [0, 0, 1, 1, 1, 0]
    assert torch.equal(pad_frames(x, range(0, 3), range(-2, 4), -2), padded)
    assert pad_frames(x, range(3), range(3), 1) is x


def test_what_does_not_fit_is_refused() -> None:
    plan = FramePlan((4,))
    x = torch.zeros(1, 4)
    with pytest.raises(ValueError, match="clip of 4 frames, got 3"):
        halo_exchange(x[:, :3], 1, 1, 1, plan)
    with pytest.raises(ValueError, match="need one dtype"):
        halo_exchange((x, x.double()), 1, 1, 1, plan)
    with pytest.raises(ValueError, match="left=-1"):
        halo_exchange(x, -1, 1, 1, plan)
    with pytest.raises(ValueError, match="need a process group"):
        halo_exchange(x, 1, 1, 1, FramePlan((4, 4)))


def test_one_rank_alone_gets_its_own_tensors() -> None:
    x = torch.zeros(1, 4)
    window, frames = halo_exchange(x, 2, 2, 1, FramePlan((4,)))
    assert window is x and frames == range(4)
