"""Parts of the video transformer's training: what the pipeline will give the model, and what is set apart."""

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from tiny_training.fit_video import object_cells
from tiny_training.fit_wan import TinyWan, WanPlan, encode_clip
from tiny_training.fit_wan_vae import draw_clips, encode
from tiny_training.text import MAX_VIDEO_TOKENS
from tiny_training.wan_parts import FRAMES, LATENT_CHANNELS, LATENT_FRAMES, TEXT_DIM, build_wan_scheduler, build_wan_vae

from diffattn.tiny import moving


@pytest.fixture(scope="module")
def wan() -> TinyWan:
    torch.manual_seed(0)
    return TinyWan()


def test_64_captions_are_set_apart_and_every_word_stays() -> None:
    apart = moving.set_apart_scenes()
    assert len({moving.caption(scene) for scene in apart}) == 64
    seen = [scene for scene in moving.scenes() if not moving.is_set_apart(scene)]
    for name in ("colour", "shape", "background", "motion"):
        assert {getattr(scene, name) for scene in seen} == {getattr(scene, name) for scene in moving.scenes()}
    pairs = {(scene.colour, scene.shape, scene.background) for scene in apart}
    assert not pairs & {(scene.colour, scene.shape, scene.background) for scene in seen}


def test_clips_become_as_many_cells_as_promised() -> None:
    vae = build_wan_vae()
    scene = next(moving.scenes())
    latents = encode_clip(vae, scene, np.random.default_rng(0))
    assert latents.shape == (1, LATENT_CHANNELS, LATENT_FRAMES, 12, 12)


def test_the_first_latents_are_those_of_the_beginning() -> None:
    """Wan's VAE is causal: what short clips are trained on is the start of long ones."""
    vae, clip = build_wan_vae(), draw_clips(1, FRAMES, np.random.default_rng(0))
    whole, start = encode(vae, clip), encode(vae, clip[:, :, :9])
    torch.testing.assert_close(whole[:, :, :3], start, atol=2e-2, rtol=0)


@torch.no_grad()
def test_text_is_what_the_pipeline_gives_its_model(wan: TinyWan) -> None:
    pipe = WanPipeline(
        tokenizer=wan.tokenizer,
        text_encoder=wan.text,
        vae=build_wan_vae(),
        scheduler=build_wan_scheduler(),
        transformer=wan.transformer,
    )
    texts = ["a red circle moving sideways on a blue background", ""]
    for length in (MAX_VIDEO_TOKENS, 64):
        want, _ = pipe.encode_prompt(texts, do_classifier_free_guidance=False, max_sequence_length=length)
        torch.testing.assert_close(wan.encode(texts, length), want, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
def test_a_step_changes_every_parameter(wan: TinyWan) -> None:
    latents = torch.randn(2, LATENT_CHANNELS, 2, 12, 12)
    generator = torch.Generator().manual_seed(0)
    wan.loss(latents, ["a red circle", ""], generator, 4.0, MAX_VIDEO_TOKENS).backward()
    assert wan.encode(["a"]).shape == (1, MAX_VIDEO_TOKENS, TEXT_DIM)
    still = [name for name, parameter in wan.named_parameters() if parameter.grad is None]
    assert not still


def test_batches_shrink_as_clips_grow() -> None:
    plan = WanPlan(steps=30, picture_steps=10, short_steps=10, batch_size=2)
    assert [plan.shape_at(step) for step in (0, 10, 20)] == [(22, 1), (6, 3), (2, LATENT_FRAMES)]


def test_objects_are_what_departs_from_the_background() -> None:
    latents = torch.zeros(1, LATENT_CHANNELS, 1, 12, 12)
    latents[..., 4:7, 5:8] = 1
    assert object_cells(latents).sum() == 9
