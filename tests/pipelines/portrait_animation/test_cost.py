"""`scripts/portrait_cost.py`: both call patterns give one video, and the tables follow from counts of their own."""

import importlib.util
from pathlib import Path

import pytest
import torch
from diffattn.pipelines.portrait_animation import Sizes
from golden_portrait import tiny_sizes, tiny_weights
from golden_vectors import OWN_SET

FOLDER = OWN_SET / "xportrait"
SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "portrait_cost.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("portrait_cost", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
@pytest.mark.slow
def test_the_released_pattern_gives_the_same_video_with_many_more_calls(script):
    """With the recorded weights, over two windows that overlap."""
    from diffattn.pipelines.portrait_animation.checkpoint.convert import load_networks

    run = script.Run(script.GOLDEN, 20, 2)
    recorded = load_networks(tiny_weights(FOLDER), FOLDER, tiny_sizes(FOLDER), null_text=torch.zeros(1, 5, 24))
    run.pipe.register_modules(**recorded)
    released, ours = (script.count_calls(run, pattern) for pattern in script.PATTERNS)
    assert released == {"VAE encoder": 40, "appearance network": 2 * 32, "condition encoders": 2 * 2 * 32}
    assert ours == {"VAE encoder": 1, "appearance network": 2, "condition encoders": 2 * 20}
    frames = [run(pattern) for pattern in script.PATTERNS]
    assert frames[0].shape == (20, 3, 128, 128) and frames[0].std() > 0.01
    torch.testing.assert_close(frames[0], frames[1], atol=1e-4, rtol=0)


def test_the_sizes_are_those_of_the_recorded_cases(script):
    recorded = tiny_sizes(FOLDER)
    names = ("channels", "heads", "text_tokens", "text_width", "latent_side", "vae_channels", "vae_layers", "positions")
    assert all(getattr(script.GOLDEN, name) == getattr(recorded, name) for name in names)


def test_full_size_parts_differ_by_the_calls_alone(script):
    """20 frames in two windows of 16; 1000 // 3 gives timesteps 1, 334, 667."""
    table = script.full_size_flops(20, 3, Sizes(channels=(32, 32, 32, 64), heads=2, latent_side=16))
    released, ours = (table[pattern] for pattern in script.PATTERNS)
    ratios = {name: released[name] / ours[name] for name in released}
    assert ratios.pop("appearance network") == pytest.approx(32)
    assert ratios.pop("VAE encoder") == pytest.approx(40)
    assert ratios.pop("condition encoders of the ControlNets") == pytest.approx(3 * 32 / 20)
    assert set(ratios.values()) == {1.0}
    encoder = [(3, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 2), (32, 96, 4), (96, 96, 4), (96, 256, 8), (256, 32, 8)]
    once = 2 * sum(2 * 9 * a * b * (128 // f) ** 2 for a, b, f in encoder)
    assert ours["condition encoders of the ControlNets"] == pytest.approx(20 * once / 1e12)
