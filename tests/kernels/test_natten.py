"""The natten backend: our numbers from NATTEN's kernels, and every call it can't take is refused with the reason."""

import builtins
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tolerances import assert_close
from torch import Tensor
from torch.nn.attention import flex_attention

from diffattn import ClearAttention, NeighborhoodAttention, TokenGrid
from diffattn.kernels import BACKENDS, choose, window_attention
from diffattn.kernels.call import WindowCall, window_call
from diffattn.kernels.natten import Axis, natten_axis
from diffattn.mechanisms.base import Context
from diffattn.mechanisms.softmax import softmax_reference

GRID = TokenGrid(6, 9)

natten = pytest.importorskip("natten", reason="needs NATTEN: pip install 'diffattn[natten]'")


@pytest.fixture(autouse=True)
def eager_flex(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention by plain operations, without a compilation for each case."""
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


def tensors(grid: TokenGrid, dtype: torch.dtype = torch.float32, dim: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(3, 2, 3, grid.tokens, dim, dtype=dtype)
    return q, k, v


def call_of(grid: TokenGrid = GRID, dim: int = 8, mask: Tensor | None = None, **options: Any) -> WindowCall:
    q, k, v = tensors(grid, dim=dim)
    pattern = NeighborhoodAttention(**{"kernel_size": 3, **options}).pattern(grid)
    return window_call(q, k, v, grid, pattern, 0.3, mask, None)


@pytest.mark.parametrize(
    ("grid", "options"),
    [
        (TokenGrid(7, 10), {"kernel_size": 3}),
        (TokenGrid(7, 10, before=4, after=2), {"kernel_size": (4, 5), "dilation": (1, 2)}),
        (TokenGrid(7, 10, before=3), {"kernel_size": 3, "dilation": (2, 3), "is_causal": (False, True)}),
        (TokenGrid(8, 6, after=3), {"kernel_size": 100, "dilation": 2}),
        (TokenGrid(7, 10, before=3), {"kernel_size": 100}),
        (TokenGrid(1, 13, before=2), {"kernel_size": 4}),
        (TokenGrid(13, 1), {"kernel_size": 5, "dilation": 2}),
        (TokenGrid(13, 1, before=1), {"kernel_size": 13, "is_causal": True}),
        (TokenGrid(7, 10, before=3), {"kernel_size": (1, 4)}),
        (TokenGrid(7, 10, before=3), {"kernel_size": (4, 3), "dilation": (1, 10)}),
        (TokenGrid(5, 6, frames=4, before=3), {"kernel_size": (3, 4, 3), "is_causal": (True, False, False)}),
        (TokenGrid(5, 6, frames=4, before=3, after=1), {"kernel_size": (1, 3, 5)}),
        (TokenGrid(5, 6, frames=4), {"kernel_size": (2, 1, 3), "dilation": (2, 1, 2)}),
        (TokenGrid(5, 6, frames=4, after=2), {"kernel_size": (3, 1, 1)}),
    ],
    ids=str,
)
def test_equals_the_reference(grid: TokenGrid, options: dict[str, Any]) -> None:
    mechanism = NeighborhoodAttention(**options)
    q, k, v = tensors(grid)
    out = mechanism.attend(q, k, v, grid, scale=0.4, backend="natten")
    assert_close(out, mechanism.reference(q.double(), k.double(), v.double(), grid, scale=0.4))


def test_it_is_natten_that_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def na2d(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        seen.update(options, shape=tuple(q.shape))
        return torch.zeros_like(v)

    monkeypatch.setattr(natten, "na2d", na2d)
    grid = TokenGrid(7, 10, before=4)
    out = NeighborhoodAttention(kernel_size=3, dilation=2).attend(*tensors(grid), grid, backend="natten")
    assert out[:, :, 4:].abs().max() == 0 < out[:, :, :4].abs().min()
    assert seen["shape"] == (2, 7, 10, 3, 8) and seen["additional_keys"].shape == (2, 4, 3, 8)
    assert (seen["kernel_size"], seen["dilation"], seen["is_causal"]) == ((3, 3), (2, 2), (False, False))


def test_pooled_keys_are_additional_keys() -> None:
    grid = TokenGrid(6, 7, before=2)
    mechanism = NeighborhoodAttention(kernel_size=3)
    q, k, v = tensors(grid)
    pooled = torch.randn(2, 2, 3, 5, 8)
    out = window_attention(
        q, k, v, grid, mechanism.pattern(grid), scale=0.3, backend="natten", pooled=(pooled[0], pooled[1])
    )
    mask = torch.cat([mechanism.mask(grid), torch.ones(grid.tokens, 5, dtype=torch.bool)], dim=1)
    mask[:2, grid.tokens :] = False
    keys, values = torch.cat([k, pooled[0]], dim=2), torch.cat([v, pooled[1]], dim=2)
    assert_close(out, softmax_reference(q, keys, values, scale=0.3, mask=mask))


def test_bfloat16() -> None:
    grid = TokenGrid(9, 6, before=3)
    mechanism = NeighborhoodAttention(kernel_size=(4, 3))
    q, k, v = tensors(grid, torch.bfloat16, dim=16)
    out = mechanism.attend(q, k, v, grid, backend="natten")
    assert out.dtype == torch.bfloat16
    assert_close(out, mechanism.reference(q.double(), k.double(), v.double(), grid))


@pytest.mark.parametrize(
    ("size", "kernel_size", "dilation", "expected"),
    [
        (9, 3, 1, Axis(3, 1, False)),
        (9, 12, 1, Axis(9, 1, False)),
        (9, 4, 2, Axis(4, 2, False)),
        (9, 5, 2, None),  # rests of five and of four cells
        (8, 5, 2, Axis(4, 2, False)),
        (9, 2, 9, Axis(1, 1, False)),
        (1, 1, 1, Axis(1, 1, False)),
    ],
)
def test_windows_beyond_the_axis(size: int, kernel_size: int, dilation: int, expected: Axis | None) -> None:
    assert natten_axis(size, kernel_size, dilation, False) == expected


NO_MASK = torch.ones(54, dtype=torch.bool)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            lambda: replace(call_of(), pattern=ClearAttention(radius=3).pattern(TokenGrid(4, 4))),
            "neighborhood attention alone",
        ),
        (lambda: replace(call_of(dilation=2), pattern=call_of(dilation=2).pattern.grouped()), "neighborhood"),
        (lambda: call_of(mask=NO_MASK), "takes no mask"),
        (lambda: call_of(TokenGrid(9, 9), kernel_size=5, dilation=2), r"kernel_size \* dilation <= cells .* grid 9x9"),
        (lambda: call_of(kernel_size=1), "more than one cell"),
        (lambda: call_of(TokenGrid(1, 5), kernel_size=9, is_causal=True), "does not run on a CPU"),
        (lambda: call_of(dim=12), "a power of two from 8 to 512, got 12 for queries"),
    ],
)
def test_refusals(make: Callable[[], WindowCall], reason: str) -> None:
    call = make()
    with pytest.raises(
        ValueError, match=f"backend='natten' can't serve this call: .*{reason}.*can: auto, dense, tiled"
    ):
        choose.run(call, "natten")


def test_gradients_on_a_cpu_are_refused() -> None:
    q = torch.randn(1, 1, 12, 8, requires_grad=True)
    with pytest.raises(ValueError, match="no backward pass on cpu"):
        NeighborhoodAttention(kernel_size=2).attend(q, q, q, TokenGrid(3, 4), backend="natten")


def test_a_missing_natten_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    found = builtins.__import__

    def missing(name: str, *args: Any, **options: Any) -> Any:
        if name.split(".")[0] == "natten":
            raise ImportError("No module named 'natten'")
        return found(name, *args, **options)

    monkeypatch.delitem(sys.modules, "natten")
    monkeypatch.setattr(builtins, "__import__", missing)
    grid = TokenGrid(3, 4)
    with pytest.raises(ValueError, match=r"not installed.*pip install 'diffattn\[natten\]'.*can: auto, dense, tiled"):
        NeighborhoodAttention(kernel_size=2).attend(*tensors(grid), grid, backend="natten")


def test_a_mechanism_of_another_rule_does_not_offer_it() -> None:
    assert "natten" not in ClearAttention(radius=2).backends
    assert "natten" in NeighborhoodAttention(kernel_size=3).backends


def test_auto_takes_it_on_cuda_with_its_library_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    call = call_of(TokenGrid(40, 40), dilation=2)
    assert choose.choose(call).backend != "natten" and not choose.takes_natten(call, "auto")
    assert choose.takes_natten(call, "natten")
    monkeypatch.setattr(choose, "natten_has_kernel", lambda call: True)
    assert choose.choose(call).backend == "natten" and choose.takes_natten(call, "auto")
    assert not choose.takes_natten(call, "tiled")


def test_a_device_of_its_own_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """`natten_has_kernel` by a stand-in for tensors on CUDA."""

    class OnCuda(torch.Tensor):
        device = torch.device("cuda")  # type: ignore[assignment]

    call = call_of(TokenGrid(40, 40))
    there = replace(call, q=call.q.as_subclass(OnCuda))
    for library in (False, True):
        monkeypatch.setattr(choose, "has_library", lambda library=library: library)
        monkeypatch.setattr("diffattn.kernels.natten.has_library", lambda library=library: library)
        assert choose.natten_has_kernel(there) is library
        assert not choose.natten_has_kernel(call)
    assert BACKENDS["natten"].refuses(there) is None
    explained = NeighborhoodAttention(kernel_size=3, dilation=2).explain_backend(
        there.q, there.k, there.v, there.grid, "auto", Context()
    )
    assert explained == "natten: NATTEN has a kernel for this pattern"
