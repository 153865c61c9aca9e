"""The script for the day there is a GPU runs on a CPU, with torch alone, and stops in time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu_check import flex_pays_from

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "gpu_check.py"
HIDING = """
import importlib.abc, runpy, sys
class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("diffusers", "transformers", "accelerate", "huggingface_hub", "peft"):
            raise ModuleNotFoundError(name)
import importlib.util
own = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "diffusers" else own(name, *rest)
sys.meta_path.insert(0, Hidden())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT / "scripts")


@pytest.mark.slow
@pytest.mark.compile
def test_every_part_runs_with_torch_alone(tmp_path: Path) -> None:
    done = run("-c", HIDING, SCRIPT, "--cpu", "--output", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "check.json").read_text())
    assert found["finished"]
    assert list(found["parts"]) == [
        "bfloat16 forward against float64",
        "first calls and memory",
        "latency",
        "from which size on",
        "other dtypes and gradients",
        "CUDA graphs",
    ]
    rows = [row for part in found["parts"].values() for row in part]
    assert not [row for row in rows if "FAILED" in row]
    errors = [float(row["error"]) for row in found["parts"]["bfloat16 forward against float64"] if "error" in row]
    assert len(errors) > 20 and max(errors) < 2e-2
    assert "| mechanism | backend |" in (tmp_path / "check.md").read_text()


def test_the_size_from_which_the_kernel_pays_holds_for_all_larger_ones() -> None:
    def rows(flex: dict[int, float | None], dense: dict[int, float]) -> list[dict[str, object]]:
        found = [{"cells": cells, "kernel": "flex", "over_full": speed} for cells, speed in flex.items()]
        return found + [{"cells": cells, "kernel": "dense", "over_full": speed} for cells, speed in dense.items()]

    dense = {256: 1.0, 576: 0.5, 1024: 0.5, 4096: 0.3}
    assert flex_pays_from(rows({256: 2.0, 576: 0.5, 1024: 0.7, 4096: 1.0}, dense)) == 1024
    assert flex_pays_from(rows({256: 2.0, 576: 1.0, 1024: 0.7, 4096: 1.0}, dense)) == 256
    assert flex_pays_from(rows({1024: 0.7, 4096: 0.3}, dense)) is None
    assert flex_pays_from(rows({1024: 0.7, 4096: None}, dense)) is None
    assert flex_pays_from([]) is None


@pytest.mark.slow
def test_it_stops_in_time_with_what_it_has(tmp_path: Path) -> None:
    done = run(SCRIPT, "--cpu", "--seconds", 0, "--output", tmp_path)
    assert done.returncode == 0 and "stopped after 0 s" in done.stdout, done.stdout + done.stderr
    found = json.loads((tmp_path / "check.json").read_text())
    assert not found["finished"] and sum(map(len, found["parts"].values())) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.slow
def test_without_a_device_it_says_so(tmp_path: Path) -> None:
    done = run(SCRIPT, "--output", tmp_path / "out")
    assert done.returncode == 2 and "torch sees no CUDA device" in done.stderr
    assert not (tmp_path / "out").exists()
