"""Calls that are not one grid whose tokens all ask: fewer queries than keys, several grids in a sequence."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from diffattn import (
    AgentAttention,
    ClearAttention,
    DualScopeAttention,
    HaloAttention,
    LinearAttention,
    Mechanism,
    NeighborhoodAttention,
    RoutingAttention,
    SoftmaxAttention,
    TokenGrid,
    TokenMergeAttention,
)
from diffattn.mechanisms.base import Context
from diffattn.mechanisms.sequences import attend_sequence, flops_of_sequence, joined, padded, reference_sequence

MECHANISMS: list[Mechanism] = [
    SoftmaxAttention(),
    SoftmaxAttention(proportional=True, train_tokens=64),
    ClearAttention(radius=3),
    ClearAttention(radius=3, pool=2),
    HaloAttention(tile=4, halo=1),
    NeighborhoodAttention(kernel_size=5),
    AgentAttention(num_agents=9),
    AgentAttention(agents="merge"),
    AgentAttention(num_agents=9, others="agents"),
    LinearAttention(),
    TokenMergeAttention(ratio=0.4),
    DualScopeAttention(padding=1, local_phase=None, global_phase=None),
    RoutingAttention(top_k=2, tile=4),
    RoutingAttention(top_k=2, tile=4, chosen_by="mean"),
    RoutingAttention(share=0.9, tile=4),
]
FEWER = [
    TokenGrid(9, 7, before=6, silent=(6, 0)),
    TokenGrid(9, 7, after=6, silent=(0, 6)),
    TokenGrid(8, 10, before=5, after=4, silent=(3, 2)),
    TokenGrid(6, 5, 3, before=7, silent=(4, 0)),
    TokenGrid(1, 1, before=5, silent=(5, 0)),
]
each = pytest.mark.parametrize("mechanism", MECHANISMS, ids=str)


def tensors(grid: TokenGrid, dtype: torch.dtype = torch.float32, heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(grid.tokens)
    q, k, v = (torch.randn(2, heads, grid.tokens, 8, generator=generator).to(dtype) for _ in range(3))
    return q[:, :, grid.query_slice], k, v


def choosing(mechanism: Mechanism, grid: TokenGrid, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Any:
    """What the reference is given: a choice by content is made in the dtype of the call."""
    if not isinstance(mechanism, RoutingAttention):
        return {}
    return {"chosen": mechanism.choose(padded(q, grid), k, v, grid, None, context)}


@each
@pytest.mark.parametrize("grid", FEWER, ids=lambda grid: f"{grid} silent {grid.silent}")
def test_fewer_queries_get_what_a_full_sequence_gets(mechanism: Mechanism, grid: TokenGrid) -> None:
    """The other tokens' queries are whatever they are: what they would get changes nothing for those that ask."""
    if mechanism.type == "agent" and mechanism.agents == "merge" and grid.cells == 1:
        pytest.skip("a cell alone is no block to merge")
    q, k, v = tensors(grid)
    plain, context = replace(grid, silent=(0, 0)), Context()
    full = torch.randn(2, 2, grid.tokens, 8, generator=torch.Generator().manual_seed(1))
    full[:, :, grid.query_slice] = q
    got = attend_sequence(mechanism, q, k, v, [grid])
    assert got.shape == q.shape
    if isinstance(mechanism, RoutingAttention):
        # as many tiles as for this many queries, whatever the others are
        chosen = choosing(mechanism, grid, q, k, v, context)
        want = mechanism.reference(full.double(), k.double(), v.double(), grid, **chosen)
    else:
        want = mechanism.reference(full.double(), k.double(), v.double(), plain)
    assert torch.allclose(got.double(), want[:, :, grid.query_slice], atol=2e-5)


@each
def test_masks_and_half_precision(mechanism: Mechanism) -> None:
    """Padding of the text hides it in every sample alike or not; a mask of every query has a row for each that asks."""
    if mechanism.type == "agent" and mechanism.agents == "merge":
        pytest.skip("merging takes no mask")
    grid = TokenGrid(8, 10, before=6, silent=(6, 0))
    visible = torch.ones(2, 1, 1, grid.tokens, dtype=torch.bool)
    visible[1, ..., 3:6] = False
    for dtype, bound in ((torch.float32, 2e-5), (torch.bfloat16, 0.05)):
        q, k, v = tensors(grid, dtype)
        context = Context(mask=visible)
        got = attend_sequence(mechanism, q, k, v, [grid], context=context)
        assert got.dtype == dtype
        whole = [padded(q, grid).double(), k.double(), v.double()]
        want = mechanism.reference(*whole, grid, context=context, **choosing(mechanism, grid, q, k, v, context))
        assert (got.double() - want[:, :, grid.query_slice]).abs().max() < bound
    if not mechanism.one_mask:
        (q, k, v), rows = tensors(grid), visible.expand(-1, -1, grid.queries, -1)
        again = attend_sequence(mechanism, q, k, v, [grid], context=Context(mask=rows))
        plain = attend_sequence(mechanism, q, k, v, [grid], context=context)
        assert torch.allclose(again, plain, atol=2e-5)


@each
def test_gradients_of_fewer_queries(mechanism: Mechanism) -> None:
    grid = TokenGrid(6, 7, before=5, silent=(5, 0))
    inputs = [x.double().requires_grad_() for x in tensors(grid)]
    got = torch.autograd.grad(attend_sequence(mechanism, *inputs, [grid]).square().sum(), inputs)
    wide = [padded(inputs[0], grid), *inputs[1:]]
    chosen = choosing(mechanism, grid, *(x.detach() for x in inputs), Context())
    out = mechanism.reference(*wide, grid, **chosen)[:, :, grid.query_slice]
    want = torch.autograd.grad(out.square().sum(), inputs)
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(got, want, strict=True))


def test_silent_queries_cost_nothing() -> None:
    """Other tokens ask for all keys, where they ask."""
    grid = TokenGrid(16, 16, before=256, silent=(256, 0))
    asking = replace(grid, silent=(0, 0))
    assert (grid.queries, grid.pairs, grid.other_pairs) == (256, 256 * 512, 256 * 256)
    for mechanism in (ClearAttention(radius=3), HaloAttention(tile=4, halo=1), AgentAttention(num_agents=16)):
        saved = mechanism.flops(asking, 1, 8) - mechanism.flops(grid, 1, 8)
        assert saved == 4 * 256 * 512 * 8, mechanism
    assert SoftmaxAttention().flops(grid, 1, 8) == 4 * grid.pairs * 8
    routing = RoutingAttention(share=0.7, tile=4)
    assert routing.flops(grid, 1, 8) < 4 * grid.pairs * 8
    assert routing.share_on(grid) <= 0.7


def test_the_queries_of_silent_tokens_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = TokenGrid(16, 16, before=256, silent=(256, 0))
    rows = []
    own = F.scaled_dot_product_attention

    def count(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rows.append(query[..., 0].numel() * key.shape[-2])
        return own(query, key, *args, **kwargs)

    _, k, v = tensors(grid)
    monkeypatch.setattr(F, "scaled_dot_product_attention", count)
    for silent, computed in ((256, 0), (200, 56)):
        rows.clear()
        q = tensors(own_grid := replace(grid, silent=(silent, 0)))[0]
        attend_sequence(ClearAttention(radius=3), q, k, v, [own_grid], backend="tiled")
        assert sum(rows) == computed * grid.tokens * 4


SEVERAL = [
    (TokenGrid(6, 7, before=5, after=42 + 12), TokenGrid(6, 7, before=47, after=12)),
    (TokenGrid(4, 9, before=5 + 20, after=0), TokenGrid(5, 4, before=5, after=36)),
]


@each
@pytest.mark.parametrize("grids", SEVERAL, ids=["one size", "two sizes"])
def test_grids_of_one_sequence_see_each_other_exactly(mechanism: Mechanism, grids: tuple[TokenGrid, ...]) -> None:
    """Each grid's cells as if the rest were text; what lies on none by softmax."""
    if mechanism == RoutingAttention(share=0.9, tile=4) and grids is SEVERAL[1]:
        pytest.skip("a share that grids this small cannot meet")
    q, k, v = tensors(grids[0])
    if len(joined(mechanism, grids)) == 1:
        merged = TokenGrid(6, 7, 2, before=5, after=12)
        chosen = choosing(mechanism, merged, q, k, v, Context())
        want = mechanism.reference(q.double(), k.double(), v.double(), merged, **chosen)
    else:
        want = SoftmaxAttention().reference(q.double(), k.double(), v.double(), grids[0])
        for grid in grids:
            own = replace(grid, silent=(grid.before, grid.after))
            chosen = choosing(mechanism, own, q[:, :, grid.cell_slice], k, v, Context())
            part = mechanism.reference(q.double(), k.double(), v.double(), own, **chosen)
            want[:, :, grid.cell_slice] = part[:, :, grid.cell_slice]
    got = attend_sequence(mechanism, q, k, v, grids)
    assert torch.allclose(got.double(), want, atol=2e-5)


def test_which_grids_are_frames_of_one() -> None:
    routing, clear = RoutingAttention(), ClearAttention(radius=3)
    same, other = SEVERAL
    assert joined(routing, same) == [TokenGrid(6, 7, 2, before=5, after=12)]
    assert joined(routing, same[::-1]) == [TokenGrid(6, 7, 2, before=5, after=12)]
    assert joined(routing, other) == other
    apart = (TokenGrid(6, 7, before=5, after=43), TokenGrid(6, 7, before=48))
    assert joined(routing, apart) == apart
    assert joined(clear, same) == same


def test_what_several_grids_cost() -> None:
    clear, grids = ClearAttention(radius=3), SEVERAL[0]
    alone = [replace(grid, silent=(grid.before, grid.after)) for grid in grids]
    rest = grids[0].tokens - 2 * 42
    want = sum(clear.flops(grid, 2, 8) for grid in alone) + 4 * rest * grids[0].tokens * 2 * 8
    assert flops_of_sequence(clear, grids, 2, 8, Context()) == want
    full = 4 * grids[0].tokens ** 2 * 2 * 8
    assert flops_of_sequence(SoftmaxAttention(), grids, 2, 8, Context()) == full
    assert want < full


def test_memories_are_of_one_grid_each() -> None:
    """What a mechanism keeps for one grid would be of the wrong shape for another."""
    memory: dict[str, Any] = {}
    grids = SEVERAL[1]
    q, k, v = tensors(grids[0])
    attend_sequence(RoutingAttention(top_k=2, tile=4), q, k, v, grids, context=Context(memory=memory))
    assert set(memory) == {"grid 0", "grid 1"}


def test_wrong_silence_is_refused() -> None:
    for silent in ((6, 0), (0, 1), (-1, 0)):
        with pytest.raises(ValueError, match=r"silent must be at most the other tokens on each side, \(5, 0\)"):
            TokenGrid(3, 4, before=5, silent=silent)


def test_the_references_agree() -> None:
    grid = FEWER[2]
    q, k, v = (x.double() for x in tensors(grid))
    got = reference_sequence(ClearAttention(radius=3), q, k, v, [grid])
    assert torch.allclose(got, attend_sequence(ClearAttention(radius=3), q, k, v, [grid]))
