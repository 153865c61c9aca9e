"""SLA against the formula of its code by hand, and what the general rules add: text, masks, ragged blocks."""

import copy
from typing import Any

import pytest
import torch
from sparse_formulas import sla_by_hand
from tolerances import TOLERANCE, assert_close
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from diffattn import SparseLinearAttention, TokenGrid, config
from diffattn.kernels.routed import gather
from diffattn.mechanisms.base import Context
from diffattn.mechanisms.hybrids.sla import SLAWeights
from diffattn.mechanisms.sequences import attend_sequence, reference_sequence
from diffattn.swap.context_parallel import check_mechanism

SMALL: dict[str, Any] = {"tile": 5, "query_tile": 7}
CONFIGS = {
    "all": SparseLinearAttention(top_share=0.3, **SMALL),
    "rest": SparseLinearAttention(top_share=0.3, over="rest", **SMALL),
    "elu": SparseLinearAttention(top_share=0.6, feature_map="elu", tile=4, query_tile=4),
    "relu, rest": SparseLinearAttention(top_share=0.5, feature_map="relu", over="rest", tile=3, query_tile=6),
}
GRIDS = [
    TokenGrid(5, 7),
    TokenGrid(4, 6, before=3),
    TokenGrid(3, 5, frames=3, after=2),
    TokenGrid(1, 3),
    TokenGrid(1, 1),
]


def inputs(grid: TokenGrid, dtype: torch.dtype = torch.float64, d: int = 8) -> list[Tensor]:
    return [torch.randn(2, 3, grid.tokens, d, dtype=torch.float64).to(dtype).requires_grad_() for _ in range(3)]


def weights_of(mechanism: SparseLinearAttention, dtype: torch.dtype = torch.float64, d: int = 8) -> SLAWeights:
    weights = mechanism.weights(3, d)
    for parameter in weights.parameters():
        nn.init.normal_(parameter)
    return weights.to(dtype)


def check_against_reference(
    mechanism: SparseLinearAttention, grid: TokenGrid, dtype: torch.dtype = torch.float64, mask: Tensor | None = None
) -> None:
    fast = inputs(grid, dtype)
    slow = [tensor.detach().double().requires_grad_() for tensor in fast]
    weights = weights_of(mechanism, dtype)
    other = copy.deepcopy(weights).double()
    got = mechanism.attend(*fast, grid, context=Context(mask=mask, weights=weights))
    want = mechanism.reference(*slow, grid, context=Context(mask=mask, weights=other))
    assert got.dtype == dtype
    assert_close(got, want)
    cotangent = torch.randn(got.shape, dtype=dtype)
    got.backward(cotangent)
    want.backward(cotangent.double())
    for one, two in zip([*fast, *weights.parameters()], [*slow, *other.parameters()], strict=True):
        found = torch.zeros_like(one) if one.grad is None else one.grad
        wanted = torch.zeros_like(two) if two.grad is None else two.grad
        assert (found - wanted).abs().max() / wanted.abs().max().clamp(min=1) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_reference(name: str, grid: TokenGrid) -> None:
    check_against_reference(CONFIGS[name], grid)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["all", "rest"])
def test_equals_the_reference_in_lower_precision(name: str, dtype: torch.dtype) -> None:
    check_against_reference(CONFIGS[name], TokenGrid(5, 7, before=2, after=1), dtype)


@pytest.mark.parametrize("kind", ["bool", "additive", "without axes", "all hidden"])
@pytest.mark.parametrize("name", ["all", "rest"])
def test_equals_the_reference_under_a_mask(name: str, kind: str) -> None:
    grid = TokenGrid(5, 4, frames=2, before=6)
    visible = torch.rand(2, 1, 1, grid.tokens) > 0.3
    masks = {
        "bool": visible,
        "additive": torch.randn(2, 3, 1, grid.tokens, dtype=torch.float64),
        "without axes": visible[0, 0, 0],
        "all hidden": torch.zeros_like(visible),
    }
    check_against_reference(CONFIGS[name], grid, mask=masks[kind])


@pytest.mark.parametrize("name", ["all", "rest"])
def test_small_strips_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mechanism, grid = CONFIGS[name], TokenGrid(5, 7, before=2)
    q, k, v = inputs(grid, torch.float32)
    context = Context(weights=weights_of(mechanism, torch.float32))
    want = mechanism.attend(q, k, v, grid, context=context)
    assert_close(mechanism.attend(q, k, v, grid, context=context, backend="dense"), want)
    monkeypatch.setattr(gather, "STRIP", {"cpu": 1})
    monkeypatch.setattr(gather, "GATHERED", {"cpu": 1})
    assert_close(mechanism.attend(q, k, v, grid, context=context), want)


# What its authors compute


@pytest.mark.parametrize("name", CONFIGS)
def test_the_formula_by_hand(name: str) -> None:
    mechanism, grid = CONFIGS[name], TokenGrid(4, 7, frames=2)
    q, k, v = (tensor.detach() for tensor in inputs(grid))
    weights = weights_of(mechanism)
    want = sla_by_hand(
        q, k, v, weights.proj_l.weight.detach(), weights.proj_l.bias.detach(), share=mechanism.top_share,
        asking=mechanism.query_tile, tile=mechanism.tile, over=mechanism.over, phi=mechanism.feature_map,
    )  # fmt: skip
    assert_close(mechanism.attend(q, k, v, grid, context=Context(weights=weights)), want)


def test_the_published_blocks_by_hand() -> None:
    """128 queries and 64 keys; 300 tokens are five blocks of keys, the last of 44, of which int(0.5 * 5) are chosen."""
    mechanism, grid = SparseLinearAttention(top_share=0.5), TokenGrid(6, 10, frames=5)
    q, k, v = (tensor[:1, :1].detach() for tensor in inputs(grid, torch.float32, d=16))
    weights = weights_of(mechanism, torch.float32, d=16)
    want = sla_by_hand(
        *(x.double() for x in (q, k, v, weights.proj_l.weight.detach(), weights.proj_l.bias.detach())), share=0.5
    )
    assert_close(mechanism.attend(q, k, v, grid, context=Context(weights=weights)), want)


@pytest.mark.parametrize(("share", "tokens", "count"), [(0.1, 32760, 51), (0.1, 300, 1), (0.15, 1280, 3), (1, 64, 1)])
def test_a_share_is_rounded_down_to_one_block_at_least(share: float, tokens: int, count: int) -> None:
    assert SparseLinearAttention(top_share=share).part.exact_tiles(TokenGrid(1, tokens)) == count


def test_with_all_blocks_it_is_softmax_and_the_projected_linear_attention() -> None:
    mechanism, grid = SparseLinearAttention(top_share=1, **SMALL), TokenGrid(5, 6)
    q, k, v = inputs(grid)
    weights = weights_of(mechanism)
    f, g = q.softmax(-1), k.softmax(-1)
    linear = f @ (g.mT @ v) / (1e-5 + f @ g.sum(-2)[..., None])
    dense = F.scaled_dot_product_attention(q, k, v)
    assert_close(mechanism.attend(q, k, v, grid, context=Context(weights=weights)), dense + weights.proj_l(linear))
    rest = SparseLinearAttention(top_share=1, over="rest", **SMALL)
    assert_close(rest.attend(q, k, v, grid, context=Context(weights=weights)), dense)


def test_before_training_what_is_not_chosen_is_not_seen() -> None:
    mechanism, grid = CONFIGS["all"], TokenGrid(4, 7, frames=2)
    q, k, v = (tensor.detach() for tensor in inputs(grid))
    zero = torch.zeros(8, 8, dtype=torch.float64)
    want = sla_by_hand(q, k, v, zero, zero[0], share=0.3, asking=7, tile=5)
    fresh = mechanism.weights(3, 8)
    assert_close(mechanism.attend(q, k, v, grid, context=Context(weights=fresh)), want)
    assert_close(mechanism.attend(q, k, v, grid), want)
    assert not mechanism.approximates


def test_the_fresh_projection_learns_and_takes_no_random_numbers() -> None:
    mechanism, grid = CONFIGS["all"], TokenGrid(5, 7)
    state = torch.get_rng_state()
    weights = mechanism.weights(3, 8).double()
    assert torch.equal(torch.get_rng_state(), state)
    mechanism.attend(*inputs(grid), grid, context=Context(weights=weights)).square().sum().backward()
    assert all(own.grad is not None and own.grad.abs().max() > 0 for own in weights.parameters())
    assert {name: tuple(own.shape) for name, own in weights.named_parameters()} == {
        "proj_l.weight": (8, 8),
        "proj_l.bias": (8,),
    }


# What the general rules add


def test_text_is_seen_and_sees_all_and_is_in_no_block() -> None:
    mechanism, grid = CONFIGS["all"], TokenGrid(5, 7, before=4, after=2)
    q, k, v = (tensor.detach() for tensor in inputs(grid))
    context = Context(weights=weights_of(mechanism))
    out = mechanism.attend(q, k, v, grid, context=context)
    dense = F.scaled_dot_product_attention(q, k, v)
    assert_close(out[:, :, :4], dense[:, :, :4])
    assert_close(out[:, :, -2:], dense[:, :, -2:])
    cells = [tensor[:, :, grid.cell_slice] for tensor in (q, k, v)]
    alone = TokenGrid(5, 7)
    assert torch.equal(mechanism.choose(q, k, v, grid), mechanism.choose(*cells, alone))
    more = out[:, :, 4:-2] - mechanism.attend(q, k, v, grid)[:, :, 4:-2]
    assert_close(more, mechanism.attend(*cells, alone, context=context) - mechanism.attend(*cells, alone))


def test_hidden_keys_are_as_if_they_were_not_there() -> None:
    """Whole blocks hidden: the choice among the others is that without them."""
    mechanism, grid = SparseLinearAttention(top_share=0.5, tile=3, query_tile=15), TokenGrid(1, 15)
    q, k, v = (tensor.detach() for tensor in inputs(grid))
    visible = torch.arange(15) % 15 < 9
    context = Context(weights=weights_of(mechanism))
    out = mechanism.attend(q, k, v, grid, context=Context(mask=visible, weights=context.weights))
    fewer = SparseLinearAttention(top_share=0.7, tile=3, query_tile=15)  # two of three as two of five
    kept = fewer.attend(*(x[:, :, :9] for x in (q, k, v)), TokenGrid(1, 9), context=context)
    chosen = mechanism.choose(q, k, v, grid, context=Context(mask=visible))
    assert chosen.max() < 3
    q = q.clone()
    q[:, :, 9:] = q[:, :, :9].mean(2, keepdim=True)  # the mean query is that of the shorter sequence
    out = mechanism.attend(q, k, v, grid, context=Context(mask=visible, weights=context.weights))
    assert_close(out[:, :, :9], kept)


def test_silent_tokens_and_several_grids() -> None:
    mechanism = CONFIGS["rest"]
    context = Context(weights=weights_of(mechanism))
    silent = TokenGrid(4, 5, before=3, after=2, silent=(3, 1))
    q, k, v = inputs(silent)
    asking = q[:, :, silent.query_slice]
    assert_close(
        attend_sequence(mechanism, asking, k, v, [silent], context=context),
        reference_sequence(mechanism, asking, k, v, [silent], context=context),
    )
    grids = [TokenGrid(3, 4, before=2, after=10), TokenGrid(2, 5, before=14)]
    q, k, v = inputs(grids[0])
    assert_close(
        attend_sequence(mechanism, q, k, v, grids, context=context),
        reference_sequence(mechanism, q, k, v, grids, context=context),
    )


def test_one_projection_for_all_heads_can_be_split_among_ranks() -> None:
    mechanism = CONFIGS["all"]
    check_mechanism(mechanism, mechanism.weights(4, 8), torch.empty(1, 4, 9, 8), 2)


@pytest.mark.parametrize("name", ["all", "rest"])
def test_operations_are_those_computed(name: str) -> None:
    mechanism, grid = SparseLinearAttention(top_share=0.5, tile=8, query_tile=16, over=name), TokenGrid(8, 8)
    q, k, v = (tensor[:1].detach() for tensor in inputs(grid, torch.float32))
    counts = []
    for weights in (None, mechanism.weights(3, 8)):
        with FlopCounterMode(display=False) as counter:
            mechanism.attend(q, k, v, grid, context=Context(weights=weights))
        counts.append(counter.get_total_flops())
    assert mechanism.flops(grid, 3, 8) - mechanism.part.flops(grid, 3, 8) == counts[1] - counts[0]
    assert mechanism.part.flops(grid, 3, 8) == (4 * 64 * 4 * 8 + 2 * 4 * 8) * 3 * 8  # four of eight blocks


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_share": 0}, "top_share must be a number above 0 and at most 1"),
        ({"tile": 0}, "tile must be an int of at least 1"),
        ({"over": "some"}, "over must be one of all, rest"),
        ({"feature_map": "learned"}, "feature_map must be one of softmax, elu, relu"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseLinearAttention(**options)


def test_wrong_calls_and_json() -> None:
    grid, mechanism = TokenGrid(3, 4), CONFIGS["all"]
    q, k, v = inputs(grid)
    with pytest.raises(ValueError, match="a mask must be the same for all of them"):
        mechanism.attend(q, k, v, grid, context=Context(mask=torch.ones(12, 12, dtype=torch.bool)))
    with pytest.raises(ValueError, match=r"sla: Context\.weights must come from .* got a Linear"):
        mechanism.attend(q, k, v, grid, context=Context(weights=nn.Linear(1, 1)))
    for own in CONFIGS.values():
        assert config.from_json(config.to_json(own)) == own
        assert config.from_text(str(own)) == own
