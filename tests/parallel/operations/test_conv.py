"""Convolutions along the frames."""

import pytest
import torch
from clip_splits import SPLITS, clip_of, plan_of
from parallel_ranks import on_ranks
from tolerances import assert_close
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from diffattn.parallel.operations.conv import halo_conv, padded_layer


def convolved(mesh: DeviceMesh, lengths: tuple[int, ...], kernel: int, dilation: int) -> None:
    plan = plan_of(mesh, lengths)
    halo = kernel // 2 * dilation
    conv = nn.Conv3d(3, 4, (kernel, 1, 1), padding=(halo, 0, 0), dilation=(dilation, 1, 1)).double()
    x, loss = torch.randn(2, 3, plan.frames, 3, 2).double(), torch.randn(2, 4, plan.frames, 3, 2).double()
    whole, own = x.clone().requires_grad_(), clip_of(x, plan, 2).requires_grad_()
    want, got = conv(whole), halo_conv(own, conv, plan, halo)
    assert_close(got, clip_of(want, plan, 2))
    if plan.ranks > 2 and plan.rank == 1 and min(plan.lengths) >= halo:
        assert plan.traffic.sent == {"conv": 2 * halo * 2 * 3 * 6 * 8}
    (want * loss).sum().backward()
    (got * clip_of(loss, plan, 2)).sum().backward()
    assert own.grad is not None and whole.grad is not None
    assert_close(own.grad, clip_of(whole.grad, plan, 2))


@pytest.mark.dist
@pytest.mark.parametrize("lengths", SPLITS, ids=str)
@pytest.mark.slow
def test_it_is_the_convolution_of_the_whole(lengths: tuple[int, ...]) -> None:
    for kernel, dilation in ((3, 1), (5, 1), (3, 2)):
        on_ranks(len(lengths), convolved, lengths, kernel, dilation)


def padded(mesh: DeviceMesh, lengths: tuple[int, ...], halo: int) -> None:
    plan = plan_of(mesh, lengths)
    x = torch.randn(2, 3, plan.frames, 2)
    layer = nn.GroupNorm(3, 3)  # not zero at zeros, and sees all frames
    zeros = x.new_zeros(2, 3, halo, 2)
    around = torch.cat([zeros, x, zeros], dim=2)[:, :, plan.own.start : plan.own.stop + 2 * halo]
    assert_close(padded_layer(clip_of(x, plan, 2), layer, plan, halo), layer(around)[:, :, halo : halo + plan.length])


@pytest.mark.dist
@pytest.mark.parametrize("lengths", SPLITS, ids=str)
def test_a_padded_layer_sees_its_halo_and_zeros_beyond_the_ends(lengths: tuple[int, ...]) -> None:
    for halo in (1, 4):
        on_ranks(len(lengths), padded, lengths, halo)
