"""The pipelines as a user of diffusers calls them."""

import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import tiny_pasd
import torch
from diffattn.pipelines.pixel_aware_sr import PASDPipeline, PASDXLPipeline, base_pipeline, prompts
from diffattn.pipelines.pixel_aware_sr.networks.controlnet import DegradationRemoval
from PIL import Image

import diffattn
from diffattn.media.color import wavelet_split
from diffattn.media.windows import tiles

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def pipe() -> PASDPipeline:
    return tiny_pasd.pipeline()


@pytest.fixture(scope="module")
def xl() -> PASDXLPipeline:
    return tiny_pasd.xl_pipeline()


def run(pipe, image=None, prompt="boats", seed=0, **options):
    given = {**tiny_pasd.STEPS, "generator": tiny_pasd.generator(seed), **options}
    return pipe(tiny_pasd.picture() if image is None else image, prompt, **given).images


@pytest.mark.parametrize(("scale", "size"), [(1, (40, 24)), (4, (160, 96)), (1.5, (60, 36))])
def test_a_result_has_the_size_asked_for(pipe, xl, scale, size):
    for each in (pipe, xl):
        (result,) = run(each, upscale=scale)
        assert result.size == size and result.mode == "RGB"


def test_the_same_seed_gives_the_same_picture(pipe, xl):
    for each in (pipe, xl):
        assert run(each) == run(each) != run(each, seed=1)


@pytest.mark.parametrize("options", [{}, {"guess_mode": True}, {"guidance_scale": 1.0}, {"tile_batch": 2}])
@pytest.mark.parametrize("build", [tiny_pasd.pipeline, tiny_pasd.xl_pipeline])
def test_three_pictures_equal_three_calls(build, options):
    """In float64, for random networks magnify rounding."""
    pipe = build()
    for name in ("unet", "controlnet", "vae", "text_encoder", "text_encoder_2"):
        if getattr(pipe, name, None) is not None:
            getattr(pipe, name).double()
    options |= {"tile_size": 64, "tile_overlap": 16, "output_type": "latent", "start": "lr"}
    pictures = [tiny_pasd.picture(90, 64, seed=i) for i in range(3)]
    words = ["boats", "a cat", ""]
    generators = [tiny_pasd.generator(i) for i in range(3)]
    together = run(pipe, pictures, words, generator=generators, **options)
    for i in range(3):
        (alone,) = run(pipe, pictures[i], words[i], seed=i, **options)
        torch.testing.assert_close(together[i], alone, atol=1e-6, rtol=1e-6)


def test_pictures_may_be_arrays_and_tensors(pipe):
    (want,) = run(pipe)
    pixels = np.asarray(tiny_pasd.picture())
    assert run(pipe, pixels.astype(np.float32) / 255)[0] == want
    assert run(pipe, torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 255)[0] == want
    assert run(pipe, [tiny_pasd.picture()])[0] == want
    arrays, tensors = run(pipe, output_type="np"), run(pipe, output_type="pt")
    assert arrays.shape == (1, 24, 40, 3) and np.array_equal((255 * arrays[0]).round(), np.asarray(want))
    assert torch.equal(tensors, torch.from_numpy(arrays).permute(0, 3, 1, 2))


def test_the_condition_encoder_runs_once_for_each_tile(pipe):
    """Not at every step and for both halves of guidance: 2 x 4 x 2 calls for this image in the released code."""
    seen = []
    hook = pipe.controlnet.controlnet_cond_embedding.register_forward_hook(
        lambda module, args, output: seen.append(args[0].shape)
    )
    features, DegradationRemoval.features = DegradationRemoval.features, counted(DegradationRemoval.features)
    try:
        run(pipe, tiny_pasd.picture(112, 112), tile_size=64, tile_overlap=16)
        encoded = DegradationRemoval.features.calls
    finally:
        DegradationRemoval.features = features
        hook.remove()
    assert encoded == 4 and len(seen) == 4 + 2 * 4  # the others passed on what was encoded
    assert {shape[1] for shape in seen[4:]} == {8}


def counted(function):
    def call(*args):
        call.calls += 1
        return function(*args)

    call.calls = 0
    return call


def test_in_guess_mode_the_negative_half_sees_no_picture(pipe):
    seen = []
    hook = pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["down_block_additional_residuals"]), with_kwargs=True
    )
    try:
        run(pipe, guess_mode=True)
        run(pipe)
    finally:
        hook.remove()
    for residual in seen[0]:
        negative, positive = residual.chunk(2)
        assert not negative.any() and positive.any()
    assert all(residual.chunk(2)[0].any() for residual in seen[2])


def test_a_tile_that_covers_the_picture_changes_nothing(pipe):
    """The image is restored at 104 x 64."""
    covered, whole, cut = (run(pipe, tile_size=size, tile_overlap=16) for size in (104, 1024, 64))
    assert covered == whole != cut


def test_tile_batches_give_the_same_picture(pipe):
    pipe = tiny_pasd.pipeline()
    for part in (pipe.unet, pipe.controlnet, pipe.vae, pipe.text_encoder):
        part.double()
    options = {"tile_size": 64, "tile_overlap": 16, "output_type": "latent"}
    one, three = (run(pipe, tiny_pasd.picture(120, 90), tile_batch=n, **options) for n in (1, 3))
    torch.testing.assert_close(one, three, atol=1e-6, rtol=1e-6)


def test_no_seam_is_left_at_the_borders_of_tiles(monkeypatch):
    """A U-Net that predicts the same slope across every tile, whatever is in it: what seams come from."""
    pipe = tiny_pasd.pipeline()

    def slope(sample, timestep, text, **options):
        return (0.1 * sample + 0.5 * torch.linspace(-1, 1, sample.shape[-1]),)

    monkeypatch.setattr(pipe.unet, "forward", slope)
    gradient = np.linspace(60, 200, 256, dtype=np.uint8)[None, :, None].repeat(64, 0).repeat(3, 2)
    options = {"tile_size": 96, "tile_overlap": 32, "output_type": "latent", "latents": torch.zeros(1, 4, 8, 32)}
    latents = run(pipe, Image.fromarray(gradient), **options)
    steps = latents.diff(dim=-1).abs().amax((0, 1, 2))
    places = tiles(8, 32, 12, 4)
    borders = sorted({edge for tile in places for edge in (tile.left, tile.left + tile.width)} - {0, 32})
    assert len(places) == 4 and len(borders) == 6
    at_borders = max(float(steps[border - 1]) for border in borders)
    assert at_borders <= float(steps.median())  # the blend's largest steps lie in the middle of overlaps
    hard = latents_with_equal_weights(monkeypatch, pipe, gradient, options).diff(dim=-1).abs().amax((0, 1, 2))
    assert max(float(hard[border - 1]) for border in borders) > 2 * at_borders  # what a plain mean leaves there


def latents_with_equal_weights(monkeypatch, pipe, pixels, options):
    monkeypatch.setattr(base_pipeline, "gaussian_weights", lambda rows, columns, official: torch.ones(rows, columns))
    return run(pipe, Image.fromarray(pixels), **options)


@pytest.mark.parametrize("fix", ["wavelet", "adain"])
def test_colours_come_from_the_input(pipe, fix):
    picture = tiny_pasd.picture(64, 64)
    want = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None] / 255
    fixed, raw = (run(pipe, picture, color_fix=name, output_type="pt") for name in (fix, None))

    def tone(pictures: torch.Tensor) -> torch.Tensor:
        return pictures.mean((2, 3)) if fix == "adain" else wavelet_split(pictures)[1]

    off = [float((tone(result) - tone(want)).abs().mean()) for result in (fixed, raw)]
    assert off[0] < 0.3 * off[1]


def test_colorizing_keeps_the_luma(pipe):
    picture = tiny_pasd.picture(64, 48)
    (result,) = run(pipe, picture, task="grayscale", upscale=3)
    assert result.size == picture.size
    own, kept = (np.asarray(each.convert("L"), dtype=int) for each in (picture, result))
    inside = (np.asarray(result).min(-1) > 0) & (np.asarray(result).max(-1) < 255)  # not cut off
    assert inside.any() and np.abs(own - kept)[inside].max() <= 2
    assert np.asarray(result).std(-1).max() > 2  # and there is colour


def test_prompts_are_composed_per_picture(pipe, monkeypatch):
    seen = []
    encode = pipe.encode_texts
    monkeypatch.setattr(
        pipe, "encode_texts", lambda *args, **options: seen.append(args[:2]) or encode(*args, **options)
    )
    pictures = [tiny_pasd.picture(), tiny_pasd.picture(seed=1)]
    captions = {"captioner": lambda picture: f"a blurry photo {picture.width} wide", "added_prompt": "8k"}
    run(pipe, pictures, ["a harbour", "a cat"], negative_prompt="fog", **captions)
    run(pipe, pictures[0], "")
    run(pipe, pictures[0], "", task="grayscale", captioner=lambda picture: "a black and white cat")
    assert seen[0] == (
        ["a clear photo 40 wide, a harbour, 8k", "a clear photo 40 wide, a cat, 8k"],
        ["fog", "fog"],
    )
    assert seen[1] == (["clean, high-resolution, 8k"], [prompts.NEGATIVE])
    assert seen[2] == (["a color cat, clean, high-resolution, 8k"], ["b&w, color bleeding"])


@torch.no_grad()
def test_the_start_is_the_picture_under_noise(pipe):
    """Black and white pictures' latents differ as much as the share that the start leaves of them."""
    dark, light = Image.new("RGB", (64, 64), "black"), Image.new("RGB", (64, 64), "white")
    for official in (False, True):
        pipe.scheduler.set_timesteps(20)
        first, second = (
            pipe.start_latents(pipe.as_tensor([each]), "lr", 900, tiny_pasd.generator(), official)
            for each in (dark, light)
        )
        clean = [pipe.encode(pipe.as_tensor([each]), tiny_pasd.generator(), False) for each in (dark, light)]
        share = float((second - first).norm() / (clean[1] - clean[0]).norm())
        assert share == pytest.approx(0.0666 if official else 0.00812, rel=0.01)
    noise = pipe.start_latents(pipe.as_tensor([dark]), "noise", 900, tiny_pasd.generator(), False)
    assert torch.equal(noise, pipe.start_latents(pipe.as_tensor([light]), "noise", 900, tiny_pasd.generator(), False))


@torch.no_grad()
def test_sdxl_starts_from_noise_of_the_scheduler_deviation(xl):
    xl.scheduler.set_timesteps(25)
    sigma = float(xl.scheduler.init_noise_sigma)
    picture = xl.as_tensor([tiny_pasd.picture(512, 512)])
    assert sigma > 10
    for start in ("noise", "lr"):
        latents = xl.start_latents(picture, start, 900, tiny_pasd.generator(), False)
        assert float(latents.std()) == pytest.approx(sigma, rel=0.02)


def test_a_callback_sees_every_step_and_may_change_it(pipe):
    steps = []

    def callback(pipeline, step, timestep, tensors):
        steps.append((step, int(timestep)))
        return {"latents": tensors["latents"] * 0}

    (latents,) = run(pipe, callback_on_step_end=callback, output_type="latent")
    assert [step for step, _ in steps] == [0, 1] and steps[0][1] == 999 and not latents.any()
    with pytest.raises(ValueError, match="callback tensors among"):
        run(pipe, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["noise"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("build", [tiny_pasd.pipeline, tiny_pasd.xl_pipeline])
def test_half_precision_runs_without_nan(build, dtype):
    pipe = build()
    for name in ("unet", "controlnet", "vae", "text_encoder", "text_encoder_2"):
        if getattr(pipe, name, None) is not None:
            getattr(pipe, name).to(dtype)
    latents = run(pipe, output_type="latent", start="lr")
    assert latents.dtype == dtype and torch.isfinite(latents).all()
    (result,) = run(pipe)
    assert result.size == (40, 24)
    assert pipe.vae.dtype == dtype  # back from float32, where SDXL's computes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"upscale": 0}, "upscale above 0"),
        ({"start": "picture"}, "start to be one of 'lr', 'noise'; got 'picture'"),
        ({"color_fix": "lab"}, "color_fix to be one of"),
        ({"output_type": "jpg"}, "output_type to be one of"),
        ({"tile_size": 60}, "multiples of 8; got 60"),
        ({"tile_size": 64, "tile_overlap": 64}, "smaller tile_overlap"),
        ({"tile_batch": 0}, "tile_batch of at least 1"),
        ({"added_noise_level": 1000}, "from 0 to 999; got 1000"),
        ({"task": "sharpen"}, "task"),
        ({"process_size": 4}, "process_size"),
        ({"prompt": ["a", "b"]}, "for each of 1 images; got 2"),
        ({"image": []}, "at least one image"),
        ({"image": "a name"}, "expected images"),
        ({"image": [Image.new("RGB", (64, 64)), Image.new("RGB", (64, 96))]}, "one size in a batch"),
    ],
)
def test_wrong_input_is_refused_before_any_work(pipe, options, message):
    calls = []
    hook = pipe.unet.register_forward_pre_hook(lambda *args: calls.append(1))
    with pytest.raises(ValueError, match=message):
        run(pipe, **options)
    hook.remove()
    assert not calls


def test_parts_of_unlike_models_are_refused(pipe, xl):
    parts = dict(pipe.components)
    with pytest.raises(ValueError, match="expected a U-Net for text of width 12"):
        PASDPipeline(**{**parts, "unet": xl.unet})
    with pytest.raises(ValueError, match="of one checkpoint"):
        PASDPipeline(**{**parts, "controlnet": tiny_pasd.controlnet(block_out_channels=(8, 16, 24, 32))})
    small = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2)
    with pytest.raises(ValueError, match="8 times shorter"):
        PASDPipeline(**{**parts, "vae": small})


def test_attention_is_swapped_in_the_unet_and_not_lost(pipe):
    own = run(pipe)
    with diffattn.apply(pipe, "neighborhood", kernel_size=3) as handle:
        local = run(pipe)
        assert all(layer.reached for layer in handle.layers)
    assert local != own == run(pipe)


def test_lora_and_textual_inversion_load(pipe, tmp_path):
    changed = tiny_pasd.pipeline()
    from peft import LoraConfig

    changed.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"], init_lora_weights=False))
    layers = {name for name, _ in changed.unet.named_modules() if name.endswith("lora_A")}
    assert any("pixel_attentions" in name for name in layers)
    state = {f"unet.{name}": tensor for name, tensor in lora_state(changed.unet).items()}
    diffusers.loaders.StableDiffusionLoraLoaderMixin.write_lora_layers(
        state, str(tmp_path), True, "lora.safetensors", lambda w, f: save(w, f), True
    )
    fresh = tiny_pasd.pipeline()
    own, want = (run(each, output_type="latent") for each in (fresh, changed))
    fresh.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    loaded = run(fresh, output_type="latent")
    fresh.unload_lora_weights()
    unloaded = run(fresh, output_type="latent")
    assert (want - own).abs().max() > 1.0  # and rounding, which random networks magnify, changes less than 0.1
    assert (loaded - want).abs().max() < 0.1 and (unloaded - own).abs().max() < 0.1
    token = {"<harbour>": torch.ones(tiny_pasd.TEXT)}
    fresh.load_textual_inversion(token)
    assert run(fresh, prompt="<harbour>", added_prompt="") != run(fresh, prompt="", added_prompt="")


def lora_state(unet):
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(unet)


def save(weights, file):
    from safetensors.torch import save_file

    save_file(weights, file, metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["pasd", "pasd_xl"])
def test_a_custom_pipeline_of_diffusers(name, tmp_path):
    """In a process of its own, for folders of custom pipelines share a module name."""
    built = tiny_pasd.pipeline() if name == "pasd" else tiny_pasd.xl_pipeline()
    built.save_pretrained(tmp_path / "saved")
    loaded = type(built).from_pretrained(tmp_path / "saved")
    run(loaded)[0].save(tmp_path / "want.png")
    folder = ROOT / "pipelines" / "pixel_aware_sr" / "custom_pipelines" / name
    code = f"""
import torch, diffusers
from PIL import Image
pipe = diffusers.DiffusionPipeline.from_pretrained(
    {str(tmp_path / "saved")!r}, custom_pipeline={str(folder)!r}, trust_remote_code=True)
given = dict(num_inference_steps=2, process_size=64, generator=torch.Generator().manual_seed(0))
got = pipe(Image.open({str(tmp_path / "in.png")!r}), "boats", **given).images[0]
assert got.tobytes() == Image.open({str(tmp_path / "want.png")!r}).tobytes(), "another picture"
print(type(pipe).__module__)
"""
    tiny_pasd.picture().save(tmp_path / "in.png")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1].startswith("diffattn.pipelines.pixel_aware_sr.")
