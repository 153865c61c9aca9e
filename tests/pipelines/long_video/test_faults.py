"""Real processes: a rank that dies or stands still ends the run, and another number of ranks goes on with it."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_video
import torch
from diffattn.pipelines.long_video import Checkpoints, LongVideoConfig, LongVideoPipeline, open_parts
from diffattn.pipelines.long_video.checkpoints import found_in
from PIL import Image

from diffattn.parallel import FramePlan

FRAMES, STEPS = 7, 24
pytestmark = [
    pytest.mark.dist,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers.schedulers"),  # of numpy, by diffusers
]


def start(folder: Path, model: Path, ranks: int, *more: Any) -> "subprocess.Popen[str]":
    tiny_video.write_prompts(folder / "prompts.json", FRAMES)
    options = ["--model", model, "--prompts", folder / "prompts.json", "--height", 16, "--width", 16, "--blend", 2]
    options += ["--steps", STEPS, "--guidance", 2, "--padding", 2, "--top-k", 3, "--scheduler", "sde-dpmsolver++"]
    options += ["--seed", 5, "--save-every", 4, "--output", folder / "frames", *more]
    line, environment = tiny_video.command(*options, ranks=ranks)
    with (folder / f"told-{ranks}").open("w") as told:
        return subprocess.Popen(line, env=environment, stdout=told, stderr=subprocess.STDOUT, text=True)


def config() -> LongVideoConfig:
    return tiny_video.config(FRAMES, steps=STEPS, guidance=2.0, scheduler="sde-dpmsolver++")


def wait_for(what: Callable[[], Any], seconds: float, told: Path) -> Any:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found = what()
        if found:
            return found
        if "ChildFailedError" in told.read_text():
            break
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s; the ranks said\n{told.read_text()}")


def pids_of_ranks(launcher: int) -> dict[int, int]:
    """Rank -> process of what a torchrun started."""
    found = {}
    for process in Path("/proc").iterdir():
        try:
            parent = int((process / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == launcher:
                lines = (process / "environ").read_bytes().decode().split("\0")
                values = dict(line.split("=", 1) for line in lines if "=" in line)
                found[int(values["RANK"])] = int(process.name)
        except (OSError, IndexError, KeyError, ValueError):
            continue
    return found


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def end(launcher: "subprocess.Popen[str]", ranks: dict[int, int]) -> None:
    for pid in ranks.values():
        if is_running(pid):
            os.kill(pid, signal.SIGKILL)
    launcher.terminate()
    launcher.wait(60)


def pictures(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(file)) for file in sorted(folder.glob("*.png"))]).astype(int)


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_and_two_ranks_go_on(tmp_path: Path, model: Path) -> None:
    work, told = tmp_path / "frames.work", tmp_path / "told-3"
    launcher = start(tmp_path, model, 3)
    ranks: dict[int, int] = {}
    try:
        wait_for(lambda: found_in(work / "checkpoints"), 90, told)
        ranks = pids_of_ranks(launcher.pid)
        os.kill(ranks[1], signal.SIGKILL)
        killed = time.monotonic()
        wait_for(lambda: not any(map(is_running, ranks.values())), 60, told)
        assert launcher.wait(60) != 0
        assert time.monotonic() - killed < 60
    finally:
        end(launcher, ranks)
    text = told.read_text()
    for rank in (0, 2):
        assert f"rank {rank} ends: rank 1 is dead or stopped, its last sign came in step" in text or (
            f"error: rank {rank}: rank 1 is dead or stopped, its last sign came in step" in text
        ), text
    assert max(found_in(work / "checkpoints")) < STEPS
    second = start(tmp_path, model, 2, "--resume", "--keep")
    assert second.wait(120) == 0, (tmp_path / "told-2").read_text()

    pipe = LongVideoPipeline(open_parts(str(model), None, torch.float32, torch.device("cpu")), FramePlan((FRAMES,)))
    latents = pipe(config(), tmp_path / "whole")
    last = work / "checkpoints" / f"step-{STEPS:06d}"
    checkpoints = Checkpoints(work, LongVideoConfig.from_dict(tiny_video.stored_config(last)), pipe.plan, 0)
    got = checkpoints.read(last, torch.device("cpu")).latents
    assert float(latents.abs().max()) > 0.1
    torch.testing.assert_close(got, latents, atol=1e-4 * float(latents.abs().max()), rtol=0)
    assert np.abs(pictures(tmp_path / "frames") - pictures(tmp_path / "whole")).max() <= 1


@pytest.mark.slow
def test_a_stopped_rank_ends_the_other_at_the_timeout(tmp_path: Path, model: Path) -> None:
    told = tmp_path / "told-2"
    launcher = start(tmp_path, model, 2, "--timeout", 15)
    ranks: dict[int, int] = {}
    try:
        wait_for(lambda: found_in(tmp_path / "frames.work" / "checkpoints"), 90, told)
        ranks = pids_of_ranks(launcher.pid)
        os.kill(ranks[1], signal.SIGSTOP)
        stopped = time.monotonic()
        wait_for(lambda: not is_running(ranks[0]), 40, told)
        assert 10 < time.monotonic() - stopped < 40
    finally:
        end(launcher, ranks)
    assert launcher.returncode != 0
    assert "rank 0 ends: rank 1 is dead or stopped, its last sign came in step" in told.read_text()
