"""What only a CUDA device can show: the same numbers from the same code, in half precision too, with gradients."""

from pathlib import Path

import pytest
import torch
from context_parallel_ranks import ON_GPUS, RANKS, run_ranks
from models import flux
from tolerances import TOLERANCE

import diffattn
from diffattn import ClearAttention, TokenGrid
from diffattn.kernels import BACKENDS

pytestmark = pytest.mark.gpu

GRID = TokenGrid(40, 56, before=77, after=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", sorted(BACKENDS))
def test_backends_equal_the_reference(backend: str, dtype: torch.dtype) -> None:
    mechanism = ClearAttention(radius=6)
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
