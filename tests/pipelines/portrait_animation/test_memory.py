"""Long driving videos, in processes of their own so that their peak memory can be told."""

import os
import subprocess
import sys
from pathlib import Path

import portrait_files as files
import pytest

from diffattn.media.video import probe

RUN = """
import atexit, re, sys
import diffattn.pipelines.portrait_animation.run.animation
from diffattn.cli import app
# not `ru_maxrss`, which begins with the peak of the process that started this one
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1e3
imported = peak()
atexit.register(lambda: print(peak() - imported))
app(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return files.write_checkpoint(tmp_path_factory.mktemp("memory") / "x-portrait")


def peak(checkpoint: Path, folder: Path, count: int) -> float:
    """MB above what the process had after its imports."""
    folder.mkdir()
    clip = files.write_clip(folder / "driving.mp4", count, repeat=8)
    points = files.write_points(folder / "points.npy", count)
    line = ["animate", files.write_source(folder / "source.png"), clip, "--landmarks", points, "--steps", "1"]
    line += ["--checkpoint", checkpoint, "--guidance", "1", "--window", "8", "--output", folder / "out.mp4"]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back at once
    command = [sys.executable, "-c", RUN, *map(str, line)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    assert probe(folder / "out.mp4").frames == count
    return float(done.stdout.split()[-1])


@pytest.mark.slow
def test_memory_does_not_grow_with_the_video(checkpoint: Path, tmp_path: Path) -> None:
    short, long = (peak(checkpoint, tmp_path / str(count), count) for count in (48, 120))
    assert short > 50 and long < 1.1 * short, f"{short:.0f} MB for 48 frames, {long:.0f} MB for 120"
