"""Every family's cache: what the pipeline itself gives its model, and nothing of another model."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import models
import numpy as np
import pytest
import text_pipelines
import torch
from diffattn.distill.data.cache import CacheSource, write_cache
from diffattn.distill.data.cache_facts import FACTS, SAMPLE
from diffattn.distill.data.pictures import Counts, load_picture
from diffattn.distill.data.samples import collate
from diffattn.distill.encoders import encoder_of, latent_frames, model_facts, model_of, text_length_of, vae_facts
from diffattn.distill.inputs import inputs_of, predict
from diffattn.distill.objective import Noised
from PIL import Image
from safetensors.torch import load_file, save_file
from text_pipelines import CALL, PIPELINES, SIZE
from torch import nn

CAPTIONS = {"a": "a red circle", "b": "a green ring at the top left"}


@pytest.fixture(scope="module")
def pipes() -> dict[str, Any]:
    return {name: build() for name, build in PIPELINES.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, (name, caption) in enumerate(CAPTIONS.items()):
        pixels = np.random.default_rng(seed).integers(0, 256, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(caption)
    return tmp_path


def write(pipe: Any, name: str, folder: Path, **options: Any) -> Counts:
    length = CALL.get(name, {}).get("max_sequence_length")
    return write_cache(pipe, folder, **{"size": SIZE, "max_sequence_length": length, **options})


def given_by_the_pipeline(pipe: Any, name: str, caption: str, **changes: Any) -> dict[str, Any]:
    """The arguments of the model's forward in a call of the pipeline."""
    seen: dict[str, Any] = {}
    hook = model_of(pipe).register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    height, width = SIZE
    call = {"height": height, "width": width, "num_inference_steps": 1, "guidance_scale": 1.0, **CALL.get(name, {})}
    pipe(caption, output_type="latent", **{**call, **changes})
    hook.remove()
    return seen | (seen.get("added_cond_kwargs") or {})


@pytest.mark.parametrize("name", PIPELINES)
def test_conditioning_is_what_the_pipeline_gives_its_model(name, pipes, folder):
    pipe = pipes[name]
    assert write(pipe, name, folder, dtype=torch.float32) == Counts(done=2)
    source = CacheSource(folder, expected=model_facts(model_of(pipe)))
    sample = source.sample(1, torch.Generator())
    wanted = given_by_the_pipeline(pipe, name, CAPTIONS["b"])
    assert {"encoder_hidden_states"} <= sample.conditioning.keys() <= wanted.keys()
    for key, value in sample.conditioning.items():
        torch.testing.assert_close(value, wanted[key][0].to(value.dtype), msg=lambda text, key=key: f"{key}: {text}")
    left = {key for key, value in wanted.items() if isinstance(value, torch.Tensor)} - sample.conditioning.keys()
    assert left <= {"hidden_states", "timestep"}


@pytest.mark.parametrize("frames", [1, 9, 13])
@pytest.mark.parametrize("kind", ["1.0", "1.5"])
def test_cogvideox_predicts_what_its_pipeline_computes(kind, frames, pipes):
    """With rotary positions; 9 frames are 3 latent ones, to which the pipeline of 1.5 adds one in front."""
    rotary = {"use_rotary_positional_embeddings": True}
    pipe = pipes["CogVideoX-1.5"]
    if kind == "1.0":
        model = models._cogvideox(1, **rotary).model
        pipe = diffusers.CogVideoXPipeline(pipe.tokenizer, pipe.text_encoder, pipe.vae, model, pipe.scheduler)
        pipe.set_progress_bar_config(disable=True)
    answers = []
    hook = pipe.transformer.register_forward_hook(lambda module, args, output: answers.append(output[0]))
    seen = given_by_the_pipeline(pipe, "CogVideoX", "a red circle", num_frames=frames)
    hook.remove()
    latents = seen["hidden_states"].transpose(1, 2)
    assert latents.shape[2] == latent_frames(pipe, pipe.transformer, frames)
    noised = Noised(latents, seen["timestep"], torch.tensor([0.3]), torch.zeros(1))
    text = {"encoder_hidden_states": seen["encoder_hidden_states"]}
    given = inputs_of(pipe.transformer).arguments(pipe.transformer, noised, text, None)["image_rotary_emb"]
    assert all(torch.equal(*pair) for pair in zip(given, seen["image_rotary_emb"], strict=True))
    with torch.no_grad():
        prediction = predict(pipe.transformer, noised, text, None)
    assert torch.equal(prediction.transpose(1, 2), answers[0]) and prediction.abs().max() > 0


def test_latents_that_are_no_whole_patches_are_refused(pipes):
    noised = Noised(torch.zeros(1, 4, 3, 4, 6), torch.tensor([300]), torch.tensor([0.3]), torch.zeros(1))
    with pytest.raises(ValueError, match="takes latents in patches of 2 frames, got 3"):
        predict(pipes["CogVideoX-1.5"].transformer, noised, {}, None)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_batch_goes_through_the_model(name, pipes, folder):
    pipe = pipes[name]
    write(pipe, name, folder)
    batch = collate(CacheSource(folder, expected=model_facts(model_of(pipe))), range(2), seed=0)
    noised = Noised(batch.latents, torch.full((2,), 300), torch.full((2,), 0.3), batch.noise)
    with torch.no_grad():
        answer = predict(model_of(pipe), noised, batch.conditioning, None)
    assert answer.shape == batch.latents.shape and answer.isfinite().all()


@pytest.mark.parametrize("name", ["Wan", "SD3", "SDXL"])
def test_latents_are_shifted_and_scaled_as_the_pipeline_undoes_it(name, pipes, folder):
    pipe = pipes[name]
    write(pipe, name, folder, dtype=torch.float32)
    stored = load_file(folder / f"a{SAMPLE}")
    save_file({**stored, "std": torch.zeros_like(stored["std"])}, folder / f"a{SAMPLE}")
    latents = CacheSource(folder).sample(0, torch.Generator()).latents[None]
    config = pipe.vae.config
    if name == "Wan":
        mean, std = (torch.tensor(config[key]).view(1, 4, 1, 1, 1) for key in ("latents_mean", "latents_std"))
        undone = latents * std + mean
    else:
        undone = latents / config.scaling_factor + (config.shift_factor or 0.0)
    pixels = load_picture(folder / "a.png", SIZE)[None]
    with torch.no_grad():
        encoded = pipe.vae.encode(pixels[:, :, None] if name == "Wan" else pixels).latent_dist.mean
    torch.testing.assert_close(undone, encoded)
    assert latents.shape == ((1, 4, 1, 4, 6) if name == "Wan" else (1, 4, 16, 24))


def test_one_file_a_picture_and_the_facts(pipes, folder):
    write(pipes["SDXL"], "SDXL", folder)
    assert sorted(path.name for path in folder.glob("*.safetensors")) == [f"a{SAMPLE}", f"b{SAMPLE}"]
    assert json.loads((folder / FACTS).read_text()) == {
        "model": "UNet2DConditionModel",
        "latent_channels": 4,
        "latent_size": [16, 24],
        "picture_size": [32, 48],
        "scaling_factor": 0.18215,
        "shift_factor": 0.0,
        "text_length": 32,
        "text_dim": 12,
        "pooled_dim": 8,
        "conditioning": {"encoder_hidden_states": [32, 12], "text_embeds": [8]},
        "constants": {"time_ids": [32, 48, 0, 0, 32, 48]},
    }
    assert {value.dtype for value in load_file(folder / f"a{SAMPLE}").values()} == {torch.bfloat16}


def test_masks_stay_whole_numbers(pipes, folder):
    write(pipes["PixArt"], "PixArt", folder)
    mask = CacheSource(folder).sample(0, torch.Generator()).conditioning["encoder_attention_mask"]
    assert mask.dtype == torch.int64 and 0 < mask.sum() < len(mask)


@pytest.mark.parametrize("rest", [0, 5, 200])
def test_a_truncated_sample_is_written_anew_and_the_others_are_left(rest, pipes, folder, caplog):
    write(pipes["SD1.5"], "SD1.5", folder)
    broken, before = folder / f"a{SAMPLE}", (folder / f"b{SAMPLE}").stat().st_mtime_ns
    whole = broken.read_bytes()
    broken.write_bytes(whole[:rest])
    with pytest.raises(ValueError, match="sample a can't be read"):
        CacheSource(folder).sample(0, torch.Generator())
    assert write(pipes["SD1.5"], "SD1.5", folder) == Counts(done=1, skipped=1)
    assert broken.read_bytes() == whole and (folder / f"b{SAMPLE}").stat().st_mtime_ns == before
    assert str(broken) in caplog.text


def test_a_corrupt_picture_is_named_counted_and_no_sample(pipes, folder, caplog):
    (folder / "b.png").write_bytes(b"none")
    assert write(pipes["Wan"], "Wan", folder) == Counts(done=1, corrupt=1)
    assert "b.png is not a whole image" in caplog.text
    assert CacheSource(folder).names == ["a"]


def test_the_cache_of_another_family_is_refused(pipes, folder):
    write(pipes["SD1.5"], "SD1.5", folder)
    for other in ("SDXL", "PixArt", "Wan"):
        with pytest.raises(ValueError, match="the cache of another model or size"):
            CacheSource(folder, expected=model_facts(model_of(pipes[other])))
        with pytest.raises(ValueError, match="the cache of another model or size"):
            write(pipes[other], other, folder)


def test_the_cache_of_another_vae_is_refused(pipes, folder):
    write(pipes["SD3"], "SD3", folder)
    with pytest.raises(ValueError, match="scaling_factor 0.18215, got 1.5; shift_factor 0.0, got 0.3"):
        CacheSource(folder, expected=vae_facts(pipes["SD1.5"].vae.config))


def test_samples_without_their_facts_are_refused(pipes, folder):
    write(pipes["SD1.5"], "SD1.5", folder)
    (folder / FACTS).unlink()
    with pytest.raises(ValueError, match="diffattn_cache.json is missing"):
        CacheSource(folder, shift=0.0, scale=1.0)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("Wan", {"size": (32, 40)}, "multiples of 16 pixels"),
        ("SD1.5", {"size": (32, 33)}, "multiples of 2 pixels"),
        ("SD1.5", {"max_sequence_length": 20}, "expected 32 text tokens"),
        ("CogVideoX", {"max_sequence_length": 12}, "takes 5 text tokens, got 12"),
    ],
)
def test_what_a_family_cannot_take_is_said_before_anything_is_written(name, options, said, pipes, folder):
    with pytest.raises(ValueError, match=said):
        write(pipes[name], name, folder, **options)
    assert not (folder / FACTS).exists()


def test_captions_are_needed(pipes, folder):
    (folder / "a.txt").unlink()
    with pytest.raises(ValueError, match="caption for every image.*a.png"):
        write(pipes["SDXL"], "SDXL", folder)


def test_pipelines_that_cannot_be_cached(pipes, folder, monkeypatch):
    pipe = pipes["PixArt"]
    with monkeypatch.context() as patch:
        patch.setattr(pipe, "text_encoder", None)
        with pytest.raises(ValueError, match="one without text_encoder; load them"):
            write(pipe, "PixArt", folder)
    with monkeypatch.context() as patch:
        patch.setattr(pipe, "text_encoder", text_pipelines.t5(8))
        with pytest.raises(ValueError, match="expected text of width 12 .*got 8: wrong text encoder"):
            write(pipe, "PixArt", folder)
    inpainting = SimpleNamespace(**vars(pipes["SD1.5"]), components={"unet": models.svd().model})
    with pytest.raises(ValueError, match="UNetSpatioTemporalConditionModel has no cache yet; known: Flux"):
        write(inpainting, "SD1.5", folder)


def test_models_that_cannot_be_cached(pipes):
    with pytest.raises(ValueError, match="Linear has no cache yet"):
        encoder_of(nn.Linear(1, 1))
    wider = models._make("PixArtTransformer2DModel", **{**models.pixart().model.config, "in_channels": 9})
    pipe = SimpleNamespace(components={"transformer": wider}, vae=pipes["PixArt"].vae, tokenizer=1, text_encoder=1)
    with pytest.raises(ValueError, match="VAE's 4 latent channels, got PixArtTransformer2DModel with 9"):
        model_of(pipe)


def test_text_is_as_long_as_in_the_pipelines_own_calls(pipes):
    lengths = {name: text_length_of(pipe) for name, pipe in pipes.items()}
    assert lengths == {
        "SD3": 256,
        "Wan": 512,
        "CogVideoX": 226,
        "CogVideoX-1.5": 226,
        "PixArt": 300,
        "PixArt-Alpha": 120,
        "SD1.5": 32,
        "SDXL": 32,
    }
