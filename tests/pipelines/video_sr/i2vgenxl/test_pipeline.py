"""The pipeline as a user of diffusers calls it, and its parts as a program does that keeps the clip in a folder."""

import itertools
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import tiny_star
import torch
from diffattn.pipelines.video_sr.clips.store import FolderStore, MemoryStore
from diffattn.pipelines.video_sr.i2vgenxl.denoiser import Denoiser
from diffattn.pipelines.video_sr.i2vgenxl.pipeline import STARPipeline
from diffattn.pipelines.video_sr.i2vgenxl.scheduler import STARScheduler
from diffattn.pipelines.video_sr.i2vgenxl.settings import UpscaleSettings
from diffattn.pipelines.video_sr.i2vgenxl.text import NEGATIVE, QUALITY
from PIL import Image
from star_runs import StubUNet, pipeline, run, stubbed
from tiny_star import clip

import diffattn
from diffattn import DualScopeAttention, NeighborhoodAttention
from diffattn.parallel.operations.noise import FrameNoise

ROOT = Path(__file__).resolve().parents[4]
GUIDED = {"guidance_scale": 7.5, "window": 4, "overlap": 2, "decode_chunk": 3, "decode_overlap": 1}
"""Windows of both networks and of the decoder, and guidance."""


@pytest.fixture(scope="module")
def pipe():
    return pipeline()


def work(pipe, store, video, upscale=2, prompt="boats", **settings):
    """The whole run by its parts; frames come and go by threes."""
    settings = UpscaleSettings(**{"num_inference_steps": 2, **settings})
    plan = pipe.plan(len(video), *video.shape[-2:], upscale, settings)
    pipe.encode_clip(iter(video.split(3)), plan, settings, store)
    text = pipe.embed(prompt)
    for step in range(plan.steps):
        pipe.denoise_step(step, plan, settings, text, store)
    return torch.cat(list(pipe.decode_clip(iter(video.split(3)), plan, settings, store)))


@pytest.mark.parametrize("frames", [1, 2, 31, 32, 33, 36, 40, 41, 64, 100])
@pytest.mark.slow
def test_a_clip_of_any_length(frames):
    """In windows of 32."""
    pipe = stubbed()
    for official in (False, True):
        latents = run(pipe, clip(frames), output_type="latent", official=official)
        assert latents.shape == (4, frames, 90, 160) if official else (4, frames, 10, 8)
        assert max(shape[2] for shape in pipe.unet.seen) <= (40 if official else 32)
    video = run(pipe, clip(frames))
    assert video.shape == (frames, 3, 40, 32) and torch.isfinite(video).all()


@pytest.mark.parametrize("frames", [1, 2, 31, 32, 33, 36, 40])
@pytest.mark.slow
def test_the_networks_take_clips_of_any_length(pipe, frames):
    video = run(pipe, clip(frames, 8, 8))
    assert video.shape == (frames, 3, 16, 16) and torch.isfinite(video).all() and video.std() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("frames", [41, 64, 100])
def test_the_networks_take_long_clips(pipe, frames):
    assert run(pipe, clip(frames, 8, 8)).shape == (frames, 3, 16, 16)


@pytest.mark.parametrize(("height", "width", "upscale"), [(20, 16, 1), (13, 21, 1.5), (1, 3, 4), (9, 30, 2.3)])
def test_any_size_and_scale(pipe, height, width, upscale):
    video = run(pipe, clip(2, height, width), upscale=upscale, tile_overlap=8, tile=40)
    assert video.shape == (2, 3, round(height * upscale), round(width * upscale)) and torch.isfinite(video).all()


def test_frames_are_pillow_pictures_by_default(pipe):
    def made(seed):
        return pipe(
            list(clip(2)), num_inference_steps=1, upscale=2, generator=torch.Generator().manual_seed(seed)
        ).frames[0]

    first = made(0)
    assert [(frame.size, frame.mode) for frame in first] == [((32, 40), "RGB")] * 2
    assert first == made(0) != made(1)


def test_output_types(pipe):
    want = run(pipe, clip(2))
    np.testing.assert_allclose(run(pipe, clip(2), output_type="np"), want.permute(0, 2, 3, 1).numpy())
    assert run(pipe, clip(2), output_type="latent").shape == (4, 2, 10, 8)
    (tupled,) = pipe(clip(2), num_inference_steps=1, upscale=1, output_type="pt", return_dict=False)
    assert tupled.shape == (1, 2, 3, 20, 16)


def test_kinds_of_video_are_the_same_clip(pipe):
    array = (clip(2).permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8)
    tensor = torch.from_numpy(array).permute(0, 3, 1, 2).float() / 255
    want = run(pipe, tensor)
    for kind in (array, array.astype(np.float32) / 255, [Image.fromarray(frame) for frame in array]):
        torch.testing.assert_close(run(pipe, kind), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [{}, {"official": True}, {"tile": 64, "tile_overlap": 8, "decode_tile": 72, "guidance_scale": 1}],
)
@pytest.mark.slow
def test_memory_and_folder_give_the_same_bits(pipe, tmp_path, options):
    """And so does the call."""
    video, given = clip(5, 20, 40), {**GUIDED, **options}
    if given.get("official"):
        pipe = stubbed(StubUNet(time=0.1))  # padded to 1280 x 720
    seed = 7
    want = work(pipe, MemoryStore(), video, seed=seed, **given)
    assert torch.equal(work(pipe, FolderStore(tmp_path), video, seed=seed, **given), want)
    generator = torch.Generator().manual_seed(3)
    drawn = int(torch.randint(2**62, (1,), generator=torch.Generator().manual_seed(3)))
    called = pipe(
        video, "boats", upscale=2, num_inference_steps=2, generator=generator, output_type="pt", **given
    ).frames[0]
    assert torch.equal(called, work(pipe, MemoryStore(), video, seed=drawn, **given)) and not torch.equal(called, want)


class Killed(Exception):
    """Ends a run where power would have."""


class FragileStore(FolderStore):
    """Ends with the write of that number."""

    def __init__(self, folder, writes):
        super().__init__(folder)
        self.left = writes

    def write(self, name, begin, frames):
        if self.left == 0:
            super().write(name, begin, frames[: max(1, len(frames) // 2)])
            raise Killed
        self.left -= 1
        super().write(name, begin, frames)


@pytest.mark.parametrize("writes", range(0, 24, 5))
def test_a_step_that_was_cut_off_is_made_again(tmp_path, writes):
    """Three steps of four windows with two writes each; whatever is written when it ends."""
    pipe = stubbed(StubUNet(time=0.1))
    video, settings = clip(9, 8, 8), UpscaleSettings(num_inference_steps=3, guidance_scale=1, window=4, overlap=2)
    plan, text = pipe.plan(9, 8, 8, 2, settings), pipe.embed("boats")
    want = MemoryStore()
    pipe.encode_clip([video], plan, settings, want)
    for step in range(plan.steps):
        pipe.denoise_step(step, plan, settings, text, want)
    pipe.encode_clip([video], plan, settings, FolderStore(tmp_path))
    begun, store = 0, FragileStore(tmp_path, writes)
    with pytest.raises(Killed):
        for step in range(plan.steps):
            begun = step
            pipe.denoise_step(step, plan, settings, text, store)
    for step in [begun, begun, *range(begun + 1, plan.steps)]:  # twice: its end may not have been noted
        pipe.denoise_step(step, plan, settings, text, FolderStore(tmp_path))
    for name in ("x.3", "x0.3"):
        assert torch.equal(FolderStore(tmp_path).read(name, 0, 9), want.read(name, 0, 9))


class WatchedStore(MemoryStore):
    """Notes how many frames are read and written at once, and most entries at a time."""

    def __init__(self):
        super().__init__()
        self.longest, self.most = 0, 0

    def read(self, name, begin, end):
        self.longest = max(self.longest, end - begin)
        return super().read(name, begin, end)

    def write(self, name, begin, frames):
        super().write(name, begin, frames)
        self.longest, self.most = max(self.longest, len(frames)), max(self.most, len(self._entries))


@pytest.mark.parametrize("frames", [30, 200])
def test_no_more_than_a_window_is_held_however_long_the_clip(frames):
    pipe, store = stubbed(StubUNet(time=0.1)), WatchedStore()
    settings = UpscaleSettings(num_inference_steps=3, guidance_scale=1, window=8, overlap=4)
    plan = pipe.plan(frames, 8, 8, 1, settings)
    pipe.encode_clip((frame[None] for frame in clip(frames, 8, 8)), plan, settings, store)
    for step in range(plan.steps):
        pipe.denoise_step(step, plan, settings, pipe.embed(), store)
    given = []

    def source():
        for frame in clip(frames, 8, 8):
            given.append(frame)
            yield frame[None]

    made = 0
    for piece in pipe.decode_clip(source(), plan, settings, store):
        made += len(piece)
        assert len(piece) <= 8 and len(given) == made
    assert made == frames and store.longest == 8 and store.most == 5
    assert {shape[2] for shape in pipe.unet.seen} == {8} and {shape[0] for shape in pipe.vae.decoded} == {8}


def test_noise_belongs_to_the_frame_and_the_step(tmp_path):
    """A frame's noise depends neither on windows nor on the length of the clip."""
    pipe, states = stubbed(), []
    for frames, window in ((20, 8), (20, 20), (12, 8)):
        store, settings = (
            MemoryStore(),
            UpscaleSettings(num_inference_steps=2, guidance_scale=1, window=window, overlap=4),
        )
        plan = pipe.plan(frames, 8, 8, 1, settings)
        pipe.encode_clip([clip(20, 8, 8)[:frames]], plan, settings, store)
        pipe.denoise_step(0, plan, settings, pipe.embed(), store)
        states.append((store.read("x.0", 0, 12), store.read("x.1", 0, 12)))
    for start, after in states[1:]:
        assert torch.equal(start, states[0][0])
        torch.testing.assert_close(after, states[0][1])
    assert not torch.equal(states[0][0][0], states[0][0][1])


@pytest.mark.slow
def test_steps_are_those_of_the_scheduler(pipe):
    """One window through its own `step`, with the noise of each step."""
    settings, store = UpscaleSettings(num_inference_steps=3, seed=5), MemoryStore()
    plan, text = pipe.plan(2, 8, 8, 2, settings), pipe.embed("boats")
    pipe.encode_clip([clip(2, 8, 8)], plan, settings, store)
    x, hint = (store.read(name, 0, 2).transpose(0, 1)[None] for name in ("x.0", "hint"))
    noised = pipe.scheduler.noised(hint[0], FrameNoise(5).draw(range(2), (4, *plan.latent), dim=1))
    torch.testing.assert_close(x[0], pipe.scheduler.start(noised))
    denoise = Denoiser(pipe.unet, pipe.controlnet, text, plan.tiles, guidance_scale=7.5, guidance_rescale=0.2)
    scheduler = STARScheduler()
    scheduler.set_timesteps(3)
    for step, timestep in enumerate(scheduler.timesteps):
        pipe.denoise_step(step, plan, settings, text, store)
        with torch.no_grad():
            velocity = denoise(x, hint, timestep)
        drawn = FrameNoise(5).draw(range(2), (4, *plan.latent), step=step + 1, dim=1)[None]
        x = scheduler.step(velocity, timestep, x, variance_noise=drawn).prev_sample
        torch.testing.assert_close(store.read(f"x.{step + 1}", 0, 2).transpose(0, 1)[None], x, atol=1e-4, rtol=1e-4)


def test_official_latents_are_sampled_by_frame():
    samples = []
    pipe = stubbed()
    pipe.vae.deviation = 0.1
    for chunk in (1, 3):
        store, settings = MemoryStore(), UpscaleSettings(official=True, encode_chunk=chunk)
        plan = pipe.plan(4, 8, 8, 1, settings)
        pipe.encode_clip([clip(4, 8, 8)], plan, settings, store)
        samples.append(store.read("hint", 0, 4))
    torch.testing.assert_close(*samples)
    noise = samples[0] - samples[0].mean((-1, -2), keepdim=True)
    assert 0.08 < noise[:, :, :30].std() < 0.12  # white padding


@pytest.mark.slow
def test_steps_are_taken_and_callbacks_see_them(pipe):
    seen = []

    def callback(own, step, timestep, tensors):
        seen.append((own is pipe, step, int(timestep), tuple(tensors["latents"].shape)))
        return {"latents": 0 * tensors["latents"]} if step == 4 else {}

    latents = run(pipe, clip(2), num_inference_steps=5, callback_on_step_end=callback, output_type="latent")
    pipe.scheduler.set_timesteps(5)
    assert seen == [(True, i, int(t), (1, 4, 2, 10, 8)) for i, t in enumerate(pipe.scheduler.timesteps)]
    assert len(seen) == 5 and not latents.any()
    kept = run(pipe, clip(2), num_inference_steps=3, output_type="latent", callback_on_step_end=lambda *given: None)
    assert torch.equal(kept, run(pipe, clip(2), num_inference_steps=3, output_type="latent"))
    with pytest.raises(ValueError, match=r"latents of \(1, 4, 2, 10, 8\) for this clip; got \(1, 4, 1, 10, 8\)"):
        run(pipe, clip(2), callback_on_step_end=lambda *given: {"latents": torch.zeros(1, 4, 1, 10, 8)})


def test_the_released_steps():
    pipe = stubbed()
    run(pipe, clip(1, 8, 8), num_inference_steps=15)
    assert len(pipe.unet.seen) == 14


def test_given_latents_are_the_start(pipe):
    start = tiny_star.latents(2)
    own, again, other = (run(pipe, clip(2), latents=x, output_type="latent") for x in (start, start.clone(), start + 1))
    assert torch.equal(own, again) and not torch.equal(own, other)


def test_texts(pipe, monkeypatch):
    made, encode = [], pipe.tokenizer

    def note(texts, **options):
        made.extend(texts)
        return encode(texts, **options)

    note.model_max_length = encode.model_max_length
    monkeypatch.setitem(pipe.__dict__, "tokenizer", note)
    positive, negative = pipe.embed()
    assert made == [f"a good video, {QUALITY}", NEGATIVE]
    assert positive.shape == negative.shape == (1, encode.model_max_length, 12)
    pipe.embed("", "bad")
    assert made[2:] == [QUALITY, "bad"]
    tokens = encode([made[0]], padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert torch.equal(pipe.text_encoder(tokens).last_hidden_state, positive)


def test_embeddings_stand_in_for_texts(pipe):
    options = {"guidance_scale": 5.0, "output_type": "latent"}
    positive, negative = pipe.embed("boats", "dust")
    want = run(pipe, clip(1), prompt="boats", negative_prompt="dust", **options)
    given = run(pipe, clip(1), prompt_embeds=positive, negative_prompt_embeds=negative, **options)
    half = run(pipe, clip(1), prompt="boats", negative_prompt_embeds=negative, **options)
    assert torch.equal(given, want) and torch.equal(half, want)
    assert not torch.equal(run(pipe, clip(1), prompt="boats", **options), want)
    assert not torch.equal(run(pipe, clip(1), negative_prompt="dust", **options), want)


@pytest.mark.slow
def test_halves_of_guidance_in_one_call(pipe):
    one, two = (run(pipe, clip(5), **GUIDED, guidance_batch=batch, num_inference_steps=2) for batch in (True, False))
    torch.testing.assert_close(one, two, atol=1e-3, rtol=1e-3)


@pytest.mark.slow
def test_windows_over_everything_are_no_windows(pipe):
    whole = run(pipe, clip(6), window=6, overlap=2)
    assert torch.equal(run(pipe, clip(6)), whole)
    assert (run(pipe, clip(6), window=4, overlap=2) - whole).abs().max() > 1e-3
    assert torch.equal(run(pipe, clip(6), tile=1000), whole)


def test_colours(pipe):
    video = 0.2 * clip(2, 20, 16) + torch.tensor([0.7, 0.1, 0.4])[:, None, None]
    far, adain, wavelet = (
        (run(pipe, video, color_fix=fix).mean((0, 2, 3)) - video.mean((0, 2, 3))).abs().max()
        for fix in (None, "adain", "wavelet")
    )
    assert max(adain, wavelet) < far / 3


def test_colours_are_those_of_the_same_frame():
    """Also where frames are decoded in chunks and the clip comes in pieces."""
    shades = torch.linspace(0.3, 0.7, 11)[:, None, None, None]
    video = 0.1 * (clip(11, 8, 8) - 0.5) + shades
    got = work(stubbed(StubUNet(time=0.1)), MemoryStore(), video, guidance_scale=1, decode_chunk=4, decode_overlap=1)
    torch.testing.assert_close(got.mean((2, 3)), video.mean((2, 3)), atol=1e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.slow
def test_half_precision(dtype):
    video = run(pipeline().to(dtype), clip(2), num_inference_steps=2, guidance_scale=7.5)
    assert video.dtype == torch.float32 and torch.isfinite(video).all() and video.std() > 0.01


def test_the_encoder_works_in_float32_where_the_configuration_says_so(monkeypatch):
    pipe, seen = pipeline().to(torch.float16), []
    encode = pipe.vae.encode
    monkeypatch.setattr(pipe.vae, "encode", lambda pictures: seen.append(pictures.dtype) or encode(pictures))
    plan = pipe.plan(1, 8, 8, 1, UpscaleSettings())
    pipe.encode_clip([clip(1, 8, 8)], plan, UpscaleSettings(), MemoryStore())
    assert seen == [torch.float32] and pipe.vae.dtype == torch.float16


def test_offloading_changes_nothing():
    """To the CPU, which stands for an accelerator: the hooks run."""
    pipe = pipeline()
    want = run(pipe, clip(2), output_type="latent")
    pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        assert torch.equal(run(pipe, clip(2), output_type="latent"), want)


@pytest.mark.slow
def test_exchanged_attention(pipe):
    """Windows over everything are the model's own attention; small ones are not; restored is as before.

    Local windows in space and dual scope in time, on both networks at once.
    """
    video, options = clip(5, 8, 8), {"upscale": 4, "output_type": "latent"}  # 4 x 4 cells, 10 x 8 with the padding
    small, large = NeighborhoodAttention(kernel_size=3), NeighborhoodAttention(kernel_size=15)
    near = DualScopeAttention(padding=1, top_k=0)
    all_frames = DualScopeAttention(padding=5, top_k=0, local_phase=None, global_phase=None)
    want, seen = run(pipe, video, **options), []
    for space, time in ((small, all_frames), (large, near), (small, near), (large, all_frames)):
        given = {"*.attentions.*": space, "*temp_attentions*": time}
        with diffattn.apply(pipe, given, components=("unet", "controlnet")) as handle:
            seen.append(run(pipe, video, **options))
        assert {"temp_" in layer.name for layer in handle.layers} == {False, True}
        assert torch.equal(run(pipe, video, **options), want)
    torch.testing.assert_close(seen.pop(), want, atol=1e-3, rtol=1e-3)
    for one, other in itertools.combinations([want, *seen], 2):
        assert (one - other).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 8}, "overlap from 0 to below window; got 16"),
        ({"upscale": 0.5}, "upscale of at least 1; got 0.5"),
        ({"num_inference_steps": 0}, "num_inference_steps of at least 1; got 0"),
        ({"num_inference_steps": 2000}, "few enough steps .* got 2000"),
        ({"output_type": "gif"}, "output_type among .*; got 'gif'"),
        ({"color_fix": "luma"}, "color_fix must be one of adain, wavelet or none, got 'luma'"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "among 'latents'; got 'noise'"),
        ({"latents": torch.zeros(1, 4, 2, 8, 8)}, r"latents of \(1, 4, 2, 10, 8\) .*; got \(1, 4, 2, 8, 8\)"),
        ({"video": []}, "^expected "),
        ({"video": "clip.mp4"}, "^expected "),
        ({"video": torch.zeros(2, 4, 8, 8)}, "^expected "),
        ({"video": 2 + clip(2)}, "frames in 0..1"),
    ],
)
def test_wrong_input_is_refused_before_any_work(pipe, monkeypatch, options, message):
    for part in ("embed", "encode_clip"):
        monkeypatch.setattr(pipe, part, lambda *given: pytest.fail("work was begun"))
    with pytest.raises(ValueError, match=message):
        run(pipe, **{"video": clip(2), **options})


def test_clips_of_another_size_or_length_than_planned_are_refused():
    pipe, store, settings = stubbed(), MemoryStore(), UpscaleSettings(num_inference_steps=1, guidance_scale=1)
    plan = pipe.plan(4, 8, 8, 1, settings)
    for frames, message in ((clip(3, 8, 8), "got 3"), (clip(5, 8, 8), "got more"), (clip(4, 8, 9), "as planned")):
        with pytest.raises(ValueError, match=message):
            pipe.encode_clip([frames], plan, settings, store)
    with pytest.raises(ValueError, match="write them first"):
        pipe.denoise_step(1, plan, settings, pipe.embed(), MemoryStore())


def test_parts_of_unlike_models_are_refused(pipe):
    for name, part, message in (
        ("vae", diffusers.AutoencoderKL(), "expected a AutoencoderKLTemporalDecoder; got a AutoencoderKL"),
        ("scheduler", diffusers.DDIMScheduler(), "STARScheduler; got a DDIMScheduler"),
        ("vae", tiny_star.vae(block_out_channels=(32,), down_block_types=("DownEncoderBlock2D",)), "got 1 times"),
        ("controlnet", tiny_star.controlnet(cross_attention_dim=8), "same width of text .* 8 in the controlnet"),
        ("controlnet", tiny_star.controlnet(conditioning_channels=3), "same channels of latents .* 3 in the"),
        ("controlnet", tiny_star.controlnet(block_out_channels=(8, 8, 16, 32)), "same levels"),
    ):
        with pytest.raises(ValueError, match=message):
            STARPipeline(**{**pipe.components, name: part})


@pytest.mark.slow
def test_a_custom_pipeline_of_diffusers(pipe, tmp_path):
    """In a process of its own, for folders of custom pipelines share a module name."""
    pipe.save_pretrained(tmp_path / "saved")
    index = tmp_path / "saved" / "model_index.json"
    names = index.read_text().replace(".i2vgenxl.networks.", ".").replace(".i2vgenxl.", ".")
    index.write_text(names)  # as the files hold that were saved before the modules moved
    assert "diffattn.pipelines.video_sr.unet" in names and "diffattn.pipelines.video_sr.scheduler" in names
    loaded = STARPipeline.from_pretrained(tmp_path / "saved")
    np.save(tmp_path / "want.npy", run(loaded, clip(2), output_type="np"))
    np.testing.assert_allclose(np.load(tmp_path / "want.npy"), run(pipe, clip(2), output_type="np"), atol=1e-4)
    folder = ROOT / "pipelines" / "video_sr" / "custom_pipelines" / "star"
    code = f"""
import sys, numpy, torch, diffusers
sys.path[:0] = {[str(ROOT / "tests"), str(Path(__file__).parents[1])]!r}
torch.set_num_threads({torch.get_num_threads()})
pipe = diffusers.DiffusionPipeline.from_pretrained(
    {str(tmp_path / "saved")!r}, custom_pipeline={str(folder)!r}, trust_remote_code=True)
import star_runs, tiny_star
got = star_runs.run(pipe, tiny_star.clip(2), output_type="np")
assert numpy.array_equal(got, numpy.load({str(tmp_path / "want.npy")!r})), "another video"
print(type(pipe).__module__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "diffattn.pipelines.video_sr.i2vgenxl.pipeline"
