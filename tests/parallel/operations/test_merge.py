"""Attention to all keys from that to parts of them."""

import pytest
import torch
from clip_splits import SPLITS, clip_of, plan_of
from parallel_ranks import on_ranks
from tolerances import assert_close
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

from diffattn.parallel.operations import merge as merge_module
from diffattn.parallel.operations.merge import merge_attention, merge_over_ranks, partial_attention


def qkv(keys: int = 11) -> tuple[torch.Tensor, ...]:
    return torch.randn(2, 3, 5, 4), torch.randn(2, 3, keys, 4), torch.randn(2, 3, keys, 6)


@pytest.mark.parametrize("cuts", [[11], [4, 7], [1, 0, 9, 1], [0, 11]])
def test_parts_merge_into_the_whole(cuts: list[int]) -> None:
    q, k, v = qkv()
    mask = torch.rand(2, 1, 5, 11) < 0.7
    mask[..., 3] = True
    parts = [
        partial_attention(q, part_k, part_v, scale=0.7, mask=part_mask)
        for part_k, part_v, part_mask in zip(k.split(cuts, 2), v.split(cuts, 2), mask.split(cuts, 3), strict=True)
    ]
    out, lse = merge_attention(parts)
    assert_close(out, F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.7))
    assert_close(lse, (q @ k.mT * 0.7).masked_fill(~mask, -torch.inf).logsumexp(-1))


def test_chunks_of_keys_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = qkv()
    bias = torch.randn(1, 1, 5, 11)
    want = partial_attention(q, k, v, scale=0.7, mask=bias)
    monkeypatch.setattr(merge_module, "KEY_CHUNK", 4)
    for got, whole in zip(partial_attention(q, k, v, scale=0.7, mask=bias), want, strict=True):
        assert_close(got, whole)


def test_a_query_without_any_key_gets_zeros() -> None:
    q, k, v = qkv()
    nothing = partial_attention(q, k[:, :, :0], v[:, :, :0], scale=1.0)
    hidden = partial_attention(q, k, v, scale=1.0, mask=torch.zeros(1, 1, 1, 11, dtype=torch.bool))
    out, lse = merge_attention([nothing, hidden])
    assert torch.equal(out, torch.zeros_like(out)) and bool((lse == -torch.inf).all())


def test_large_logits_do_not_overflow() -> None:
    q, k, v = qkv()
    parts = [partial_attention(q, k[:, :, part], v[:, :, part], scale=500.0) for part in (slice(0, 4), slice(4, 11))]
    assert_close(merge_attention(parts)[0], F.scaled_dot_product_attention(q, k, v, scale=500.0))


def over_ranks(mesh: DeviceMesh, lengths: tuple[int, ...]) -> torch.Tensor:
    plan = plan_of(mesh, lengths)
    q, k, v = (x.double() for x in qkv(plan.frames))
    whole = [x.clone().requires_grad_() for x in (q, k, v)]
    want = F.scaled_dot_product_attention(*whole, scale=0.7)
    own = [x.clone().requires_grad_() for x in (q, clip_of(k, plan, 2), clip_of(v, plan, 2))]
    out, lse = partial_attention(*own, scale=0.7)
    got = merge_over_ranks(out, lse, plan)
    torch.testing.assert_close(got.double(), want, atol=2e-6, rtol=0)
    if plan.ranks > 1:
        size = 2 * 3 * 5 * 7 * 4
        assert (plan.traffic.sent, plan.traffic.received) == ({"merge": size}, {"merge": size * (plan.ranks - 1)})
    loss = torch.randn(want.shape).double()
    (want * loss).sum().backward()
    (got * loss / plan.ranks).sum().backward()  # every rank has the same output
    for i in (1, 2):
        torch.testing.assert_close(own[i].grad, clip_of(whole[i].grad, plan, 2), atol=2e-6, rtol=0)
    return got.detach()


@pytest.mark.dist
@pytest.mark.parametrize("lengths", SPLITS, ids=str)
def test_all_ranks_get_the_same_output(lengths: tuple[int, ...]) -> None:
    first, *others = on_ranks(len(lengths), over_ranks, lengths)
    assert all(torch.equal(first, other) for other in others)
