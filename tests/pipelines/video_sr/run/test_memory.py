"""Memory of whole runs and of single calls, in processes of their own so that their peak can be told."""

import os
import subprocess
import sys
from pathlib import Path

import clip_files as files
import pytest
import star_runs
import tiny_star

from diffattn.media.video import probe

ROOT = Path(__file__).resolve().parents[4]
RUN = """
import atexit, re, sys
import diffattn.pipelines.video_sr.run.upscaling
from diffattn.cli import app
# not `ru_maxrss`, which begins with the peak of the process that started this one
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1e3
imported = peak()
atexit.register(lambda: print(peak() - imported))
app(sys.argv[1:])
"""
CALL = """
import re, resource, sys
from pathlib import Path
import torch
from diffattn.pipelines.video_sr.run.memory import MARGIN, plan_memory
from diffattn.pipelines.video_sr.run.opening import open_pipeline
from diffattn.pipelines.video_sr.i2vgenxl.sizes import plan_upscaling
from diffattn.pipelines.video_sr.i2vgenxl.settings import UpscaleSettings
folder, part = Path(sys.argv[1]), sys.argv[2]
settings = UpscaleSettings(window=8, overlap=4, decode_chunk=4)
plan = plan_upscaling(8, 68, 128, 4, settings, steps=1)
planned = getattr(plan_memory(folder, plan, settings, torch.float32), part) / MARGIN
pipe = open_pipeline(folder, torch.device("cpu"), torch.float32)
x, text = torch.randn(1, 4, 8, *plan.latent), torch.randn(1, 77, 12)
pages = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
before = pages()
with torch.no_grad():
    if part == "window":
        down, mid = pipe.controlnet(x, 500, text, x, return_dict=False)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        pipe.unet(x, 500, text, **residuals)
    else:
        pipe.vae.decode(x[0, :, :4].transpose(0, 1), num_frames=4)
peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
print((peak * 1024 - before) / planned)
"""
WIDE = {"block_out_channels": (64, 64, 64, 64), "norm_num_groups": 16, "attention_head_dim": 16}
"""So that activations are large beside everything else."""


def run(program: str, *arguments: object) -> float:
    """The last number that it prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is freed goes back at once
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    return float(done.stdout.split()[-1])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return files.write_checkpoint(tmp_path_factory.mktemp("memory") / "star")


def peak(checkpoint: Path, folder: Path, count: int) -> float:
    """MB above what the process had after its imports."""
    folder.mkdir()
    clip = files.write_clip(folder / "in.mp4", count, height=20, width=28, repeat=8)
    line = ["video-upscale", clip, "--checkpoint", checkpoint, "--output", folder / "out.mp4", "--device", "cpu"]
    used = run(RUN, *line, "--window", 8, "--overlap", 2, "--steps", 1, "--guidance", 1)
    found = probe(folder / "out.mp4")
    assert (found.frames, found.height, found.width) == (count, 80, 112)
    return used


@pytest.mark.slow
def test_memory_does_not_grow_with_the_video(checkpoint: Path, tmp_path: Path) -> None:
    short, long = (peak(checkpoint, tmp_path / str(count), count) for count in (48, 120))
    assert short > 50 and long < 1.05 * short, f"{short:.0f} MB for 48 frames, {long:.0f} MB for 120"


@pytest.mark.slow
@pytest.mark.parametrize("part", ["window", "decode"])
def test_a_call_takes_what_is_counted_and_what_kernels_need(tmp_path: Path, part: str) -> None:
    wide = {"unet": tiny_star.unet(**WIDE), "controlnet": tiny_star.controlnet(**WIDE)}
    star_runs.pipeline(**wide).save_pretrained(tmp_path / "star")
    assert 0.75 < run(CALL, tmp_path / "star", part) < 1.5
