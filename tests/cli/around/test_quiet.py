"""What reaches the terminal: real processes, whose stdout and stderr hold a command's own lines alone."""

import logging
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffattn.cli.around.quiet import PROGRESS, set_up
from diffattn.errors import CHATTY, DEBUG

ROOT = Path(__file__).resolve().parents[3]
NOISE = ("torchao", "transformers", "_pytree", "torchvision", "triton", "Warning")


def program(*arguments: object) -> subprocess.CompletedProcess[str]:
    """`diffattn` in a process of its own; without its lines on progress, which only a busy machine makes it write."""
    line = [sys.executable, "-m", "diffattn", *map(str, arguments)]
    result = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    result.stderr = re.sub(r"^diffattn: steps: \d+ of \d+ after [\d:]+\n", "", result.stderr, flags=re.MULTILINE)
    return result


@pytest.mark.slow
def test_generate_prints_its_own_lines_alone_and_makes_the_same_again(tmp_path: Path) -> None:
    plain = program("generate", "tiny", "--prompt", "a red circle", "--steps", 2, "--output", tmp_path / "a.png")
    assert (plain.returncode, plain.stderr) == (0, "")
    assert re.fullmatch(rf"own attention: \d+\.\d s\nwrote {tmp_path / 'a.png'}\n", plain.stdout)

    swap = ["--mechanism", "clear", "-o", "radius=3", "--seed", 4]
    swapped = program("generate", "--like", tmp_path / "a.png", *swap, "--output", tmp_path / "b.png")
    assert swapped.returncode == 0, swapped.stderr
    assert not any(noise in swapped.stderr for noise in NOISE) and "%|" not in swapped.stderr
    assert "clear takes the place of the attention" in swapped.stderr  # this library's own warnings stay
    again = program("generate", "--like", tmp_path / "b.png", "--output", tmp_path / "c.png")
    assert again.returncode == 0, again.stderr
    a, b, c = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in "abc")
    assert np.array_equal(b, c) and not np.array_equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["summary", "tiny", "-o", "radius=4"],
        ["list"],
        ["env"],
        ["generate", "tiny:wan", "--prompt", "a red circle", "--steps", 1, "--frames", 5, "--output"],
        ["animate", "--help"],
        ["long-video", "--help"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_other_commands_are_as_quiet(arguments: list[object], tmp_path: Path) -> None:
    result = program(*arguments, *([tmp_path / "frames"] if arguments[-1] == "--output" else []))
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.slow
def test_debug_shows_what_other_libraries_say() -> None:
    pytest.importorskip("torchao", reason="says of itself that it misses kernels")
    said = program("--debug", "summary", "tiny", "-o", "radius=4").stderr
    assert "torchao" in said


def test_progress_becomes_lines_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):  # a second command in a process adds nothing
        set_up(debug=False)
    logging.getLogger(PROGRESS).info("images: 3 of 20 after 00:30")
    logging.getLogger("diffattn.other").info("nothing")
    assert capsys.readouterr().err == "diffattn: images: 3 of 20 after 00:30\n"


def test_only_the_loggers_that_are_known_are_silenced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DEBUG, raising=False)
    others = ("diffusers.pipelines.flux", "transformers.modeling_utils", "torch", "diffattn")
    levels = {name: logging.getLogger(name).level for name in others}
    set_up(debug=False)
    assert {name: logging.getLogger(name).level for name in others} == levels
    assert {logging.getLogger(name).level for name in CHATTY} == {logging.ERROR}
