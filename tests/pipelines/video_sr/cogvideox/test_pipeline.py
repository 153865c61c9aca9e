from importlib.resources import files

import numpy as np
import pytest
import torch
from diffattn.pipelines.video_sr import custom_pipelines
from diffattn.pipelines.video_sr.clips.frames import enlarge, pad, read_video
from diffattn.pipelines.video_sr.cogvideox.denoiser import Denoiser
from diffattn.pipelines.video_sr.cogvideox.pipeline import CogVideoXSTARPipeline
from diffattn.pipelines.video_sr.cogvideox.scheduler import STARCogVideoXScheduler
from diffusers import CogVideoXTransformer3DModel, DiffusionPipeline
from PIL import Image
from text_pipelines import t5, tokenizer
from tiny_cogvideox import SIZES, clip, draw, pipeline, transformer, vae

import diffattn
from diffattn.media.windows import ramp_weights


@pytest.fixture(scope="module")
def pipe():
    return pipeline()


def run(pipe, video, seed=0, **options):
    options = {"num_inference_steps": 2, "upscale": 2, "output_type": "pt", **options}
    return pipe(video, "a cat", generator=torch.Generator().manual_seed(seed), **options).frames[0]


@pytest.mark.parametrize("frames", [1, 2, 9, 25, 31, 33, 40, 41, 64, 100])
def test_as_many_frames_come_out_as_go_in(pipe, frames):
    video = run(pipe, clip(frames, 8, 8))
    assert video.shape == (frames, 3, 16, 16) and torch.isfinite(video).all()
    assert video.min() >= 0 and video.max() <= 1 and video.std() > 0.01


@pytest.mark.parametrize(("height", "width", "upscale"), [(1, 1, 4), (7, 13, 4), (9, 5, 3), (6, 11, 1), (5, 7, 1.5)])
def test_any_size_and_factor(pipe, height, width, upscale):
    video = run(pipe, clip(2, height, width), upscale=upscale)
    assert video.shape == (2, 3, round(height * upscale), round(width * upscale))


def test_frames_are_reflected_and_the_last_one_repeated():
    frames = torch.arange(2 * 3 * 3 * 5).float().reshape(2, 3, 3, 5)
    padded = pad(frames, 8, 4)
    assert padded.shape == (5, 3, 8, 8) and torch.equal(padded[:2, :, :3, :5], frames)
    assert all(torch.equal(padded[i], padded[1]) for i in range(2, 5))
    assert padded[0, 0, :, 0].tolist() == [0, 5, 10, 5, 0, 5, 10, 5]
    assert padded[0, 0, 0].tolist() == [0, 1, 2, 3, 4, 3, 2, 1]
    assert pad(frames[:1, :, :1, :1], 4, 4).unique().tolist() == [0, 15, 30]
    whole = clip(5, 16, 32)
    assert torch.equal(pad(whole, 16, 4), whole)


def test_kinds_of_video_are_the_same_clip(pipe):
    array = (clip(3).permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8)
    tensor = torch.from_numpy(array).permute(0, 3, 1, 2).float() / 255
    pictures = [Image.fromarray(frame) for frame in array]
    kinds = [array, array.astype(np.float32) / 255, tensor, list(tensor), pictures, tuple(pictures), list(array)]
    for kind in kinds:
        torch.testing.assert_close(read_video(kind, pipe.video_processor), tensor)
    gray = read_video([pictures[0].convert("L")], pipe.video_processor)
    assert gray.shape == (1, 3, 12, 20)


def test_output_types(pipe):
    video = clip(3)
    want = run(pipe, video)
    np.testing.assert_allclose(run(pipe, video, output_type="np"), want.permute(0, 2, 3, 1).numpy())
    pictures = run(pipe, video, output_type="pil")
    assert [picture.size for picture in pictures] == [(40, 24)] * 3
    latents = run(pipe, video, output_type="latent", return_dict=True)
    assert latents.shape == (3, 4, 4, 6)
    (tupled,) = pipe(video, upscale=2, num_inference_steps=1, output_type="pt", return_dict=False)
    assert tupled.shape == (1, 3, 3, 24, 40)


def test_batched_and_sequential_guidance_agree(pipe):
    batched, sequential = (run(pipe, clip(5), sequential_guidance=way, num_inference_steps=3) for way in (False, True))
    torch.testing.assert_close(batched, sequential, atol=1e-5, rtol=1e-5)
    without = run(pipe, clip(5), guidance_scale=0.0, num_inference_steps=3)
    assert (without - batched).abs().max() > 1e-3


def test_without_guidance_the_negative_text_is_not_run(pipe, monkeypatch):
    batches, forward = [], type(pipe.transformer).forward

    def spy(self, hidden_states, *args, **kwargs):
        batches.append(len(hidden_states))
        return forward(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(type(pipe.transformer), "forward", spy)
    run(pipe, clip(1), num_inference_steps=4)
    assert batches == [1, 2, 2, 2]  # dynamic guidance begins with a weight of 1
    batches.clear()
    run(pipe, clip(1), num_inference_steps=4, guidance_scale=0.0)
    assert batches == [1] * 4


def test_texts(pipe):
    zeros, empty, other = (run(pipe, clip(1), negative_prompt=text, output_type="latent") for text in (None, "", "dog"))
    assert not torch.equal(zeros, empty) and not torch.equal(empty, other)
    assert pipe.embed(None).abs().max() == 0 and pipe.embed(None).shape == pipe.embed("a " * 50).shape == (1, 5, 12)


def test_a_window_over_everything_is_no_window(pipe):
    video = clip(17)
    whole = run(pipe, video, window=None)
    assert torch.equal(run(pipe, video, window=17, overlap=4), whole)
    assert torch.equal(run(pipe, video, window=25), whole)
    windows = run(pipe, video, window=9, overlap=4)
    assert (windows - whole).abs().max() > 1e-3


def test_windows_are_blended_at_every_step(pipe):
    """Three of 3 latent frames over 5: 0-2, 1-3 and 2-4."""
    condition, latents, texts = draw(1, 5, 4, 4, 6), draw(1, 5, 4, 4, 6, seed=1), draw(2, 5, 12, seed=2)
    timestep = torch.tensor(500)
    with torch.no_grad():
        got = Denoiser(pipe.transformer, condition, texts[:1], texts[1:], 3, 2)(latents, timestep, 2.5)
        parts = [
            Denoiser(pipe.transformer, condition[:, i : i + 3], texts[:1], texts[1:])(
                latents[:, i : i + 3], timestep, 2.5
            )
            for i in range(3)
        ]
    torch.testing.assert_close(got[:, 0], parts[0][:, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got[:, 4], parts[2][:, 2], atol=1e-5, rtol=1e-5)
    shares = ramp_weights([0, 1, 2], 3, 5).float()
    assert shares[0, 1] > 0.6
    second = shares[0, 1] * parts[0][:, 1] + shares[1, 0] * parts[1][:, 0]
    torch.testing.assert_close(got[:, 1], second, atol=1e-5, rtol=1e-5)


def test_seeds_and_first_latents(pipe):
    video = clip(5)
    first = run(pipe, video)
    assert torch.equal(run(pipe, video), first) and not torch.equal(run(pipe, video, seed=1), first)
    noise = draw(1, 3, 4, 4, 6)
    given, zeros = (run(pipe, video, latents=latents, output_type="latent") for latents in (noise, 0 * noise))
    assert not torch.equal(given, zeros)


def test_steps_and_callbacks(pipe):
    seen = []

    def watch(own, step, timestep, tensors):
        seen.append((own is pipe, step, int(timestep), tensors["latents"].shape))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 2 else {}

    latents = run(pipe, clip(5), num_inference_steps=3, callback_on_step_end=watch, output_type="latent")
    assert seen == [(True, step, timestep, (1, 3, 4, 4, 6)) for step, timestep in enumerate((999, 666, 333))]
    assert latents.abs().max() == 0


@pytest.mark.parametrize(("official", "used"), [(False, (0, 1)), (True, (0, 2))])
def test_the_official_noise_is_the_second_draw_from_the_second_step_on(pipe, official, used):
    def network(latents, timestep, weight):
        return torch.tanh(latents)

    scheduler = STARCogVideoXScheduler()
    scheduler.set_timesteps(3)
    pipe.scheduler.set_timesteps(3)
    x = draw(1, 1, 4, 2, 2)
    got = pipe.denoise(network, x, [1.0] * 3, torch.Generator().manual_seed(0), official, None)
    reference = torch.Generator().manual_seed(0)
    noise = [torch.randn(1, 1, 4, 2, 2, generator=reference) for _ in range(3)]
    before = None
    for step, given in enumerate([*(noise[i] for i in used), None]):
        x0 = scheduler.predict_x0(x, network(x, None, None), step)
        x, before = scheduler.update(x, x0, before, step, given), x0
    assert torch.equal(got, x)


def test_official_guidance_differs(pipe):
    options = {"num_inference_steps": 1, "output_type": "latent"}
    assert not torch.equal(run(pipe, clip(1), **options), run(pipe, clip(1), official=True, **options))


def test_colours_are_those_of_the_low_quality_clip(pipe):
    video = 0.2 * clip(3, 16, 16) + torch.tensor([0.7, 0.1, 0.4])[:, None, None]
    far, adain, wavelet = (
        (run(pipe, video, color_fix=fix).mean((0, 2, 3)) - video.mean((0, 2, 3))).abs().max()
        for fix in (None, "adain", "wavelet")
    )
    assert max(adain, wavelet) < far / 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    half = pipeline().to(dtype)
    video = run(half, clip(5), num_inference_steps=3)
    assert video.dtype == torch.float32 and torch.isfinite(video).all() and video.std() > 0.01


def test_offloading_changes_nothing():
    """To the CPU, which stands for an accelerator: the hooks run."""
    pipe = pipeline()
    options = {"decode_chunk_size": 3, "decode_overlap": 1}
    want = run(pipe, clip(17), **options)
    pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        assert torch.equal(run(pipe, clip(17), **options), want)


LOCAL = {
    "neighborhood": ({"kernel_size": (1, 1, 3)}, {"kernel_size": (3, 9, 9)}),
    "clear": ({"radius": 1.2}, {"radius": 20}),
    "halo": ({"tile": (1, 1, 1), "halo": 1}, {"tile": (1, 2, 4), "halo": (3, 3, 1)}),
}
"""Settings of a window that leaves tokens out, and of one that holds the clip's 3 x 2 x 3."""


@pytest.mark.parametrize("mechanism", LOCAL)
def test_local_attention_and_back(mechanism):
    pipe, video = pipeline(), clip(9)
    want = run(pipe, video)
    with diffattn.apply(pipe, mechanism, **LOCAL[mechanism][1]):
        torch.testing.assert_close(run(pipe, video), want, atol=1e-3, rtol=1e-3)
    diffattn.apply(pipe, mechanism, **LOCAL[mechanism][0])
    swapped = run(pipe, video)
    diffattn.restore(pipe)
    assert torch.isfinite(swapped).all() and (swapped - want).abs().max() > 1e-3
    assert torch.equal(run(pipe, video), want)


def test_saved_loaded_and_as_a_custom_pipeline(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    custom = str(files(custom_pipelines) / "star_cogvideox")
    loaded = [
        CogVideoXSTARPipeline.from_pretrained(tmp_path),
        DiffusionPipeline.from_pretrained(tmp_path, custom_pipeline=custom, trust_remote_code=True),
    ]
    want = run(pipe, clip(2))
    for one in loaded:
        one.set_progress_bar_config(disable=True)
        for part in (one.transformer, one.vae, one.text_encoder):
            for parameter in part.parameters():  # unaligned in a mapped file, which changes rounding
                parameter.data = parameter.data.clone()
        assert type(one).__name__ == "CogVideoXSTARPipeline" and torch.equal(run(one, clip(2)), want)


NO_VIDEO = [[], torch.zeros(0, 3, 4, 4), torch.zeros(2, 1, 4, 4), torch.zeros(1, 2, 3, 4, 4)[:, :0], "clip.mp4", None]


@pytest.mark.parametrize("video", [*NO_VIDEO, torch.zeros(2, 2, 3, 4, 4), 2 + clip(1), clip(1) * float("nan"), 7])
def test_what_is_no_clip_is_refused(pipe, video):
    with pytest.raises(ValueError, match="^expected .*; got "):
        run(pipe, video)


def test_frames_of_several_sizes_are_refused(pipe):
    with pytest.raises(ValueError, match="frames of one size"):
        run(pipe, [Image.new("RGB", (8, 8)), Image.new("RGB", (8, 9))])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 24}, r"window of 4 k \+ 1 frames .*; got 24 and 12"),
        ({"window": 9, "overlap": 12}, "got 9 and 12"),
        ({"overlap": 3}, "got 25 and 3"),
        ({"overlap": -4}, "got 25 and -4"),
        ({"decode_chunk_size": 12}, "odd decode_chunk_size and a smaller odd decode_overlap .*; got 12 and 3"),
        ({"decode_chunk_size": 3}, "got 3 and 3"),
        ({"decode_chunk_size": 1, "decode_overlap": 1}, "got 1 and 1"),
        ({"decode_overlap": 2}, "got 13 and 2"),
        ({"decode_overlap": -1}, "got 13 and -1"),
        ({"upscale": 0.5}, "upscale of at least 1; got 0.5"),
        ({"guidance_scale": -1.0}, "guidance_scale of at least 0; got -1"),
        ({"guidance_scale": float("nan")}, "got nan"),
        ({"num_inference_steps": 0}, "from 1 to 1000 steps; got 0"),
        ({"output_type": "gif"}, "output_type among .*; got 'gif'"),
        ({"color_fix": "luma"}, "color_fix among .*; got 'luma'"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "got 'noise'"),
        ({"latents": torch.zeros(1, 1, 4, 4, 6)}, r"latents of shape \(1, 3, 4, 4, 6\) .*; got \(1, 1, 4, 4, 6\)"),
    ],
)
def test_wrong_settings_are_refused_before_any_work(pipe, monkeypatch, options, message):
    for work in ("embed", "encode"):
        monkeypatch.setattr(pipe, work, lambda *given: pytest.fail("work was begun"))
    with pytest.raises(ValueError, match=message):
        run(pipe, clip(5), **options)


def test_parts_that_do_not_fit_are_refused():
    own = {"vae": vae(), "text_encoder": t5(12), "tokenizer": tokenizer("t5"), "scheduler": STARCogVideoXScheduler()}
    settings = {**SIZES.transformer(), "in_channels": 4}
    with pytest.raises(ValueError, match="from 8 to 4 channels.*got 4 to 4"):
        CogVideoXSTARPipeline(transformer=CogVideoXTransformer3DModel(**settings), **own)
    with pytest.raises(ValueError, match="text encoder of width 12.*got 8"):
        CogVideoXSTARPipeline(transformer=transformer(), **{**own, "text_encoder": t5(8)})


def test_enlarging_is_bicubic_and_stays_in_range():
    frames = torch.zeros(1, 3, 2, 4)
    frames[..., 2:] = 1
    large = enlarge(frames, 4)
    assert large.shape == (1, 3, 8, 16) and large.min() == 0 and large.max() == 1
    assert enlarge(frames, 1) is frames
