"""What only a CUDA device can show: the same numbers from the same code, in half precision too, with gradients."""

from pathlib import Path

import pytest
import torch
from context_parallel_ranks import ON_GPUS, RANKS, run_ranks
from models import flux
from tolerances import TOLERANCE

import diffattn
from diffattn import ClearAttention, NeighborhoodAttention, TokenGrid
from diffattn.kernels.natten import has_library
from diffattn.mechanisms.base import Context

pytestmark = pytest.mark.gpu

GRID = TokenGrid(40, 56, before=77, after=3)


WINDOWS = [
    ClearAttention(radius=6),
    NeighborhoodAttention(kernel_size=(7, 6)),
    NeighborhoodAttention(kernel_size=5, dilation=(3, 2), is_causal=(False, True)),
]


def need(backend: str) -> None:
    """Skip where what the backend stands on is not installed."""
    if backend == "xformers":
        pytest.importorskip("xformers.ops", reason="needs xformers")
    if backend == "natten" and not has_library():
        pytest.skip("needs NATTEN built with its library")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("mechanism", "backend"), [(m, name) for m in WINDOWS for name in m.backends], ids=str)
def test_backends_equal_the_reference(mechanism: ClearAttention, backend: str, dtype: torch.dtype) -> None:
    need(backend)
    exact = torch.randn(3, 2, 2, GRID.tokens, 64, dtype=torch.float64, device="cuda")
    tensors = [x.to(dtype).requires_grad_() for x in exact]
    doubles = [x.detach().double().requires_grad_() for x in tensors]
    out = mechanism.attend(*tensors, GRID, backend=backend)  # type: ignore[misc]
    reference = mechanism.reference(*doubles, GRID)  # type: ignore[misc]
    assert (out.double() - reference).abs().max() < TOLERANCE[dtype]
    weight = torch.randn_like(reference)
    got = torch.autograd.grad((out.double() * weight).sum(), tensors)
    want = torch.autograd.grad((reference * weight).sum(), doubles)
    for left, right in zip(got, want, strict=True):
        assert (left.double() - right).abs().max() / right.abs().max() < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("mechanism", WINDOWS, ids=str)
@pytest.mark.parametrize("backend", ["auto", "tiled", "flex", "xformers"])
def test_padded_text(mechanism: ClearAttention, backend: str) -> None:
    need(backend)
    q, k, v = torch.randn(3, 2, 2, GRID.tokens, 64, device="cuda")
    visible = torch.ones(2, 1, 1, GRID.tokens, dtype=torch.bool, device="cuda")
    visible[0, ..., 60:77], visible[1, ..., 10:77] = False, False
    context = Context(mask=visible)
    out = mechanism.attend(q, k, v, GRID, backend=backend, context=context)
    reference = mechanism.reference(q.double(), k.double(), v.double(), GRID, context=context)
    assert (out - reference).abs().max() < TOLERANCE[torch.float32]


def test_auto_takes_natten_where_it_has_a_kernel() -> None:
    need("natten")
    q = torch.empty(1, 1, GRID.tokens, 64, device="cuda", dtype=torch.bfloat16)
    for mechanism in WINDOWS:
        chosen = mechanism.explain_backend(q, q, q, GRID, "auto", Context())
        assert chosen.startswith("natten:") == isinstance(mechanism, NeighborhoodAttention)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_on_the_device(dtype: torch.dtype) -> None:
    tiny = flux()
    model = tiny.model.to("cuda", dtype)
    inputs = {
        key: value.to("cuda", dtype if value.is_floating_point() and "ids" not in key else value.dtype)
        for key, value in tiny.inputs.items()
    }
    plain = model(**inputs, return_dict=False)[0]
    with diffattn.apply(model, "clear", radius=2):
        swapped = model(**inputs, return_dict=False)[0]
    assert swapped.isfinite().all() and not torch.equal(swapped, plain)
    assert torch.equal(model(**inputs, return_dict=False)[0], plain)


@pytest.mark.dist
@pytest.mark.skipif(torch.cuda.device_count() < RANKS, reason=f"needs {RANKS} CUDA devices")
def test_context_parallelism_over_nccl(tmp_path: Path) -> None:
    for found in run_ranks(tmp_path, "cuda"):
        assert set(found) == set(ON_GPUS)
        for name, result in found.items():
            assert "failed" not in result, result["failed"]
            if name == "ring":
                assert result["type"] == "NotImplementedError"
            else:
                assert result["error"] < 1e-4 and result["change"] > 1e-3, name
                assert result.get("restored", True), name
