"""Every backend gives what explicit exponentials give under the dense mask."""

import pytest
import torch
from torch.nn.attention import flex_attention

from diffattn.grid import TokenGrid
from diffattn.kernels import BACKENDS, window_attention
from diffattn.kernels.dense import dense_attention
from diffattn.kernels.flex import flex_window_attention
from diffattn.kernels.tiled import tiled_attention

GRIDS = [
    TokenGrid(1, 1),
    TokenGrid(7, 9),
    TokenGrid(12, 20, before=3),
    TokenGrid(40, 1, after=2),
    TokenGrid(3, 33, before=1, after=4),
    TokenGrid(5, 6, frames=3, before=2, after=1),
]
PATTERNS = [
    ("disc", 3.5),
    ("disc", 99),
    ("lattice", 4),
    ("bricks", (2, 4, 8), 1),  # blocks of whole tiles
    ("bricks", (1, 6, 6), 2),  # whose sides are no powers of two
    ("bricks", (1, 2, 3), 2),  # tiles too small for blocks of their own
]


@pytest.fixture
def eager_flex(monkeypatch):
    """FlexAttention by plain operations: the same rule, no compilation, and float64."""
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    return lambda call: flex_window_attention(call, compiled=False)


@pytest.fixture
def backend(request, eager_flex):
    return {"dense": dense_attention, "tiled": tiled_attention, "flex": eager_flex}[request.param]


@pytest.fixture
def pattern(request):
    name, *sizes = request.param
    return request.getfixturevalue(name)(*sizes)


def check(case, result, tolerance):
    assert result.dtype == case.call.q.dtype
    assert result.shape == case.expected.shape
    assert (result - case.expected).abs().max() <= tolerance[case.call.q.dtype]


@pytest.mark.parametrize(("pooled", "mask"), [(0, None), (3, None), (0, "bool"), (3, "bias")])
@pytest.mark.parametrize("pattern", PATTERNS, indirect=True, ids=lambda p: "-".join(map(str, p)))
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("backend", ["dense", "tiled", "flex"], indirect=True)
def test_equals_the_reference(backend, grid, pattern, pooled, mask, make_case, tolerance):
    case = make_case(grid, pattern, batch=2, pooled=pooled, mask=mask)
    check(case, backend(case.call), tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pattern", [("disc", 4), ("bricks", (1, 4, 8), 1)], indirect=True, ids=lambda p: p[0])
@pytest.mark.parametrize("backend", ["dense", "tiled", "flex"], indirect=True)
def test_equals_the_reference_in_lower_precision(backend, dtype, pattern, make_case, tolerance):
    for mask in (None, "bool", "bias"):
        case = make_case(
            TokenGrid(11, 14, before=5), pattern, batch=2, heads=3, dim=32, pooled=2, mask=mask, dtype=dtype
        )
        check(case, backend(case.call), tolerance)


@pytest.mark.parametrize(("pooled", "mask"), [(0, None), (3, None), (0, "bool"), (3, "bias")])
@pytest.mark.parametrize("grid", [TokenGrid(1, 1), *GRIDS[2:]], ids=str)
@pytest.mark.parametrize("pattern", [("disc", 3), ("bricks", (1, 4, 8), 1)], indirect=True, ids=lambda p: p[0])
@pytest.mark.parametrize("backend", ["dense", "tiled"], indirect=True)
def test_gradients_equal_those_of_the_reference(backend, grid, pattern, pooled, mask, make_case, tolerance):
    case = make_case(grid, pattern, batch=2, pooled=pooled, mask=mask, grad=True)
    weight = torch.randn(case.expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = torch.autograd.grad(case.expected, case.leaves, weight)
    found = torch.autograd.grad(backend(case.call), case.leaves, weight)
    for name, left, right in zip(("q", "k", "v", "pooled k", "pooled v"), found, expected, strict=False):
        assert (left - right).abs().max() <= tolerance[torch.float64], name


@pytest.mark.parametrize("pattern", [("disc", 2), ("bricks", (1, 4, 8), 0)], indirect=True, ids=lambda p: p[0])
@pytest.mark.parametrize("backend", ["dense", "tiled", "flex"], indirect=True)
def test_a_query_that_may_see_nothing_gives_zeros(backend, pattern, make_case):
    case = make_case(TokenGrid(6, 6), pattern, mask="bool")
    case.call.mask.zero_() if case.call.mask.is_contiguous() else None
    assert not case.call.mask.any()
    assert backend(case.call).abs().max() == 0


def test_a_mask_that_differs_by_query_is_computed_densely_and_refused_elsewhere(disc, make_case, tolerance):
    case = make_case(TokenGrid(9, 8, before=2), disc(3), mask="query")
    check(case, dense_attention(case.call), tolerance)
    assert BACKENDS["dense"].refuses(case.call) is None
    for name in ("tiled", "flex"):
        case32 = make_case(TokenGrid(9, 8, before=2), disc(3), mask="query", dtype=torch.float32)
        assert "differs from query to query" in BACKENDS[name].refuses(case32.call)


@pytest.mark.parametrize("backend", ["auto", "dense", "tiled", "flex"])
@pytest.mark.slow
def test_several_heads_of_queries_may_share_one_of_keys(backend, disc, make_case, monkeypatch):
    if backend == "flex":
        monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
        monkeypatch.setattr("diffattn.kernels.choose.missing_compiler", lambda device: None)
    call = make_case(TokenGrid(9, 11, before=3), disc(3), heads=4, dtype=torch.float32).call
    k, v = call.k[:, ::2], call.v[:, ::2]
    options = {"scale": 0.3, "backend": backend, "mask": torch.rand(1, 1, 1, 102) > 0.2}
    repeated = (x.repeat_interleave(2, 1) for x in (k, v))
    want = window_attention(call.q, *repeated, call.grid, call.pattern, **options | {"backend": "dense"})
    got = window_attention(call.q, k, v, call.grid, call.pattern, **options)
    assert (got - want).abs().max() < 1e-5
