"""Agent attention: against its reference, and what its options mean."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from tolerances import assert_close
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from diffattn import config
from diffattn.grid import TokenGrid
from diffattn.mechanisms.agent import AgentAttention, Plan, worthwhile
from diffattn.mechanisms.base import Context
from diffattn.mechanisms.parts.agent_weights import AgentWeights
from diffattn.mechanisms.parts.merging import Stage
from diffattn.mechanisms.parts.pooling import averages_per_axis, pool, pool_groups

CONFIGS = {
    "default": AgentAttention(),
    "few": AgentAttention(num_agents=5),
    "size": AgentAttention(agent_size=(2, 3), k_scale2=1.0, k_shortcut=0.0),
    "others ask": AgentAttention(num_agents=4, others="agents"),
    "merge": AgentAttention(agents="merge", sx=2, sy=2, ratio=0.3, agent_ratio=0.8),
    "merge, others ask": AgentAttention(agents="merge", sx=2, sy=2, ratio=0.0, agent_ratio=0.8, others="agents"),
    "merge, no agents": AgentAttention(agents="merge", sx=2, sy=2, ratio=0.5, agent_ratio=0.5, use_rand=False),
    "merge, official": AgentAttention(agents="merge", sx=2, sy=2, official=True),
    "bias": AgentAttention(agent_size=(2, 2), bias=True, window=5),
    "convolution": AgentAttention(agent_size=(2, 3), depthwise_conv=True),
    "published": AgentAttention.published((2, 2), window=4),
}
GRIDS = [
    TokenGrid(5, 7),
    TokenGrid(4, 6, before=3),
    TokenGrid(3, 5, frames=3, after=2),
    TokenGrid(9, 4, frames=2, before=1, after=4),
]


def inputs(grid: TokenGrid, dtype: torch.dtype = torch.float64, batch: int = 2, heads: int = 3) -> list[Tensor]:
    shape = (batch, heads, grid.tokens, 8)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3)]


def weights_of(mechanism: AgentAttention, dtype: torch.dtype, heads: int = 3, head_dim: int = 8) -> nn.Module | None:
    """Weights with every parameter away from its start."""
    weights = mechanism.weights(heads, head_dim)
    if weights is not None:
        for parameter in weights.parameters():
            nn.init.normal_(parameter, std=0.1)
        weights.to(dtype)
    return weights


def doubled(context: Context) -> Context:
    def double(tensor: Tensor | None) -> Tensor | None:
        return tensor.double() if tensor is not None and tensor.is_floating_point() else tensor

    weights = copy.deepcopy(context.weights)
    weights = None if weights is None else weights.double()
    return replace(context, mask=double(context.mask), features=double(context.features), weights=weights)


def check_against_reference(
    mechanism: AgentAttention, grid: TokenGrid, dtype: torch.dtype, context: Context, batch: int = 2, heads: int = 3
) -> None:
    """Output and gradients (of the inputs and, in float64, of the weights)."""
    fast = inputs(grid, dtype, batch, heads)
    slow = [tensor.detach().double().requires_grad_() for tensor in fast]
    context = replace(context, weights=weights_of(mechanism, dtype, heads))
    slow_context = doubled(context)
    got = mechanism.attend(*fast, grid, context=context)
    want = mechanism.reference(*slow, grid, context=slow_context)
    assert got.dtype == dtype
    assert_close(got, want)
    cotangent = torch.randn(got.shape, dtype=dtype)
    got.backward(cotangent)
    want.backward(cotangent.double())
    for name, one, other in zip("qkv", fast, slow, strict=True):
        assert one.grad is not None and other.grad is not None
        assert_close(one.grad, other.grad, f"gradient of {name}")
    if context.weights is not None and slow_context.weights is not None and dtype == torch.float64:
        for (name, one_p), other_p in zip(
            context.weights.named_parameters(), slow_context.weights.parameters(), strict=True
        ):
            assert one_p.grad is not None and other_p.grad is not None, name
            # without other tokens, or with a single key, some biases have no say
            assert one_p.grad.abs().sum() > 0 or not grid.others, name
            torch.testing.assert_close(one_p.grad, other_p.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_reference(name: str, grid: TokenGrid) -> None:
    features = torch.randn(2, grid.cells, 10, dtype=torch.float64)
    check_against_reference(CONFIGS[name], grid, torch.float64, Context(features=features))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_reference_in_lower_precision(name: str, dtype: torch.dtype) -> None:
    grid = TokenGrid(5, 7, before=2, after=1)
    check_against_reference(CONFIGS[name], grid, dtype, Context(features=torch.randn(2, grid.tokens, 10)))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_reference_for_one_head_and_odd_batches(name: str, batch: int) -> None:
    check_against_reference(CONFIGS[name], TokenGrid(4, 3, before=1), torch.float64, Context(), batch, heads=1)


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("name", [name for name, mechanism in CONFIGS.items() if mechanism.agents == "pool"])
def test_equals_the_reference_under_a_key_mask(name: str, additive: bool) -> None:
    grid = TokenGrid(5, 4, before=6)
    mask = torch.ones(2, 1, 1, grid.tokens, dtype=torch.bool)
    mask[0, ..., 3:6] = False
    mask[1, ..., 10:13] = False
    if additive:
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    check_against_reference(CONFIGS[name], grid, torch.float64, Context(mask=mask))


def test_one_token_and_single_rows() -> None:
    for grid in (TokenGrid(1, 1), TokenGrid(1, 9), TokenGrid(7, 1, before=2), TokenGrid(1, 1, frames=6)):
        check_against_reference(AgentAttention(), grid, torch.float64, Context())
        check_against_reference(AgentAttention(agents="merge", sx=1, sy=1), grid, torch.float64, Context())
        check_against_reference(AgentAttention.published((2, 2)), grid, torch.float64, Context())


def test_a_scale_of_the_model_governs_both_softmaxes() -> None:
    grid, mechanism = TokenGrid(4, 4, before=1), AgentAttention(agent_size=(2, 2))
    q, k, v = inputs(grid)
    scale = 0.7
    agents = pool(q[:, :, 1:], grid, (1, 2, 2))
    gathered = (scale * agents @ k.transpose(-1, -2)).softmax(-1) @ v
    want = (scale**0.3 * q[:, :, 1:] @ agents.transpose(-1, -2)).softmax(-1) @ gathered + 0.075 * v[:, :, 1:]
    out = mechanism.attend(q, k, v, grid, scale=scale)
    assert_close(out[:, :, 1:], want)
    assert_close(out[:, :, :1], (scale * q[:, :, :1] @ k.transpose(-1, -2)).softmax(-1) @ v)


def test_equal_values_come_back() -> None:
    grid = TokenGrid(6, 6, before=2)
    q, k, v = inputs(grid, torch.float32)
    for name in ("default", "others ask", "merge", "merge, no agents"):
        out = replace(CONFIGS[name], k_shortcut=0.0).attend(q, k, torch.ones_like(v), grid)
        torch.testing.assert_close(out, torch.ones_like(v))


# The activity rule, and where agents are


def test_the_default_uses_agents_at_every_useful_size() -> None:
    sizes = {(64, 64): 256, (128, 96): 252, (16, 16): 64, (8, 8): 16, (2, 2): 1, (1, 1): 0}
    assert {size: AgentAttention().plan(TokenGrid(*size)).agents for size in sizes} == sizes
    assert AgentAttention(num_agents=256).plan(TokenGrid(8, 8)) == Plan(64, 0)


def test_agents_are_used_below_half_the_cells_only() -> None:
    assert worthwhile(15, 32) and not worthwhile(16, 32) and not worthwhile(17, 32)
    grid = TokenGrid(4, 8, before=3)
    q, k, v = inputs(grid)
    exact = F.scaled_dot_product_attention(q, k, v)
    half = AgentAttention(agent_size=(4, 4))
    assert half.plan(grid) == Plan(32, 0)
    assert torch.equal(half.attend(q, k, v, grid), exact)
    below = AgentAttention(agent_size=(3, 5))
    assert below.plan(grid) == Plan(32, 15)
    assert not torch.allclose(below.attend(q, k, v, grid), exact)


def test_the_rule_counts_merged_tokens() -> None:
    grid = TokenGrid(4, 8)
    merge = AgentAttention(agents="merge", sx=2, sy=4, agent_ratio=1.0)
    assert replace(merge, ratio=0.75).plan(grid) == Plan(8, 0)
    assert replace(merge, ratio=0.72).plan(grid) == Plan(9, 4)
    # merging nothing at all is exact
    none = replace(merge, ratio=0.0, agent_ratio=0.0)
    q, k, v = inputs(grid)
    assert torch.equal(none.attend(q, k, v, grid), F.scaled_dot_product_attention(q, k, v))


def test_the_published_schedule() -> None:
    preset, grid = AgentAttention.stable_diffusion(), TokenGrid(64, 64)
    plans = [preset.plan(grid, Context(progress=step / 50)) for step in range(50)]
    assert plans == [Plan(2458, 256)] * 20 + [Plan(2458, 0)] * 30
    assert preset.plan(grid) == Plan(2458, 256)
    assert preset.plan(grid, Context(downsample=2)) == Plan(4096, 0)
    # the official defaults never use an agent
    inert = AgentAttention(agents="merge", sx=2, sy=2, ratio=0.5, agent_ratio=0.8)
    assert inert.plan(grid) == Plan(2048, 0)


def test_coarse_layers_stay_exact() -> None:
    grid = TokenGrid(2, 2)
    q, k, v = inputs(grid)
    mask = torch.rand(2, 1, 4, 4) > 0.2
    mask[..., 0] = True
    out = AgentAttention.stable_diffusion().attend(q, k, v, grid, context=Context(downsample=2, mask=mask))
    assert torch.equal(out, F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
    with pytest.raises(ValueError, match="does not fit the grid"):
        AgentAttention.stable_diffusion().attend(q, k, v, grid)


@pytest.mark.parametrize(
    ("shape", "most", "want"),
    [
        ((1, 64, 64), 256, (1, 16, 16)),
        ((1, 64, 64), 49, (1, 7, 7)),
        ((1, 32, 48), 100, (1, 8, 12)),
        ((1, 90, 10), 16, (1, 16, 1)),
        ((1, 1, 40), 7, (1, 1, 7)),
        ((8, 16, 16), 32, (2, 4, 4)),
        ((2, 3, 2), 1000, (2, 3, 2)),
        ((4, 4, 4), 1, (1, 1, 1)),
    ],
)
def test_agents_spread_in_proportion(shape: tuple[int, int, int], most: int, want: tuple[int, int, int]) -> None:
    assert averages_per_axis(shape, most) == want


@pytest.mark.parametrize("layout", [(1, 2, 3), (2, 4, 5), (3, 5, 7), (1, 1, 1), (4, 6, 9)])
def test_pool_averages_the_groups(layout: tuple[int, int, int]) -> None:
    grid = TokenGrid(5, 7, frames=3)
    cells = torch.randn(2, 2, grid.cells, 4, dtype=torch.float64)
    groups = pool_groups(grid, layout)
    assert len(groups) == math.prod(layout)
    assert sorted({cell for group in groups for cell in group}) == list(range(grid.cells))
    want = torch.stack([cells[:, :, group].mean(dim=2) for group in groups], dim=2)
    assert_close(pool(cells, grid, layout), want)


def test_two_numbers_pool_over_all_frames() -> None:
    grid = TokenGrid(6, 8, frames=5)
    assert AgentAttention(agent_size=(2, 3)).layout(grid) == (1, 2, 3)
    assert AgentAttention(agent_size=(4, 2, 3)).layout(grid) == (4, 2, 3)


# Merging: seeds


def merge_once(mechanism: AgentAttention, batch: int = 2, **context: object) -> Tensor:
    grid = TokenGrid(6, 6)
    torch.manual_seed(1)
    q, k, v = (torch.randn(4, 2, 36, 8)[:batch] for _ in range(3))
    return mechanism.attend(q, k, v, grid, context=Context(**context))  # type: ignore[arg-type]


def test_merging_is_reproducible_and_differs_by_seed_layer_and_step() -> None:
    mechanism = AgentAttention(agents="merge", sx=3, sy=3, ratio=0.3, agent_ratio=0.9)
    first = merge_once(mechanism, call_index=1, progress=0.5)
    state = torch.get_rng_state()
    assert torch.equal(merge_once(mechanism, call_index=1, progress=0.5), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(merge_once(replace(mechanism, seed=1), call_index=1, progress=0.5), first)
    assert not torch.equal(merge_once(mechanism, call_index=2, progress=0.5), first)
    assert not torch.equal(merge_once(mechanism, call_index=1, progress=0.52), first)


def test_the_batch_size_does_not_change_a_picture() -> None:
    mechanism = AgentAttention(agents="merge", sx=3, sy=3, ratio=0.3, agent_ratio=0.9)
    four = merge_once(mechanism, batch=4)
    for batch in (1, 2, 3):
        torch.testing.assert_close(merge_once(mechanism, batch=batch), four[:batch])


def test_official_draws_from_the_global_state_and_not_for_odd_batches() -> None:
    grid = TokenGrid(8, 8)
    mechanism = AgentAttention(agents="merge", official=True)
    first_cells = [0, 4, 32, 36]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    drawn = mechanism.destinations(grid, 2, Context())
    assert torch.equal(torch.get_rng_state(), state)
    inside = torch.randint(16, (2, 2, 1)).flatten()
    want = torch.tensor(first_cells) + inside // 4 * 8 + inside % 4
    assert torch.equal(drawn, want.sort().values)
    assert mechanism.destinations(grid, 3, Context()).tolist() == first_cells
    assert replace(mechanism, use_rand=False).destinations(grid, 2, Context()).tolist() == first_cells


def test_what_merging_reads() -> None:
    assert AgentAttention().needs == frozenset()
    assert AgentAttention(max_downsample=2).needs == {"downsample"}
    merge = AgentAttention(agents="merge")
    assert merge.needs == {"features", "call_index", "progress"}
    assert replace(merge, use_rand=False).needs == {"features"}
    assert replace(merge, official=True).needs == {"features"}
    preset = replace(AgentAttention.stable_diffusion(), use_rand=False)
    assert preset.needs == {"features", "downsample", "progress"}


def test_merging_compares_the_features() -> None:
    grid = TokenGrid(4, 4)
    mechanism = AgentAttention(agents="merge", sx=4, sy=4, ratio=0.5, agent_ratio=0.5, use_rand=False)
    q, k, v = inputs(grid)
    # tokens 8 ... 15 are like the only destination, 0, so they share its output
    features = torch.zeros(2, 16, 3, dtype=torch.float64)
    features[:, 0, 0] = features[:, 8:, 0] = features[:, 1:8, 1] = 1
    out = mechanism.attend(q, k, v, grid, context=Context(features=features))
    assert torch.equal(out[:, :, 8:], out[:, :, :1].expand(-1, -1, 8, -1))
    assert (out[:, :, 1:8] - out[:, :, :1]).abs().amin() > 0
    # features that are all zero give no NaN
    assert mechanism.attend(q, k, v, grid, context=Context(features=features * 0)).isfinite().all()


# Masks


def test_masked_keys_are_as_good_as_absent() -> None:
    padded, bare = TokenGrid(4, 5, after=6), TokenGrid(4, 5, after=2)
    q, k, v = inputs(padded)
    mask = torch.ones(1, 1, 1, padded.tokens, dtype=torch.bool)
    mask[..., bare.tokens :] = False
    for mechanism in (AgentAttention(), AgentAttention(num_agents=3, others="agents")):
        out = mechanism.attend(q, k, v, padded, context=Context(mask=mask))
        want = mechanism.attend(*(tensor[:, :, : bare.tokens] for tensor in (q, k, v)), bare)
        assert_close(out[:, :, : bare.tokens], want)


def test_a_query_that_may_see_nothing_gets_zeros() -> None:
    grid = TokenGrid(4, 4)
    mask = torch.zeros(1, 1, 1, 16, dtype=torch.bool)
    out = AgentAttention(k_shortcut=0.0).attend(*inputs(grid), grid, context=Context(mask=mask))
    assert torch.equal(out, torch.zeros_like(out))


def test_masks_that_cannot_be_honoured_are_refused() -> None:
    grid = TokenGrid(4, 4)
    q, k, v = inputs(grid)
    by_query = Context(mask=torch.ones(1, 1, 16, 16, dtype=torch.bool))
    for call in (AgentAttention().attend, AgentAttention().reference):
        with pytest.raises(ValueError, match=r"same for all of them.*\(1, 1, 16, 16\)"):
            call(q, k, v, grid, context=by_query)
    by_key = Context(mask=torch.ones(1, 1, 1, 16, dtype=torch.bool))
    for call in (AgentAttention(agents="merge").attend, AgentAttention(agents="merge").reference):
        with pytest.raises(ValueError, match="takes no mask"):
            call(q, k, v, grid, context=by_key)


# The trained form


def test_trained_weights_are_the_published_ones() -> None:
    weights = AgentAttention.published((3, 3), window=14).weights(heads=2, head_dim=16)
    assert {name: tuple(parameter.shape) for name, parameter in weights.named_parameters()} == {
        "an_bias": (2, 9, 7, 7),
        "na_bias": (2, 9, 7, 7),
        "ah_bias": (1, 2, 9, 14, 1),
        "aw_bias": (1, 2, 9, 1, 14),
        "ha_bias": (1, 2, 14, 1, 9),
        "wa_bias": (1, 2, 1, 14, 9),
        "ac_bias": (1, 2, 9, 1),
        "ca_bias": (1, 2, 1, 9),
        "dwc.weight": (32, 1, 3, 3),
        "dwc.bias": (32,),
    }
    biases = torch.cat([parameter.flatten() for name, parameter in weights.named_parameters() if "dwc" not in name])
    assert 0.018 < biases.std() < 0.022
    names = set(dict(AgentAttention(agent_size=(2, 2), bias=True).weights(2, 4).named_parameters()))
    assert "ca_bias" not in names and "ac_bias" in names and not any(name.startswith("dwc") for name in names)
    assert set(dict(AgentAttention(agent_size=(2, 2), depthwise_conv=True).weights(2, 4).named_parameters())) == {
        "dwc.weight",
        "dwc.bias",
    }
    assert AgentAttention().weights(2, 4) is None


def test_fresh_weights_start_at_the_untrained_form() -> None:
    grid = TokenGrid(5, 6, before=2)
    q, k, v = inputs(grid, torch.float32)
    plain = AgentAttention(agent_size=(2, 2), k_scale2=1.0)
    trained = replace(plain, bias=True, depthwise_conv=True)
    weights = trained.weights(3, 8)
    fresh = trained.attend(q, k, v, grid, context=Context(weights=weights))
    assert (fresh - plain.attend(q, k, v, grid)).abs().amax() < 0.05
    for name, parameter in weights.named_parameters():
        if name.endswith("_bias"):
            nn.init.zeros_(parameter)
    assert_close(trained.attend(q, k, v, grid, context=Context(weights=weights)), plain.attend(q, k, v, grid))


def test_biases_are_interpolated_to_the_grid() -> None:
    weights = weights_of(AgentAttention.published((2, 2), window=7), torch.float64)
    assert isinstance(weights, AgentWeights)
    first, second = weights.biases(TokenGrid(7, 7, before=1), torch.float64)
    want = weights.an_bias + weights.ah_bias[0] + weights.aw_bias[0]
    assert_close(first[0, :, :, 1:], want.flatten(2))
    assert torch.equal(first[0, :, :, 0], weights.ac_bias[0, ..., 0])
    want = weights.na_bias + weights.ha_bias[0, :, :, 0].mT[..., None] + weights.wa_bias[0, :, 0].mT[:, :, None]
    assert_close(second[0, :, 1:].mT, want.flatten(2))
    assert torch.equal(second[0, :, 0], weights.ca_bias[0, :, 0])

    # a bias that rises by 1 per stored column rises by 1/2 on a grid twice as wide, and stops at the borders
    with torch.no_grad():
        for parameter in weights.parameters():
            parameter.zero_()
        weights.an_bias += torch.arange(7.0, dtype=torch.float64)
    first, _ = weights.biases(TokenGrid(3, 14), torch.float64)
    rise = torch.arange(14, dtype=torch.float64) / 2 - 0.25
    assert_close(first, rise.clamp(0, 6).repeat(3).expand(1, 3, 4, -1))

    # constant biases stay constant on any grid, and all frames are alike
    for parameter in weights.parameters():
        nn.init.constant_(parameter, 0.25)
    first, second = weights.biases(TokenGrid(5, 12, frames=2, after=3), torch.float64)
    assert_close(first, torch.tensor([0.75] * 120 + [0.25] * 3, dtype=torch.float64).expand(1, 3, 4, -1))
    assert second.shape == (1, 3, 123, 4)
    weights = weights_of(AgentAttention.published((2, 2)), torch.float64)
    first, _ = weights.biases(TokenGrid(3, 8, frames=2), torch.float64)  # type: ignore[union-attr]
    assert torch.equal(first[..., :24], first[..., 24:])


def test_the_convolution_runs_on_the_cells_of_each_frame() -> None:
    grid = TokenGrid(3, 4, frames=2, before=1, after=1)
    weights = weights_of(AgentAttention(agent_size=(1, 1), depthwise_conv=True), torch.float64)
    assert isinstance(weights, AgentWeights) and weights.dwc is not None
    _, _, v = inputs(grid)
    out = weights.add_convolved(torch.zeros_like(v), v, grid)
    assert not out[:, :, [0, -1]].any()
    kernel, bias = weights.dwc.weight.view(3, 8, 3, 3), weights.dwc.bias.view(3, 8)
    cells = v[:, :, 1:-1].unflatten(2, (2, 3, 4))
    for frame, row, column in [(0, 0, 0), (0, 2, 3), (1, 0, 1), (1, 1, 2)]:
        want = bias.expand(2, -1, -1)
        for y in range(max(row - 1, 0), min(row + 2, 3)):
            for x in range(max(column - 1, 0), min(column + 2, 4)):
                want = want + kernel[..., y - row + 1, x - column + 1] * cells[:, :, frame, y, x]
        assert_close(out[:, :, 1 + frame * 12 + row * 4 + column], want)


def test_the_trained_form_always_uses_its_agents_and_needs_its_weights() -> None:
    grid, mechanism = TokenGrid(2, 3), AgentAttention.published((3, 3))
    q, k, v = inputs(grid, torch.float32)
    assert mechanism.plan(grid) == Plan(6, 9)
    with pytest.raises(ValueError, match="needs Context"):
        mechanism.attend(q, k, v, grid)
    mechanism.attend(q, k, v, grid, context=Context(weights=mechanism.weights(3, 8)))


# Configs


@pytest.mark.parametrize("mechanism", [*CONFIGS.values(), AgentAttention.stable_diffusion()], ids=str)
def test_json_round_trip(mechanism: AgentAttention) -> None:
    again = config.from_json(config.to_json(mechanism))
    assert again == mechanism
    assert all(isinstance(stage, Stage) for stage in again.stages)
    assert hash(again) == hash(mechanism)


def test_stages_may_be_plain_numbers() -> None:
    values = {"type": "agent", "agents": "merge", "stages": [[0.5, 4, 4, 0.4, 0.95], [1.0, 2, 2, 0.2]]}
    mechanism = config.from_dict(json.loads(json.dumps(values)))
    assert mechanism.stages == (Stage(0.5, 4, 4, 0.4, 0.95), Stage(1.0, 2, 2, 0.2, 0.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"agents": "learned"}, "agents must be one of pool, merge, got 'learned'"),
        ({"others": "none"}, "others must be one of exact, agents"),
        ({"num_agents": 0}, "num_agents must be an int of at least 1, got 0"),
        ({"num_agents": True}, "num_agents must be an int"),
        ({"max_downsample": 0}, "max_downsample must be an int"),
        ({"agent_size": (4,)}, "agent_size must be"),
        ({"agent_size": (4, 0)}, "agent_size must be"),
        ({"agent_size": (4, 4), "num_agents": 9}, "num_agents is given by agent_size"),
        ({"k_scale2": math.nan}, "k_scale2 must be a finite number"),
        ({"k_shortcut": "x"}, "k_shortcut must be a finite number"),
        ({"ratio": 0.5}, 'ratio is an option of agents="merge"'),
        ({"seed": 3}, 'seed is an option of agents="merge"'),
        ({"agents": "merge", "seed": -1}, "seed must be an int of at least 0"),
        ({"agents": "merge", "num_agents": 9}, 'num_agents is an option of agents="pool"'),
        ({"agents": "merge", "bias": True}, 'bias is an option of agents="pool"'),
        ({"agents": "merge", "ratio": 1.5}, "ratio and agent_ratio must lie in 0-1"),
        ({"agents": "merge", "sx": 0}, "sx and sy must be ints"),
        ({"agents": "merge", "sx": 2, "stages": ((1.0, 4, 4, 0.4, 0.9),)}, "sx is given by stages"),
        ({"agents": "merge", "stages": ((0.9, 4, 4, 0.4, 0.9),)}, "last stage must have until=1.0"),
        ({"bias": True}, "give agent_size"),
        ({"depthwise_conv": True, "num_agents": 49}, "give agent_size"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_wrong_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AgentAttention(**options)  # type: ignore[arg-type]


def test_wrong_calls() -> None:
    grid = TokenGrid(4, 4)
    q, k, v = inputs(grid)
    assert torch.equal(AgentAttention().attend(q, k, v, grid), AgentAttention().attend(q, k, v, grid, backend="dense"))
    with pytest.raises(ValueError, match="agent has no backend 'flex'; it has auto, dense"):
        AgentAttention().attend(q, k, v, grid, backend="flex")
    with pytest.raises(ValueError, match="has 17 tokens"):
        AgentAttention().attend(q, k, v, TokenGrid(4, 4, before=1))
    with pytest.raises(ValueError, match="more agents along an axis"):
        AgentAttention(agent_size=(2, 5)).check(grid)
    AgentAttention(agent_size=(2, 4)).check(grid)
    AgentAttention(num_agents=99).check(grid)
    with pytest.raises(ValueError, match="does not fit the grid 3x4"):
        AgentAttention(agents="merge").check(TokenGrid(3, 4))


@pytest.mark.parametrize("name", [name for name, mechanism in CONFIGS.items() if mechanism.agents == "pool"])
def test_flops_are_those_computed(name: str) -> None:
    mechanism, grid = CONFIGS[name], TokenGrid(5, 6, before=3)
    weights = mechanism.weights(3, 8)
    q, k, v = (tensor.detach() for tensor in inputs(grid, torch.float32, batch=1))
    # the counter knows the products of the math kernel, and counts the convolution's border as if it were inside
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        mechanism.attend(q, k, v, grid, context=Context(weights=weights))
    assert mechanism.flops(grid, 3, 8) == counter.get_total_flops()


def test_flops_of_merging_and_at_size() -> None:
    grid = TokenGrid(64, 64)
    preset = AgentAttention.stable_diffusion()
    matching = 2 * 3840 * 256
    assert preset.flops(grid, 8, 40) == (4 * (2 * 2458 * 256) + matching) * 8 * 40
    matching = 2 * 3072 * 1024
    assert preset.flops(grid, 8, 40, Context(progress=0.4)) == (4 * 2458**2 + matching) * 8 * 40
    assert preset.flops(grid, 8, 40, Context(downsample=2)) == 4 * 4096**2 * 8 * 40
    # linear in the cells once the number of agents is fixed
    small, large = (AgentAttention(num_agents=64).flops(TokenGrid(64, width), 1, 64) for width in (64, 128))
    assert large < 2.01 * small


@pytest.mark.compile
@pytest.mark.parametrize("name", ["default", "published"])
def test_pooled_agents_compile_whole(name: str) -> None:
    mechanism, grid = CONFIGS[name], TokenGrid(6, 8, before=2)
    q, k, v = inputs(grid, torch.float32)
    context = Context(weights=mechanism.weights(3, 8))
    compiled = torch.compile(
        lambda q, k, v: mechanism.attend(q, k, v, grid, context=context), backend="eager", fullgraph=True
    )
    assert_close(compiled(q, k, v), mechanism.attend(q, k, v, grid, context=context))
