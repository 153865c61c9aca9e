"""Every model family with what needs no training: `routing`, and windows with `pool`."""

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hand_masks import TOLERANCE, HandReference, error, under_masks
from models import BUILDERS, Tiny
from releases import built
from torch import Tensor

import diffattn
from diffattn import ClearAttention, HaloAttention, NeighborhoodAttention, RoutingAttention
from diffattn.mechanisms.base import Mechanism

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")

PART = [
    RoutingAttention(top_k=1, tile=(1, 2, 2), pool=(1, 2, 2)),
    RoutingAttention(top_k=2, tile=2, pool=(1, 2, 1), query_tile=(1, 2, 3)),
    RoutingAttention(top_k=1, tile=2, pool=2, order="content"),
    ClearAttention(radius=1, pool=(1, 2, 2)),
    HaloAttention(tile=(1, 2, 2), halo=0, pool=(1, 2, 1)),
    NeighborhoodAttention(kernel_size=1, pool=2),
]
WHOLE = [RoutingAttention(share=1), ClearAttention(radius=100, pool=4), HaloAttention(tile=4, halo=100, pool=2)]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def build(name: str) -> Tiny:
    return BUILDERS[name]()


@functools.cache
def own_output(name: str) -> Tensor:
    with torch.no_grad():
        return build(name).run()


@pytest.fixture(params=built(BUILDERS))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def tiny(family: str) -> Iterator[Tiny]:
    own_output(family)
    yield build(family)
    if hasattr(build(family).model, "_diffattn"):
        diffattn.restore(build(family).model)


@torch.no_grad()
@pytest.mark.parametrize("mechanism", WHOLE, ids=str)
def test_all_tiles_are_the_model(tiny: Tiny, family: str, mechanism: Mechanism) -> None:
    handle = diffattn.apply(tiny.model, mechanism)
    assert error(tiny.run(), own_output(family)) < TOLERANCE
    assert all(layer.reached for layer in handle.layers)


@torch.no_grad()
@pytest.mark.parametrize("mechanism", PART, ids=str)
def test_the_model_with_the_reference_in_its_layers(
    tiny: Tiny, family: str, mechanism: Mechanism, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each layer's queries, keys and values against the reference with the same choice, and the whole model."""
    calls = 0
    own = type(mechanism).attend

    def checked(self: Any, q: Tensor, k: Tensor, v: Tensor, grid: Any, **options: Any) -> Tensor:
        nonlocal calls
        out = own(self, q, k, v, grid, **options)
        context, scale, chosen = options["context"], options.get("scale"), {}
        if isinstance(self, RoutingAttention) and not self.is_exact(grid):
            chosen["chosen"] = self.choose(q, k, v, grid, scale, context)
        wide = (tensor.double() for tensor in (q, k, v))
        asking = grid.query_slice
        want = self.reference(*wide, grid, scale=scale, context=context, **chosen)[:, :, asking]
        assert (out[:, :, asking] - want).abs().max() < 2e-5
        calls += 1
        return out

    options = {"mechanism": mechanism, "padding_apart": tiny.padding_apart}
    want = under_masks(tiny.run, (tiny.model, tiny.spatial), mode=HandReference, **options)
    monkeypatch.setattr(type(mechanism), "attend", checked)
    diffattn.apply(tiny.model, mechanism)
    got = tiny.run()
    assert calls > 0
    assert error(got, want) < TOLERANCE
    # on a line in time a block across two rows is a single cell, its own mean
    exact = mechanism.pool == (1, 2, 1) and all(t.rows == 1 for layout in tiny.spatial.values() for t in layout)
    assert (error(got, own_output(family)) > 1e-3) != exact
