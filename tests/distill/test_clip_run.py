"""Clips from the teacher's prompts to an evaluation, by the commands; what they refuse; the bundled world."""

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import text_pipelines
import torch
from diffattn.distill.config import override, preset
from diffattn.distill.data.cache_facts import FACTS
from diffattn.distill.evaluation.evaluate import MODELS, compare
from diffattn.distill.evaluation.page import page
from diffattn.distill.run import evaluate_run, open_run, open_setting, train
from diffattn.distill.setting import world_prompts
from diffusers import WanPipeline
from PIL import Image
from video_files import encode, picture

import diffattn
from diffattn import tiny
from diffattn.cli import main
from diffattn.measure import psnr

SIZE = "32x48"


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(["distill", *arguments])
    assert isinstance(end.value.code, int)
    return end.value.code


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    text_pipelines.PIPELINES["Wan"]().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips that the model drew, cached."""
    folder = tmp_path_factory.mktemp("data")
    prompts = folder.parent / "prompts.txt"
    prompts.write_text("a red circle\na blue ring\n")
    assert command("generate", model, str(prompts), "--size", SIZE, "--frames", "9", "--output", str(folder)) == 0
    assert (
        command("cache", model, str(folder), "--size", SIZE, "--frames", "5", "--fps", "8", "--text-length", "12") == 0
    )
    return folder


@pytest.fixture(scope="module")
def run(model: str, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    settings = (f"model={model}", "mechanism.radius=1.5", "mechanism.radius_t=none", "steps=2", "batch_size=2")
    options = [word for setting in (*settings, "text_length=none", "warmup=0") for word in ("-s", setting)]
    assert command("run", "--preset", "tiny_video", "--data", str(data), *options, "--output", str(folder)) == 0
    return folder


def test_every_other_frame_of_the_teachers_clips_is_cached(data: Path) -> None:
    """Drawn for 16 frames a second, taken at 8."""
    said = json.loads((data / FACTS).read_text())
    assert (said["frames"], said["fps"], said["latent_size"]) == (5, "8", [2, 4, 6])
    assert len(list(data.glob("*_sample.safetensors"))) == len(list(data.glob("*.mp4"))) == 2


def test_a_run_on_clips_is_evaluated_on_clips(run: Path, model: str) -> None:
    assert command("evaluate", str(run), "--prompt", "a red circle", "--samples", "2", "--rounds", "1") == 0
    figures = json.loads((run / "evaluation.json").read_text())
    assert figures["pictures"]["frames"] == 5 and figures["layers"][0]["grid"] == "2x2x3"
    assert figures["speed"]["size"] == [4, 2, 4, 6]
    assert "Clips of 1 prompts, means over frames:" in (run / "evaluation.md").read_text()
    assert (run / "sheet.png").is_file()
    pipe = WanPipeline.from_pretrained(model)
    assert diffattn.load(pipe, run / "adapter").layers


def test_frames_that_the_data_does_not_have_are_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("evaluate", str(run), "--samples", "2", "--set", "frames=9", "--rounds", "0") == 2
    assert "expected frames 9, got 5" in capsys.readouterr().err
    assert open_run(run, options=["frames=5"]).source().sample(0, torch.Generator()).latents.shape == (4, 2, 4, 6)


def test_a_setting_draws_as_many_frames_as_the_data_has(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def draw(pipe: Any, prompts: Any, seeds: Any, **call: Any) -> list[list[Image.Image]]:
        asked.append(call["num_frames"])
        return [[Image.new("RGB", (48, 32))] * call["num_frames"]]

    monkeypatch.setattr("diffattn.distill.setting.draw", draw)
    setting = open_run(run)
    assert setting.draw("a", 0).shape == (5, 32, 48, 3)
    assert open_run(run, options=["frames=9"]).draw("a", 0).shape == (9, 32, 48, 3)
    assert open_run(run, options=["frames=1"]).draw("a", 0).shape == (32, 48, 3)
    assert asked == [5, 9, 1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--frames", "8"], "clips of 4 n + 1 frames, as the VAE of WanPipeline takes them, got 8; ask for 5 or 9"),
        (["--frames", "1"], "frames must be 2 or more, an image is a clip of one: leave it out, got 1"),
        (["--stride", "2"], "give --frames, which says how many, as well"),
        (["--fps", "8"], "give --frames, which says how many, as well"),
        (["--frames", "5", "--fps", "none"], "--fps must be a positive number such as 16 or 30000/1001, got 'none'"),
        (["--frames", "5", "--fps", "8", "--stride", "2"], "a stride or a rate (fps), got stride=2 and fps=8"),
        (["--frames", "5", "--size", "32x40"], "multiples of 16 pixels, got (32, 40)"),
        ([], "got 1 videos only; say how many frames a clip has"),
    ],
    ids=str,
)
def test_what_a_cache_of_clips_cannot_be(
    options: list[str], said: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encode(tmp_path / "a.mp4", [picture(number) for number in range(9)])
    (tmp_path / "a.txt").write_text("one")
    assert command("cache", model, str(tmp_path), *([] if "--size" in options else ["--size", SIZE]), *options) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "a.txt"]


def test_shards_of_videos_are_unpacked_and_cached(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with tarfile.open(tmp_path / "data-0.tar", "w") as shard:
        for name, count in (("a", 6), ("b", 3)):
            shard.add(encode(tmp_path / f"{name}.mp4", [picture(number) for number in range(count)]), f"{name}.mp4")
            (tmp_path / f"{name}.txt").write_text("one")
            shard.add(tmp_path / f"{name}.txt", f"{name}.txt")
    folder, shards = tmp_path / "clips", str(tmp_path / "data-{0..0}.tar")
    for done in ("done=1, skipped=0", "done=0, skipped=1"):
        assert command("cache", model, str(folder), "--size", SIZE, "--frames", "5", "--shards", shards) == 0
        assert f"Counts({done}, corrupt=1)" in capsys.readouterr().out
    assert [path.name for path in folder.rglob("*.safetensors")] == ["a_sample.safetensors"]


def test_an_image_folder_is_no_folder_of_clips(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(picture(0)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("one")
    assert command("cache", model, str(tmp_path), "--size", SIZE, "--frames", "5") == 2
    assert "got 1 images only; leave the number of frames out to cache these" in capsys.readouterr().err
    assert command("cache", "tiny", str(tmp_path), "--size", "64x64", "--frames", "5") == 2
    encode(tmp_path / "b.mp4", [picture(number) for number in range(9)])
    (tmp_path / "b.txt").write_text("one")
    assert command("cache", "tiny", str(tmp_path), "--size", "64x64", "--frames", "5") == 2
    assert "FluxTransformer2DModel makes images, got frames=5 of clips" in capsys.readouterr().err


def test_an_image_model_draws_no_clips(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_text("one\n")
    prompts, output = str(tmp_path / "prompts.txt"), tmp_path / "out"
    assert command("generate", "tiny", prompts, "--frames", "5", "--output", str(output)) == 2
    assert "FluxPipeline draws images, got num_frames=5; leave it out" in capsys.readouterr().err
    assert command("generate", "tiny:wan", prompts, "--fps", "0", "--output", str(output)) == 2
    assert "--fps must be a positive number" in capsys.readouterr().err
    assert not output.exists()


def test_clips_are_compared_frame_by_frame() -> None:
    rng = np.random.default_rng(0)
    drawn = {which: [rng.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8) for _ in range(2)] for which in MODELS}
    seen: list[tuple[int, list[str]]] = []

    def count(pictures: Any, teacher: Any, prompts: Any) -> float:
        seen.append((len(pictures), list(prompts)))
        return float(np.mean([picture.ndim for picture in pictures]))

    found = compare(drawn, ["a", "b"], {"count": count})
    pairs = [(own, wanted) for pair in zip(drawn["student"], drawn["teacher"], strict=True)
             for own, wanted in zip(*pair, strict=True)]  # fmt: skip
    assert found.frames == 3 and found.psnr["student"] == pytest.approx(np.mean([psnr(*pair) for pair in pairs]))
    assert found.ssim is not None and set(found.ssim) == {"student", "swap alone"}
    assert found.metrics == {"count": dict.fromkeys(MODELS, 3.0)} and seen[0] == (6, ["a"] * 3 + ["b"] * 3)
    greys = np.arange(0, 250, 10, dtype=np.uint8)[:, None, None, None].repeat(32, 1).repeat(32, 2).repeat(3, 3)
    shown = np.asarray(page({which: [greys] for which in MODELS}, ["a"]))
    for grey in (0, 80, 160, 240):
        found = np.argwhere((shown == grey).all(-1))
        assert len(found) > 3 * 32 * 32 / 4, "the first and last frame, and two between"


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffattn.distill.setting.TRAINING_CLIPS", 3)
    monkeypatch.setattr("diffattn.distill.setting.HELD_OUT_CLIPS", 2)


@pytest.mark.slow
def test_the_video_preset_learns(few: None, tmp_path: Path) -> None:
    """In a few steps, on shorter clips."""
    config = override(preset("tiny_video"), ["steps=6", "batch_size=2", "warmup=0", "frames=17", "mechanism.radius=4"])
    setting, outcome = train(config, tmp_path)
    assert setting is not None and outcome.finished
    evaluation, _ = evaluate_run(setting, tmp_path, prompts=[], samples=2)
    assert 0 < evaluation.velocity_error["student"] < evaluation.velocity_error["swap alone"]
    assert evaluation.layers[0].grid == "5x12x12"
    card = (tmp_path / "adapter/README.md").read_text()
    assert 'diffattn.tiny.path("wan")' in card and 'diffattn.tiny.defaults("wan")' in card
    pipe = WanPipeline.from_pretrained(tiny.path("wan"))
    assert len(diffattn.load(pipe, tmp_path / "adapter").layers) == 6


def test_the_video_preset_has_a_third_of_the_pairs(few: None) -> None:
    setting = open_setting(preset("tiny_video"))
    layer = diffattn.TokenGrid(12, 12, frames=9)
    size = setting.student.model.config
    shares = [
        mechanism.flops(layer, size.num_attention_heads, size.attention_head_dim)
        for mechanism in (setting.config.mechanism, diffattn.SoftmaxAttention())
    ]
    assert 0.25 < shares[0] / shares[1] < 0.35
    sample = setting.source().sample(0, torch.Generator())
    assert sample.latents.shape == (8, 9, 12, 12) and sample.conditioning["encoder_hidden_states"].shape == (16, 64)
    assert len(setting.held_out()) == 2 and len(world_prompts("moving")) == 8 and world_prompts("folder") == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("data=shapes", "data=shapes is for a FluxTransformer2DModel, and 'tiny:wan' has a WanTransformer3DModel"),
        ("model=tiny", "data=moving is for a WanTransformer3DModel, and 'tiny' has a FluxTransformer2DModel"),
        ("frames=8", "clips of 4 n + 1 frames, as the VAE of WanPipeline takes them, got 8; ask for 5 or 9"),
    ],
)
def test_worlds_belong_to_their_pipelines(change: str, said: str, few: None) -> None:
    with pytest.raises(ValueError) as error:
        open_setting(override(preset("tiny_video"), ["mechanism.radius_t=none", change])).source()
    assert said in str(error.value)
