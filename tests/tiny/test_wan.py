"""The shipped Wan pipeline: stock diffusers loads it, it is small, and it shows what unseen captions say."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from safetensors import safe_open
from tiny_training.export import folder_size

import diffattn
from diffattn import TokenGrid, tiny
from diffattn.tiny.evaluate_video import generate_videos, judge_videos
from diffattn.tiny.moving import caption, set_apart_scenes

PROMPT = "a red circle moving sideways on a blue background"


@pytest.fixture(scope="module")
def pipeline() -> Any:
    pipeline = WanPipeline.from_pretrained(tiny.path("wan"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_folder_is_at_most_ten_megabytes() -> None:
    assert folder_size(tiny.path("wan")) <= 10_000_000


def test_every_weight_is_in_the_files(pipeline: Any) -> None:
    for part in ("transformer", "vae", "text_encoder"):
        model = getattr(pipeline, part)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        [file] = (tiny.path("wan") / part).glob("*.safetensors")
        with safe_open(file, "pt") as weights:
            stored = {name: weights.get_tensor(name).float() for name in weights.keys()}  # noqa: SIM118
        own = model.state_dict()
        assert set(stored) <= set(own)
        shared = {own[name].data_ptr() for name in stored}
        assert all(value.data_ptr() in shared for name, value in own.items() if name not in stored)
        assert all(torch.equal(own[name], value) for name, value in stored.items())


def test_each_caption_word_is_one_token(pipeline: Any) -> None:
    assert len(pipeline.tokenizer(PROMPT).input_ids) == len(PROMPT.split()) + 1


def test_attention_is_over_all_frames_at_once(pipeline: Any) -> None:
    with diffattn.apply(pipeline, "routing", share=0.3) as handle:
        pipeline(PROMPT, **tiny.defaults("wan") | {"num_inference_steps": 1}, output_type="latent")
        assert {layer.grid for layer in handle.layers} == {TokenGrid(12, 12, frames=9)}
        assert len(handle.layers) == 6


def test_same_seed_gives_the_same_video(pipeline: Any) -> None:
    first, again = (generate_videos(pipeline, [PROMPT], name="wan", num_inference_steps=1)[0] for _ in range(2))
    assert first.shape == (33, 48, 48, 3)
    assert np.array_equal(first, again)


@pytest.mark.slow
def test_shows_the_colours_and_shapes_of_unseen_captions(pipeline: Any) -> None:
    scenes = [set_apart_scenes()[number] for number in (3, 20, 41)]
    videos = generate_videos(pipeline, [caption(scene) for scene in scenes], name="wan", seed=5, num_inference_steps=10)
    findings, _ = judge_videos(videos, scenes)
    assert sum(finding.colour_kept and finding.shape_kept and finding.background_kept for finding in findings) >= 2
