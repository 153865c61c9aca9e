"""`diffattn env`: what a report needs, and nothing of who writes it."""

import getpass
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from diffattn.cli import app
from diffattn.cli.commands.env import lines


def output(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["env", *arguments], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.stdout


def test_text_and_json_say_the_same_and_no_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DIFFATTN_THRESHOLDS_OF", str(tmp_path))
    found: dict[str, Any] = json.loads(output("--json", "--output", str(tmp_path / "env.json")))
    assert json.loads((tmp_path / "env.json").read_text()) == found
    text = "\n".join(lines(found))
    assert f"torch: {found['packages']['torch']}" in text and "  dense: yes" in text
    assert "DIFFATTN_THRESHOLDS_OF=(set)" in text
    for private in (str(tmp_path), str(Path.home()), socket.gethostname(), f"/{getpass.getuser()}"):
        assert private not in text


def test_what_is_missing_says_how_to_get_it() -> None:
    found: dict[str, Any] = {
        "python": "3.11",
        "system": "Linux",
        "packages": {"torch": "2.13", "triton": None},
        "extras": [{"extra": "video", "package": "av", "version": None}],
        "cpu": {"name": "CPU", "cores": 2, "vectors": "AVX2", "memory_gib": None},
        "devices": [{"device": "cuda:0", "name": "Card", "memory_gib": 80.0, "capability": "9.0"}],
        "threads": {"compute": 2, "interop": 1},
        "variables": {},
        "kernels": {"on": "cuda, bfloat16", "why_not": {"dense": None, "flex": "no compiler"}, "error": None},
    }
    assert lines(found) == [
        "python: 3.11, Linux",
        "torch: 2.13",
        "triton: not installed",
        'av (extra video): not installed: pip install "diffattn[video]"',
        "cpu: CPU, AVX2, 2 cores",
        "cuda:0: Card, 80.0 GiB, capability 9.0",
        "torch threads: 2 in a call, 1 between calls",
        "kernels (cuda, bfloat16):",
        "  dense: yes",
        "  flex: no: no compiler",
        "environment variables: none that count",
    ]


def test_a_broken_variable_is_told_in_the_report(tmp_path: Path) -> None:
    """A fresh process: thresholds are read at the first import."""
    line = [sys.executable, "-m", "diffattn", "env"]
    environ = {**os.environ, "DIFFATTN_THRESHOLDS": str(tmp_path / "absent.json")}
    result = subprocess.run(line, env=environ, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert "  every other command fails: DIFFATTN_THRESHOLDS must name a JSON file" in result.stdout
    assert "DIFFATTN_THRESHOLDS=(set)" in result.stdout and "  dense: yes" in result.stdout
    assert "torch:" in result.stdout and str(tmp_path) not in result.stdout
