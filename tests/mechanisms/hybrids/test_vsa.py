"""VSA against the formula of its code by hand, and what the general rules add: text, masks, ragged cubes."""

import copy
from typing import Any

import pytest
import torch
from sparse_formulas import vsa_by_hand
from tolerances import TOLERANCE, assert_close
from torch import Tensor, nn
from torch.nn import functional as F

from diffattn import PerHeadAttention, TokenGrid, VideoSparseAttention, config
from diffattn.kernels.routed import gather
from diffattn.mechanisms.base import Context
from diffattn.mechanisms.hybrids.vsa import VSAWeights
from diffattn.mechanisms.sequences import attend_sequence, reference_sequence

CONFIGS = {
    "cubes": VideoSparseAttention(top_share=0.3, tile=2),
    "boxes": VideoSparseAttention(top_share=0.5, tile=(2, 3, 4)),
    "all": VideoSparseAttention(top_share=1, tile=2),
    "other channels": VideoSparseAttention(tile=(1, 2, 3), channels=11),
}
GRIDS = [
    TokenGrid(5, 7),
    TokenGrid(4, 6, before=3),
    TokenGrid(3, 5, frames=5, before=1, after=2),
    TokenGrid(1, 13),
    TokenGrid(1, 1),
]


def inputs(mechanism: VideoSparseAttention, grid: TokenGrid, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Queries, keys, values and hidden states."""
    shapes = [(2, 3, grid.tokens, 8)] * 3 + [(2, grid.tokens, mechanism.channels or 24)]
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def weights_of(mechanism: VideoSparseAttention, dtype: torch.dtype = torch.float64) -> VSAWeights:
    weights = mechanism.weights(3, 8)
    for parameter in weights.parameters():
        nn.init.normal_(parameter, std=0.3)
    return weights.to(dtype)


def check_against_reference(
    mechanism: VideoSparseAttention, grid: TokenGrid, dtype: torch.dtype = torch.float64, mask: Tensor | None = None
) -> None:
    fast = inputs(mechanism, grid, dtype)
    slow = [tensor.detach().double().requires_grad_() for tensor in fast]
    weights = weights_of(mechanism, dtype)
    other = copy.deepcopy(weights).double()
    (q, k, v, hidden), (wide_q, wide_k, wide_v, wide) = fast, slow
    got = mechanism.attend(q, k, v, grid, context=Context(mask=mask, weights=weights, hidden=hidden))
    want = mechanism.reference(wide_q, wide_k, wide_v, grid, context=Context(mask=mask, weights=other, hidden=wide))
    assert got.dtype == dtype
    assert_close(got, want)
    cotangent = torch.randn(got.shape, dtype=dtype)
    got.backward(cotangent)
    want.backward(cotangent.double())
    for one, two in zip([*fast, *weights.parameters()], [*slow, *other.parameters()], strict=True):
        assert one.grad is not None and two.grad is not None
        assert (one.grad - two.grad).abs().max() / two.grad.abs().max().clamp(min=1) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_reference_with_the_gradients_of_gate_and_hidden_states(name: str, grid: TokenGrid) -> None:
    check_against_reference(CONFIGS[name], grid)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_the_reference_in_lower_precision(dtype: torch.dtype) -> None:
    check_against_reference(CONFIGS["cubes"], TokenGrid(5, 7, before=2, after=1), dtype)


@pytest.mark.parametrize("kind", ["bool", "additive", "without axes", "all hidden"])
def test_equals_the_reference_under_a_mask(kind: str) -> None:
    grid = TokenGrid(5, 4, frames=2, before=6)
    visible = torch.rand(2, 1, 1, grid.tokens) > 0.6
    masks = {
        "bool": visible,
        "additive": torch.randn(2, 3, 1, grid.tokens, dtype=torch.float64),
        "without axes": visible[0, 0, 0],
        "all hidden": torch.zeros_like(visible),
    }
    check_against_reference(CONFIGS["cubes"], grid, mask=masks[kind])


def test_small_strips_and_a_dense_backend_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    mechanism, grid = CONFIGS["cubes"], TokenGrid(5, 7, before=2)
    q, k, v, hidden = inputs(mechanism, grid, torch.float32)
    context = Context(weights=weights_of(mechanism, torch.float32), hidden=hidden)
    want = mechanism.attend(q, k, v, grid, context=context)
    assert_close(mechanism.attend(q, k, v, grid, context=context, backend="dense"), want)
    monkeypatch.setattr(gather, "STRIP", {"cpu": 1})
    monkeypatch.setattr(gather, "GATHERED", {"cpu": 1})
    assert_close(mechanism.attend(q, k, v, grid, context=context), want)


# What its authors compute


@pytest.mark.parametrize(
    ("sides", "share", "shape"), [((4, 4, 4), 0.3, (5, 6, 9)), ((2, 3, 2), 0.5, (4, 6, 4)), ((4, 4, 4), 1, (4, 4, 8))]
)
def test_the_formula_by_hand(sides: tuple[int, int, int], share: float, shape: tuple[int, int, int]) -> None:
    mechanism, grid = VideoSparseAttention(top_share=share, tile=sides), TokenGrid(shape[1], shape[2], shape[0])
    q, k, v, hidden = (tensor[:1].detach() for tensor in inputs(mechanism, grid))
    weights = weights_of(mechanism)
    gate = weights.to_gate_compress(hidden).detach().view(1, grid.cells, 3, 8).transpose(1, 2)
    want = vsa_by_hand(q, k, v, gate, shape, share=share, sides=sides)
    assert_close(mechanism.attend(q, k, v, grid, context=Context(weights=weights, hidden=hidden)), want)


@pytest.mark.parametrize(
    ("share", "shape", "count"),
    [(0.2, (21, 30, 52), 125), (0.1, (21, 45, 80), 144), (0.2, (4, 4, 60), 3), (0.01, (4, 4, 4), 1)],
)
def test_a_share_is_rounded_up(share: float, shape: tuple[int, int, int], count: int) -> None:
    grid = TokenGrid(shape[1], shape[2], shape[0])
    assert VideoSparseAttention(top_share=share).part.exact_tiles(grid) == count


def test_without_a_gate_and_with_all_cubes_it_is_softmax() -> None:
    mechanism, grid = CONFIGS["all"], TokenGrid(5, 6, frames=3, before=2)
    q, k, v, hidden = inputs(mechanism, grid)
    dense = F.scaled_dot_product_attention(q, k, v)
    assert_close(mechanism.attend(q, k, v, grid), dense)
    fresh = mechanism.weights(3, 8).double()
    assert_close(mechanism.attend(q, k, v, grid, context=Context(weights=fresh, hidden=hidden)), dense)


def test_one_cube_adds_the_gated_mean_of_the_values() -> None:
    mechanism, grid = VideoSparseAttention(), TokenGrid(4, 3, frames=2)
    q, k, v, hidden = inputs(mechanism, grid)
    weights = weights_of(mechanism)
    gate = weights.gates(hidden, 3)
    want = F.scaled_dot_product_attention(q, k, v) + gate * v.mean(2, keepdim=True)
    assert_close(mechanism.attend(q, k, v, grid, context=Context(weights=weights, hidden=hidden)), want)


def test_the_fresh_gate_is_zero_learns_first_and_takes_no_random_numbers() -> None:
    mechanism, grid = CONFIGS["cubes"], TokenGrid(5, 7)
    state = torch.get_rng_state()
    weights = mechanism.weights(3, 8).double()
    assert torch.equal(torch.get_rng_state(), state)
    q, k, v, hidden = inputs(mechanism, grid)
    out = mechanism.attend(q, k, v, grid, context=Context(weights=weights, hidden=hidden))
    assert torch.equal(out, mechanism.attend(q, k, v, grid)) and not mechanism.approximates
    out.square().sum().backward()
    assert all(own.grad is not None and own.grad.abs().max() > 0 for own in weights.parameters())
    assert {name: tuple(own.shape) for name, own in CONFIGS["other channels"].weights(3, 8).named_parameters()} == {
        "to_gate_compress.weight": (24, 11),
        "to_gate_compress.bias": (24,),
    }


# What the general rules add


def test_text_is_seen_and_sees_all_and_has_no_gate() -> None:
    mechanism, grid = CONFIGS["cubes"], TokenGrid(5, 7, before=4, after=2)
    q, k, v, hidden = (tensor.detach() for tensor in inputs(mechanism, grid))
    weights = weights_of(mechanism)
    out = mechanism.attend(q, k, v, grid, context=Context(weights=weights, hidden=hidden))
    dense = F.scaled_dot_product_attention(q, k, v)
    assert_close(out[:, :, :4], dense[:, :, :4])
    assert_close(out[:, :, -2:], dense[:, :, -2:])
    cells, alone = [tensor[:, :, grid.cell_slice] for tensor in (q, k, v)], TokenGrid(5, 7)
    told = Context(weights=weights, hidden=hidden[:, grid.cell_slice])
    assert torch.equal(mechanism.choose(q, k, v, grid), mechanism.choose(*cells, alone))
    more = out[:, :, 4:-2] - mechanism.attend(q, k, v, grid)[:, :, 4:-2]
    assert_close(more, mechanism.attend(*cells, alone, context=told) - mechanism.attend(*cells, alone))
    # a module that is given the cells alone, with text beside them
    assert torch.equal(mechanism.attend(q, k, v, grid, context=told), out)


def test_silent_tokens_and_several_grids() -> None:
    mechanism = CONFIGS["cubes"]
    weights = weights_of(mechanism)
    silent = TokenGrid(4, 5, before=3, after=2, silent=(3, 1))
    q, k, v, hidden = inputs(mechanism, silent)
    asking, seen = q[:, :, silent.query_slice], hidden[:, silent.query_slice]
    told = Context(weights=weights, hidden=seen)
    out = attend_sequence(mechanism, asking, k, v, [silent], context=told)
    assert_close(out, reference_sequence(mechanism, asking, k, v, [silent], context=told))
    whole = attend_sequence(mechanism, asking, k, v, [silent], context=Context(weights=weights, hidden=hidden))
    assert_close(out, whole)
    grids = [TokenGrid(3, 4, before=2, after=10), TokenGrid(2, 5, before=14)]
    q, k, v, hidden = inputs(mechanism, grids[0])
    context = Context(weights=weights, hidden=hidden)
    got = attend_sequence(mechanism, q, k, v, grids, context=context)
    for grid in grids:
        alone = mechanism.reference(q, k, v, grid, context=context)
        assert_close(got[:, :, grid.cell_slice], alone[:, :, grid.cell_slice])


def test_beside_others_in_other_heads() -> None:
    mechanism = PerHeadAttention(mechanisms="vsa(tile=2,channels=24),linear", heads=(0, 1, 0))
    assert mechanism.needs == {"hidden"}
    grid = TokenGrid(5, 6)
    q, k, v, hidden = inputs(CONFIGS["cubes"], grid)
    weights: Any = mechanism.weights(3, 8).double()  # type: ignore[union-attr]
    nn.init.normal_(weights["part_0"].to_gate_compress.weight)
    out = mechanism.attend(q, k, v, grid, context=Context(weights=weights, hidden=hidden))
    part = VideoSparseAttention(tile=2, channels=24)
    own = [tensor[:, [0, 2]] for tensor in (q, k, v)]
    want = part.attend(*own, grid, context=Context(weights=weights["part_0"], hidden=hidden))
    assert_close(out[:, [0, 2]], want)


def test_operations_of_the_gate_and_the_means() -> None:
    grid = TokenGrid(8, 8, frames=4)
    narrow, wide = VideoSparseAttention(channels=10), VideoSparseAttention(channels=20)
    assert wide.flops(grid, 3, 8) - narrow.flops(grid, 3, 8) == 2 * 256 * 10 * 24
    assert narrow.flops(grid, 3, 8) - narrow.part.flops(grid, 3, 8) == 2 * 256 * 10 * 24 + 4 * 4 * 4 * 24


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_share": 1.2}, "top_share must be a number above 0 and at most 1"),
        ({"tile": 0}, "tile must be an int of at least 1"),
        ({"channels": 0}, "channels must be an int of at least 1"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VideoSparseAttention(**options)


def test_wrong_calls_and_json() -> None:
    mechanism, grid = CONFIGS["cubes"], TokenGrid(3, 4)
    q, k, v, hidden = inputs(mechanism, grid)
    weights = weights_of(mechanism)
    for context, message in (
        (Context(mask=torch.ones(12, 12, dtype=torch.bool)), "a mask must be the same for all of them"),
        (Context(weights=nn.Linear(1, 1)), r"vsa: Context\.weights must come from .* got a Linear"),
        (Context(weights=weights), r"Context\.hidden is missing"),
        (Context(weights=weights, hidden=hidden[..., :7]), "7 channels, and the gate sees 24: give channels=7"),
        (
            Context(weights=weights, hidden=hidden[:, :7]),
            "expected hidden states of 12 cells.* got 7; leave this layer",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            mechanism.attend(q, k, v, grid, context=context)
    with pytest.raises(ValueError, match=r"tile=\(2, 3\) says nothing of frames"):
        VideoSparseAttention(tile=(2, 3)).check(TokenGrid(4, 4, frames=2))
    for own in CONFIGS.values():
        assert config.from_json(config.to_json(own)) == own
        assert config.from_text(str(own)) == own
