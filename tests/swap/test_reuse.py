"""`reuse=`: a layer's output kept from one step to the next."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline

import diffattn
from diffattn import ClearAttention, tiny

CALL = {**tiny.defaults("flux"), "height": 64, "width": 64, "num_inference_steps": 6}


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = FluxPipeline.from_pretrained(tiny.path("flux"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, prompt: Any = "a red circle at the top on a blue background", **options: Any) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    images: np.ndarray = pipe(prompt, generator=generator, output_type="np", **{**CALL, **options}).images
    return images


def test_the_steps_between_take_the_output_of_the_last_computed_one(pipe: Any) -> None:
    with diffattn.apply(pipe, "softmax", reuse=2):
        draw(pipe)
        calls = diffattn.summary(pipe).calls
        computed = diffattn.summary(pipe).computed
    layers = 6
    assert calls == {"swapped": 4 * layers, "with the output of an earlier step": 2 * layers}  # 0, 2, 4 and 5
    assert computed == pytest.approx(4 / 6)


@pytest.mark.parametrize("steps", [1, 2])
def test_first_and_last_step_are_computed(pipe: Any, steps: int) -> None:
    own = draw(pipe, num_inference_steps=steps)
    with diffattn.apply(pipe, "softmax", reuse=5):
        np.testing.assert_allclose(draw(pipe, num_inference_steps=steps), own, atol=1e-5)


def test_a_reuse_of_one_is_no_reuse(pipe: Any) -> None:
    with diffattn.apply(pipe, "clear", radius=3):
        own = draw(pipe)
    with diffattn.apply(pipe, "clear", radius=3, reuse=1):
        np.testing.assert_array_equal(draw(pipe), own)


def test_what_is_reused_is_what_the_layer_gave(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mechanism that gives its call's number: between computed steps the number stays."""
    given: list[int] = []
    seen: list[float] = []
    own = ClearAttention.attend

    def numbered(self: Any, q: Any, *rest: Any, **options: Any) -> Any:
        given.append(len(given))
        return torch.zeros_like(own(self, q, *rest, **options)) + given[-1]

    monkeypatch.setattr(ClearAttention, "attend", numbered)
    layer = pipe.transformer.single_transformer_blocks[-1].attn
    hook = layer.register_forward_hook(lambda module, args, out: seen.append(float(out.mean())))
    with diffattn.apply(pipe, ClearAttention(radius=3), layers="single_transformer_blocks.3.attn", reuse=3):
        draw(pipe)
    hook.remove()
    assert given == [0, 1, 2]  # steps 0, 3 and 5
    assert seen == [0, 0, 0, 1, 1, 2]


def test_each_prompt_and_each_run_has_its_own(pipe: Any) -> None:
    prompts = ["a red circle at the top on a blue background", "a green square in the center on a white background"]
    with diffattn.apply(pipe, "softmax", reuse=3):
        first = [draw(pipe, prompt) for prompt in prompts]
        again = [draw(pipe, prompt) for prompt in reversed(prompts)]
        longer = draw(pipe, prompts[0], height=96)
        after = draw(pipe, prompts[0])
    np.testing.assert_array_equal(first[0], again[1])
    np.testing.assert_array_equal(first[1], again[0])
    np.testing.assert_array_equal(first[0], after)
    assert longer.shape != after.shape


def test_a_batch_is_its_samples(pipe: Any) -> None:
    prompts = ["a red circle at the top on a blue background", "a green square in the center on a white background"]
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    with diffattn.apply(pipe, "softmax", reuse=2):
        both = pipe(prompts, generator=generators, output_type="np", **CALL).images
        one = pipe(prompts[1], generator=torch.Generator().manual_seed(4), output_type="np", **CALL).images[0]
    np.testing.assert_allclose(both[1], one, atol=1e-4)


def test_a_model_without_its_pipeline_has_no_steps(pipe: Any) -> None:
    with pytest.raises(ValueError, match="reuse= counts the steps of a pipeline; pass the pipeline"):
        diffattn.apply(pipe.transformer, "softmax", reuse=2)


@pytest.mark.parametrize("reuse", [0, -1, 1.5, "two"])
def test_wrong_numbers_are_refused(pipe: Any, reuse: Any) -> None:
    with pytest.raises(ValueError, match="reuse must be"):
        diffattn.apply(pipe, "softmax", reuse=reuse)
    with pytest.raises(ValueError, match="nothing to restore"):
        diffattn.restore(pipe)


def test_every_second_of_some_steps(pipe: Any) -> None:
    """Steps 1, 3 and 5 are swapped, and no two of them are within one step of each other: nothing is reused."""
    with diffattn.apply(pipe, "softmax", steps=slice(1, None, 2), reuse=2):
        draw(pipe)
        calls = diffattn.summary(pipe).calls
    assert "with the output of an earlier step" not in calls


def test_nothing_is_kept_after_the_last_step(pipe: Any) -> None:
    with diffattn.apply(pipe, "softmax", reuse=2) as handle:
        draw(pipe)
        [run] = {id(run): run for run in handle.layers[0].state.runs._runs.values()}.values()
        assert run.kept and not any("output" in memory for _, memory in run.kept.values())
