"""The bundled Wan pipeline's world as samples."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from diffattn.distill.data.moving_clips import Moving, clip_of, encode, held_out
from diffusers import WanPipeline

from diffattn import tiny
from diffattn.tiny.moving import caption, is_set_apart, scenes, set_apart_scenes


@pytest.fixture(scope="module")
def pipe() -> Iterator[WanPipeline]:
    yield WanPipeline.from_pretrained(tiny.path("wan"))


def texts(world: Moving, index: int, draws: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [world.sample(index, generator).conditioning["encoder_hidden_states"] for _ in range(draws)]


def test_samples_are_what_the_model_takes(pipe: WanPipeline) -> None:
    world = Moving(pipe, 3, frames=5)
    assert len(world) == 3
    sample = world.sample(0, torch.Generator().manual_seed(0))
    assert sample.latents.shape == (8, 2, 12, 12) and 0.3 < sample.latents.std() < 3
    assert sample.conditioning["encoder_hidden_states"].shape == (16, 64)
    with torch.no_grad():
        wanted = pipe.encode_prompt(sample.name, do_classifier_free_guidance=False, max_sequence_length=16)[0][0]
    assert torch.equal(sample.conditioning["encoder_hidden_states"], wanted)


def test_the_pipeline_decodes_the_latents_of_a_clip_to_it(pipe: WanPipeline) -> None:
    clip = clip_of(next(scenes()), np.random.default_rng(0), 5)
    assert clip.shape == (3, 5, 48, 48)
    with torch.no_grad():
        latents = encode(pipe.vae, clip)
        mean, std = (torch.tensor(pipe.vae.config[name]).view(-1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
        decoded = pipe.vae.decode((latents * std + mean)[None]).sample[0]
    assert (decoded - clip).abs().mean() < 0.1


def test_some_captions_are_left_out_in_training_alone(pipe: WanPipeline) -> None:
    found = texts(Moving(pipe, 1, frames=1), 0, 400)
    kinds = {tuple(text.flatten().tolist()): text for text in found}
    shares = sorted(sum(torch.equal(text, kind) for text in found) / 400 for kind in kinds.values())
    assert len(shares) == 2 and 0.06 < shares[0] < 0.14
    assert len({tuple(text.flatten().tolist()) for text in texts(Moving(pipe, 1, frames=1, unseen=True), 0, 100)}) == 1


def test_worlds_repeat_by_their_seed_and_hold_scenes_apart(pipe: WanPipeline) -> None:
    apart = {caption(scene) for scene in set_apart_scenes()}
    rest = {caption(scene) for scene in scenes() if not is_set_apart(scene)}
    seen, unseen = Moving(pipe, 100, frames=1), Moving(pipe, 8, frames=1, unseen=True)
    generator = torch.Generator()
    names = [seen.sample(index, generator).name for index in range(100)]
    assert set(names) == rest and len(names) == 100, "each of 96 scenes, and four of them on another course"
    twice = next(name for name in names if names.count(name) == 2)
    first, second = (seen.sample(index, generator).latents for index in range(100) if names[index] == twice)
    assert not torch.equal(first, second)
    assert {unseen.sample(index, generator).name for index in range(8)} <= apart
    again = Moving(pipe, 2, frames=1)
    assert torch.equal(again.sample(1, generator).latents, seen.sample(1, generator).latents)
    other = Moving(pipe, 2, frames=1, seed=1)
    assert [other.sample(index, generator).name for index in range(2)] != names[:2]


def test_held_out_captions_are_of_scenes_that_training_never_sees() -> None:
    assert len(set(held_out(8))) == 8 and set(held_out(8)) <= {caption(scene) for scene in set_apart_scenes()}
