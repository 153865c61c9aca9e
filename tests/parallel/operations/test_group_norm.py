"""GroupNorm over all frames of a video, some on each rank."""

import pytest
import torch
from clip_splits import SPLITS, clip_of, plan_of
from parallel_ranks import on_ranks
from tolerances import assert_close
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

from diffattn.parallel.operations.group_norm import distributed_group_norm, merge_moments
from diffattn.parallel.operations.shares import FramePlan


def normalised(mesh: DeviceMesh, lengths: tuple[int, ...]) -> None:
    plan = plan_of(mesh, lengths)
    x = torch.randn(2, 6, plan.frames, 3, 2) + 5 * torch.randn(2, 6, plan.frames, 1, 1)  # frames that differ
    weight, bias, loss = torch.randn(6), torch.randn(6), torch.randn(x.shape)
    for scale, offset in ((1.0, 0.0), (1e-2, 30.0)):
        whole, own = (scale * x + offset).requires_grad_(), clip_of(scale * x + offset, plan, 2).requires_grad_()
        want = F.group_norm(whole.double(), 3, weight.double(), bias.double(), 1e-5)
        plan.traffic.reset()
        got = distributed_group_norm(own, 3, weight, bias, 1e-5, plan)
        torch.testing.assert_close(got.double(), clip_of(want, plan, 2), atol=2e-5 if offset == 0 else 2e-3, rtol=0)
        if plan.ranks > 1:
            assert (plan.traffic.calls, plan.traffic.sent) == ({"norm": 1}, {"norm": 2 * 2 * 3 * 4})
        if offset:  # torch's own gradients are far off there
            continue
        (want * loss).sum().backward()
        (got * clip_of(loss, plan, 2)).sum().backward()
        assert own.grad is not None and whole.grad is not None
        torch.testing.assert_close(own.grad, clip_of(whole.grad, plan, 2), atol=2e-4, rtol=2e-3)
    plain = distributed_group_norm(clip_of(x, plan, 2), 3, None, None, 1e-5, plan)
    assert_close(plain, clip_of(F.group_norm(x.double(), 3), plan, 2))
    half = distributed_group_norm(clip_of(x, plan, 2).bfloat16(), 3, weight, bias, 1e-5, plan)
    assert half.dtype == torch.bfloat16
    want = F.group_norm(x.bfloat16().double(), 3, weight.double(), bias.double())
    torch.testing.assert_close(half.double(), clip_of(want, plan, 2), atol=2e-2, rtol=1e-2)
    first = distributed_group_norm(clip_of(x, plan, 2).movedim(2, -1), 3, weight, bias, 1e-5, plan, dim=-1)
    assert_close(first, clip_of(F.group_norm(x.double(), 3, weight.double(), bias.double()), plan, 2).movedim(2, -1))


@pytest.mark.dist
@pytest.mark.parametrize("lengths", SPLITS, ids=str)
def test_it_is_the_group_norm_of_the_whole(lengths: tuple[int, ...]) -> None:
    on_ranks(len(lengths), normalised, lengths)


def test_merged_moments_are_those_of_everything() -> None:
    parts = [torch.randn(5, 2).double() + 3 * i for i in range(3)] + [torch.randn(1, 2).double()]
    moments = torch.stack([torch.stack([x.mean(0), ((x - x.mean(0)) ** 2).sum(0)]) for x in parts])
    mean, m2 = merge_moments(moments, [len(x) for x in parts])
    whole = torch.cat(parts)
    assert_close(mean, whole.mean(0))
    assert_close(m2, ((whole - whole.mean(0)) ** 2).sum(0))


def test_a_clip_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="clip of 4 frames, got 3"):
        distributed_group_norm(torch.zeros(1, 2, 3), 1, None, None, 1e-5, FramePlan((4,)))
