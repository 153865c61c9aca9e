"""What is special about channel attention: the definition by hand, groups, masks, and what it refuses."""

import math

import pytest
import torch
from tolerances import TOLERANCE, assert_close
from torch import Tensor

from diffattn import ChannelAttention, SoftmaxAttention, TokenGrid
from diffattn.mechanisms.base import Context
from diffattn.mechanisms.sequences import attend_sequence, reference_sequence


def inputs(tokens: int, dtype: torch.dtype = torch.float64, channels: int = 8) -> list[Tensor]:
    return [torch.randn(2, 3, tokens, channels, dtype=torch.float64).to(dtype) for _ in range(3)]


def by_hand(q: Tensor, k: Tensor, v: Tensor, groups: int, divisor: float) -> Tensor:
    """Transposed attention of each group of channels: rows of Q^T are the queries, rows of V^T the values."""
    size = q.shape[-1] // groups
    parts = []
    for first in range(0, q.shape[-1], size):
        asking, keys, values = (x[..., first : first + size].mT for x in (q, k, v))
        parts.append((torch.softmax(asking @ keys.mT / math.sqrt(divisor), -1) @ values).mT)
    return torch.cat(parts, -1)


@pytest.mark.parametrize(
    "grid", [TokenGrid(5, 7, before=3), TokenGrid(2, 3, frames=4, after=2), TokenGrid(1, 1)], ids=str
)
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_definition(grid: TokenGrid, groups: int) -> None:
    q, k, v = inputs(grid.tokens)
    published = ChannelAttention(groups=groups)
    assert_close(published.attend(q, k, v, grid), by_hand(q, k, v, groups, 8 / groups))
    by_tokens = ChannelAttention(groups=groups, scale_by="tokens")
    assert_close(by_tokens.attend(q, k, v, grid), by_hand(q, k, v, groups, grid.tokens))
    for mechanism in (published, by_tokens):  # the scale that most models give is the default
        given = mechanism.attend(q, k, v, grid, scale=8**-0.5)
        assert_close(given, mechanism.attend(q, k, v, grid))
        assert_close(given, mechanism.reference(q, k, v, grid))


def test_one_channel_a_group_gives_the_values() -> None:
    q, k, v = inputs(20)
    assert_close(ChannelAttention(groups=8).attend(q, k, v, TokenGrid(4, 5)), v)


def test_it_does_not_move_what_is_at_a_token() -> None:
    """A token's output is made of its own value alone; its query and key are in all outputs."""
    grid = TokenGrid(4, 5, before=2)
    q, k, v = inputs(grid.tokens)
    out = ChannelAttention().attend(q, k, v, grid)
    other = v.clone()
    other[:, :, 7] += 1
    same = torch.arange(grid.tokens) != 7
    assert_close(ChannelAttention().attend(q, k, other, grid)[:, :, same], out[:, :, same])
    other = k.clone()
    other[:, :, 7] *= -1
    assert not torch.isclose(ChannelAttention().attend(q, other, v, grid), out).all(-1).any()


@pytest.mark.parametrize("options", [{}, {"groups": 2}, {"scale_by": "tokens"}, {"scale_by": "tokens", "groups": 4}])
def test_hidden_tokens_are_left_out_of_the_sums(options) -> None:
    grid = TokenGrid(3, 4, before=5)
    q, k, v = inputs(grid.tokens)
    mask = torch.ones(2, 1, 1, grid.tokens, dtype=torch.bool)
    mask[1, ..., 1:4] = False
    mechanism = ChannelAttention(**options)
    out = mechanism.attend(q, k, v, grid, context=Context(mask=mask))
    shorter, kept = TokenGrid(3, 4, before=2), mask[1, 0, 0]
    want = mechanism.attend(*(x[1:, :, kept] for x in (q, k, v)), shorter)
    assert_close(out[1:, :, kept], want)
    assert_close(out[:1], mechanism.attend(*(x[:1] for x in (q, k, v)), grid))
    additive = torch.randn(2, 1, 1, grid.tokens, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    out = mechanism.attend(q, k, v, grid, context=Context(mask=additive))
    assert_close(out, mechanism.reference(q, k, v, grid, context=Context(mask=additive)))
    assert_close(out, mechanism.attend(q, k, v, grid, context=Context(mask=additive + 3)))


@pytest.mark.parametrize("scale_by", ["channels", "tokens"])
def test_where_all_is_hidden_channels_have_their_mean(scale_by) -> None:
    grid = TokenGrid(3, 4)
    q, k, v = inputs(12)
    for mask in (torch.zeros(12, dtype=torch.bool), torch.full((12,), -torch.inf, dtype=torch.float64)):
        out = ChannelAttention(scale_by=scale_by).attend(q, k, v, grid, context=Context(mask=mask))
        assert_close(out, v.mean(-1, keepdim=True).expand_as(v))


@pytest.mark.parametrize("options", [{}, {"groups": 2, "scale_by": "tokens"}])
def test_tokens_that_do_not_ask_are_in_no_sum(options) -> None:
    grid = TokenGrid(4, 3, before=3, after=2, silent=(3, 1))
    q, k, v = inputs(grid.tokens)
    asking = q[:, :, grid.query_slice]
    mechanism, mask = ChannelAttention(**options), torch.rand(2, 1, 1, grid.tokens) > 0.3
    for context in (Context(), Context(mask=mask)):
        out = attend_sequence(mechanism, asking, k, v, [grid], context=context)
        assert_close(out, reference_sequence(mechanism, asking, k, v, [grid], context=context))
    out = attend_sequence(mechanism, asking, k, v, [grid])
    own = TokenGrid(4, 3, after=1)
    assert_close(out, mechanism.attend(asking, k[:, :, grid.query_slice], v[:, :, grid.query_slice], own))
    assert mechanism.flops(grid, 3, 8) == 2 * (13 + 17) * 3 * 8 * 8 // mechanism.groups


def test_long_sums_of_half_precision() -> None:
    """Taken in float32: 9,216 products of bfloat16 would lose most of them. `scale_by="tokens"` keeps them small."""
    grid = TokenGrid(96, 96)
    q, k, v = inputs(grid.tokens, torch.bfloat16)
    for mechanism in (ChannelAttention(), ChannelAttention(scale_by="tokens")):
        with torch.autocast("cpu", torch.bfloat16):
            out = mechanism.attend(q, k, v, grid)
        want = mechanism.attend(q.double(), k.double(), v.double(), grid)
        assert out.dtype == torch.bfloat16 and (out - want).abs().max() < TOLERANCE[torch.bfloat16] * want.abs().max()

    def sharpest(mechanism: ChannelAttention) -> float:
        channels = torch.eye(8)[None, None].repeat(1, 1, grid.tokens // 8, 1)
        return mechanism.attend(q[:1, :1].float(), k[:1, :1].float(), channels, grid).amax(-2).median().item()

    assert sharpest(ChannelAttention()) > 0.9 > 0.6 > sharpest(ChannelAttention(scale_by="tokens"))


def test_the_cost_grows_with_the_tokens_alone() -> None:
    small, large = TokenGrid(16, 16), TokenGrid(64, 64)
    assert ChannelAttention().flops(large, 4, 64) == 16 * ChannelAttention().flops(small, 4, 64)
    assert ChannelAttention(groups=4).flops(large, 4, 64) * 4 == ChannelAttention().flops(large, 4, 64)
    assert ChannelAttention().flops(large, 4, 64) == SoftmaxAttention().flops(large, 4, 64) * 64 // large.tokens


def test_what_it_refuses() -> None:
    grid = TokenGrid(3, 4)
    q, k, v = inputs(12)
    with pytest.raises(ValueError, match="as many, got 8 and 5; leave such layers out"):
        ChannelAttention().attend(q, k, v[..., :5], grid)
    with pytest.raises(ValueError, match="groups=3 must divide the 8 channels of a head; use another number"):
        ChannelAttention(groups=3).attend(q, k, v, grid)
    mask = torch.ones(1, 1, 12, 12, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"channel: .*mask must be the same.*got \(1, 1, 12, 12\); leave layers"):
        ChannelAttention().attend(q, k, v, grid, context=Context(mask=mask))
    for options, message in (
        ({"groups": 0}, "groups must be an int of at least 1, got 0"),
        ({"groups": 2.0}, "groups must be an int of at least 1, got 2.0"),
        ({"scale_by": "mean"}, "scale_by must be 'channels' or 'tokens', got 'mean'"),
    ):
        with pytest.raises(ValueError, match=message):
            ChannelAttention(**options)
    with pytest.raises(NotImplementedError):
        ChannelAttention().mask(grid)
