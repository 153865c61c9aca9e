"""The command line: what it writes, what it refuses, and in how many words."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from typer.testing import CliRunner, Result

from diffattn import ClearAttention, TokenGrid, tiny
from diffattn.cli import app
from diffattn.cli.arguments import parse_cell, parse_grid, parse_mechanism, parse_mechanism_text, parse_steps
from diffattn.cli.checkpoints import summarize
from diffattn.cli.places import save
from diffattn.measure import attention_share
from diffattn.media.outputs import check_frames

COMMANDS = ("demo", "env", "generate", "summary", "list", "bench", "mask", "long-video")
ROOT = Path(__file__).resolve().parents[2]


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def succeed(*arguments: object) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def refusal(*arguments: object) -> str:
    """The one line with which a command ends with code 2."""
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("diffattn: error: "), result.stderr
    return lines[0]


@pytest.fixture(scope="module")
def model() -> str:
    if not (tiny.path("flux") / "model_index.json").is_file():
        pytest.skip("the bundled pipeline is not there yet")
    return "tiny"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_has_examples_and_the_four_common_options(command: str) -> None:
    text = succeed(command, "--help")
    assert f"$ diffattn {command}" in text
    for option in ("--seed", "--device", "--dtype", "--output"):
        assert option in text


def test_help_names_every_command_and_is_what_no_command_gives() -> None:
    text = succeed()
    assert all(command in text for command in COMMANDS)
    assert succeed("--help").split() == text.split()
    assert succeed("--version").startswith("diffattn ")


@pytest.mark.slow
def test_the_module_runs_as_a_program() -> None:
    program = [sys.executable, "-m", "diffattn"]
    helped = subprocess.run([*program, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "demo" in helped.stdout and helped.stderr == ""
    wrong = subprocess.run([*program, "mask", "no-such"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "Traceback" not in wrong.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["mask", "no-such"], "unknown mechanism 'no-such'; known: "),
        (["mask", "claer"], "Did you mean 'clear'?"),
        (["mask", "agent"], "agent is not a mask over the tokens; mechanisms that are: clear"),
        (["mask", "clear", "-o", "raduis=3"], "clear has no option 'raduis'"),
        (["mask", "clear", "-o", "radius=big"], "-o radius=big: expected a number"),
        (["mask", "clear", "-o", "down_factor=2.5"], "expected a whole number or none"),
        (["mask", "clear", "-o", "radius"], "-o must be NAME=VALUE"),
        (["mask", "clear", "-o", "radius=2", "-o", "radius=3"], "radius is given twice"),
        (["mask", "clear", "-o", "radius=-1"], "radius must be a positive number"),
        (["mask", "clear", "--grid", "16"], "--grid must be ROWSxCOLUMNS"),
        (["mask", "clear", "--grid", "0x4"], "TokenGrid.height must be at least 1"),
        (["mask", "clear"], "clear needs radius: add -o radius="),
        (["mask", "clear", "-o", "radius=2", "--grid", "4x4", "--query", "4,0"], "lies outside the grid"),
        (["mask", "clear", "--dtype", "float8"], "--dtype must be one of float32"),
        (["mask", "clear", "--device", "toaster"], "'toaster' is no device"),
        (["mask", "clear", "--device", "cuda:99"], "CUDA devices; use --device cpu"),
        (["mask"], "Missing argument"),
        (["mask", "clear", "--colour", "red"], "No such option"),
        (["masc"], "No such command"),
        (["list", "--dtype", "int"], "--dtype must be one of"),
        (["list", "--seed", "-1"], "--seed"),
        (["bench", "--backends", "magic"], "unknown row 'magic'; known: official"),
        (["bench", "--mechanism", "agent num_agents=few"], "-o num_agents=few: expected a whole number or none"),
        (["bench", "--grid", "8x8", "--rounds", "0"], "--rounds"),
        (["demo", "--model", "./no-such-folder"], "no folder './no-such-folder'"),
        (["demo", "--model", "."], "say what . shall draw"),
        (["demo", "--model", "tiny:nothing"], "expected the name of a tiny pipeline"),
        (["generate", "./no-such-folder", "--prompt", "x"], "no folder './no-such-folder'"),
        (["generate", "tiny", "--prompt", "x", "--output", "a.xyz"], "cannot write '.xyz'"),
        (["generate", "tiny", "--prompt", "x", "--compare"], "--compare needs something to compare"),
        (["generate", "tiny", "--prompt", "x", "--swap-steps", "4"], "--swap-steps must be a slice"),
        (["generate", "tiny", "--prompt", "x", "--start", "0.9", "--end", "0.2"], "start= before end="),
        (["generate", "tiny", "--prompt", "x", "--start", "20"], "a share of the schedule from 0 to 1"),
        (["generate", "tiny", "--prompt", "x", "--start", "0.2"], "need a --mechanism"),
        (["generate", "tiny", "--prompt", "x", "--adapter", "a", "--shares", "0.5,0.2"], "--mechanism routing"),
        (["generate", "tiny", "--prompt", "x", "-o", "radius=3"], "need a --mechanism"),
        (["generate", "tiny", "--prompt", "x", "--mechanism", "clear", "--adapter", "a"], "not both"),
        (["summary", "./no-such-folder", "-o", "radius=3"], "no folder './no-such-folder'"),
        (["summary", "tiny", "--mechanism", "no-such"], "unknown mechanism"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_input_ends_with_code_2_and_one_line(arguments: list[str], words: str) -> None:
    assert words in refusal(*arguments)


def test_debug_shows_where_an_error_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFATTN_DEBUG", "1")
    assert isinstance(invoke("mask", "no-such").exception, ValueError)


def test_an_error_of_the_program_is_not_passed_off_as_wrong_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("diffattn.media.drawing.plot_mask", broken)
    assert isinstance(invoke("mask", "clear", "-o", "radius=2").exception, RuntimeError)


def test_ctrl_c_ends_with_130_and_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("diffattn.media.drawing.plot_mask", interrupted)
    result = invoke("mask", "clear", "-o", "radius=2")
    assert (result.exit_code, result.stderr) == (130, "diffattn: interrupted\n")


def test_values_are_read_by_the_types_of_the_options() -> None:
    mechanism = parse_mechanism("clear", ["radius=2.5", "radius-t=none", "down_factor=4", "proportional=yes"])
    assert mechanism == ClearAttention(radius=2.5, radius_t=None, down_factor=4, proportional=True)
    assert isinstance(parse_mechanism("clear", ["radius=3"]).to_dict()["radius"], int)
    agent = parse_mechanism_text("agent agent_size=4,8 k_shortcut=0")
    assert agent.to_dict()["agent_size"] == [4, 8] and agent.to_dict()["k_shortcut"] == 0
    staged = parse_mechanism("agent", ["agents=merge", "stages=((0.4, 4, 4, 0.4, 0.95), (1.0, 2, 2, 0.4, 0.5))"])
    assert [stage[0] for stage in staged.to_dict()["stages"]] == [0.4, 1.0]


def test_grids_cells_and_steps_are_read_rows_first() -> None:
    grid = parse_grid("3x4x5", before=2, after=1)
    assert grid == TokenGrid(4, 5, 3, 2, 1)
    assert parse_cell("1,2", grid) == (0, 1, 2) and parse_cell("2,3,4", grid) == (2, 3, 4)
    assert parse_steps("4:") == slice(4, None) and parse_steps("1:9:2") == slice(1, 9, 2)
    with pytest.raises(ValueError, match="slice"):
        parse_steps("::0")


def test_mask_draws_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    target = tmp_path / "pictures" / "mask.png"
    place = ["--grid", "6x9", "--before", 2, "--query", "1,3"]
    text = succeed("mask", "clear", *place, "-o", "radius=3", "--output", target)
    assert str(target) in text
    with Image.open(target) as picture:
        assert min(picture.size) > 500
    assert [file.name for file in target.parent.iterdir()] == ["mask.png"]


def test_mask_draws_what_a_query_of_a_model_sees(model: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    target = tmp_path / "seen.png"
    options = ["-o", "share=0.6", "-o", "tile=2", "-o", "pool=2"]
    at_work = ["--model", model, "--prompt", "a red circle", "--steps", 2, "--step", 1, "--head", 1]
    succeed("mask", "routing", *options, *at_work, "--query", "3,5", "--output", target)
    with Image.open(target) as picture:
        assert picture.width > 2 * picture.height


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["routing"], "with --model it is drawn at work"),
        (["clear", "-o", "radius=2", "--step", "1"], "add --model"),
        (["clear", "-o", "radius=2", "--model", "tiny"], "add --prompt"),
        (["clear", "-o", "radius=2", "--model", "tiny", "--prompt", "x", "--grid", "4x4"], "leave them out"),
        (["agent", "--model", "tiny", "--prompt", "x"], "agent does not choose among keys"),
        (["clear", "-o", "radius=2", "--model", "tiny", "--prompt", "x", "--steps", "1", "--head", "99"], "heads 0 to"),
        (
            ["clear", "-o", "radius=2", "--model", "tiny", "--prompt", "x", "--steps", "1", "--step", "1"],
            "steps 0 to 0",
        ),
    ],
)
def test_what_mask_cannot_draw(arguments: list[str], words: str, tmp_path: Path) -> None:
    assert words in refusal("mask", *arguments, "--output", tmp_path / "mask.png")
    assert list(tmp_path.iterdir()) == []


def test_mask_names_the_missing_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    line = refusal("mask", "clear", "-o", "radius=2", "--output", tmp_path / "mask.png")
    assert 'pip install "diffattn[demo]"' in line
    assert list(tmp_path.iterdir()) == []


def test_list_shows_mechanisms_families_and_kernels(tmp_path: Path) -> None:
    text = succeed("list", "--output", tmp_path / "list.json", "--device", "cpu")
    found = json.loads((tmp_path / "list.json").read_text())
    clear = next(mechanism for mechanism in found["mechanisms"] if mechanism["name"] == "clear")
    assert {"name": "down_factor", "expects": "a whole number or none", "default": None} in clear["options"]
    flux = next(family for family in found["families"] if family["name"] == "Flux")
    assert flux["models"][:2] == ["FluxTransformer2DModel", "FluxControlNetModel"]
    kernels = {kernel["name"]: kernel["why_not"] for kernel in found["kernels"]}
    assert kernels["dense"] is None and kernels["tiled"] is None
    for word in ("clear", "agent", "softmax", "Flux", "dense", "radius (required)"):
        assert word in text


def test_summary_shows_costs_without_loading_weights(model: str, tmp_path: Path) -> None:
    target = tmp_path / "summary.json"
    text = succeed("summary", model, "-o", "radius=3", "--text-tokens", 32, "--layers", "single_*", "--output", target)
    [part] = json.loads(target.read_text())
    assert part["grid"] == "32+16x16" and "left out by layers=" in text
    swapped = [row for row in part["layers"] if row["swapped"]]
    assert swapped and all(row["layer"].startswith("single_transformer_blocks.") for row in swapped)
    want = attention_share([(ClearAttention(radius=3), TokenGrid(16, 16, before=32), 1, 1)])
    assert swapped[0]["flops_after"] / swapped[0]["flops_before"] == part["attention_share"] == pytest.approx(want)


def test_summary_refuses_sizes_and_globs_that_do_not_fit(model: str) -> None:
    assert "does not divide 100 x 128" in refusal("summary", model, "-o", "radius=3", "--height", 100)
    assert "matches none of" in refusal("summary", model, "-o", "radius=3", "--layers", "decoder.*")


def test_summary_knows_the_levels_of_a_unet(tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    sizes = {"block_out_channels": (8, 16), "norm_num_groups": 4, "cross_attention_dim": 8, "attention_head_dim": 4}
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",) * 2, "up_block_types": ("CrossAttnUpBlock2D",) * 2}
    UNet2DConditionModel(**sizes, **blocks, layers_per_block=1).save_config(tmp_path)
    [part] = summarize(str(tmp_path), ClearAttention(radius=2), height=64, width=128)
    grids = {row.layer.split(".attentions")[0]: str(row.grid) for row in part.summary.rows if row.swapped}
    assert grids == {
        "down_blocks.0": "8x16",
        "down_blocks.1": "4x8",
        "mid_block": "4x8",
        "up_blocks.0": "4x8",
        "up_blocks.1": "8x16",
    }


@pytest.mark.slow
def test_demo_draws_a_sheet_and_writes_its_numbers(model: str, tmp_path: Path) -> None:
    pytest.importorskip("torchmetrics")
    prompts = ["--prompt", "a red circle at the top", "--prompt", "a blue ring in the center"]
    options = ["--radius", 3, "--steps", 2, "--seed", 5, "--large", 0]
    text = succeed("demo", "--model", model, *prompts, *options, "--output", tmp_path)
    assert "bit-identical" in text and "CLEAR radius 3" in text
    numbers = json.loads((tmp_path / "demo.json").read_text())
    full, window, agent = numbers["methods"]
    assert numbers["restored_bit_identical"] is True
    assert (full["mechanism"], full["attention_share"], full["psnr_db"]) == (None, 1.0, [None, None])
    assert window["mechanism"]["radius"] == 3 and 0 < window["attention_share"] < 0.5
    assert agent["mechanism"]["type"] == "agent" and 0 < agent["attention_share"] < 1
    assert all(value > 3 for value in window["psnr_db"] + agent["psnr_db"])
    assert len(window["time_per_picture"]["rounds_s"]) == len(window["ssim"]) == 2
    pooled, reuse, routing, both = numbers["without_training"]
    assert pooled["mechanism"]["pool"] is not None and routing["mechanism"]["type"] == "routing"
    assert (reuse["mechanism"]["type"], reuse["reuse"], routing["reuse"], both["reuse"]) == ("softmax", 2, 1, 2)
    assert numbers["large"] is None and not (tmp_path / "large.png").exists()
    for name, columns in (("sheet.png", 3), ("without-training.png", 5)):
        with Image.open(tmp_path / name) as sheet:
            assert sheet.width > columns * 256 and sheet.height > 2 * 256


@pytest.mark.slow
def test_demo_draws_a_large_image_by_both(model: str, tmp_path: Path) -> None:
    size = ["--steps", 1, "--large", 256]
    text = succeed("demo", "--model", model, "--prompt", "a ring", "--radius", 2, *size, "--output", tmp_path)
    large = json.loads((tmp_path / "demo.json").read_text())["large"]
    assert (large["side"], large["steps"], large["quality"]) == (256, 6, "balanced")
    assert large["psnr"] > 10 and 0 < large["computed"] < 1
    assert large["speedup"] == pytest.approx(large["seconds_full"] / large["seconds"])
    assert text.rstrip().endswith('diffattn.apply(pipe, "routing", quality="balanced")')
    with Image.open(tmp_path / "large.png") as sheet:
        assert sheet.width > 2 * 512


def test_generate_compares_and_numbers_its_pictures(model: str, tmp_path: Path) -> None:
    swap = ["--mechanism", "clear", "-o", "radius=3", "--layers", "single_*", "--swap-steps", "1:", "--compare"]
    size = ["--steps", 2, "--height", 64, "--width", 96, "--num-images", 2]
    text = succeed("generate", model, "--prompt", "a red circle", *swap, *size, "--output", tmp_path / "a.png")
    assert "clear(radius=3)" in text and " dB" in text
    names = ["a-0.png", "a-1.png", "a-full-0.png", "a-full-1.png"]
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(["a.json", *names])
    pictures = [np.asarray(Image.open(tmp_path / name)) for name in names]
    assert all(picture.shape == (64, 96, 3) for picture in pictures)
    assert not np.array_equal(pictures[0], pictures[2])


def test_generate_repeats_itself_by_seed_only(model: str, tmp_path: Path) -> None:
    def picture(seed: int) -> np.ndarray:
        options = ["--steps", 1, "--seed", seed, "--output", tmp_path / "a.png", "--overwrite"]
        succeed("generate", model, "--prompt", "a ring", *options)
        return np.asarray(Image.open(tmp_path / "a.png"))

    first = picture(1)
    assert np.array_equal(first, picture(1)) and not np.array_equal(first, picture(2))


def test_generate_refuses_what_the_pipeline_does_not_take(model: str, tmp_path: Path) -> None:
    basics = ["generate", model, "--prompt", "x", "--steps", 1, "--output", tmp_path / "a.png"]
    assert "FluxPipeline takes no num_frames" in refusal(*basics, "--frames", 4)
    assert "reads a negative prompt with true_cfg_scale above 1 alone" in refusal(*basics, "--negative-prompt", "blue")
    assert "matches none of" in refusal(*basics, "--mechanism", "clear", "-o", "radius=2", "--layers", "decoder.*")
    assert "clear has no option 'size'" in refusal(*basics, "--mechanism", "clear", "-o", "size=3")
    assert list(tmp_path.iterdir()) == []


def test_videos_are_written_as_frames_where_nothing_can_encode_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    videos = [[Image.new("RGB", (8, 6), colour) for colour in ("red", "lime", "blue")]] * 2
    paths = save(videos, tmp_path / "waves.mp4")
    assert paths == [tmp_path / "waves-0", tmp_path / "waves-1"] and "diffattn[video]" in caplog.text
    assert Image.open(paths[1] / "frame-0001.png").getpixel((0, 0)) == (0, 255, 0)


def test_generate_replaces_videos_when_asked_alone(model: str, tmp_path: Path) -> None:
    pytest.importorskip("av")
    basics = ["generate", model, "--prompt", "x", "--steps", 1, "--output"]
    (tmp_path / "a.mp4").write_bytes(b"mine")
    assert "a.mp4 is there, and --output would replace it: add --overwrite" in refusal(*basics, tmp_path / "a.mp4")
    assert (tmp_path / "a.mp4").read_bytes() == b"mine"
    (tmp_path / "a.png").write_bytes(b"an earlier image")
    succeed(*basics, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (128, 128)


def test_a_large_picture_is_compared_with_the_models_own_attention(model: str, tmp_path: Path) -> None:
    size = ["--size", "128x192", "--via", 64, "--steps", 2, "--strength", 0.5, "--growth", "inf"]
    swap = ["--mechanism", "clear", "-o", "radius=2"]
    text = succeed("generate", model, "--prompt", "x", *swap, *size, "--compare", "--output", tmp_path / "a.png")
    assert "clear, 128x192: 1 steps, " in text and "own attention, 128x192: 1 steps, " in text
    assert "PSNR between them" in text and " dB" in text
    pictures = [np.asarray(Image.open(tmp_path / name)) for name in ("a.png", "a-full.png")]
    assert all(picture.shape == (128, 192, 3) for picture in pictures)
    assert not np.array_equal(*pictures)


def test_videos_are_compared_frame_by_frame_and_drawn_as_strips(tmp_path: Path) -> None:
    call = ["generate", "tiny:video", "--prompt", "a red circle moving sideways on a blue background", "--steps", 2]
    swap = ["--mechanism", "clear", "-o", "radius=2", "--exact-frames", "0,0"]
    text = succeed(*call, "--frames", 6, *swap, "--compare", "--output", tmp_path / "clip")
    assert "video 0: PSNR of the frames " in text and "; flicker 0." in text
    assert "; by its own: " in text and f"wrote {tmp_path / 'clip-strips.png'}" in text
    with Image.open(tmp_path / "clip-strips.png") as drawn:
        assert drawn.width > 6 * 128
    assert {path.name for path in tmp_path.iterdir()} == {"clip", "clip.json", "clip-full", "clip-strips.png"}
    assert json.loads((tmp_path / "clip.json").read_text())["made"]["full"] == ["clip-full"]
    assert f"wrote {tmp_path / 'clip-full'}, by the model's own attention" in text
    assert "--exact-frames need a --mechanism" in refusal(*call, "--exact-frames", "1,0")
    image = refusal(*call, "--output", tmp_path / "clip.png")
    assert "makes videos, and --output" in image and "is the name of an image: end it in .mp4" in image


def test_a_size_that_was_rounded_is_told(model: str, tmp_path: Path) -> None:
    sides = ["--height", 50, "--width", 70, "--steps", 1]
    text = succeed("generate", model, "--prompt", "x", *sides, "--output", tmp_path / "a.png")
    assert "48 x 64 pixels instead of 50 x 70: FluxPipeline rounds them" in text


OUTPUTS = ("demo", "generate", "summary", "list", "bench", "mask", "upscale", "animate", "video-upscale", "long-video")
BASICS: dict[str, list[str]] = {
    "generate": ["tiny", "--prompt", "x"],
    "summary": ["tiny", "-o", "radius=3"],
    "mask": ["clear", "-o", "radius=2"],
    "upscale": ["in.png", "--checkpoint", ".", "--base", "."],
    "animate": ["in.png", "in.mp4", "--checkpoint", "."],
    "video-upscale": ["in.mp4", "--checkpoint", "."],
    "long-video": ["--prompt", "x"],
}


@pytest.mark.parametrize("command", OUTPUTS)
def test_an_empty_output_is_refused(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "expected the name of a file or folder for --output" in refusal(
        command, *BASICS.get(command, []), "--output", ""
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["demo", "generate", "summary", "list", "bench", "mask", "long-video"])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    name = {"long-video": "v.mp4"}.get(command, "a.png")
    basics = [command, *BASICS.get(command, [])]
    for folder in ("file", "/proc/nowhere", "a" * 300):
        line = refusal(*basics, "--output", f"{folder}/{name}")
        assert "--output" in line and folder in line
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a.mp4", "FluxPipeline makes images, and --output"),
        ("a.mkv", "makes images"),
        ("a.psd", "cannot write '.psd'"),  # Pillow reads these only
        ("a.webp", "expected sides of at most 16383 pixels for WEBP"),
    ],
)
def test_generate_refuses_a_name_that_does_not_fit_what_is_made(
    model: str, tmp_path: Path, name: str, words: str
) -> None:
    line = ["generate", model, "--prompt", "x", "--width", 16400, "--output", tmp_path / name]
    assert words in refusal(*line)
    assert not list(tmp_path.iterdir())


def test_frames_of_a_longer_video_are_not_mixed_in(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "lime", "blue")]
    save([frames], tmp_path / "waves")
    with pytest.raises(ValueError, match="waves has 3 frames of another video"):
        check_frames(tmp_path / "waves")
    (tmp_path / "waves" / "frame-mine.png").touch()
    save([frames[:2]], tmp_path / "waves")
    names = sorted(path.name for path in (tmp_path / "waves").iterdir())
    assert names == ["frame-0000.png", "frame-0001.png", "frame-mine.png"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "tiny", "--prompt", "x", "--height", "1"], "expected --height of at least 8 pixels"),
        (["generate", "tiny", "--prompt", "x", "--width", "7"], "expected --width of at least 8 pixels"),
        (["demo", "--height", "7"], "expected --height of at least 8 pixels"),
        (
            ["generate", "tiny", "--prompt", "x", "--guidance", "nan"],
            "expected a finite number for --guidance; got nan",
        ),
        (["generate", "tiny", "--prompt", "x", "--guidance", "inf"], "expected a finite number for --guidance"),
        (
            ["generate", "tiny", "--prompt", "x", "--size", "64x64", "--strength", "nan"],
            "a finite number for --strength",
        ),
        (["generate", "tiny", "--prompt", "x", "--size", "64x64", "--growth", "nan"], "a finite number for --growth"),
        (["generate", "", "--prompt", "x"], "no folder ''"),
        (["demo", "--radius", "inf"], "expected a finite number for --radius"),
        (["bench", "--heads", "9999999999"], "expected a number of at most 2147483647 for --heads"),
        (["demo", "--model", "tiny:video", "--prompt", "x"], "makes videos, and the demonstration draws images"),
        (["list", "--seed", "99999999999999999999"], "--seed"),
        (["list", "--device", "meta"], "--device meta has no memory"),
        (["list", "--device", "xpu"], "--device xpu: this torch cannot use it here"),
        (["list", "--device", "mps"], "--device mps: this torch cannot use it here"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_values_that_mean_nothing_end_with_one_line(arguments: list[str], words: str, tmp_path: Path) -> None:
    assert words in refusal(*arguments, "--output", tmp_path / "a.png")


def test_pythons_own_type_error_is_a_bug_and_one_of_ours_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def ours(*_: Any) -> None:
        raise TypeError("expected a number")

    def bug(*_: Any) -> None:
        len(3)  # type: ignore[arg-type]

    line = ["mask", "clear", "-o", "radius=2"]
    monkeypatch.setattr("diffattn.media.drawing.plot_mask", ours)
    assert "expected a number" in refusal(*line, "--output", "no-such-file.png")
    monkeypatch.setattr("diffattn.media.drawing.plot_mask", bug)
    assert isinstance(invoke(*line, "--output", "no-such-file.png").exception, TypeError)


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
        SafetensorError("Error while deserializing header: incomplete metadata"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_the_machine_lacks_ends_with_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*_: Any) -> None:
        raise error

    monkeypatch.setattr("diffattn.media.drawing.plot_mask", full)
    line = refusal("mask", "clear", "-o", "radius=2", "--output", tmp_path / "a.png")
    assert str(error).split(":")[0] in line and not list(tmp_path.iterdir())
