"""Calibrations from end to end on the bundled pipeline, small: budgets, targets, guidance, resuming."""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_pipelines
import torch
from diffusers import FluxPipeline
from torch.nn import functional as F

import diffattn
from diffattn import ClearAttention, RoutingAttention, calibrate, tiny
from diffattn.calibration.probing import Prober
from diffattn.measure import psnr

PROMPTS = ["a red circle at the top on a blue background", "a green square in the center on a white background"]
CALL: dict[str, Any] = {**tiny.defaults("flux"), "height": 64, "width": 64, "num_inference_steps": 4}
NEAR, FAR = RoutingAttention(share=0.7, tile=2, pool=2), ClearAttention(radius=1, pool=2)
OPTIONS: dict[str, Any] = {"mechanisms": [NEAR, FAR], "reuse": (1, 2), "parts": 2, "progress": False, **CALL}


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = FluxPipeline.from_pretrained(tiny.path("flux"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, number: int) -> np.ndarray:
    generator = torch.Generator().manual_seed(number)
    image: np.ndarray = pipe(PROMPTS[number], generator=generator, output_type="np", **CALL).images[0]
    return image


@pytest.mark.slow
def test_a_budget_is_kept_and_its_figures_are_those_of_real_runs(pipe: Any) -> None:
    recipe = calibrate(pipe, PROMPTS, share=0.6, **OPTIONS)
    full = [draw(pipe, number) for number in range(2)]
    with diffattn.apply(pipe, recipe):
        images = [draw(pipe, number) for number in range(2)]
        summary = diffattn.summary(pipe)
    assert [psnr(one, other) for one, other in zip(images, full, strict=True)] == pytest.approx(
        recipe.made["psnr"], abs=1e-3
    )
    assert recipe.made["share"] <= 0.6
    left = sum(not row.swapped for row in summary.rows)  # layers that are full throughout
    layers = len(summary.rows)
    computed = ((summary.computed or 0) * (layers - left) + left) / layers
    assert computed == pytest.approx(recipe.made["share"], abs=1e-6)
    assert diffattn.Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


@pytest.mark.slow
def test_a_target_is_reached_by_the_cheapest_plan_that_was_tried(pipe: Any, tmp_path: Path) -> None:
    high = calibrate(pipe, PROMPTS, target=45, folder=tmp_path, **OPTIONS)
    assert statistics.median(high.made["psnr"]) >= 45
    low = calibrate(pipe, PROMPTS, target=30, folder=tmp_path, **OPTIONS)
    assert statistics.median(low.made["psnr"]) >= 30 and low.made["share"] < high.made["share"]


@torch.no_grad()
def test_one_layer_alone_by_hand() -> None:
    """A layer's error is what the model's output changes by, when that layer alone is swapped."""
    case = tiny_pipelines.flux(steps=2)
    calls: list[Any] = []
    hook = case.pipe.transformer.register_forward_hook(
        lambda module, args, kwargs, out: calls.append((kwargs, out[0])), with_kwargs=True
    )
    case.run()
    hook.remove()
    prober = Prober(case.pipe, "transformer", [ClearAttention(radius=1)], 1, None)
    with prober.watching():
        case.run()
    errors = prober.errors()
    assert errors.own.shape == (4, 1, 2) and errors.stale.shape == (4, 1, 2)
    assert (errors.stale[..., 0] == 0).all() and (errors.stale[..., 1] > 0).all()
    for layer, name in enumerate(prober.names):
        for step, (given, out) in enumerate(calls):
            with diffattn.apply(case.pipe.transformer, ClearAttention(radius=1), layers=name):
                got = case.pipe.transformer(**given)[0]
            assert errors.own[layer, 0, step] == pytest.approx(float(F.mse_loss(got, out)), rel=1e-3)
    weighed = errors.weighed()
    sigmas = case.pipe.scheduler.sigmas.tolist()
    moved = (sigmas[0] - sigmas[1]) ** 2
    np.testing.assert_allclose(weighed.own[..., 0], errors.own[..., 0] * moved, rtol=1e-5)


def test_guidance_in_two_calls_counts_both() -> None:
    case = tiny_pipelines.wan(steps=2)
    prober = Prober(case.pipe, "transformer", [ClearAttention(radius=1)], 1, None)
    with prober.watching():
        case.run()
    assert prober.errors().own.shape == (2, 1, 2) and prober.path.turn == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "target= in dB or share="),
        ({"target": 30, "share": 0.5}, "either target= in dB or share= of the pairs; got target=30 and share=0.5"),
        ({"share": 1.5}, "share"),
        ({"target": -3}, "target"),
        pytest.param({"share": 0.01, **OPTIONS}, "the cheapest choices take", marks=pytest.mark.slow),
        ({"share": 0.5, "reuse": (0,)}, "reuse"),
        ({"share": 0.5, "component": "vae2"}, "no part 'vae2'"),
    ],
)
def test_wrong_arguments_are_refused(pipe: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        calibrate(pipe, PROMPTS[:1], **{**CALL, **options})
    assert all(not row.swapped for row in diffattn.summary(pipe).rows)


SCRIPT = """
import json, sys, torch
from pathlib import Path
sys.path.insert(0, {tests!r})
from calibration.test_calibrate import OPTIONS, PROMPTS
from diffusers import FluxPipeline
import diffattn
pipe = FluxPipeline.from_pretrained(diffattn.tiny.path("flux"))
print("begun", flush=True)
diffattn.calibrate(pipe, PROMPTS, target=40, folder=Path({folder!r}), **OPTIONS).save({output!r})
"""


@pytest.mark.slow
def test_a_killed_calibration_goes_on_to_the_same_recipe(pipe: Any, tmp_path: Path) -> None:
    folder, output = tmp_path / "work", tmp_path / "recipe.json"
    script = SCRIPT.format(tests=str(Path(__file__).parents[1]), folder=str(folder), output=str(output))
    process = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 300
    while not (folder / "prompt-000.npz").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (folder / "prompt-000.npz").exists() and not output.exists()
    held = (folder / "prompt-000.npz").stat().st_mtime_ns
    resumed = calibrate(pipe, PROMPTS, target=40, folder=folder, **OPTIONS)
    assert (folder / "prompt-000.npz").stat().st_mtime_ns == held  # not measured again
    assert resumed == calibrate(pipe, PROMPTS, target=40, **OPTIONS)
    with pytest.raises(ValueError, match="a calibration with other parts"):
        calibrate(pipe, PROMPTS, target=40, folder=folder, **{**OPTIONS, "parts": 3})


def test_a_folder_with_other_things_is_left_alone(pipe: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="holds other things"):
        calibrate(pipe, PROMPTS, share=0.6, folder=tmp_path, **OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
