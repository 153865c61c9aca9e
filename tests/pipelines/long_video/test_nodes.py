"""Several machines: one launcher for each, here two on one machine, make the video of a single process."""

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_video
from PIL import Image

from diffattn.cli.commands.long_video import main

FRAMES = 7


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(node: int, port: int, *arguments: Any) -> "subprocess.Popen[str]":
    """torchrun of machine `node` of two, as docs/long-video.md has it, with a rank for each."""
    _, environment = tiny_video.command()
    nodes = ["--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(node)]
    address = ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    module = ["-m", "diffattn.pipelines.long_video", *map(str, arguments)]
    line = [sys.executable, "-m", "torch.distributed.run", *nodes, *address, *module]
    return subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run_on_two(*arguments: Any) -> list[tuple[int, str, str]]:
    """(exit code, output, errors) of both launchers."""
    port = free_port()
    nodes = [launch(node, port, *arguments) for node in (0, 1)]
    try:
        told = [node.communicate(timeout=240) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    return [(node.returncode, *texts) for node, texts in zip(nodes, told, strict=True)]


def pictures(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(file)).astype(int) for file in sorted(folder.glob("*.png"))])


def options(model: Path, output: Path, prompts: Path) -> list[str]:
    line = ["--model", model, "--output", output, "--prompts", prompts, "--device", "cpu", "--dtype", "float32"]
    size = ["--height", 16, "--width", 24, "--steps", 2, "--padding", 2, "--top-k", 3, "--seed", 5]
    return list(map(str, [*line, *size]))


@pytest.mark.dist
@pytest.mark.slow
def test_two_launchers_make_the_video_of_one_process(model: Path, tmp_path: Path) -> None:
    prompts = tiny_video.write_prompts(tmp_path / "prompts.json", FRAMES)
    assert main(options(model, tmp_path / "one", prompts)) == 0
    first, second = run_on_two(*options(model, tmp_path / "two", prompts))
    assert first[0] == second[0] == 0, first[2] + second[2]
    assert f"wrote {tmp_path / 'two'}" in first[1] and "wrote" not in second[1]
    want, got = pictures(tmp_path / "one"), pictures(tmp_path / "two")
    assert want.shape == got.shape == (FRAMES, 16, 24, 3) and want.std() > 1
    assert np.abs(got - want).max() <= 1


@pytest.mark.dist
@pytest.mark.slow
def test_both_launchers_say_what_is_wrong(model: Path, tmp_path: Path) -> None:
    prompts = tiny_video.write_prompts(tmp_path / "prompts.json", FRAMES)
    for node, (code, _, errors) in enumerate(run_on_two(*options(model, tmp_path / "out", prompts), "--frames", 1)):
        assert code != 0
        assert f"diffattn: error: rank {node}: " in errors
    assert not (tmp_path / "out").exists()
