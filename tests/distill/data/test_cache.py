"""The cache: the official files, resumed where they end, and refused where they belong to another model."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from diffattn.distill.data.cache import CacheSource, write_cache
from diffattn.distill.data.cache_facts import FACTS, LATENTS, PROMPT
from diffattn.distill.data.pictures import Counts, load_picture
from diffattn.distill.data.samples import collate
from diffattn.distill.encoders import model_facts
from diffusers import FluxPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffattn import tiny
from diffattn.tiny.shapes import Scene, render

SIZE = (96, 128)
CAPTION = "a {} circle at the top left on a blue background"
COLOURS = {"a": "red", "b": "green", "deep/c": "yellow"}


@pytest.fixture(scope="module")
def pipe() -> FluxPipeline:
    return FluxPipeline.from_pretrained(tiny.path("flux"))


def lay_out(folder: Path) -> Path:
    """Three captioned images, 128 x 128."""
    for name, colour in COLOURS.items():
        path = folder / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        scene = Scene(colour=colour, shape="circle", place="at the top left", background="blue")
        Image.fromarray(render(scene)).save(path)
        path.with_suffix(".txt").write_text(CAPTION.format(colour))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three captioned images, not cached."""
    return lay_out(tmp_path)


@pytest.fixture(scope="module")
def encoded(pipe: FluxPipeline, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """All files of the three images, cached."""
    folder = lay_out(tmp_path_factory.mktemp("encoded"))
    assert write(pipe, folder) == Counts(done=3)
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def cached(encoded: dict[str, bytes], tmp_path: Path) -> Path:
    """The three images, cached."""
    for name, data in encoded.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    return tmp_path


def write(pipe: Any, folder: Path, **options: Any) -> Counts:
    return write_cache(pipe, folder, **{"size": SIZE, "max_sequence_length": 32, **options})


def files(folder: Path) -> dict[str, int]:
    """Files of a cache, with the time of their last change."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}


def drawn(source: CacheSource, index: int = 0, seed: int = 0) -> Tensor:
    return source.sample(index, torch.Generator().manual_seed(seed)).latents


def test_files_are_the_official_ones(cached, pipe):
    assert set(files(cached)) == {f"{name}{ending}" for name in COLOURS for ending in (LATENTS, PROMPT)}
    latent, prompt = load_file(cached / f"a{LATENTS}"), load_file(cached / f"a{PROMPT}")
    assert {key: (value.dtype, list(value.shape)) for key, value in (latent | prompt).items()} == {
        "mean": (torch.bfloat16, [4, 24, 32]),
        "std": (torch.bfloat16, [4, 24, 32]),
        "caption_feature_t5": (torch.bfloat16, [32, 96]),
        "caption_feature_clip": (torch.bfloat16, [64]),
    }
    with torch.no_grad():
        posterior = pipe.vae.encode(load_picture(cached / "a.png", SIZE)[None]).latent_dist
        text, pooled, _ = pipe.encode_prompt(CAPTION.format("red"), max_sequence_length=32)
    assert torch.equal(latent["mean"], posterior.mean[0].bfloat16())
    assert torch.equal(latent["std"], posterior.std[0].bfloat16())
    assert torch.equal(prompt["caption_feature_t5"], text[0].bfloat16())
    assert torch.equal(prompt["caption_feature_clip"], pooled[0].bfloat16())


def test_the_cache_says_what_it_is_for(cached, pipe):
    facts = json.loads((cached / FACTS).read_text())
    assert facts == {
        "model": "FluxTransformer2DModel",
        "latent_channels": 4,
        "latent_size": [24, 32],
        "picture_size": [96, 128],
        "scaling_factor": pipe.vae.config.scaling_factor,
        "shift_factor": pipe.vae.config.shift_factor,
        "text_length": 32,
        "text_dim": 96,
        "pooled_dim": 64,
    }


def test_a_finer_type_is_kept(folder, pipe):
    write(pipe, folder, dtype=torch.float32)
    assert {value.dtype for path in files(folder) for value in load_file(folder / path).values()} == {torch.float32}


@pytest.mark.parametrize("lost", [f"b{LATENTS}", f"b{PROMPT}"])
def test_only_what_is_missing_is_encoded(lost, cached, encoded, pipe):
    (cached / lost).unlink()
    before = files(cached)
    assert write(pipe, cached) == Counts(done=1, skipped=2)
    after = files(cached)
    assert after.pop(lost) and after == before
    assert (cached / lost).read_bytes() == encoded[lost]


@pytest.mark.parametrize("rest", [0, 5, 200])
@pytest.mark.parametrize("ending", [LATENTS, PROMPT])
def test_a_truncated_file_is_written_anew(ending, rest, cached, encoded, pipe, caplog):
    broken = cached / f"a{ending}"
    broken.write_bytes(broken.read_bytes()[:rest])
    assert write(pipe, cached) == Counts(done=1, skipped=2)
    assert broken.read_bytes() == encoded[broken.name]
    assert str(broken) in caplog.text


def test_what_has_changed_since_is_encoded_anew(cached, pipe, caplog):
    """Though its file has the former name, size and time."""
    before, times = files(cached), os.stat(cached / "a.png")
    former = load_file(cached / f"a{LATENTS}")["mean"]
    with Image.open(cached / "a.png") as image:
        flipped = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    flipped.save(cached / "a.png")
    os.utime(cached / "a.png", ns=(times.st_atime_ns, times.st_mtime_ns))
    (cached / "b.txt").write_text(CAPTION.format("blue"))
    assert write(pipe, cached) == Counts(done=2, skipped=1)
    after = files(cached)
    assert {name for name in after if after[name] != before[name]} == {f"a{LATENTS}", f"b{PROMPT}"}
    assert "encoded anew: 2 (a, b)" in caplog.text
    assert not torch.equal(load_file(cached / f"a{LATENTS}")["mean"], former)
    text = pipe.encode_prompt(CAPTION.format("blue"), max_sequence_length=32)[0][0]
    assert torch.equal(load_file(cached / f"b{PROMPT}")["caption_feature_t5"], text.detach().bfloat16())
    assert write(pipe, cached) == Counts(skipped=3)


def test_another_precision_is_encoded_anew(cached, pipe):
    assert write(pipe, cached, dtype=torch.float32) == Counts(done=3)


@pytest.mark.parametrize("part", ["vae", "text_encoder_2"])
def test_another_encoder_of_the_same_sizes_is_refused(part, cached):
    other, before = FluxPipeline.from_pretrained(tiny.path("flux")), files(cached)
    with torch.no_grad():
        list(getattr(other, part).parameters())[-1].add_(1)
    with pytest.raises(ValueError, match="encoded by another VAE or text encoder.*use another folder"):
        write(other, cached)
    assert files(cached) == before


def test_files_that_do_not_say_what_they_are_made_from_are_kept(cached, pipe, caplog):
    for path in files(cached):
        save_file(load_file(cached / path), cached / path)
    before = files(cached)
    assert write(pipe, cached) == Counts(skipped=3)
    assert files(cached) == before and "do not say what they were made from, kept: 3" in caplog.text


def test_an_error_leaves_no_part_of_a_file(folder, pipe, monkeypatch):
    def fail(tensors: Any, path: Path, metadata: dict[str, str]) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("diffattn.distill.data.cache.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        write(pipe, folder)
    assert not files(folder)


def test_two_processes_cover_everything_once(folder, pipe):
    assert write(pipe, folder, rank=0, world=2) == Counts(done=2)
    first = files(folder)
    assert write(pipe, folder, rank=1, world=2) == Counts(done=1)
    both = files(folder)
    assert len(first) == 4 and len(both) == 6 and first.items() <= both.items()
    with pytest.raises(ValueError, match="rank 2 of 2"):
        write(pipe, folder, rank=2, world=2)


def test_a_corrupt_picture_is_named_counted_and_no_sample(cached, pipe, caplog):
    (cached / "b.png").write_bytes(b"none")
    (cached / f"b{LATENTS}").write_bytes(b"")
    assert write(pipe, cached) == Counts(skipped=2, corrupt=1)
    assert "b.png is not a whole image" in caplog.text
    assert CacheSource(cached).names == ["a", "deep/c"]


def test_a_process_with_nothing_but_a_corrupt_picture_goes_on(folder, pipe):
    (folder / "b.png").write_bytes(b"none")
    assert write(pipe, folder, rank=1, world=3) == Counts(corrupt=1)


def test_corrupt_pictures_only_raise(folder, pipe):
    for name in COLOURS:
        (folder / f"{name}.png").write_bytes(b"none")
    with pytest.raises(ValueError, match="3 corrupt files only"):
        write(pipe, folder)
    assert not (folder / FACTS).exists()


def test_a_missing_caption_is_named_before_anything_is_written(folder, pipe):
    (folder / "deep/c.txt").unlink()
    with pytest.raises(ValueError, match="deep/c.png"):
        write(pipe, folder)
    assert not files(folder) and not (folder / FACTS).exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"size": (128, 128)}, r"picture_size \[128, 128\], got \[96, 128\]"),
        ({"max_sequence_length": 16}, "text_length 16, got 32"),
        ({"size": (100, 128)}, "multiples of 8 pixels"),
    ],
)
def test_another_size_is_refused(options, said, cached, pipe):
    before = files(cached)
    with pytest.raises(ValueError, match=said):
        write(pipe, cached, **options)
    assert files(cached) == before


def test_whole_files_of_another_model_are_not_overwritten(cached, pipe):
    (cached / FACTS).unlink()
    save_file({"mean": torch.zeros(16, 24, 32), "std": torch.zeros(16, 24, 32)}, cached / f"a{LATENTS}")
    before = files(cached)
    with pytest.raises(ValueError, match="another model or size.*another folder"):
        write(pipe, cached)
    assert files(cached) == before


def test_a_pipeline_without_encoders_is_refused(folder):
    bare = FluxPipeline.from_pretrained(tiny.path("flux"), text_encoder_2=None, tokenizer_2=None)
    with pytest.raises(ValueError, match="without tokenizer_2, text_encoder_2"):
        write(bare, folder)
    with pytest.raises(ValueError, match="expected a diffusers pipeline to encode with, got object"):
        write(object(), folder)


def test_numbers_that_are_not_finite_are_refused(folder, pipe, monkeypatch):
    encode_prompt = pipe.encode_prompt
    monkeypatch.setattr(pipe, "encode_prompt", lambda **call: [value / 0 for value in encode_prompt(**call)])
    with pytest.raises(ValueError, match="NaN or infinity"):
        write(pipe, folder)


def test_a_sample_is_what_the_model_takes(cached, pipe):
    source = CacheSource(cached, expected=model_facts(pipe.transformer))
    assert (len(source), source.names) == (3, ["a", "b", "deep/c"])
    sample = source.sample(2, torch.Generator().manual_seed(0))
    prompt = load_file(cached / f"deep/c{PROMPT}")
    assert sample.name == "deep/c"
    assert torch.equal(sample.conditioning["encoder_hidden_states"], prompt["caption_feature_t5"].float())
    assert torch.equal(sample.conditioning["pooled_projections"], prompt["caption_feature_clip"].float())
    batch = collate(source, range(4), seed=0)
    assert {value.dtype for value in (batch.latents, *batch.conditioning.values())} == {torch.float32}
    assert batch.latents.shape == (4, 4, 24, 32) and batch.conditioning["pooled_projections"].shape == (4, 64)


def test_the_pipeline_decodes_a_sample_to_its_picture(cached, pipe):
    latents = drawn(CacheSource(cached), 2)
    scale, shift = pipe.vae.config.scaling_factor, pipe.vae.config.shift_factor
    with torch.no_grad():
        decoded = pipe.vae.decode(latents[None] / scale + shift).sample[0]
    assert (decoded - load_picture(cached / "deep/c.png", SIZE)).abs().mean() < 0.1


def test_draws_follow_the_generator_and_the_posterior(cached):
    save_file({"mean": torch.full((4, 24, 32), 3.0), "std": torch.full((4, 24, 32), 0.5)}, cached / f"a{LATENTS}")
    source = CacheSource(cached, shift=1.0, scale=2.0)
    assert torch.equal(drawn(source, seed=5), drawn(source, seed=5))
    assert not torch.equal(drawn(source, seed=5), drawn(source, seed=6))
    draws = torch.stack([drawn(source, seed=seed) for seed in range(20)])
    assert abs(draws.mean() - (3 - 1) * 2) < 0.02
    assert abs(draws.std() - 0.5 * 2) < 0.02


def test_a_cache_of_another_model_is_refused(cached, pipe):
    wrong = {**model_facts(pipe.transformer), "model": "OtherModel", "text_dim": 4096, "picture_size": SIZE}
    with pytest.raises(ValueError, match="expected model OtherModel, got Flux.*; text_dim 4096, got 96; use another"):
        CacheSource(cached, expected=wrong)
    with pytest.raises(ValueError, match="got text_width"):
        CacheSource(cached, expected={"text_width": 96})


@pytest.mark.parametrize("content", ["{", '{"model": "FluxTransformer2DModel"}'])
def test_facts_that_are_not_whole_are_refused(content, cached):
    (cached / FACTS).write_text(content)
    with pytest.raises(ValueError, match="delete it and write the cache again"):
        CacheSource(cached)


def test_an_official_cache_needs_shift_and_scale(cached, pipe):
    with_facts = CacheSource(cached)
    want, shift, scale = drawn(with_facts), with_facts.shift, with_facts.scale
    (cached / FACTS).unlink()
    for given in ({}, {"shift": shift}, {"scale": scale}):
        with pytest.raises(ValueError, match="pass shift= and scale="):
            CacheSource(cached, **given)
    official = CacheSource(cached, shift=shift, scale=scale, expected=model_facts(pipe.transformer))
    assert torch.equal(drawn(official), want)
    with pytest.raises(ValueError, match="pooled_dim 768, got 64"):
        CacheSource(cached, shift=shift, scale=scale, expected={"pooled_dim": 768})


def test_shift_and_scale_of_zero_count_as_given(cached):
    assert CacheSource(cached, scale=0.0).scale == 0.0
    assert CacheSource(cached, shift=0.0).shift == 0.0


def test_pictures_that_are_not_cached_are_left_out_and_named(cached, caplog):
    (cached / f"a{PROMPT}").unlink()
    (cached / "b.png").unlink()
    assert CacheSource(cached).names == ["deep/c"]
    assert "not cached, left out: 1 (a)" in caplog.text
    assert "gone, left out: 1 (b)" in caplog.text


def test_cache_files_without_any_picture_are_samples(cached):
    for name in COLOURS:
        (cached / f"{name}.png").unlink()
    assert CacheSource(cached).names == list(COLOURS)


def test_a_folder_that_is_not_cached_is_refused(folder):
    with pytest.raises(ValueError, match="none of 3; run write_cache"):
        CacheSource(folder)


def break_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:300])


def reshape(path: Path) -> None:
    save_file({key: value[..., :-1].contiguous() for key, value in load_file(path).items()}, path)


def rename(path: Path) -> None:
    save_file({f"other_{key}": value for key, value in load_file(path).items()}, path)


@pytest.mark.parametrize("ending", [LATENTS, PROMPT])
@pytest.mark.parametrize("damage", [Path.unlink, break_off, reshape, rename])
def test_a_damaged_sample_is_named(damage, ending, cached):
    source = CacheSource(cached)
    damage(cached / f"b{ending}")
    drawn(source, 0)
    with pytest.raises(ValueError, match="sample b can't be read"):
        drawn(source, 1)
