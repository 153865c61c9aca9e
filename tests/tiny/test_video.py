"""The shipped video pipeline: it loads as any other, is small, and shows the colours of unseen captions."""

import numpy as np
import pytest
import torch
from diffusers import TextToVideoSDPipeline
from tiny_training.components import build_unet, build_vae, build_video_scheduler
from tiny_training.export import fold_shift, folder_size
from tiny_training.fast_unet import FrameConv, identity_temporal, quicken, temporal_layers, without_temporal
from tiny_training.fit_video import Clips, TinyVideo, VideoPlan, draw_laps, object_cells

from diffattn import tiny
from diffattn.tiny.evaluate_video import generate_videos, judge_videos
from diffattn.tiny.moving import caption, held_out_scenes, is_held_out
from diffattn.tiny.track import figures, follow, majority

PARTS = ("unet", "vae", "text_encoder")
PROMPT = "a red circle moving sideways on a blue background"


@pytest.fixture(scope="module")
def pipeline() -> TextToVideoSDPipeline:
    """The shipped pipeline in float32, without a progress bar."""
    pipeline = TextToVideoSDPipeline.from_pretrained(tiny.path("video"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_folder_is_at_most_ten_megabytes():
    assert folder_size(tiny.path("video")) <= 10_000_000


def test_loads_in_float32(pipeline):
    for part in PARTS:
        assert {parameter.dtype for parameter in getattr(pipeline, part).parameters()} == {torch.float32}


def test_each_caption_word_is_one_token(pipeline):
    assert len(pipeline.tokenizer(PROMPT).input_ids) == len(PROMPT.split()) + 2


def test_same_seed_gives_the_same_video(pipeline):
    first, again = (generate_videos(pipeline, [PROMPT], num_inference_steps=2)[0] for _ in range(2))
    assert first.shape == (16, 48, 48, 3)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, generate_videos(pipeline, [PROMPT], seed=1, num_inference_steps=2)[0])


@pytest.mark.slow
def test_shows_the_colours_of_unseen_captions(pipeline):
    scenes = held_out_scenes(4, seed=1)
    findings, measured = judge_videos(generate_videos(pipeline, [caption(scene) for scene in scenes], seed=1), scenes)
    assert sum(finding.colour_kept and finding.background_kept for finding in findings) >= 3
    assert np.mean([found.acceleration for found in measured]) < 2.0


@pytest.mark.slow
def test_an_unnamed_object_keeps_its_colour_but_differs_between_videos(pipeline):
    seen = [follow(video) for video in generate_videos(pipeline, ["a shape moving on a white background"] * 4, seed=1)]
    assert np.mean([figures(sightings).colour_identity for sightings in seen]) > 0.75
    assert len({majority([sighting.colour for sighting in sightings]) for sightings in seen}) > 1


def test_quick_unet_computes_the_same():
    unet = build_unet().eval()
    for layer in temporal_layers(unet):
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    latents, timestep, text = torch.randn(2, 4, 5, 12, 12), torch.tensor([3, 900]), torch.randn(2, 16, 64)
    with torch.no_grad():
        expected = unet(latents, timestep, text).sample
        names = list(unet.state_dict())
        quicken(unet)
        got = unet(latents, timestep, text).sample
    assert any(isinstance(module, FrameConv) for module in unet.modules()) and list(unet.state_dict()) == names
    assert (got - expected).abs().max() < 1e-4 * expected.abs().max()


def test_temporal_layers_start_as_the_identity_and_can_be_left_out():
    unet = build_unet().eval()
    latents, timestep, text = torch.randn(1, 4, 3, 12, 12), torch.tensor([500]), torch.randn(1, 16, 64)
    with torch.no_grad():
        plain = unet(latents, timestep, text).sample
        with without_temporal(unet):
            left_out = unet(latents, timestep, text).sample
        assert torch.equal(unet(latents, timestep, text).sample, plain) and not torch.allclose(plain, left_out)
        identity_temporal(unet)
        assert torch.allclose(unet(latents, timestep, text).sample, left_out, atol=1e-5)


def test_noise_ends_without_any_signal():
    assert build_video_scheduler().alphas_cumprod[-1] == 0.0 and TinyVideo().alphas_cumprod[-1] == 0.0


def test_folded_shift_changes_latents_but_no_picture():
    vae = build_vae().eval()
    vae.register_to_config(shift_factor=0.3)
    pictures = torch.rand(1, 3, 48, 48) * 2 - 1
    with torch.no_grad():
        before = vae.encode(pictures).latent_dist.mean
        expected = vae.decode(before).sample
        fold_shift(vae)
        after = vae.encode(pictures).latent_dist.mean
        assert torch.allclose(after, before - 0.3, atol=1e-6)
        assert torch.allclose(vae.decode(after).sample, expected, atol=1e-5)
    assert vae.config.shift_factor is None


def test_object_cells_mark_what_departs_from_its_frame():
    latents = torch.zeros(1, 4, 2, 12, 12)
    latents[:, :, 1] = 3.0
    latents[:, :, 0, 2:4, 5] += 2.0
    latents[:, :, 1, 6, 0] -= 2.0
    assert object_cells(latents)[0, 0].nonzero().tolist() == [[0, 2, 5], [0, 3, 5], [1, 6, 0]]


def test_laps_are_of_every_scene_that_is_not_held_out():
    laps = draw_laps(160, np.random.default_rng(0))
    assert len({lap.scene for lap in laps}) == 148 and not any(is_held_out(lap.scene) for lap in laps)


def test_clips_are_runs_of_a_lap(tmp_path):
    """Whole, or in two or four pieces that neighbour each other in no other way."""
    clips = Clips.__new__(Clips)
    clips.rng = np.random.default_rng(0)
    lap = draw_laps(1, np.random.default_rng(0))[0]
    period, counts = lap.course.period, set()
    for _ in range(60):
        order = clips._window(lap, 16)
        steps = np.diff(order) % period
        breaks = np.flatnonzero((steps != 1) & (steps != period - 1))
        assert len(order) == 16 and set((breaks + 1) % 4) <= {0}
        counts.add(len(breaks))
    assert {0, 1, 3} <= counts
    short = np.diff(clips._window(lap, 8)) % period
    assert len(set(short.tolist())) == 1


def test_captions_of_clips_tell_the_truth(tmp_path):
    plan = VideoPlan(laps=4)
    vae = build_vae().eval()
    vae.register_to_config(shift_factor=0.0, scaling_factor=1.0)
    clips = Clips(vae, plan, tmp_path, 0)
    latents, texts = clips.batch(64, 16)
    assert latents.shape == (64, 4, 16, 12, 12) and "" in texts
    backgrounds = {lap.scene.background for lap in clips.laps}
    assert {text.split()[-2] for text in texts if text} == backgrounds
    assert any(text.startswith("a shape moving") for text in texts)
    again, texts_again = Clips(vae, plan, tmp_path, 0).batch(64, 16)
    assert torch.equal(latents, again) and texts == texts_again


def test_fewer_frames_leave_room_for_more_clips():
    plan = VideoPlan(picture_steps=2, short_steps=2, batch_size=3)
    assert [plan.shape_at(step) for step in (0, 1, 2, 3, 4)] == [(48, 1), (48, 1), (6, 8), (6, 8), (3, 16)]
