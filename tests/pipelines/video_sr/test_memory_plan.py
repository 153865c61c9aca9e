"""What a run is said to need: each part follows from sizes, and too little is refused by name."""

import functools
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import clip_files as files
import pytest
import torch
from diffattn.pipelines.video_sr.i2vgenxl.settings import UpscaleSettings
from diffattn.pipelines.video_sr.i2vgenxl.sizes import Plan, plan_upscaling
from diffattn.pipelines.video_sr.run import memory
from diffattn.pipelines.video_sr.run.memory import LiveBytes, MemoryPlan, plan_memory

CPU, GPU = torch.device("cpu"), torch.device("cuda")
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return files.write_checkpoint(tmp_path_factory.mktemp("plan") / "star")


def sizes(frames: int = 12, height: int = 20, width: int = 16, **settings: Any) -> tuple[Plan, UpscaleSettings]:
    made = UpscaleSettings(**{"window": 8, "overlap": 4, "decode_chunk": 4, **settings})
    return plan_upscaling(frames, height, width, 4, made, steps=2), made


@functools.cache
def planned(checkpoint: Path, dtype: torch.dtype = torch.float32, **options: Any) -> MemoryPlan:
    return plan_memory(checkpoint, *sizes(**options), dtype)


def plan(**parts: Any) -> MemoryPlan:
    weights = {"unet": 50, "controlnet": 20, "vae": 10, "text_encoder": 40}
    own = {"weights": weights, "encode": 5, "window": 60, "decode": 30, "frames": 7, "disk": 100}
    return MemoryPlan(**{**own, "dtype": torch.float32, **parts})


def test_live_bytes_are_those_that_are_still_referred_to() -> None:
    with LiveBytes() as live:
        first = torch.zeros(1000)  # 4000 bytes
        view = first[:10].reshape(2, 5)
        first = first + 1  # 8000, as the view holds on to the old ones
        del view
        other = torch.zeros(250)  # 5000
    assert live.peak == 8000 and first.shape == (1000,) and other.shape == (250,)


@pytest.mark.slow
def test_weights_are_counted_by_the_heads_of_their_files(checkpoint: Path) -> None:
    whole, half = (planned(checkpoint, dtype).weights for dtype in (torch.float32, torch.bfloat16))
    assert set(whole) == {"unet", "controlnet", "vae", "text_encoder"}
    for name, size in whole.items():
        files_of = list((checkpoint / name).glob("*.safetensors"))
        assert 0 < sum(file.stat().st_size for file in files_of) - size < 0.35 * size + 3000
        assert half[name] * 2 == size


@pytest.mark.slow
def test_each_part_follows_its_own_settings(checkpoint: Path) -> None:
    wide = {"height": 40, "width": 48}
    base = planned(checkpoint, **wide)
    other = planned(checkpoint, **wide, window=4, overlap=2, decode_chunk=2, decode_overlap=1, encode_chunk=3)
    assert other.window == pytest.approx(base.window / 2, rel=0.15)
    assert other.decode == pytest.approx(base.decode / 2, rel=0.1) and other.frames == base.frames / 2
    assert other.encode == pytest.approx(3 * base.encode, rel=0.1)
    assert planned(checkpoint, **wide, guidance_batch=True).window == pytest.approx(2 * base.window, rel=0.15)
    for tiles in ({"tile": 80}, {"decode_tile": 80}):
        tiled = planned(checkpoint, **wide, **tiles, tile_overlap=16)
        smaller, same = ("window", "decode") if "tile" in tiles else ("decode", "window")
        assert getattr(tiled, smaller) < 0.5 * getattr(base, smaller)
        assert getattr(tiled, same) == getattr(base, same) and tiled.encode == base.encode


@pytest.mark.slow
def test_a_longer_clip_needs_more_disk_alone(checkpoint: Path) -> None:
    short, long = planned(checkpoint, frames=12), planned(checkpoint, frames=36)
    assert long.disk == pytest.approx(3 * short.disk, abs=1)
    assert (long.device, long.frames) == (short.device, short.frames)


@pytest.mark.slow
def test_disk_holds_the_latents_before_and_after_a_step(checkpoint: Path) -> None:
    made, _ = sizes()
    latents = 12 * 4 * made.latent[0] * made.latent[1] * 4
    assert 5 * latents < planned(checkpoint).disk < 7 * latents


@pytest.mark.slow
def test_half_precision_halves_all_but_an_encoder_that_overflows(checkpoint: Path) -> None:
    whole, half = planned(checkpoint), planned(checkpoint, torch.float16)
    assert half.window == pytest.approx(whole.window / 2, rel=0.05) and half.encode == whole.encode
    assert planned(checkpoint, torch.bfloat16).encode == pytest.approx(whole.encode / 2, rel=0.05)
    assert torch.get_default_dtype() == torch.float32


def test_a_part_without_weights_is_named(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "less")
    (tmp_path / "less" / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"expected safetensors files in .*vae; got none"):
        planned(tmp_path / "less")


def test_only_what_computes_counts_with_offload() -> None:
    assert plan().device == 120 + 60
    assert plan(offload=True).device == 70 + 60
    assert plan(offload=True, window=1, decode=300).device == 10 + 300
    assert plan(offload=True, window=1, encode=2, decode=3).device == 71
    assert plan(offload=True, weights={"unet": 1, "controlnet": 1, "vae": 1, "text_encoder": 90}).device == 90


def test_the_cpu_holds_frames_and_what_passes_through_it() -> None:
    assert plan().on_cpu(CPU) == 180 + 7 and plan().on_cpu(GPU) == 120 + 7


def test_needs_in_one_line() -> None:
    weights = {"unet": 5_000_000_000, "controlnet": 2_000_000_000, "vae": 0, "text_encoder": 0}
    text = plan(weights=weights, window=3_000_000_000, decode=2_000_000).describe(CPU, Path("out.mp4.work"))
    assert text == (
        "needs about 10.0 GB of memory at these settings (weights 7.0 GB, window 3.0 GB, decode 2.0 MB) and 0.0 MB of "
        "disk in out.mp4.work"
    )
    assert "decode 2.0 MB, one at a time)" in plan(decode=2_000_000, offload=True).describe(GPU, Path("a"))


@pytest.mark.parametrize(
    ("device", "parts", "helps"),
    [
        (CPU, {}, "try a smaller --tile or --window, --dtype bfloat16, or --force"),
        (CPU, {"decode": 90}, "try a smaller --decode-chunk or --decode-tile, --dtype bfloat16, or --force"),
        (CPU, {"encode": 90, "dtype": torch.bfloat16}, "try a smaller --scale, or --force"),
        (GPU, {"dtype": torch.float16}, "try a smaller --tile or --window, --offload, or --force"),
        (GPU, {"dtype": torch.float16, "offload": True}, "try a smaller --tile or --window, or --force"),
    ],
)
def test_too_little_memory_is_refused_with_what_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: torch.device, parts: dict[str, Any], helps: str
) -> None:
    made = plan(**parts)
    need = made.on_cpu(CPU) if device == CPU else made.device
    monkeypatch.setattr(memory, "free_bytes", lambda place: need - 1 if place == device else 10**9)
    with pytest.raises(ValueError, match=f"expected .* of free memory on {device}; got .*; {helps}$"):
        made.check(device, tmp_path / "work")
    monkeypatch.setattr(memory, "free_bytes", lambda place: need if place == device else 10**9)
    made.check(device, tmp_path / "work")


def test_weights_that_do_not_pass_through_the_cpu_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda place: 126 if place == CPU else 10**9)
    with pytest.raises(ValueError, match="free memory on cpu"):
        plan().check(GPU, tmp_path / "work")


def test_memory_that_cannot_be_told_is_not_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda place: None)
    plan().check(CPU, tmp_path / "work")


def test_too_little_disk_is_refused_but_what_is_kept_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda folder: seen.append(folder) or Usage(0, 0, 60))
    with pytest.raises(ValueError, match=r"free disk for .*work; got .*; free some, name an --output elsewhere"):
        plan().check(CPU, tmp_path / "work", 39)
    plan().check(CPU, tmp_path / "work", 40)
    assert seen == [tmp_path, tmp_path]
