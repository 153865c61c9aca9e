"""One call on the tokens of an 8K image with text stays below 4 GB, Python and torch included."""

import subprocess
import sys

import pytest
import torch

from diffattn.kernels.flex import missing_compiler

BIG = """
import resource, sys, torch
from diffattn.grid import TokenGrid
from diffattn.kernels import window_attention
from diffattn.mechanisms.clear import Ball
grid = TokenGrid(512, 512, before=512)
torch.manual_seed(0)
q, k, v = (torch.randn(1, 1, grid.tokens, 64) for _ in range(3))
out = {}
with torch.no_grad():
    try:
        window_attention(q, k, v, grid, Ball(8), scale=0.125, backend="dense")
    except MemoryError as error:
        assert "tiled" in str(error)
    else:
        raise SystemExit("dense did not refuse")
    for backend in sys.argv[1:]:
        out[backend] = window_attention(q, k, v, grid, Ball(8), scale=0.125, backend=backend)
for token in (0, 300, 512, 512 + 100 * 512 + 77, grid.tokens - 1):  # text, corners, inside
    keys = torch.arange(grid.tokens) < 0
    if token < 512:
        keys[:] = True
    else:
        y, x = divmod(token - 512, 512)
        rows, columns = torch.arange(512)[:, None] - y, torch.arange(512)[None] - x
        keys[512:] = (rows**2 + columns**2 < 64).flatten()
        keys[:512] = True
    weight = (q[0, 0, token] @ k[0, 0, keys].T * 0.125).softmax(-1)
    for backend, result in out.items():
        assert (weight @ v[0, 0, keys] - result[0, 0, token]).abs().max() < 2e-5, (backend, token)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)
"""


@pytest.mark.slow
def test_an_8k_picture_fits_in_4_gigabytes():
    backends = ["tiled"] if missing_compiler(torch.device("cpu")) else ["tiled", "flex"]
    done = subprocess.run([sys.executable, "-c", BIG, *backends], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 4
