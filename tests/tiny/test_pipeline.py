"""The shipped Flux pipeline: it loads as any other, is small, and draws what unseen captions say."""

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_training.export import folder_size, name_as_the_hub_does

from diffattn import tiny
from diffattn.tiny.evaluate import generate, judge
from diffattn.tiny.shapes import held_out_scenes

PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2")
PROMPT = "a large red circle at the top left on a blue background"


def load(**options: object) -> FluxPipeline:
    """The shipped pipeline without a progress bar."""
    pipeline = FluxPipeline.from_pretrained(tiny.path("flux"), **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: FluxPipeline, seed: int, **overrides: object) -> np.ndarray:
    """One image of PROMPT as floats in 0..1."""
    arguments = tiny.defaults("flux") | {"num_inference_steps": 3} | overrides
    return pipeline(PROMPT, generator=torch.Generator().manual_seed(seed), output_type="np", **arguments).images[0]


@pytest.fixture(scope="module")
def pipeline() -> FluxPipeline:
    """The shipped pipeline in float32."""
    return load()


def test_folder_is_at_most_twelve_megabytes():
    assert folder_size(tiny.path("flux")) <= 12_000_000


@pytest.mark.parametrize("name", ["flux", "video"])
def test_every_release_of_transformers_knows_the_names_in_the_text_encoder(name):
    with safe_open(tiny.path(name) / "text_encoder" / "model.safetensors", "pt") as file:
        assert all(key.startswith("text_model.") for key in file.keys())  # noqa: SIM118


def test_a_text_encoder_is_renamed_once(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"final_layer_norm.bias": torch.arange(3.0)}, file)
    for _ in range(2):
        name_as_the_hub_does(file)
        ((key, weight),) = load_file(file).items()
        assert key == "text_model.final_layer_norm.bias" and weight.tolist() == [0, 1, 2]


def test_loads_in_float32(pipeline):
    for part in PARTS:
        assert {parameter.dtype for parameter in getattr(pipeline, part).parameters()} == {torch.float32}


def test_native_size_has_at_least_256_image_tokens(pipeline):
    side = tiny.defaults("flux")["height"] // (2 * pipeline.vae_scale_factor)
    assert side * side >= 256


def test_same_seed_gives_the_same_picture(pipeline):
    first = draw(pipeline, 0)
    assert first.shape == (128, 128, 3)
    assert np.array_equal(first, draw(pipeline, 0))
    assert not np.array_equal(first, draw(pipeline, 1))


@pytest.mark.slow
def test_loads_and_draws_in_bfloat16(pipeline):
    half = load(dtype=torch.bfloat16)
    for part in PARTS:
        assert {parameter.dtype for parameter in getattr(half, part).parameters()} == {torch.bfloat16}
    assert np.isfinite(draw(half, 0)).all()


def test_true_guidance_accepts_an_empty_negative_prompt(pipeline):
    assert np.isfinite(draw(pipeline, 0, negative_prompt="", true_cfg_scale=2.0)).all()


def test_each_caption_word_is_one_token(pipeline):
    for tokenizer, extra in ((pipeline.tokenizer, 2), (pipeline.tokenizer_2, 1)):
        assert len(tokenizer(PROMPT).input_ids) == len(PROMPT.split()) + extra


@pytest.mark.slow
def test_draws_unseen_captions(pipeline):
    scenes = held_out_scenes(8, seed=1)
    _, share = judge(generate(pipeline, scenes, seed=1, num_inference_steps=10), scenes)
    assert share >= 0.75


def test_defaults_are_a_fresh_copy():
    tiny.defaults("flux")["height"] = 1
    assert tiny.defaults("flux")["height"] == 128


@pytest.mark.parametrize("ask", [tiny.path, tiny.defaults])
def test_unknown_name_lists_the_known_ones(ask):
    with pytest.raises(ValueError, match="one of 'flux', 'video', 'wan'; got 'sdxl'"):
        ask("sdxl")
