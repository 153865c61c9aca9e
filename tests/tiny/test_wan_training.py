"""Parts of the video transformer's training: what the pipeline will give the model, and what is set apart."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from tiny_training.export import export_wan_pipeline
from tiny_training.fit import Trainer, load_averaged
from tiny_training.fit_video import object_cells
from tiny_training.fit_wan import TinyWan, WanClips, WanPlan, encode_clip, placed, take_up
from tiny_training.fit_wan_vae import draw_clips, encode, refine_wan_decoder
from tiny_training.text import MAX_VIDEO_TOKENS
from tiny_training.wan_parts import FRAMES, LATENT_CHANNELS, LATENT_FRAMES, TEXT_DIM, build_wan_scheduler, build_wan_vae

from diffattn import tiny
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
    plan = WanPlan(steps=40, picture_steps=10, short_steps=10, spread_steps=10, batch_size=2)
    assert [plan.shape_at(step) for step in (0, 10, 20, 30)] == [(22, 1), (6, 3), (6, 4), (2, LATENT_FRAMES)]
    assert [plan.spreads(step) for step in (19, 20)] == [False, True]


@torch.no_grad()
def test_frames_from_all_over_a_clip_have_their_own_positions(wan: TinyWan) -> None:
    latents, text = torch.randn(1, LATENT_CHANNELS, 5, 12, 12), wan.encode(["a red circle"])
    call = {"timestep": torch.tensor([500.0]), "encoder_hidden_states": text, "return_dict": False}
    own = wan.transformer.rope(latents)
    places = torch.tensor([0, 3, 4])
    with placed(wan.transformer, places):
        found = wan.transformer.rope(latents[:, :, places])
        some = wan.transformer(hidden_states=latents[:, :, places], **call)[0]
    for got, whole in zip(found, own, strict=True):
        torch.testing.assert_close(got, whole.unflatten(1, (5, 144))[:, places].flatten(1, 2))
    without = wan.transformer(hidden_states=latents[:, :, places], **call)[0]
    assert not torch.allclose(some, without)


def test_objects_are_what_departs_from_the_background() -> None:
    latents = torch.zeros(1, LATENT_CHANNELS, 1, 12, 12)
    latents[..., 4:7, 5:8] = 1
    assert object_cells(latents).sum() == 9


def test_batches_are_frames_of_clips_and_their_numbers(tmp_path: Path) -> None:
    plan = WanPlan(clips=3)
    torch.save(torch.arange(LATENT_FRAMES).view(1, 1, -1, 1, 1).expand(3, 2, -1, 4, 4), tmp_path / "clips_3_0.pt")
    clips = WanClips(build_wan_vae(), plan, tmp_path, 0)
    assert clips.batch(2, 3, spread=False)[3].tolist() == [0, 1, 2]
    several = [clips.batch(2, 4, spread=True) for _ in range(40)]
    for latents, texts, _, places in several:
        assert latents.shape == (2, 2, 4, 4, 4) and len(texts) == 2
        assert latents[0, 0, :, 0, 0].tolist() == places.tolist() == sorted(set(places.tolist()))
    firsts = [places[0] == 0 for *_, places in several]
    assert 0.6 < np.mean(firsts) < 1 and max(places[-1] for *_, places in several) == LATENT_FRAMES - 1


def test_an_exported_pipeline_has_the_averaged_weights(tmp_path: Path) -> None:
    torch.manual_seed(1)
    build_wan_vae().save_pretrained(tmp_path / "vae")
    trainer = Trainer(TinyWan(), WanPlan(steps=1, save_every=1), tmp_path / "wan.pt")
    trainer.averaged = [torch.randn_like(parameter) for parameter in trainer.parameters]
    trainer.step = 1
    trainer.save()
    pipe = export_wan_pipeline(tmp_path, tmp_path / "pipeline")
    load_averaged(trainer.model, tmp_path / "wan.pt")
    for part, want in (("text_encoder", trainer.model.text), ("transformer", trainer.model.transformer)):
        got, own = getattr(pipe, part).state_dict(), want.state_dict()
        assert got.keys() == own.keys()
        for name, value in got.items():
            torch.testing.assert_close(value, own[name], atol=5e-3, rtol=0)
    assert pipe.scheduler.config.shift == 3.0
    assert not any(str(tmp_path) in file.read_text() for file in (tmp_path / "pipeline").rglob("*.json"))


@pytest.mark.slow
def test_a_decoder_that_is_trained_on_leaves_latents_as_they_are() -> None:
    torch.manual_seed(0)
    vae, clip = build_wan_vae(), draw_clips(1, 5, np.random.default_rng(0))
    with torch.no_grad():
        latents, decoded = encode(vae, clip), vae.decode(torch.zeros(1, LATENT_CHANNELS, 2, 12, 12)).sample
    refine_wan_decoder(vae, steps=2, batch_size=1, rate=1e-3, seed=0)
    with torch.no_grad():
        assert torch.equal(encode(vae, clip), latents)
        assert not torch.equal(vae.decode(torch.zeros(1, LATENT_CHANNELS, 2, 12, 12)).sample, decoded)


def test_a_training_is_taken_up_from_a_pipeline() -> None:
    plan = WanPlan(steps=9000)
    trainer = Trainer(own := TinyWan(), plan, Path("unused"))
    take_up(trainer, own, plan, tiny.path("wan"))
    pipe = WanPipeline.from_pretrained(tiny.path("wan"))
    assert trainer.step == plan.first_whole_step and plan.shape_at(trainer.step)[1] == LATENT_FRAMES
    for part, want in ((own.text, pipe.text_encoder), (own.transformer, pipe.transformer)):
        assert all(torch.equal(value, want.state_dict()[name]) for name, value in part.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(trainer.averaged, trainer.parameters, strict=True))
