"""`diffattn inspect-star`: the numbers of `measure_gates`, from a converted folder and from an official file."""

import json
from dataclasses import asdict
from pathlib import Path

import clip_files as files
import pytest
import star_runs
import tiny_star
import torch
from diffattn.pipelines.video_sr.gates import measure_gates
from diffattn.pipelines.video_sr.i2vgenxl.networks.components import STARSizes
from diffattn.pipelines.video_sr.run import opening
from typer.testing import CliRunner, Result

from diffattn.cli import app

TINY = STARSizes(channels=(8, 8, 16, 16), layers=1, head_width=4, first_heads=3, text_width=tiny_star.TEXT, groups=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return files.write_checkpoint(tmp_path_factory.mktemp("inspect") / "star")


def invoke(*arguments: object) -> Result:
    line = ["inspect-star", *map(str, arguments), "--device", "cpu", "--frames", "2"]
    return CliRunner().invoke(app, line, env={"COLUMNS": "200"})


def refusal(*arguments: object) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    (text,) = result.stderr.strip().splitlines()
    assert text.startswith("diffattn: error: ")
    return text


def test_help_shows_examples_and_the_common_options() -> None:
    text = CliRunner().invoke(app, ["inspect-star", "--help"], env={"COLUMNS": "200"}).stdout
    assert text.count("$ diffattn inspect-star") == 2
    assert all(option in text for option in ("--timestep", "--seed", "--device", "--dtype", "--output"))


@pytest.mark.slow
def test_the_numbers_are_those_that_are_measured(folder: Path, tmp_path: Path) -> None:
    result = invoke(folder, "--timestep", 100, "--seed", 3, "--output", tmp_path / "gates.json")
    assert result.exit_code == 0 and result.stderr == "", result.output
    report = measure_gates(tiny_star.unet(), tiny_star.controlnet(), timestep=100, frames=2, seed=3)
    found = json.loads((tmp_path / "gates.json").read_text())
    assert found["change"] == pytest.approx(report.change, rel=1e-3)
    assert len(found["rows"]) == len(report.rows)
    for got, row in zip(found["rows"], report.rows, strict=True):
        want = asdict(row)
        assert (got.pop("network"), got.pop("module")) == (want.pop("network"), want.pop("module"))
        assert got == pytest.approx(want, rel=1e-3, abs=1e-6)
        shown = next(line for line in result.stdout.splitlines() if row.network in line and f" {row.module} " in line)
        assert f"{row.mean:.4f}" in shown and f"{row.acting:.1%}" in shown
    assert f"without all gates: {report.change:.2e}" in result.stdout


def test_modules_are_named_whole_where_there_is_little_room(folder: Path) -> None:
    line = ["inspect-star", str(folder), "--device", "cpu", "--frames", "1"]
    text = CliRunner().invoke(app, line, env={"COLUMNS": "70"}).stdout
    assert "…" not in text


@pytest.mark.slow
def test_an_official_file_gives_the_same(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "STARSizes", lambda: TINY)
    file = tmp_path / "light_deg.pt"
    torch.save({"state_dict": tiny_star.official_weights(tiny_star.unet(), tiny_star.controlnet())}, file)
    assert invoke(file).stdout == invoke(folder).stdout


def test_what_is_no_checkpoint_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "CogVideoXSTARPipeline"}')
    assert "of the CogVideoX variant" in refusal(tmp_path)
    assert "expected a folder from `convert`" in refusal(tmp_path / "none")
    torch.save({"model.diffusion_model.a": torch.zeros(1)}, tmp_path / "other.pt")
    assert "of the CogVideoX variant" in refusal(tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("no weights")
    assert "text.pt" in refusal(tmp_path / "text.pt")
    assert "Invalid value for '--timestep'" in refusal(folder, "--timestep", 1000)


def test_networks_without_gates_are_refused(tmp_path: Path) -> None:
    parts = {"unet": tiny_star.unet(liem=False), "controlnet": tiny_star.controlnet(liem=False)}
    star_runs.pipeline(**parts).save_pretrained(tmp_path / "star")
    assert "expected LIEMs in the unet; got none" in refusal(tmp_path / "star")
