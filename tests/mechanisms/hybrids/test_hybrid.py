"""A base and a linear branch: against the reference and a definition by hand, before and after training."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from tolerances import TOLERANCE, assert_close
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import diffattn
from diffattn import ClearAttention, HybridAttention, RoutingAttention, SoftmaxAttention, TokenGrid, config
from diffattn.mechanisms.base import Context
from diffattn.mechanisms.hybrids.hybrid import HybridWeights
from diffattn.mechanisms.parts import linear_branch
from diffattn.mechanisms.sequences import attend_sequence, reference_sequence
from diffattn.swap.context_parallel import check_mechanism

CONFIGS = {
    "window": HybridAttention(base="clear(radius=2)", feature_map="learned"),
    "window with means": HybridAttention(base="clear(radius=1.5,pool=2)"),
    "its rest and all": HybridAttention(base="halo(tile=2,halo=0,pool=1)", over="all", feature_map="relu"),
    "routing": HybridAttention(base="routing(top_k=2,tile=2,pool=2)", feature_map="elu", projection="layer"),
    "tiles of queries": HybridAttention(base="routing(top_k=3,tile=2,pool=1,query_tile=3)", feature_map="learned"),
    "by content": HybridAttention(base="routing(top_k=2,tile=2,pool=2,order=content)"),
    "learned means": HybridAttention(base="routing(top_k=2,tile=4,pool=2,means=learned)"),
    "no tokens left": HybridAttention(base="softmax"),
}
REST = {"window with means", "routing", "tiles of queries", "learned means"}
GRIDS = [
    TokenGrid(6, 8),
    TokenGrid(5, 7, before=3),
    TokenGrid(3, 5, frames=3, after=2),
    TokenGrid(1, 13, before=1),
    TokenGrid(1, 1),
]


def inputs(grid: TokenGrid, dtype: torch.dtype = torch.float64, batch: int = 2) -> list[Tensor]:
    shape = (batch, 3, grid.tokens, 8)
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for _ in range(3)]


def weights_of(mechanism: HybridAttention, dtype: torch.dtype = torch.float64) -> HybridWeights:
    """Weights with every parameter away from its start."""
    weights = mechanism.weights(3, 8)
    with torch.no_grad():
        for parameter in weights.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return weights.to(dtype)


def check_against_reference(
    mechanism: HybridAttention, grid: TokenGrid, dtype: torch.dtype = torch.float64, mask: Tensor | None = None
) -> None:
    """Output and gradients of the inputs and of all weights."""
    fast = inputs(grid, dtype)
    slow = [tensor.detach().double().requires_grad_() for tensor in fast]
    weights = weights_of(mechanism, dtype)
    slow_weights = copy.deepcopy(weights).double()
    got = mechanism.attend(*fast, grid, context=Context(mask=mask, weights=weights))
    want = mechanism.reference(*slow, grid, context=Context(mask=mask, weights=slow_weights))
    assert got.dtype == dtype
    assert_close(got, want)
    cotangent = torch.randn(got.shape, dtype=dtype)
    got.backward(cotangent)
    want.backward(cotangent.double())
    for one, other in zip([*fast, *weights.parameters()], [*slow, *slow_weights.parameters()], strict=True):
        found = torch.zeros_like(one) if one.grad is None else one.grad
        wanted = torch.zeros_like(other) if other.grad is None else other.grad
        assert (found - wanted).abs().max() / wanted.abs().max().clamp(min=1) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_reference(name: str, grid: TokenGrid) -> None:
    check_against_reference(CONFIGS[name], grid)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["window", "window with means", "routing"])
def test_equals_the_reference_in_lower_precision(name: str, dtype: torch.dtype) -> None:
    check_against_reference(CONFIGS[name], TokenGrid(5, 7, before=2, after=1), dtype)


def key_masks(grid: TokenGrid) -> dict[str, Tensor]:
    visible = torch.rand(2, 1, 1, grid.tokens) > 0.3
    return {
        "bool": visible,
        "additive": torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, -torch.inf),
        "finite, one per head": torch.randn(2, 3, 1, grid.tokens, dtype=torch.float64),
        "alike for all keys": torch.ones(1, 1, 1, 1, dtype=torch.bool),
        "without axes": visible[0, 0, 0],
    }


@pytest.mark.parametrize("kind", key_masks(TokenGrid(1, 1)))
@pytest.mark.parametrize("name", ["window", "window with means", "routing"])
def test_equals_the_reference_under_a_mask(name: str, kind: str) -> None:
    grid = TokenGrid(5, 4, frames=2, before=6)
    check_against_reference(CONFIGS[name], grid, mask=key_masks(grid)[kind])


# What the branch is


def by_hand(mechanism: HybridAttention, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, weights: Any) -> Tensor:
    """Cell by cell over the cells that the base does not see exactly, softmax maps."""
    out = mechanism.part.reference(q, k, v, grid, context=Context(weights=weights.base)).detach().clone()
    exact = mechanism.part.seen(q, k, v, grid).keys.expand(*q.shape[:2], -1, -1)
    f, g = q.softmax(-1), k.softmax(-1)
    for sample in range(q.shape[0]):
        for head in range(q.shape[1]):
            for query in range(grid.before, grid.before + grid.cells):
                summed, total = torch.zeros(8, dtype=q.dtype), torch.zeros((), dtype=q.dtype)
                for key in range(grid.before, grid.before + grid.cells):
                    if not exact[sample, head, query, key]:
                        weight = f[sample, head, query] @ g[sample, head, key]
                        summed, total = summed + weight * v[sample, head, key], total + weight
                if total > 0:
                    out[sample, head, query] += summed / total @ weights.projection[head]
    return out.detach()


@pytest.mark.parametrize("base", ["routing(top_k=2,tile=2,pool=2)", "halo(tile=2,halo=1,pool=2)"])
def test_the_rest_by_hand(base: str) -> None:
    grid, mechanism = TokenGrid(6, 5, before=2, after=1), HybridAttention(base=base)
    q, k, v = (tensor.detach() for tensor in inputs(grid))
    weights = weights_of(mechanism)
    want = by_hand(mechanism, q, k, v, grid, weights)
    assert_close(mechanism.attend(q, k, v, grid, context=Context(weights=weights)), want)


@pytest.mark.parametrize("name", CONFIGS)
def test_which_bases_know_their_rest(name: str) -> None:
    """What the branch reads of a far cell tells: nothing where it is exact, all where the branch is over all."""
    mechanism, grid = replace(CONFIGS[name], feature_map="softmax"), TokenGrid(8, 8)
    assert mechanism.takes_rest == (name in REST)
    q, k, v = (tensor.detach() for tensor in inputs(grid))
    weights = weights_of(mechanism)
    told = Context(weights=weights), Context(weights=weights.base)

    def branch(values: Tensor) -> Tensor:
        with_branch = mechanism.attend(q, k, values, grid, context=told[0])
        return with_branch - mechanism.part.attend(q, k, values, grid, context=told[1])

    other = v.clone()
    other[:, :, 0] += 0.001
    changed = ((branch(other) - branch(v)).abs() > 1e-12).any(dim=-1)
    assert changed.any() and changed.all() == (name not in REST)


def test_a_query_that_sees_everything_has_no_rest() -> None:
    grid, mechanism = TokenGrid(4, 4), HybridAttention(base="routing(top_k=4,tile=2,pool=1)")
    q, k, v = inputs(grid)
    weights = weights_of(mechanism)
    out = mechanism.attend(q, k, v, grid, context=Context(weights=weights))
    assert torch.equal(out, mechanism.part.attend(q, k, v, grid))
    assert mechanism.flops(grid, 3, 8) == mechanism.part.flops(grid, 3, 8)
    part = HybridAttention(base="halo(tile=2,halo=1,pool=1)")  # the tile in the middle sees all nine
    grid = TokenGrid(6, 6)
    q, k, v = (tensor.detach() for tensor in inputs(grid))
    more = part.attend(q, k, v, grid, context=Context(weights=weights)) - part.part.attend(q, k, v, grid)
    middle = more.unflatten(2, (6, 6))[:, :, 2:4, 2:4]
    assert not middle.any() and more.any()


@pytest.mark.parametrize("name", ["window", "routing"])
def test_text_is_no_part_of_the_branch(name: str) -> None:
    grid, mechanism = TokenGrid(5, 6, before=4, after=2), CONFIGS[name]
    q, k, v = (tensor.detach() for tensor in inputs(grid))
    context = Context(weights=weights_of(mechanism))
    more = mechanism.attend(q, k, v, grid, context=context) - mechanism.part.attend(q, k, v, grid)
    assert not more[:, :, :4].any() and not more[:, :, -2:].any() and more[:, :, 4:-2].abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_before_training_it_is_its_base_and_the_projection_learns_first(name: str, dtype: torch.dtype) -> None:
    grid, mechanism = TokenGrid(6, 7, before=3), CONFIGS[name]
    q, k, v = inputs(grid, dtype)
    weights = mechanism.weights(3, 8)
    base = mechanism.part.attend(q, k, v, grid)
    out = mechanism.attend(q, k, v, grid, context=Context(weights=weights))
    assert torch.equal(out, base) and torch.equal(mechanism.attend(q, k, v, grid), base)
    out.float().square().sum().backward()
    assert weights.projection.grad is not None and weights.projection.grad.abs().max() > 0
    maps = [] if weights.maps is None else list(weights.maps.parameters())
    assert not any(one.grad is not None and one.grad.any() for one in maps)


@pytest.mark.parametrize("name", ["window with means", "routing"])
def test_pieces_of_heads_and_a_dense_backend_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mechanism, grid = CONFIGS[name], TokenGrid(7, 6, before=2)
    q, k, v = inputs(grid)
    context = Context(weights=weights_of(mechanism))
    want = mechanism.attend(q, k, v, grid, context=context)
    assert_close(mechanism.attend(q, k, v, grid, context=context, backend="dense"), want)
    monkeypatch.setattr(linear_branch, "LARGEST", 1)
    assert_close(mechanism.attend(q, k, v, grid, context=context), want)


def test_a_mask_that_learns_is_computed_densely() -> None:
    mechanism, grid = CONFIGS["routing"], TokenGrid(6, 6)
    q, k, v = inputs(grid)
    mask = torch.randn(1, 1, 1, grid.tokens, dtype=torch.float64, requires_grad=True)
    context = Context(mask=mask, weights=weights_of(mechanism))
    out = mechanism.attend(q, k, v, grid, context=context)
    assert_close(out, mechanism.reference(q, k, v, grid, context=context))
    out.sum().backward()
    assert mask.grad is not None and mask.grad.abs().min() > 0


@pytest.mark.parametrize("name", ["window", "routing"])
def test_silent_tokens_and_several_grids(name: str) -> None:
    mechanism = CONFIGS[name]
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


def test_sums_are_taken_in_float32_under_autocast() -> None:
    grid = TokenGrid(4, 40)
    q, k, v = inputs(grid, torch.bfloat16)
    for name in ("window", "routing"):
        context = Context(weights=weights_of(CONFIGS[name], torch.float32))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = CONFIGS[name].attend(q, k, v, grid, context=context)
        assert torch.equal(inside, CONFIGS[name].attend(q, k, v, grid, context=context))


@pytest.mark.parametrize("feature_map", linear_branch.FEATURE_MAPS)
def test_large_inputs_stay_finite(feature_map: str) -> None:
    grid, mechanism = TokenGrid(6, 8), HybridAttention(base="routing(top_k=1,tile=2,pool=2)", feature_map=feature_map)
    q, k, v = (1000 * tensor.detach() for tensor in inputs(grid, torch.float32))
    k.requires_grad_()
    out = mechanism.attend(q, k, v, grid, context=Context(weights=weights_of(mechanism, torch.float32)))
    out.sum().backward()
    assert out.isfinite().all() and k.grad is not None and k.grad.isfinite().all()


# Its config, its weights and its costs


@pytest.mark.parametrize(
    "given",
    ["routing(top_k=2, tile=2)", {"type": "routing", "top_k": 2, "tile": 2}, RoutingAttention(top_k=2, tile=2)],
)
def test_a_base_is_read_however_it_is_written(given: object) -> None:
    made = config.create("hybrid", base=given, over="all")
    assert made == HybridAttention(base=RoutingAttention(top_k=2, tile=2), over="all")
    assert config.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    assert config.from_text(str(made)) == made


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": "warp"}, "unknown mechanism 'warp'"),
        ({"base": "clear(radius=two)"}, "radius must be"),
        ({"base": "cle ar"}, "hybrid: base must be a mechanism, such as .*, got 'cle ar'"),
        ({"base": "softmax", "feature_map": "cubic"}, "feature_map must be one of softmax, elu, relu, learned"),
        ({"base": "clear(radius=2)", "over": "rest"}, "over='rest' needs a base .* got clear"),
        ({"base": "routing(share=0.3,order=content)", "over": "rest"}, "got routing"),
        ({"base": "clear(radius=2,ntk_factor=10)"}, "ntk_factor"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HybridAttention(**options)


def test_wrong_calls() -> None:
    grid, mechanism = TokenGrid(3, 4), CONFIGS["window"]
    q, k, v = inputs(grid)
    with pytest.raises(ValueError, match=r"a mask must be the same for all of them, \(b, 1, 1, keys\), got \(12, 12\)"):
        mechanism.attend(q, k, v, grid, context=Context(mask=torch.ones(12, 12, dtype=torch.bool)))
    with pytest.raises(ValueError, match=r"must come from mechanism\.weights\(heads, head_dim\), got a Linear"):
        mechanism.attend(q, k, v, grid, context=Context(weights=nn.Linear(1, 1)))
    with pytest.raises(NotImplementedError, match="hybrid is not a mask"):
        mechanism.mask(grid)


def test_it_is_what_its_base_is() -> None:
    both = HybridAttention(base="dual_scope(top_k=2,rotation=1.0)")
    assert "temporal" in both.kinds and both.needs_steps and both.across_frames and both.needs == both.part.needs
    assert HybridAttention(base="routing(share=0.3)").joins_grids
    assert not HybridAttention(base=ClearAttention(radius=2)).approximates
    assert HybridAttention(base=SoftmaxAttention()).approximates
    assert HybridAttention(base="routing(share=0.3)").backends == RoutingAttention().backends


def test_the_base_keeps_its_memory() -> None:
    base = RoutingAttention(top_k=2, tile=2, pool=2, order="centroids", refresh=3)
    mechanism, grid, memory = HybridAttention(base=base), TokenGrid(6, 6), dict[str, Any]()
    q, k, v = inputs(grid)
    assert "memory" in mechanism.needs
    mechanism.attend(q, k, v, grid, context=Context(memory=memory, weights=mechanism.weights(3, 8).double()))
    assert memory["age"] == 1 and "order" in memory


@pytest.mark.parametrize("name", ["window", "its rest and all", "routing", "window with means"])
def test_operations_are_those_computed(name: str) -> None:
    mechanism, grid = CONFIGS[name], TokenGrid(8, 12, before=3)
    q, k, v = (tensor.detach() for tensor in inputs(grid, torch.float32, batch=1))
    mechanism.attend(q, k, v, grid)  # what is computed once, of the base's shape
    counts = []
    for weights in (None, mechanism.weights(3, 8)):
        with FlopCounterMode(display=False) as counter:
            mechanism.attend(q, k, v, grid, context=Context(weights=weights))
        counts.append(counter.get_total_flops())
    assert mechanism.flops(grid, 3, 8) - mechanism.part.flops(grid, 3, 8) == counts[1] - counts[0]


def trained(handle: Any) -> None:
    for parameter in handle.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))


@pytest.mark.parametrize("base", ["clear(radius=1.5)", "routing(top_k=1,tile=2,pool=2)"])
@pytest.mark.parametrize("build", [models.flux, models.wan], ids=["Flux", "Wan"])
def test_a_swapped_model_begins_as_its_base_and_keeps_its_weights_in_a_file(
    build: Callable[[], Any], base: str, tmp_path: Path
) -> None:
    tiny, other, plain = build(), build(), build()
    mechanism = HybridAttention(base=base, feature_map="learned")
    with torch.no_grad():
        diffattn.apply(plain.model, mechanism.part)
        handle = diffattn.apply(tiny.model, mechanism)
        untrained = tiny.run()
        assert torch.equal(untrained, plain.run())
        trained(handle)
        after = tiny.run()
        assert not torch.equal(after, untrained)
        diffattn.save(tiny.model, tmp_path)
        loaded = diffattn.load(other.model, tmp_path)
        assert loaded.layers[0].mechanism == mechanism
        assert torch.equal(other.run(), after)


def test_a_part_of_the_heads_is_refused_under_context_parallelism() -> None:
    mechanism = CONFIGS["routing"]
    check_mechanism(mechanism, mechanism.weights(4, 8), torch.empty(1, 4, 9, 8), 2)
    heads = replace(mechanism, projection="heads")
    with pytest.raises(NotImplementedError, match=r"weights for each head \(projection\).* 2 of 4 heads"):
        check_mechanism(heads, heads.weights(4, 8), torch.empty(1, 4, 9, 8), 2)
