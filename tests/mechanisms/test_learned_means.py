"""`means="learned"` of routing and of windows with `pool`: means by trained weights, which begin even."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from tolerances import assert_close
from torch import Tensor, nn

import diffattn
from diffattn import ClearAttention, HaloAttention, NeighborhoodAttention, RoutingAttention, TokenGrid
from diffattn.kernels.routed import flex
from diffattn.mechanisms.base import Context
from diffattn.mechanisms.parts.axes import per_axis
from diffattn.mechanisms.parts.pool_weights import PoolWeights

CONFIGS: dict[str, Any] = {
    "clear": ClearAttention(radius=2, pool=2, means="learned"),
    "halo": HaloAttention(tile=(1, 2, 6), halo=0, pool=(1, 2, 3), means="learned"),
    "neighborhood": NeighborhoodAttention(kernel_size=3, pool=(1, 3, 2), means="learned"),
    "routing": RoutingAttention(top_k=2, tile=4, pool=2, means="learned"),
    "routing, frames": RoutingAttention(top_k=3, tile=(2, 4, 2), pool=(2, 2, 1), query_tile=3, means="learned"),
}
GRIDS = [TokenGrid(8, 12), TokenGrid(7, 9, before=3), TokenGrid(5, 6, frames=3, before=1, after=2), TokenGrid(1, 17)]


def inputs(grid: TokenGrid, dtype: torch.dtype = torch.float64, batch: int = 2) -> list[Tensor]:
    shape = (batch, 3, grid.tokens, 8)
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for _ in range(3)]


def weights_of(mechanism: Any, dtype: torch.dtype = torch.float64) -> PoolWeights:
    """Weights away from their start."""
    weights: PoolWeights = mechanism.weights(3, 8)
    for parameter in weights.parameters():
        nn.init.normal_(parameter)
    return weights.to(dtype)


@pytest.mark.parametrize("mask", [None, "hidden", "weighed", "rows"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_reference_with_the_gradients_of_the_weights(name: str, grid: TokenGrid, mask: str | None) -> None:
    mechanism = CONFIGS[name]
    hidden, rows = torch.rand(2, 1, 1, grid.tokens) > 0.3, torch.rand(2, 1, grid.tokens, grid.tokens) > 0.3
    hidden[..., 0] = rows[..., 0] = True
    weighed = torch.randn(1, 3, 1, grid.tokens, dtype=torch.float64)
    fast = inputs(grid)
    slow = [tensor.detach().clone().requires_grad_() for tensor in fast]
    weights = weights_of(mechanism)
    other = copy.deepcopy(weights)
    told = {None: None, "hidden": hidden, "weighed": weighed, "rows": rows}[mask]
    got = mechanism.attend(*fast, grid, scale=0.4, context=Context(mask=told, weights=weights))
    want = mechanism.reference(*slow, grid, scale=0.4, context=Context(mask=told, weights=other))
    assert_close(got, want)
    cotangent = torch.randn_like(got)
    got.backward(cotangent)
    want.backward(cotangent)
    for one, two in zip([*fast, *weights.parameters()], [*slow, *other.parameters()], strict=True):
        zero = torch.zeros_like(one)
        assert_close(zero if one.grad is None else one.grad, zero if two.grad is None else two.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_lower_precision(name: str, dtype: torch.dtype) -> None:
    mechanism, grid = CONFIGS[name], TokenGrid(7, 9, before=3)
    q, k, v = (tensor.detach() for tensor in inputs(grid, dtype))
    weights = weights_of(mechanism, torch.float32)
    out = mechanism.attend(q, k, v, grid, context=Context(weights=weights))
    assert out.dtype == dtype
    wide = Context(weights=copy.deepcopy(weights).double())
    assert_close(out, mechanism.reference(q.double(), k.double(), v.double(), grid, context=wide))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_before_training_means_are_even_and_both_weights_learn(name: str, grid: TokenGrid) -> None:
    mechanism = CONFIGS[name]
    q, k, v = inputs(grid)
    weights = mechanism.weights(3, 8).double()
    out = mechanism.attend(q, k, v, grid, context=Context(weights=weights))
    even = replace(mechanism, means="even").attend(q, k, v, grid)
    assert_close(out, even)
    assert torch.equal(mechanism.attend(q, k, v, grid), even)
    if (even - torch.nn.functional.scaled_dot_product_attention(q, k, v)).abs().max() > 1e-3:  # else all is exact
        out.square().sum().backward()
        assert all(own.grad is not None and own.grad.abs().max() > 0 for own in weights.parameters())


def test_a_block_by_hand() -> None:
    """Eight cells in a row, tiles of one block of four: what a query of the first sees of the second."""
    grid, mechanism = TokenGrid(1, 8), HaloAttention(tile=(1, 4), halo=0, pool=(1, 4), means="learned")
    q, k, v = (tensor.detach() for tensor in inputs(grid, batch=1))
    weights = weights_of(mechanism)
    out = mechanism.attend(q, k, v, grid, scale=0.5, context=Context(weights=weights))
    for head in range(3):
        own, far, values = k[0, head, :4], k[0, head, 4:], v[0, head]
        share = (weights.places[head, 0, 0] + 0.5 * far @ weights.query[head]).softmax(0).detach()
        entropy = -(share * share.log()).sum()
        logits = torch.cat([0.5 * own @ q[0, head, 1], (0.5 * q[0, head, 1] @ (share @ far) + entropy)[None]])
        assert_close(out[0, head, 1], logits.softmax(0) @ torch.cat([values[:4], (share @ values[4:])[None]]))


def test_a_mean_counts_for_no_more_than_its_keys_and_for_as_much_at_its_query() -> None:
    """Where the learned query is the asking one, the block's share of the softmax is that of its keys."""
    grid, mechanism = TokenGrid(1, 8), HaloAttention(tile=(1, 4), halo=0, pool=(1, 4), means="learned")
    q, k, _ = (tensor.detach() for tensor in inputs(grid, batch=1))
    far = torch.zeros(1, 3, 8, 1, dtype=torch.float64)
    far[:, :, 4:] = 1
    mass = torch.nn.functional.scaled_dot_product_attention(q, k, far)[:, :, 2]
    weights = weights_of(mechanism)
    nn.init.zeros_(weights.places)
    values = far.expand(-1, -1, -1, 8)
    for _ in range(20):
        found = mechanism.attend(q, k, values, grid, context=Context(weights=weights))[:, :, 2, :1]
        assert (found <= mass + 1e-12).all()
        nn.init.normal_(weights.query)
    with torch.no_grad():
        weights.query.copy_(q[0, :, 2])
    assert_close(mechanism.attend(q, k, values, grid, context=Context(weights=weights))[:, :, 2, :1], mass)


def test_flex_and_gather_agree_on_what_they_are_given() -> None:
    """The kernel for CUDA takes the same means and logs of weights."""
    grid, mechanism = TokenGrid(8, 8, before=3), CONFIGS["routing"]
    q, k, v = (tensor.detach() for tensor in inputs(grid, torch.float32))
    call = mechanism.call(q, k, v, grid, None, None, None, Context(weights=weights_of(mechanism, torch.float32)))
    prepared = flex.prepare(call, mechanism.choose(q, k, v, grid).flatten(0, 1), cuda=False)
    assert_close(prepared.bias[:, -call.block_k.shape[1] :], call.block_bias.expand(6, -1).double())
    assert call.block_bias.std() > 0.1


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ClearAttention(radius=2, means="learned"), "clear: means='learned' .* give its blocks by pool="),
        (lambda: ClearAttention(radius=2, pool=2, means="weighted"), "means must be one of even, learned"),
        (lambda: RoutingAttention(share=0.3, means="learned"), "pool=None, order=space; give the sides of a block"),
        (lambda: RoutingAttention(share=0.3, pool=2, order="content", means="learned"), "leave order= out"),
        (lambda: RoutingAttention(share=0.3, blocks=9, means="learned"), "give the sides of a block by pool="),
    ],
)
def test_wrong_options(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_other_weights_are_refused() -> None:
    grid = TokenGrid(8, 8)
    for mechanism in (CONFIGS["clear"], CONFIGS["routing"]):
        with pytest.raises(ValueError, match=r"must come from mechanism\.weights\(heads, head_dim\), got a Linear"):
            mechanism.attend(*inputs(grid), grid, context=Context(weights=nn.Linear(1, 1)))


def test_the_weights_are_those_of_the_block() -> None:
    for name, block in (("halo", (1, 2, 3)), ("routing, frames", (2, 2, 1)), ("clear", (2, 2, 2))):
        weights = CONFIGS[name].weights(3, 8)
        assert per_axis(CONFIGS[name].pool, 1) == block
        assert weights.places.shape == (3, *block) and weights.query.shape == (3, 8)
    assert ClearAttention(radius=2, pool=2).weights(3, 8) is None


@pytest.mark.parametrize("name", ["clear", "routing"])
def test_a_swapped_model_keeps_its_weights_in_a_file(name: str, tmp_path: Path) -> None:
    tiny, other, even = models.flux(), models.flux(), models.flux()
    mechanism = replace(CONFIGS[name], **({"top_k": 1, "tile": 2} if name == "routing" else {"radius": 1}), pool=2)
    with torch.no_grad():
        diffattn.apply(even.model, replace(mechanism, means="even"))
        handle = diffattn.apply(tiny.model, mechanism)
        assert torch.allclose(tiny.run(), even.run(), atol=1e-6)
        for parameter in handle.parameters():
            nn.init.normal_(parameter)
        trained = tiny.run()
        assert not torch.allclose(trained, even.run(), atol=1e-4)
        diffattn.save(tiny.model, tmp_path)
        assert diffattn.load(other.model, tmp_path).layers[0].mechanism == mechanism
        assert torch.equal(other.run(), trained)
