"""A large image, in a process of its own so that its peak memory can be told."""

import subprocess
import sys
from pathlib import Path

import matplotlib.cbook
import pytest
import tiny_pasd
from PIL import Image

LIMIT = 6.0
"""GB."""


@pytest.mark.slow
def test_a_photograph_grows_to_2048_pixels_in_little_memory(tmp_path: Path) -> None:
    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file:
        Image.open(file).convert("RGB").crop((0, 0, 512, 512)).save(tmp_path / "in.png")
    checkpoint, base = tiny_pasd.write_checkpoint(tmp_path / "pasd"), tiny_pasd.write_base(tmp_path / "base")
    options = f"--checkpoint {checkpoint} --base {base} --scale 4 --steps 1 --tile 512 --tile-overlap 64 --compare"
    code = (
        "import atexit, resource; from diffattn.cli import app\n"
        "atexit.register(lambda: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6))\n"
        f"app({['upscale', str(tmp_path / 'in.png'), *options.split(), '--output', str(tmp_path / 'out')]!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "out" / "in.png") as result:
        assert result.size == (2048, 2048)
    peak = float(done.stdout.split()[-1])
    assert peak < LIMIT, f"{peak} GB"
