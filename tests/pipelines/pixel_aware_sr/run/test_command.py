"""`diffattn upscale`: what becomes of files of every kind, and what is refused before anything is opened."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffattn.pipelines.pixel_aware_sr.run.batch as batch
import numpy as np
import pytest
import tiny_pasd
import torch
import transformers
from diffattn.pipelines.pixel_aware_sr import PASDPipeline, PASDXLPipeline
from diffattn.pipelines.pixel_aware_sr.run.batch import plan_jobs
from diffattn.pipelines.pixel_aware_sr.run.command import Networks, Restoration
from PIL import Image, ImageCms
from typer.testing import CliRunner, Result

import diffattn
from diffattn.cli import app
from diffattn.media.pictures import Picture, read_picture, side_by_side

ROOT = Path(__file__).resolve().parents[4]
QUICK: dict[str, Any] = {"process_size": 64, "num_inference_steps": 2}
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `pasd` and `base`; `style`, another base; and `xl`, checkpoint and base in one."""
    folder = tmp_path_factory.mktemp("models")
    tiny_pasd.write_checkpoint(folder / "pasd")
    tiny_pasd.write_base(folder / "base")
    tiny_pasd.xl_pipeline().save_pretrained(folder / "xl")
    style = tiny_pasd.copy(folder / "base", folder / "style")
    unet = tiny_pasd.diffusers.UNet2DConditionModel.from_pretrained(style / "unet")
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.mul_(0.8)
    unet.save_pretrained(style / "unet")
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for cls in (PASDPipeline, PASDXLPipeline):
        monkeypatch.setattr(cls, "defaults", dataclasses.replace(cls.defaults, **QUICK))


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """A folder with two images."""
    folder = tmp_path / "in"
    folder.mkdir()
    tiny_pasd.picture(31, 22).save(folder / "a.png")
    tiny_pasd.picture(20, 33, seed=1).save(folder / "b.png")
    return folder


def invoke(models: Path, *arguments: object, checkpoint: str | Path = "pasd", base: str = "base") -> Result:
    places = ["--checkpoint", models / checkpoint, "--base", models / base, "--device", "cpu", "--dtype", "float32"]
    return CliRunner().invoke(app, ["upscale", *map(str, [*arguments, *places])], env={"COLUMNS": "200"})


def succeed(models: Path, *arguments: object, **where: Any) -> str:
    result = invoke(models, *arguments, **where)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return result.stdout


def refusal(models: Path, *arguments: object, **where: Any) -> str:
    """The one line with which the command ends with code 2."""
    result = invoke(models, *arguments, **where)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("diffattn: error: ")
    return line


def make(models: Path, source: Path, output: Path, *options: object, **where: Any) -> np.ndarray:
    """The result for one file."""
    options = options if "--colorize" in options else ("--scale", 1, *options)
    succeed(models, source, "--output", output, *options, **where)
    (result,) = without_records(output)
    return read_picture(result).pixels.astype(int)


def without_records(folder: Path) -> list[Path]:
    """What is in a folder but the JSON files that say what made it."""
    return sorted(path for path in folder.iterdir() if path.suffix != ".json")


def photograph() -> Image.Image:
    """Grace Hopper, of the United States Navy."""
    if importlib.util.find_spec("matplotlib") is None:
        return tiny_pasd.picture(36, 42)
    from matplotlib import cbook

    with cbook.get_sample_data("grace_hopper.jpg") as file:
        return Image.open(file).convert("RGB").resize((36, 42))


def test_help_shows_examples() -> None:
    text = CliRunner().invoke(app, ["upscale", "--help"], env={"COLUMNS": "200"}).stdout
    assert text.count("$ diffattn upscale") == 4
    for option in ("--seed", "--device", "--dtype", "--output", "--tile-overlap", "--colorize", "--overwrite"):
        assert option in text


def test_files_of_every_kind(models: Path, tmp_path: Path) -> None:
    folder, output = tmp_path / "in", tmp_path / "new" / "out"
    folder.mkdir()
    small = tiny_pasd.picture(17, 12)
    clear = np.indices((12, 17)).sum(0).astype(np.uint8) * 9
    photograph().save(folder / "photo.jpg", icc_profile=PROFILE)
    Image.fromarray(np.dstack([np.asarray(small), clear])).save(folder / "clear.png")
    Image.fromarray(np.dstack([np.asarray(small), clear])).save(folder / "clear.webp", lossless=True)
    Image.fromarray(np.linspace(0, 65535, 9 * 14).reshape(9, 14).astype(np.uint16)).save(folder / "deep.png")
    small.convert("L").save(folder / "gray.bmp")
    small.convert("P").save(folder / "palette.tiff")
    small.resize((1, 1)).save(folder / "dot.png")
    text = succeed(models, folder, "--output", output, "--scale", 1.5)
    assert text.splitlines()[-1].startswith("7 done, 0 skipped, 0 failed; ")
    assert {file.name: read_picture(file).pixels.shape[:2] for file in without_records(output)} == {
        "photo.jpg": (63, 54),
        "clear.png": (18, 26),
        "clear.webp": (18, 26),
        "deep.png": (14, 21),
        "gray.png": (18, 26),
        "palette.png": (18, 26),
        "dot.png": (2, 2),
    }
    records = {file.name for file in output.iterdir()} - {file.name for file in without_records(output)}
    one = {"photo.json", "deep.json", "gray.json", "palette.json", "dot.json"}
    assert records == one | {"clear.png.json", "clear.webp.json"}
    assert read_picture(output / "photo.jpg").icc == PROFILE
    expected = np.asarray(Image.fromarray(clear).resize((26, 18), Image.Resampling.LANCZOS))
    for name in ("clear.png", "clear.webp"):
        alpha = read_picture(output / name).alpha
        assert alpha is not None and np.array_equal(alpha, expected)
    assert read_picture(output / "deep.png").alpha is None


def test_a_picture_is_turned_as_its_file_says(models: Path, inputs: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    with Image.open(inputs / "a.png") as upright:
        upright.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    plain = make(models, inputs / "a.png", tmp_path / "plain")
    assert plain.shape == (22, 31, 3)
    assert np.array_equal(make(models, tmp_path / "turned.png", tmp_path / "turned"), plain)


def test_a_picture_does_not_depend_on_the_others(models: Path, inputs: Path, tmp_path: Path) -> None:
    a, b = inputs / "a.png", inputs / "b.png"
    results = []
    for name, order in (("one", [b]), ("two", [a, b]), ("other", [b, a])):
        succeed(models, *order, "--output", tmp_path / name, "--scale", 1, "--seed", 3)
        results.append((tmp_path / name / "b.png").read_bytes())
    assert results[0] == results[1] == results[2]
    assert len(without_records(tmp_path / "one")) == 1
    assert not np.array_equal(make(models, b, tmp_path / "4", "--seed", 4), read_picture(tmp_path / "one/b.png").pixels)


def test_a_result_is_made_again_by_the_record_beside_it(models: Path, inputs: Path, tmp_path: Path) -> None:
    options = ["--scale", 1, "--seed", 3, "--steps", 1, "--prompt", "a harbour", "--output", tmp_path / "one"]
    succeed(models, inputs, *options)
    record = json.loads((tmp_path / "one" / "b.json").read_text())
    assert (record["command"], record["options"]["inputs"]) == ("upscale", [str(inputs / "b.png")])
    assert record["made"]["files"] == ["b.png"] and record["options"]["device"] == "cpu"
    like = ["upscale", "--like", tmp_path / "one" / "b.png", "--output", tmp_path / "two"]
    result = CliRunner().invoke(app, [str(argument) for argument in like])
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    assert [file.name for file in without_records(tmp_path / "two")] == ["b.png"]
    assert (tmp_path / "two/b.png").read_bytes() == (tmp_path / "one/b.png").read_bytes()


def test_a_file_that_is_no_record_is_not_replaced(models: Path, inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "b.json").write_text('{"caption": "mine"}')
    assert "b.json is there and is no record" in refusal(models, inputs, "--output", tmp_path, "--scale", 1)
    assert not (tmp_path / "a.png").exists()


@pytest.mark.slow
def test_what_is_there_is_skipped_and_what_is_cut_off_made_anew(models: Path, inputs: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    line = [models, inputs, "--output", output, "--scale", 1]
    succeed(*line)
    first = {file.name: file.read_bytes() for file in without_records(output)}
    (output / "b.png").write_bytes(first["b.png"][:-40])
    text = succeed(*line, "--seed", 9)
    assert text.splitlines()[-1].startswith("1 done, 1 skipped, 0 failed")
    assert f"skipped {inputs / 'a.png'}: {output / 'a.png'} is there; --overwrite makes it anew" in text
    assert (output / "a.png").read_bytes() == first["a.png"]
    redone = (output / "b.png").read_bytes()
    assert redone != first["b.png"] and is_picture(output / "b.png")
    assert succeed(*line, "--overwrite").splitlines()[-1].startswith("2 done, 0 skipped")
    assert {file.name: file.read_bytes() for file in without_records(output)} == first


def is_picture(path: Path) -> bool:
    return read_picture(path).pixels.size > 0


def test_broken_files_are_told_and_the_others_made(models: Path, inputs: Path, tmp_path: Path) -> None:
    (inputs / "0-empty.png").touch()
    (inputs / "1-cut.png").write_bytes((inputs / "a.png").read_bytes()[:-60])
    (inputs / "2-text.jpg").write_text("no image")
    result = invoke(models, inputs, "--output", tmp_path / "out", "--scale", 1)
    assert result.exit_code == 1
    lines = result.stderr.strip().splitlines()
    for line, name in zip(lines, ("0-empty.png", "1-cut.png", "2-text.jpg"), strict=True):
        assert line.startswith("diffattn: error: expected a") and line.count(str(inputs / name)) == 1
    assert result.stdout.splitlines()[-1].startswith("2 done, 0 skipped, 3 failed; ")
    assert [file.name for file in without_records(tmp_path / "out")] == ["a.png", "b.png"]


def test_a_picture_that_takes_too_much_memory_is_told(
    models: Path, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    restore = Restoration.restore

    def hungry(self: Restoration, pipe: Any, picture: Picture) -> Picture:
        if picture.pixels.shape[0] == 22:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB")
        return restore(self, pipe, picture)

    monkeypatch.setattr(Restoration, "restore", hungry)
    result = invoke(models, inputs, "--output", tmp_path / "out", "--scale", 1)
    assert result.exit_code == 1
    wanted = f"diffattn: error: {inputs / 'a.png'}: CUDA out of memory. Tried to allocate 20 GiB\n"
    assert result.stderr == wanted
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["b.json", "b.png"]


def test_an_error_of_the_program_is_not_passed_off_as_a_bad_picture(
    models: Path, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(Restoration, "restore", broken)
    assert isinstance(invoke(models, inputs, "--output", tmp_path / "out").exception, KeyError)


def test_ctrl_c_while_writing_leaves_nothing(
    models: Path, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Image.Image, name: Path, **options: Any) -> None:
        Path(name).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupted)
    result = invoke(models, inputs, "--output", tmp_path / "out", "--scale", 1)
    assert (result.exit_code, result.stderr) == (130, "diffattn: interrupted\n")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["in", "--checkpoint", "nowhere"], "expected the folder of a PASD checkpoint; nowhere is not a folder"),
        (["in", "--checkpoint", "in"], "expected one PASD checkpoint in in; found no unet/"),
        (["in", "--base", "./nowhere"], "no folder './nowhere', and a hub id has the form owner/name"),
        (["in", "--stylize", "./nowhere.safetensors"], "no folder './nowhere.safetensors'"),
        (["none"], "'none', which leads to no file"),
        (["in", "*.jpg"], "'*.jpg', which leads to no file"),
        (["in", "--scale", "0"], "expected --scale above 0; got 0.0"),
        (["in", "--scale", "nan"], "expected a finite number for --scale; got nan"),
        (["in", "--scale", "inf"], "expected a finite number for --scale; got inf"),
        (["in", "--tile", "64", "--tile-overlap", "64"], "expected a tile_size and a smaller tile_overlap"),
        (["in", "--tile", "100"], "multiples of 8; got 100 and 128"),
        (["in", "--tile-batch", "0"], "expected a tile_batch of at least 1"),
        (["in", "--steps", "0"], "--steps"),
        (["in", "--colorize", "--scale", "2"], "--colorize keeps the size of an image: leave --scale out"),
        (["in", "--colorize", "--color-fix", "adain"], "--colorize makes colours"),
        (["in", "--color-fix", "magic"], "'magic' is not one of 'wavelet', 'adain', 'none'"),
        (["in", "--format", "gif"], "'gif' is not one of 'png', 'jpg', 'webp'"),
        (["in", "--style-weight", "0.5"], "--style-weight is the share of another model: add --stylize"),
        (["in", "--stylize", "in", "--style-weight", "1.5"], "expected --style-weight from 0 to 1; got 1.5"),
        (["in", "--lora", "none.safetensors"], "expected a .safetensors file for --lora; got none.safetensors"),
        (["in", "--lora", "in/a.png"], "expected a .safetensors file for --lora; got in/a.png"),
        (["in", "--mechanism", "no-such"], "unknown mechanism 'no-such'"),
        (["in", "-o", "radius=3"], "need a --mechanism"),
        (["in", "--guidance", "nan"], "expected a finite number for --guidance; got nan"),
        (["in", "--conditioning-scale", "inf"], "expected a finite number for --conditioning-scale; got inf"),
        (["in", "--output", "in/a.png"], "expected a folder for --output; got in/a.png, which is a file"),
        (["in", "--output", "in/a.png/below"], "in/a.png is a file; give another name"),
        (["in", "--output", "in"], "the result of in/a.png would overwrite the input in/a.png"),
        (["in", "twin"], "in/a.png and twin/a.png would both be written to out/a.png"),
        (["in", "--compare", "twin/a-compare.png"], "in/a.png and twin/a-compare.png would both be written to"),
        (["in", "--format", "webp", "twin/b.jpg"], "in/b.png and twin/b.jpg would both be written to out/b.webp"),
        (["in", "--device", "toaster"], "'toaster' is no device"),
        (["in", "--dtype", "float8"], "--dtype must be one of"),
        (["--scale", "2"], "Missing argument"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_arguments_are_refused_before_anything_is_opened(
    models: Path, inputs: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    def opened(*_: Any) -> None:
        raise AssertionError("opened")

    monkeypatch.setattr(Networks, "open", opened)
    monkeypatch.chdir(inputs.parent)
    Path("twin").mkdir()
    for name in ("a.png", "a-compare.png", "b.jpg"):
        tiny_pasd.picture().save(Path("twin") / name)
    given = [] if "--output" in arguments else ["--output", "out"]
    common = [f"--{name}={models / where}" for name, where in (("checkpoint", "pasd"), ("base", "base"))]
    result = CliRunner().invoke(app, ["upscale", *common, *given, *arguments], env={"COLUMNS": "200"})
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("diffattn: error: ") and words in line
    assert not Path("out").exists()
    assert sorted(file.name for file in inputs.iterdir()) == ["a.png", "b.png"]


def test_a_folder_that_cannot_be_written_is_refused(models: Path, inputs: Path) -> None:
    line = refusal(models, inputs, "--output", "/proc/out/more")
    assert "expected a folder to write to for --output; got /proc" in line


@pytest.mark.parametrize("which", ["flux", "video", "cut off", "wide"])
def test_a_base_of_another_pipeline_is_refused_before_it_is_opened(
    models: Path, inputs: Path, tmp_path: Path, which: str
) -> None:
    base = tmp_path / "other"
    if which in ("flux", "video"):
        base, words = (
            diffattn.tiny.path(which),
            "expected a base model of the kind of Stable Diffusion 1.5, with unet of",
        )
    elif which == "cut off":
        (tiny_pasd.copy(models / "base", base) / "model_index.json").write_text('{"_class_name": "Other"}')
        words = "is a Other, and its unet is missing; name another"
    else:
        encoder = tiny_pasd.copy(models / "base", base) / "text_encoder"
        transformers.CLIPTextModel(
            transformers.CLIPTextConfig(
                **{**json.loads((encoder / "config.json").read_text()), "hidden_size": 20, "num_attention_heads": 2}
            )
        ).save_pretrained(encoder)
        words = "expected a base model with text of width"
    line = ["upscale", str(inputs), f"--checkpoint={models / 'pasd'}", f"--base={base}", f"--output={tmp_path / 'out'}"]
    result = CliRunner().invoke(app, line, env={"COLUMNS": "200"})
    assert result.exit_code == 2, result.output
    (told,) = result.stderr.strip().splitlines()
    assert words in told and not (tmp_path / "out").exists()


def test_pictures_of_kinds_that_are_not_read_get_a_line_each(
    models: Path, inputs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("one.avif", "two.HEIC", "three.gif", "four.jp2", "notes.txt", ".hidden.gif"):
        (inputs / name).touch()
    first, second = (Image.new("RGB", (16, 16), colour) for colour in ("red", "blue"))
    first.save(inputs / "moves.webp", save_all=True, append_images=[second])
    first.save(inputs / "pages.tif", save_all=True, append_images=[second, first])
    jobs = plan_jobs([inputs], tmp_path / "out", sheets=False)
    assert [job.source.name for job in jobs] == ["a.png", "b.png", "moves.webp", "pages.tif"]
    left_out = [message for message in caplog.messages if "left out" in message]
    assert [Path(message.split(":")[0]).name for message in left_out] == [
        "four.jp2",
        "one.avif",
        "three.gif",
        "two.HEIC",
    ]
    for job in jobs:
        read_picture(job.source)
    assert f"{inputs / 'moves.webp'}: has 2 frames; only the first is read" in caplog.messages
    assert f"{inputs / 'pages.tif'}: has 3 pages; only the first is read" in caplog.messages


def test_checkpoints_of_another_kind_are_refused(models: Path, inputs: Path, tmp_path: Path) -> None:
    line = [models, inputs, "--output", tmp_path / "out"]
    assert "controlnet/ is missing" in refusal(*line, checkpoint="base")
    stock = tiny_pasd.copy(models / "base", tmp_path / "stock")
    tiny_pasd.copy(models / "pasd" / "controlnet", stock / "controlnet")
    assert "holds a stock U-Net" in refusal(*line, checkpoint=stock)
    (stock / "controlnet" / "config.json").write_text("{")
    assert "config.json: " in refusal(*line, checkpoint=stock)
    assert "expected a base model of the kind of SDXL" in refusal(*line, checkpoint="xl")
    assert "--stylize goes with Stable Diffusion 1.5" in refusal(
        *line, "--stylize", models / "style", checkpoint="xl", base="xl"
    )
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_sdxl_is_known_by_its_configuration(models: Path, inputs: Path, tmp_path: Path) -> None:
    made = make(models, inputs / "a.png", tmp_path / "out", "--steps", 1, checkpoint="xl", base="xl")
    assert made.shape == (22, 31, 3)


def test_the_comparison_shows_input_and_result(models: Path, inputs: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    line = [models, inputs / "a.png", "--output", output, "--scale", 2, "--compare"]
    succeed(*line)
    assert [file.name for file in without_records(output)] == ["a-compare.png", "a.png"]
    with Image.open(inputs / "a.png") as image:
        enlarged = np.asarray(image.resize((62, 44), Image.Resampling.BICUBIC))
    sheet = side_by_side([enlarged, read_picture(output / "a.png").pixels], ["input, bicubic", "PASD"])
    assert np.array_equal(read_picture(output / "a-compare.png").pixels, sheet)
    before = (output / "a.png").stat().st_mtime_ns
    (output / "a-compare.png").unlink()
    assert "1 done, 0 skipped" in succeed(*line)
    assert np.array_equal(read_picture(output / "a-compare.png").pixels, sheet)
    assert (output / "a.png").stat().st_mtime_ns == before
    assert "0 done, 1 skipped" in succeed(*line)


def test_colorized_pictures_keep_size_and_luma(models: Path, tmp_path: Path) -> None:
    gray = photograph().convert("L")
    gray.save(tmp_path / "gray.png")
    made = make(models, tmp_path / "gray.png", tmp_path / "out", "--colorize")
    assert made.shape == (42, 36, 3) and np.ptp(made, axis=-1).max() > 8
    inside = (made.min(-1) > 0) & (made.max(-1) < 255)  # elsewhere a colour was cut off
    off = made @ [0.299, 0.587, 0.114] - np.asarray(gray)
    assert inside.mean() > 0.3 and np.abs(off[inside]).max() <= 2


@pytest.mark.slow
def test_a_style_changes_the_picture_by_its_weight(models: Path, inputs: Path, tmp_path: Path) -> None:
    style = ("--stylize", models / "style")
    runs: list[tuple[object, ...]] = [(), (*style, "--style-weight", 0), (*style, "--style-weight", 0.5), style]
    plain, none, half, whole = (
        make(models, inputs / "b.png", tmp_path / str(number), *options) for number, options in enumerate(runs)
    )
    assert np.array_equal(none, plain)
    assert (half != plain).any() and (whole != plain).any() and (half != whole).any()


@pytest.mark.slow
def test_options_reach_the_pipeline(models: Path, inputs: Path, tmp_path: Path) -> None:
    options: list[tuple[object, ...]] = [
        (),
        ("--prompt", "red"),
        ("--negative-prompt", "red"),
        ("--steps", 1),
        ("--guidance", 2),
        ("--conditioning-scale", 0.5),
        ("--color-fix", "none"),
        ("--color-fix", "adain"),
        ("--official",),
        ("--tile", 32, "--tile-overlap", 8, "--tile-batch", 2),
        ("--mechanism", "clear", "-o", "radius=1"),
        ("--mechanism", "clear", "-o", "radius=1", "--layers", "mid_block*"),
    ]
    made = [make(models, inputs / "a.png", tmp_path / str(i), *given) for i, given in enumerate(options)]
    for i, picture in enumerate(made):
        for other, given in zip(made[:i], options, strict=False):
            assert (picture != other).any(), (options[i], given)


def test_the_vae_works_in_tiles_where_the_networks_do() -> None:
    pipe, small, wide = tiny_pasd.pipeline(), Picture(pixels(16, 24)), Picture(pixels(16, 40))
    seen = []
    for picture, official in ((small, False), (wide, False), (wide, True), (wide, False), (small, False)):
        rules = Restoration(scale=1, steps=1, tile=128, tile_overlap=16, official=official)
        assert rules.restore(pipe, picture).pixels.shape == picture.pixels.shape
        seen.append(pipe.vae.use_tiling)
    assert seen == [False, True, False, True, False]


def pixels(rows: int, columns: int) -> np.ndarray:
    return np.asarray(tiny_pasd.picture(columns, rows))


def test_a_result_that_its_format_cannot_hold_is_told_before_the_work(tmp_path: Path) -> None:
    Image.new("RGB", (4096, 1)).save(tmp_path / "long.webp", lossless=True)

    def restore(picture: Picture) -> Picture:
        raise AssertionError("worked")

    (job,) = batch.plan_jobs([tmp_path / "long.webp"], tmp_path / "out", sheets=False)
    tally = batch.run_jobs([job], restore, factor=4)
    assert (tally.done, tally.failed) == (0, 1)
    (job,) = batch.plan_jobs([tmp_path / "long.webp"], tmp_path / "out", ending=".png", sheets=False)
    with pytest.raises(AssertionError, match="worked"):
        batch.run_jobs([job], restore, factor=4)


def test_results_beyond_the_limit_for_inputs_are_known_as_whole(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (100, 40)).save(inputs / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100 * 40)
    jobs = batch.plan_jobs([inputs / "a.png"], tmp_path / "out", sheets=True)

    def restore(picture: Picture) -> Picture:
        return Picture(picture.pixels.repeat(2, 0).repeat(2, 1))

    assert batch.run_jobs(jobs, restore, factor=2).done == 1
    assert batch.run_jobs(jobs, restore, factor=2).skipped == 1
    assert Image.MAX_IMAGE_PIXELS == 100 * 40


@pytest.mark.slow
def test_a_lora_is_loaded_or_refused(models: Path, inputs: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from safetensors.torch import save_file

    unet = tiny_pasd.unet()
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=["attn1.to_q"], init_lora_weights=False))
    weights = {f"unet.{key}": tensor for key, tensor in peft.utils.get_peft_model_state_dict(unet).items()}
    save_file(weights, tmp_path / "lora.safetensors")
    plain = make(models, inputs / "a.png", tmp_path / "plain")
    assert (make(models, inputs / "a.png", tmp_path / "out", "--lora", tmp_path / "lora.safetensors") != plain).any()
    save_file({"weight": torch.zeros(2)}, tmp_path / "none.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "lora.safetensors").read_bytes()[:100])
    other = {key.replace("unet.", "transformer."): tensor for key, tensor in weights.items()}
    save_file(other, tmp_path / "other.safetensors")
    for name, words in (("none", "cannot load"), ("cut", "cannot load"), ("other", "no weight in it fits")):
        file = tmp_path / f"{name}.safetensors"
        assert words in refusal(models, inputs, "--output", tmp_path / name, "--lora", file)


@pytest.mark.slow
def test_the_module_is_the_command(models: Path, inputs: Path, tmp_path: Path) -> None:
    program = f"""
import dataclasses, runpy, torch
torch.set_num_threads({torch.get_num_threads()})
from diffattn.pipelines.pixel_aware_sr import PASDPipeline
PASDPipeline.defaults = dataclasses.replace(PASDPipeline.defaults, **{QUICK!r})
runpy.run_module("diffattn.pipelines.pixel_aware_sr", run_name="__main__", alter_sys=True)
"""
    (inputs / "c.png").touch()
    line = [inputs, "--checkpoint", models / "pasd", "--base", models / "base", "--output", tmp_path / "out"]
    command = [sys.executable, "-c", program, *map(str, [*line, "--scale", 1, "--device", "cpu"])]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1, run.stderr
    assert run.stdout.splitlines()[-1].startswith("2 done, 0 skipped, 1 failed; ")
    (error,) = run.stderr.strip().splitlines()[-1:]
    assert error.startswith("diffattn: error: ") and "c.png" in error
    made = read_picture(tmp_path / "out" / "a.png").pixels
    assert np.array_equal(make(models, inputs / "a.png", tmp_path / "here"), made)
