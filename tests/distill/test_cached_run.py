"""Runs from a cache: neither VAE nor text encoders are loaded, until an image is to be drawn."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import text_pipelines
import torch
from diffattn.distill.config import DistillConfig, override, preset
from diffattn.distill.data.cache import write_cache
from diffattn.distill.data.cache_facts import FACTS
from diffattn.distill.run import evaluate_run, open_run, open_setting, train
from diffattn.distill.training import checkpoints
from diffusers import FluxPipeline
from PIL import Image

import diffattn
from diffattn import ClearAttention, tiny

ENCODING = {
    "SD3": ("vae", "text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3"),
    "SD1.5": ("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"),
    "Wan": ("vae", "text_encoder", "tokenizer"),
    "Flux": ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
}
CALL = {**text_pipelines.CALL, "Flux": {"max_sequence_length": 32}}


def build(name: str) -> Any:
    if name == "Flux":
        return FluxPipeline.from_pretrained(tiny.path("flux"))
    return text_pipelines.PIPELINES[name]()


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Of each family a saved pipeline and a cache of two images."""
    made = {}
    for name in ENCODING:
        model, data = (tmp_path_factory.mktemp(f"{name}-{kind}") for kind in ("model", "data"))
        for seed in range(2):
            pixels = np.random.default_rng(seed).integers(0, 256, (32, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(data / f"{seed}.png")
            (data / f"{seed}.txt").write_text("a red circle")
        pipe = build(name)
        pipe.save_pretrained(model)
        length = CALL.get(name, {}).get("max_sequence_length")
        write_cache(pipe, data, size=text_pipelines.SIZE, max_sequence_length=length)
        made[name] = model, data
    return made


def config(name: str, places: dict[str, tuple[Path, Path]], **changes: Any) -> DistillConfig:
    model, data = places[name]
    values = {"mechanism": ClearAttention(radius=2), "steps": 2, "batch_size": 2, "save_every": 2, **changes}
    return DistillConfig(**{"model": str(model), "data": str(data), **values})


def without_encoders(model: Path, to: Path) -> Path:
    """A copy of a saved pipeline that has neither the weights of a VAE nor text encoders."""
    shutil.copytree(model, to)
    for folder in to.iterdir():
        if folder.is_dir() and folder.name.startswith(("text_encoder", "tokenizer")):
            shutil.rmtree(folder)
    for weights in (to / "vae").glob("*.safetensors"):
        weights.unlink()
    return to


@pytest.mark.parametrize("name", ENCODING)
def test_a_run_needs_no_vae_and_no_text_encoders(name, places, tmp_path):
    bare = without_encoders(places[name][0], tmp_path / "bare")
    setting, outcome = train(config(name, places, model=str(bare)), tmp_path / "run")
    assert outcome.finished and np.isfinite(outcome.totals).all()
    assert all(getattr(setting.pipe, part) is None for part in ENCODING[name])
    evaluation, _ = evaluate_run(setting, tmp_path / "run", samples=2)
    assert evaluation.pictures is None and evaluation.velocity_error["student"] > 0
    assert setting.pipe.vae is None
    with pytest.raises(ValueError, match="cannot load"):
        evaluate_run(setting, tmp_path / "other", prompts=["a red circle"])
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("name", ["Flux", "SD3", "Wan"])
def test_what_draws_is_loaded_when_it_is_asked_for(name, places, tmp_path, monkeypatch):
    setting, _ = train(config(name, places), tmp_path)
    model = setting.student.model
    monkeypatch.setattr(type(setting.pipe), "__call__", few_steps(type(setting.pipe).__call__))
    evaluation, paths = evaluate_run(setting, tmp_path, prompts=["a red circle"], samples=2)
    assert evaluation.pictures is not None and (tmp_path / "sheet.png") in paths
    assert setting.pipe.vae is not None and setting.pipe.transformer is model
    drawn = setting.draw("a red circle", 0, text_pipelines.SIZE)
    assert drawn.shape == (*text_pipelines.SIZE, 3) and drawn.dtype == np.uint8


def few_steps(call: Any) -> Any:
    """A pipeline's call with one step, of the same signature."""
    from functools import wraps

    @wraps(call)
    def quick(self: Any, *args: Any, **options: Any) -> Any:
        return call(self, *args, **{**options, "num_inference_steps": 1})

    return quick


def test_caches_are_compared_with_the_model(places, tmp_path):
    for name, other in (("SD3", "SD1.5"), ("Flux", "SD3"), ("SD1.5", "Wan")):
        with pytest.raises(ValueError, match="another model or size"):
            train(config(name, places, data=str(places[other][1])), tmp_path)
    with pytest.raises(ValueError, match="text_length 16, got 11"):
        train(config("SD3", places, text_length=16), tmp_path)
    vae = without_encoders(places["SD3"][0], tmp_path / "vae")
    said = json.loads((vae / "vae/config.json").read_text())
    (vae / "vae/config.json").write_text(json.dumps({**said, "scaling_factor": 9.0}))
    with pytest.raises(ValueError, match="scaling_factor 9.0, got 1.5"):
        train(config("SD3", places, model=str(vae)), tmp_path)


def test_data_that_is_no_cache_is_said_before_the_model_is_loaded(places, tmp_path):
    for data, said in (("/no/such", "expected a folder, got /no/such"), (str(tmp_path), "is not JSON")):
        (tmp_path / FACTS).write_text("{")
        with pytest.raises(ValueError, match=said):
            open_setting(config("SD3", places, model="/no/such/model", data=data))
    (tmp_path / FACTS).unlink()
    with pytest.raises(ValueError, match="got none of 0"):
        train(config("SD3", places, data=str(tmp_path)), tmp_path / "run")


def test_official_caches_are_read_by_the_vaes_config(places, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(places["Flux"][1], data)
    (data / FACTS).unlink()
    source, official = (
        open_setting(config("Flux", places, data=str(path))).source() for path in (places["Flux"][1], data)
    )
    first, second = (one.sample(0, torch.Generator().manual_seed(0)).latents for one in (source, official))
    assert torch.equal(first, second)


def test_a_cached_run_is_opened_again(places, tmp_path):
    setting, _ = train(config("SD1.5", places), tmp_path)
    again = open_run(tmp_path, options=["mechanism.radius=3"])
    assert again.config.mechanism == ClearAttention(radius=3) and again.pipe.vae is None
    assert all(torch.equal(again.student.parameters[name], own) for name, own in setting.student.parameters.items())
    assert list(checkpoints.find(tmp_path)) == [2]


def launch(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)


@pytest.mark.dist
@pytest.mark.slow
def test_the_official_recipe_is_launched_by_accelerate(places, tmp_path):
    """With a small model in FLUX.1-dev's place; all else but the sizes is the recipe's."""
    model, data = places["Flux"]
    small = ["steps=1", "batch_size=2", "accumulation=2", "text_length=32"]
    ended = launch(
        *(sys.executable, "-m", "accelerate.commands.launch", "--cpu", "-m", "diffattn.distill", "run"),
        *("--preset", "clear_flux_official", "--data", str(data), "--output", str(tmp_path / "run")),
        *(word for option in [f"model={model}", *small] for word in ("-s", option)),
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    said = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (said["optimizer"], said["precision"], said["guidance"]) == ("prodigy", "bf16", 3.5)
    assert diffattn.load(FluxPipeline.from_pretrained(model), tmp_path / "run" / "adapter").layers


@pytest.mark.dist
@pytest.mark.slow
def test_a_sharded_run_is_exported_and_judged_by_its_first_process(places, tmp_path):
    model, data = places["Flux"]
    options = [f"model={model}", "steps=2", "batch_size=2", "text_length=32", "sharded=true", "sheet_every=0"]
    ended = launch(
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "diffattn.distill", "run", "--preset", "tiny", "--data", str(data), "--output", str(tmp_path / "run")),
        *(word for option in options for word in ("-s", option)),
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.count("wrote") == 3, "the adapter and two files of figures, each said once"
    figures = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert figures["velocity_error"]["student"] > 0
    alone, _ = train(override(preset("tiny"), [*options[:-2], f"data={data}"]), tmp_path / "alone")
    pipe = FluxPipeline.from_pretrained(model)
    diffattn.load(pipe, tmp_path / "run" / "adapter")
    own = dict(pipe.transformer.named_parameters())
    for name, weight in alone.student.parameters.items():
        torch.testing.assert_close(own[name], weight, atol=1e-4, rtol=0)
