"""The xformers backend, by a stand-in that holds its callers to what xformers 0.0.35 asks for."""

import builtins
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from diffattn import ClearAttention, HaloAttention, NeighborhoodAttention, TokenGrid
from diffattn.kernels import BACKENDS
from diffattn.kernels.call import window_call
from diffattn.kernels.xformers import mask_as_bias, xformers_attention, xformers_refuses


class StandIn(types.ModuleType):
    """`xformers.ops` with the one function that is called."""

    calls = 0

    def memory_efficient_attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_bias: Tensor, p: float = 0.0, scale: float | None = None
    ) -> Tensor:
        type(self).calls += 1
        b, m, h, _ = query.shape  # batch, tokens, heads, head dimension
        assert key.shape[:3] == value.shape[:3] == (b, key.shape[1], h)
        assert all(x.shape[-1] % 8 == 0 and x.stride(-1) == 1 and x.stride(-2) % 8 == 0 for x in (query, key, value))
        assert attn_bias.shape == (b, h, m, key.shape[1]), "it does not broadcast"
        assert attn_bias.dtype == query.dtype
        alignment = 128 // torch.finfo(attn_bias.dtype).bits
        assert attn_bias.stride(-1) == 1 and all(step % alignment == 0 for step in attn_bias.stride()[:-1])
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_bias, scale=scale).transpose(1, 2)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    package, ops = types.ModuleType("xformers"), StandIn("xformers.ops")
    package.ops = ops  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    monkeypatch.setattr(StandIn, "calls", 0)
    return StandIn


@pytest.mark.parametrize("mask", [None, "bool", "bias"])
@pytest.mark.parametrize("grid", [TokenGrid(9, 70, before=5), TokenGrid(4, 9, frames=3, after=2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_equals_the_reference(
    grid: TokenGrid, mask: str | None, dtype: torch.dtype, disc: Any, make_case: Any, tolerance: Any, stand_in: Any
) -> None:
    case = make_case(grid, disc(4), batch=2, heads=3, dim=16, pooled=3, mask=mask, dtype=dtype, grad=True)
    out = xformers_attention(case.call)
    assert stand_in.calls > 0 and out.dtype == dtype
    assert (out - case.expected).abs().max() <= tolerance[dtype]
    if dtype == torch.float64:
        weight = torch.randn_like(case.expected)
        expected = torch.autograd.grad(case.expected, case.leaves, weight)
        for left, right in zip(torch.autograd.grad(out, case.leaves, weight), expected, strict=True):
            assert (left - right).abs().max() <= tolerance[dtype]


@pytest.mark.parametrize(
    "mechanism", [NeighborhoodAttention(kernel_size=(4, 3)), HaloAttention(tile=8, halo=1)], ids=str
)
def test_serves_every_pattern(mechanism: Any, stand_in: Any) -> None:
    grid = TokenGrid(21, 34, before=2)
    q, k, v = torch.randn(3, 1, 2, grid.tokens, 8)
    pattern = mechanism.pattern(grid)
    out = xformers_attention(window_call(q, k, v, grid, pattern, 8**-0.5, None, None))
    assert stand_in.calls > 0
    assert (out - mechanism.reference(q.double(), k.double(), v.double(), grid)).abs().max() < 2e-5
    assert "xformers" in mechanism.backends


@pytest.mark.parametrize("keys", [1, 8, 13])
def test_rows_of_the_bias_are_aligned(keys: int) -> None:
    mask = torch.rand(2, 3, 5, keys) > 0.4
    bias = mask_as_bias(mask, torch.empty(0, dtype=torch.bfloat16))
    assert bias.dtype == torch.bfloat16 and bias.stride(-2) % 8 == 0
    assert torch.equal(bias == 0, mask) and torch.equal(bias == -torch.inf, ~mask)
    added = torch.randn(2, 3, 5, keys)
    assert torch.equal(mask_as_bias(added, added), added)


def test_refusals(stand_in: Any, disc: Any, make_case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = TokenGrid(4, 4)
    assert xformers_refuses(make_case(grid, disc(2)).call) is None
    assert "head sizes divisible by 8, got 12 and 12" in str(xformers_refuses(make_case(grid, disc(2), dim=12).call))
    case = make_case(grid, disc(2), dtype=torch.float32)
    assert BACKENDS["xformers"].refuses(case.call) == "it runs on cuda, and the tensors are on cpu"

    def missing(name: str, *args: Any, **options: Any) -> Any:
        if name.split(".")[0] == "xformers":
            raise ImportError("No module named 'xformers'")
        return found(name, *args, **options)

    found = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", missing)
    assert "pip install 'diffattn[xformers]'" in str(xformers_refuses(case.call))


def test_it_is_never_chosen_by_itself_and_can_be_named() -> None:
    assert "xformers" in ClearAttention(radius=2).backends
    grid = TokenGrid(4, 4)
    q = torch.randn(1, 1, 16, 8)
    with pytest.raises(ValueError, match="it runs on cuda, and the tensors are on cpu; can: auto, dense, tiled"):
        ClearAttention(radius=2).attend(q, q, q, grid, backend="xformers")
