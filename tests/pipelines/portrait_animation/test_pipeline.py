"""The pipeline as a user of diffusers calls it."""

import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import tiny_portrait
import torch
from diffattn.pipelines.portrait_animation import NullText, XPortraitPipeline
from diffattn.pipelines.portrait_animation.networks.components import official_scheduler
from PIL import Image
from tiny_portrait import generator, pictures, run

ROOT = Path(__file__).resolve().parents[3]
ALONE = {"guidance_scale": 1.0}
"""Half the work."""


@pytest.fixture(scope="module")
def pipe():
    return tiny_portrait.pipeline()


@pytest.fixture(scope="module")
def exact():
    return tiny_portrait.double(tiny_portrait.pipeline())


def counted(module):
    """Calls of a module, until the hook is removed."""
    calls = []
    hook = module.register_forward_pre_hook(lambda m, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    return calls, hook


@pytest.mark.parametrize("frames", [1, 7, 16, 17, 24, 48, 100])
@pytest.mark.slow
def test_a_video_has_as_many_frames_as_drive_it(pipe, frames):
    video = run(pipe, frames, output_type="pt", **ALONE)
    assert video.shape == (frames, 3, 64, 128) and torch.isfinite(video).all()


@pytest.mark.slow
def test_frames_are_pillow_pictures_by_default(pipe):
    video = run(pipe, 2)
    assert [(frame.size, frame.mode) for frame in video] == [((128, 64), "RGB")] * 2
    assert run(pipe, 2) == video != run(pipe, 2, generator=generator(1))


@pytest.mark.parametrize("mode", ["controlnet_important", "balance"])
@pytest.mark.slow
def test_one_call_of_the_appearance_network_a_step_and_one_of_the_encoder(pipe, monkeypatch, mode):
    """For 40 frames in 3 windows; the released code makes 3 x 16 x 2 and 80."""
    appearance, hook = counted(pipe.reference_unet)
    windows, other_hook = counted(pipe.unet)
    encoded, encode = [], pipe.vae.encode
    monkeypatch.setattr(pipe.vae, "encode", lambda x: encoded.append(x.shape) or encode(x))
    run(pipe, 40, control_mode=mode, output_type="latent")
    hook.remove()
    other_hook.remove()
    assert len(appearance) == 2 and len(windows) == 2 * 3 * 2 and encoded == [(1, 3, 64, 128)]
    assert all(len(args[0]) == 1 for args, _ in appearance)


def test_several_references_share_one_call(pipe):
    appearance, hook = counted(pipe.reference_unet)
    two = run(pipe, image=pictures(2), output_type="latent")
    hook.remove()
    assert [len(args[0]) for args, _ in appearance] == [2, 2]
    assert (two - run(pipe, output_type="latent")).abs().max() > 1e-2


@pytest.mark.parametrize("options", [{}, {"official": True, "offsets": [7]}])
@pytest.mark.slow
def test_windows_in_batches_make_the_same_video(exact, options):
    given = {"num_inference_steps": 1, "window_size": 4, "window_overlap": 1, **options}
    one, three = (run(exact, 9, window_batch=n, control_mode="balance", output_type="latent", **given) for n in (1, 3))
    torch.testing.assert_close(one, three, atol=1e-9, rtol=1e-9)


@pytest.mark.slow
def test_batched_windows_are_one_call(pipe):
    calls, hook = counted(pipe.unet)
    run(pipe, 40, window_batch=2, output_type="latent", **ALONE)
    hook.remove()
    assert [tuple(args[0].shape[:3]) for args, _ in calls] == [(2, 4, 16), (1, 4, 16)] * 2


def moved_frames(pipe, frames, **options):
    """Frames of one step that change when the first driving frame does."""
    driving = pictures(frames, seed=1)
    given = {"output_type": "latent", "num_inference_steps": 1, **ALONE, **options}
    firsts = driving[0], pictures(1, seed=7)[0]
    before, after = (run(pipe, frames, driving=[first, *driving[1:]], **given) for first in firsts)
    return (before - after).abs().amax((1, 2, 3)).gt(0).nonzero().flatten().tolist()


@pytest.mark.slow
def test_the_ends_of_a_video_are_not_joined_unless_official(pipe):
    assert moved_frames(pipe, 30) == list(range(16))
    assert moved_frames(pipe, 30, official=True, offsets=[20]) == [*range(6), *range(20, 30)]  # and 2 .. 17, 14 .. 29


@pytest.mark.slow
def test_official_offsets(pipe):
    def latents(**options):
        windows = {"window_size": 4, "window_overlap": 1, "official": True}
        return run(pipe, 7, output_type="latent", **ALONE, **windows, **options)

    assert torch.equal(latents(offsets=[1, 7]), latents(offsets=[1, 7]))
    assert not torch.equal(latents(offsets=[1, 7]), latents(offsets=[1, 8]))
    assert torch.equal(latents(), latents())  # drawn from the generator
    for offsets in ([1], [1, -2]):
        with pytest.raises(ValueError, match="expected 2 offsets from 0"):
            latents(offsets=offsets)
    with pytest.raises(ValueError, match="at most 15 frames"):
        run(pipe, 15, official=True)


def test_guidance_of_one_leaves_the_other_half_out(pipe):
    calls, hook = counted(pipe.unet)
    run(pipe, output_type="latent", **ALONE)
    hook.remove()
    assert len(calls) == 2 and all("mid_block_additional_residual" in kwargs for _, kwargs in calls)


def test_modes_differ(pipe):
    important, balance = (run(pipe, control_mode=m, output_type="latent") for m in ("controlnet_important", "balance"))
    assert (important - balance).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["image", "driving", "local"])
def test_every_picture_counts(pipe, name):
    count = 1 if name == "image" else 3
    own, other = (run(pipe, output_type="latent", **{name: pictures(count, seed=s)}) for s in (20, 21))
    assert (own - other).abs().max() > 1e-3


def test_lcm_without_guidance():
    pipe = tiny_portrait.pipeline(scheduler=diffusers.LCMScheduler.from_config(official_scheduler().config))
    video = run(pipe, 5, num_inference_steps=4, output_type="pt", **ALONE)
    assert video.shape[0] == 5 and torch.isfinite(video).all()
    assert torch.equal(video, run(pipe, 5, num_inference_steps=4, output_type="pt", **ALONE))


def test_a_callback_sees_every_step_and_may_change_it(pipe):
    steps = []

    def callback(pipeline, step, timestep, tensors):
        steps.append((step, int(timestep)))
        return {"latents": tensors["latents"] * 0}

    latents = run(pipe, num_inference_steps=3, callback_on_step_end=callback, output_type="latent")
    assert steps == [(0, 667), (1, 334), (2, 1)] and not latents.any()


@pytest.mark.slow
def test_given_latents_are_the_start(pipe):
    start = torch.randn(3, 4, 8, 16)
    own, again, other = (run(pipe, latents=x, output_type="latent") for x in (start, start.clone(), start + 1))
    assert torch.equal(own, again) and not torch.equal(own, other)


@pytest.mark.parametrize("side", [(72, 136), (64, 128), (128, 64)])
def test_sides_need_not_halve_to_the_end(pipe, side):
    height, width = side
    assert run(pipe, 2, height=height, width=width)[1].size == (width, height)


def test_the_size_is_that_of_the_networks_by_default(pipe):
    assert run(pipe, 1, height=None, width=None)[0].size == (128, 128)


@pytest.mark.slow
def test_pictures_may_be_arrays_and_tensors(pipe):
    driving = np.stack([np.asarray(frame) for frame in pictures(3, 128, 64, seed=1)])
    want = run(pipe, driving=pictures(3, 128, 64, seed=1), output_type="latent")
    floats = driving.astype(np.float32) / 255
    for given in (driving, tuple(pictures(3, 128, 64, seed=1)), floats, torch.from_numpy(floats).permute(0, 3, 1, 2)):
        torch.testing.assert_close(run(pipe, driving=given, output_type="latent"), want, atol=1e-4, rtol=1e-4)


def test_pictures_may_be_gray_transparent_or_one_pixel(pipe):
    for image in (Image.new("L", (5, 3), 90), Image.new("RGBA", (7, 2)), Image.new("RGB", (1, 1), "red")):
        assert torch.isfinite(run(pipe, 1, image=image, output_type="latent")).all()


def test_the_decoder_works_on_a_few_frames_at_a_time(pipe):
    decoded, decode = [], pipe.vae._decode
    pipe.vae._decode = lambda z, **options: decoded.append(len(z)) or decode(z, **options)
    whole = run(pipe, 5, output_type="pt")
    parts = run(pipe, 5, output_type="pt", decode_chunk_size=2)
    pipe.vae.enable_slicing()
    sliced = run(pipe, 5, output_type="pt")
    pipe.vae.disable_slicing()
    del pipe.vae._decode
    assert decoded == [5, 2, 2, 1] + [1] * 5
    torch.testing.assert_close(parts, whole, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(sliced, whole, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_offloading_changes_nothing():
    """To the CPU, which stands for an accelerator: the hooks run."""
    pipe = tiny_portrait.pipeline()
    want = run(pipe, output_type="latent")
    pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        assert torch.equal(run(pipe, output_type="latent"), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.slow
def test_half_precision_runs_without_nan(dtype):
    pipe = tiny_portrait.pipeline().to(dtype)
    latents = run(pipe, 2, output_type="latent")
    assert latents.dtype == dtype and torch.isfinite(latents).all()
    assert run(pipe, 2)[0].size == (128, 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 60}, "multiples of 8; got 60 and 128"),
        ({"width": 0}, "multiples of 8; got 64 and 0"),
        ({"num_inference_steps": 0}, "from 1 to 1000 steps; got 0"),
        ({"num_inference_steps": 1001}, "from 1 to 1000 steps; got 1001"),
        ({"control_mode": "both"}, "control_mode among 'controlnet_important', 'balance'; got 'both'"),
        ({"output_type": "jpg"}, "output_type among"),
        ({"window_size": 25}, "window_size of at most 24"),
        ({"window_size": 4}, "smaller window_overlap; got 4 and 4"),
        ({"window_overlap": -1}, "smaller window_overlap"),
        ({"window_batch": 0}, "window_batch of at least 1; got 0"),
        ({"decode_chunk_size": 0}, "decode_chunk_size of at least 1"),
        ({"local": pictures(2)}, "as many images of eyes and mouth as driving frames; got 2 and 3"),
        ({"image": []}, "at least one image in image"),
        ({"driving": "a name"}, "at least one image in driving"),
        ({"driving": [3, 4, 5]}, "expected images in driving; got list"),
        ({"image": torch.rand(1, 1, 8, 8)}, "expected RGB images in image"),
        ({"latents": torch.zeros(3, 4, 8, 8)}, r"latents of shape \(3, 4, 8, 16\); got \(3, 4, 8, 8\)"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "among 'latents'; got 'noise'"),
    ],
)
def test_wrong_input_is_refused_before_any_work(pipe, options, message):
    calls, hook = counted(pipe.vae.encoder)
    with pytest.raises(ValueError, match=message):
        run(pipe, **options)
    hook.remove()
    assert not calls


def test_parts_of_unlike_models_are_refused(pipe):
    parts = dict(pipe.components)
    with pytest.raises(ValueError, match="expected a MultiControlNetModel of two"):
        XPortraitPipeline(**{**parts, "controlnet": parts["controlnet"].nets[0]})
    with pytest.raises(ValueError, match="null_text of width 8, as the unet takes; got one of 9"):
        XPortraitPipeline(**{**parts, "null_text": NullText(3, 9)})
    wide = type(pipe.reference_unet)(**{**pipe.reference_unet.config, "cross_attention_dim": 9})
    with pytest.raises(ValueError, match="cross_attention_dim is 8 in the unet and 9 in the reference_unet"):
        XPortraitPipeline(**{**parts, "reference_unet": wide})
    with pytest.raises(ValueError, match="8 times shorter"):
        small = diffusers.AutoencoderKL(block_out_channels=(32,))
        XPortraitPipeline(**{**parts, "vae": small})


@pytest.mark.slow
def test_a_custom_pipeline_of_diffusers(pipe, tmp_path):
    """In a process of its own, for folders of custom pipelines share a module name."""
    pipe.save_pretrained(tmp_path / "saved")
    loaded = XPortraitPipeline.from_pretrained(tmp_path / "saved")
    np.save(tmp_path / "want.npy", run(loaded, 2, output_type="np"))
    folder = ROOT / "pipelines" / "portrait_animation" / "custom_pipelines" / "x_portrait"
    code = f"""
import sys, numpy, torch, diffusers
sys.path[:0] = {[str(ROOT / "tests"), str(Path(__file__).parent)]!r}
torch.set_num_threads({torch.get_num_threads()})
pipe = diffusers.DiffusionPipeline.from_pretrained(
    {str(tmp_path / "saved")!r}, custom_pipeline={str(folder)!r}, trust_remote_code=True)
import tiny_portrait
got = tiny_portrait.run(pipe, 2, output_type="np")
assert numpy.array_equal(got, numpy.load({str(tmp_path / "want.npy")!r})), "another video"
print(type(pipe).__module__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "diffattn.pipelines.portrait_animation.pipeline"
