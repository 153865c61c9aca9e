"""`scripts/pasd_cost.py`: what its tables say follows from counts of its own."""

import importlib.util
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "pasd_cost.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("pasd_cost", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_full_size_rows_are_what_was_counted(script):
    side = 128
    released, cached, windowed = (teraflops * 1e12 for _, teraflops in script.flops_table(side, 3, "full"))
    convolutions = [
        (3, 16, 1),
        (16, 16, 1),
        (16, 32, 2),
        (32, 32, 2),
        (32, 96, 4),
        (96, 96, 4),
        (96, 256, 8),
        (256, 320, 8),
    ]
    encode = sum(2 * 9 * a * b * (side // f) ** 2 for a, b, f in convolutions)
    rgbs = sum(2 * 9 * 3 * c * (side // f) ** 2 for c, f in ((32, 2), (96, 4), (256, 8)))
    assert released - cached == pytest.approx(20 * 2 * (encode + rgbs) - encode)
    # at 16 and 8 cells a side: 3 layers of own and pixel-aware self-attention and attention to the residual each
    saved = sum(3 * 3 * 4 * (cells**4 - 9 * cells**2) * width for cells, width in ((16, 320), (8, 640)))
    assert cached - windowed == pytest.approx(20 * 2 * saved)


def test_the_measured_rows_compare_one_model_with_itself(script):
    (released, _, off), (cached, seconds, zero), (windows, _, error) = script.measure(64, 3, 1)
    assert zero == 0.0 and off < 1e-5 and error > 1e-3 and len(seconds) == 1
    assert (released, cached, windows) == ("released pattern", "condition encoded once", "and windows")
    assert torch.is_grad_enabled()
