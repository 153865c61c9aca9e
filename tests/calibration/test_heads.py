"""A mechanism for every head, on the bundled pipeline."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline

import diffattn
from diffattn import ClearAttention, PerHeadAttention, RoutingAttention, SoftmaxAttention, TokenGrid, tiny
from diffattn.calibration import calibrate_heads
from diffattn.calibration.heads import HeadErrors
from diffattn.measure import psnr

PROMPTS = ["a red circle at the top on a blue background", "a green square in the center on a white background"]
CALL: dict[str, Any] = {**tiny.defaults("flux"), "height": 64, "width": 64, "num_inference_steps": 2}
SEVERAL = [ClearAttention(radius=1, pool=2), ClearAttention(radius=3, pool=2)]


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = FluxPipeline.from_pretrained(tiny.path("flux"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _errors(grid: TokenGrid, full: torch.Tensor, others: list[torch.Tensor], mechanisms: list[Any]) -> HeadErrors:
    found = HeadErrors(mechanisms)
    found.note(0, grid, full, others)
    return found


def test_the_head_that_loses_least_is_cut_first() -> None:
    grid = TokenGrid(6, 6)
    full = torch.ones(1, 3, 36, 4)
    cheap = full + torch.tensor([0.3, 0.0, 0.1])[None, :, None, None]
    found = _errors(grid, full, [full, cheap], [SoftmaxAttention(), ClearAttention(radius=2)])
    assert found.errors[0][:, 1] == pytest.approx(np.array([0.3, 0.0, 0.1]) ** 2 / 3)
    one = float(found.operations(0)[1] / found.operations(0)[0])
    for count, want in ((1, [0, 1, 0]), (2, [0, 1, 1]), (3, [1, 1, 1])):
        share = (3 - count + count * one) / 3
        chosen = found.within(share + 1e-6)
        assert chosen[0].tolist() == want and found.share(chosen) == pytest.approx(share)
    with pytest.raises(ValueError, match=r"cheapest mechanisms take .*above share=0\.01"):
        found.within(0.01)


def test_a_layer_of_one_mechanism_is_that_mechanism() -> None:
    found = HeadErrors([SoftmaxAttention(), *SEVERAL])
    assert found.mechanism(np.array([2, 2, 2])) == SEVERAL[1]
    assert found.mechanism(np.array([2, 0, 2])) == PerHeadAttention(
        mechanisms=(SoftmaxAttention(), SEVERAL[1]), heads=(1, 0, 1)
    )


def test_a_budget_is_kept_and_its_figures_are_those_of_real_runs(pipe: Any) -> None:
    recipe = calibrate_heads(pipe, PROMPTS, SEVERAL, share=0.75, progress=False, **CALL)
    assert recipe.made["share"] <= 0.75
    read = diffattn.Recipe.from_dict(json.loads(json.dumps(recipe.to_dict())))
    assert read.models == recipe.models

    def draw(number: int) -> np.ndarray:
        generator = torch.Generator().manual_seed(number)
        image: np.ndarray = pipe(PROMPTS[number], generator=generator, output_type="np", **CALL).images[0]
        return image

    full = [draw(number) for number in range(2)]
    with diffattn.apply(pipe, read):
        images = [draw(number) for number in range(2)]
    found = [psnr(one, other) for one, other in zip(images, full, strict=True)]
    assert found == pytest.approx(recipe.made["psnr"], abs=1e-3)
    assert min(found) > 20
    assert (draw(0) == full[0]).all()


@pytest.mark.parametrize(
    ("mechanisms", "options", "message"),
    [
        ([], {"share": 0.5}, "expected mechanisms of single heads without weights, got none"),
        (["per_head"], {"share": 0.5}, "got per_head"),
        (SEVERAL, {"share": 1.5}, "share must be above 0 and below 1, got 1.5"),
        (SEVERAL, {"share": 0.5, "component": "unet"}, "has no part 'unet'"),
        ([RoutingAttention(share=0.9)], {"share": 0.1}, r"cheapest mechanisms take .* above share=0\.1"),
    ],
)
def test_what_does_not_fit_is_refused(pipe: Any, mechanisms: Any, options: Any, message: str) -> None:
    if mechanisms == ["per_head"]:
        mechanisms = [PerHeadAttention(mechanisms="softmax,linear")]
    with pytest.raises(ValueError, match=message):
        calibrate_heads(pipe, PROMPTS, mechanisms, progress=False, **options, **CALL)
