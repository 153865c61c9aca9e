"""A run from a config on the bundled pipeline: trained, exported, evaluated, by Python and by the command."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffattn.distill.config import override, preset
from diffattn.distill.data.shapes import Shapes, held_out
from diffattn.distill.evaluation.evaluate import LEVELS, MODELS
from diffattn.distill.evaluation.page import markdown
from diffattn.distill.run import Setting, draw_losses, evaluate_run, export, open_run, open_setting, train
from diffattn.distill.training import checkpoints
from diffattn.distill.training.log import LOG
from diffusers import FluxPipeline
from models import BUILDERS
from PIL import Image

import diffattn
from diffattn import LinearAttention, SoftmaxAttention, TokenGrid, tiny
from diffattn.cli import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs") / "run"


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


@pytest.fixture(scope="module")
def trained(folder: Path) -> Setting:
    """A short run with few images."""
    patch = pytest.MonkeyPatch()
    patch.setattr("diffattn.distill.setting.TRAINING_PICTURES", 24)
    patch.setattr("diffattn.distill.setting.HELD_OUT_PICTURES", 4)
    config = override(preset("tiny"), ["steps=8", "batch_size=2", "warmup=0", "save_every=4", "mechanism.radius=2"])
    setting, outcome = train(config, folder)
    assert outcome.finished
    patch.undo()
    return setting


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffattn.distill.setting.TRAINING_PICTURES", 24)
    monkeypatch.setattr("diffattn.distill.setting.HELD_OUT_PICTURES", 4)


def test_the_adapter_brings_the_students_attention_to_the_stock_pipeline(trained: Setting, folder: Path) -> None:
    pipe = FluxPipeline.from_pretrained(tiny.path("flux"))
    handle = diffattn.load(pipe, folder / "adapter")
    assert handle.layers[0].mechanism == trained.config.mechanism
    own, fresh = trained.student.model.state_dict(), pipe.transformer.state_dict()
    assert all(torch.equal(own[name], fresh[name]) for name in own)
    original = FluxPipeline.from_pretrained(tiny.path("flux")).transformer.state_dict()
    assert {name for name in own if not torch.equal(own[name], original[name])} == set(trained.student.parameters)


def test_the_folder_tells_the_run(trained: Setting, folder: Path) -> None:
    assert json.loads((folder / "config.json").read_text()) == json.loads(json.dumps(trained.config.to_dict()))
    assert len((folder / LOG).read_text().splitlines()) == 9
    assert list(checkpoints.find(folder)) == [4, 8]
    assert size_of(folder / "loss.png") > (300, 200)


def test_a_run_is_opened_again_with_its_students_weights(trained: Setting, folder: Path) -> None:
    again = open_run(folder).student
    assert all(torch.equal(again.parameters[name], weight) for name, weight in trained.student.parameters.items())


@pytest.mark.slow
def test_figures_of_an_evaluation(trained: Setting, tmp_path: Path, few: None) -> None:
    evaluation, paths = evaluate_run(trained, tmp_path, prompts=["a red circle"], samples=3)
    assert [path.name for path in paths] == ["evaluation.json", "evaluation.md", "sheet.png"]
    assert len(evaluation.velocity) == len(LEVELS)
    assert [row.level for row in evaluation.velocity] == sorted(
        (row.level for row in evaluation.velocity), reverse=True
    )
    assert 0 < evaluation.velocity_error["student"] < evaluation.velocity_error["swap alone"]
    assert set(evaluation.attention_error) == {layer.name for layer in trained.student.handle.layers}
    assert 0.1 < evaluation.attention_share < 0.5
    assert evaluation.pictures is not None and evaluation.pictures.psnr["student"] > 0
    saved = json.loads(paths[0].read_text())
    assert saved["velocity_error"] == evaluation.velocity_error
    assert f"{evaluation.velocity_error['student']:.5f}" in paths[1].read_text()
    assert size_of(paths[2])[0] > 3 * 128


def test_an_untrained_student_is_the_swap_alone(tmp_path: Path, few: None) -> None:
    setting = open_setting(override(preset("tiny"), ["mechanism.radius=2"]))
    evaluation, _ = evaluate_run(setting, tmp_path, prompts=[], samples=2)
    assert evaluation.velocity_error["student"] == evaluation.velocity_error["swap alone"]
    assert evaluation.pictures is None
    assert "| all |" in markdown(evaluation)


def test_the_share_of_attention_counts_the_width_of_the_heads(few: None, tmp_path: Path) -> None:
    setting = open_setting(override(preset("tiny"), ["mechanism=linear"]))
    evaluation, _ = evaluate_run(setting, tmp_path, prompts=[], samples=1)
    grid = TokenGrid(16, 16, before=32)
    size = setting.student.model.config
    heads, head_dim = size.num_attention_heads, size.attention_head_dim
    own, full = (mechanism.flops(grid, heads, head_dim) for mechanism in (LinearAttention(), SoftmaxAttention()))
    assert evaluation.attention_share == pytest.approx(own / full)


def test_held_out_pictures_are_not_trained_on(trained: Setting) -> None:
    seen = Shapes(trained.pipe, 16)
    unseen = Shapes(trained.pipe, 8, unseen=True)
    generator = torch.Generator()
    names = {seen.sample(i, generator).name for i in range(16)}
    assert not names & {unseen.sample(i, generator).name for i in range(8)}
    assert {unseen.sample(i, generator).name for i in range(8)} <= set(held_out(8))
    latents = torch.stack([seen.sample(i, generator).latents for i in range(16)])
    assert latents.shape == (16, 4, 32, 32) and 0.5 < latents.std() < 2


def test_models_without_a_cache_are_named() -> None:
    student: Any = SimpleNamespace(model=BUILDERS["SVD"]().model)
    with pytest.raises(ValueError, match="UNetSpatioTemporalConditionModel has no cache yet; known: Flux"):
        Setting(override(preset("tiny"), ["data=folder"]), None, student).source()


def test_what_cannot_run(trained: Setting, folder: Path, tmp_path: Path, few: None) -> None:
    with pytest.raises(ValueError, match="holds a run already"):
        train(trained.config, folder)
    with pytest.raises(ValueError, match="there is no data"):
        train(override(preset("tiny"), ["data="]), tmp_path)
    with pytest.raises(ValueError, match="holds no checkpoint"):
        open_run(tmp_path)
    with pytest.raises(ValueError, match="cannot load"):
        train(override(preset("tiny"), ["model=/no/such/folder"]), tmp_path)
    assert not any(tmp_path.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["mechanism.radius=3"], "mechanism=clear(radius=2), and this one has clear(radius=3)"),
        (["steps=4"], "step-000008 is of step 8, and steps=4 end before it"),
        (["ema=0.9"], "ema=0.0, and this one has 0.9"),
        (["seed=1"], "seed=0, and this one has 1"),
        (["optimizer=prodigy"], "optimizer=adamw"),
        (["attention_layers=none.*"], "matches none of"),
        (["betas=(0.9,)"], "betas must be two numbers"),
        (["rate=abc"], "rate must be positive, got 'abc'"),
        (["gradient_checkpointing=maybe"], "gradient_checkpointing must be true or false"),
        (["backend=magic"], "clear has no backend 'magic'"),
        (["data=nowhere"], "expected a folder, got nowhere"),
        (["mechanism=agent"], "this one has agent"),
    ],
    ids=str,
)
def test_a_refused_command_changes_nothing(
    folder: Path, trained: Setting, few: None, capsys: pytest.CaptureFixture[str], changes: list[str], message: str
) -> None:
    before = contents(folder)
    settings = ["steps=10", "batch_size=2", "warmup=0", "save_every=4", "mechanism.radius=2", *changes]
    options = [word for setting in settings for word in ("-s", setting)]
    with pytest.raises(SystemExit) as end:
        main(["distill", "run", "--preset", "tiny", *options, "--resume", "auto", "--output", str(folder)])
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error
    assert [line for line in error.splitlines() if line.startswith("diffattn: error:")] == error.splitlines()[-1:]
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (FloatingPointError("the loss of step 3 is nan"), "the loss of step 3 is nan"),
        (
            RuntimeError("can't allocate memory: 80 GB\nstack"),
            "does not fit into memory: can't allocate memory: 80 GB;",
        ),
        (torch.OutOfMemoryError("CUDA out of memory"), "does not fit into memory: CUDA out of memory"),
    ],
    ids=str,
)
def test_what_settings_are_to_blame_for_is_one_line(
    error: Exception, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr("diffattn.distill.run.train", fail)
    with pytest.raises(SystemExit) as end:
        main(["distill", "run", "--preset", "tiny", "--output", str(tmp_path / "run")])
    told = capsys.readouterr().err
    assert end.value.code == 2 and said in told and told.count("\n") == 1


@pytest.mark.slow
def test_the_command_goes_on_and_evaluates(
    folder: Path, trained: Setting, capsys: pytest.CaptureFixture[str], few: None
) -> None:
    settings = ["-s", "steps=10", "-s", "batch_size=2", "-s", "warmup=0", "-s", "mechanism.radius=2"]
    arguments = ["distill", "run", "--preset", "tiny", *settings, "--resume", "auto", "--no-evaluate"]
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--output", str(folder)])
    assert end.value.code == 0
    assert list(checkpoints.find(folder))[-1] == 10
    with pytest.raises(SystemExit) as end:
        main(["distill", "evaluate", str(folder), "--samples", "2", "--prompt", "a red circle"])
    assert end.value.code == 0
    assert "Attention computed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("mechanism", "options"),
    [("routing", ["top_k=4", "tile=2", "pool=2"]), ("clear", ["radius=2", "pool=4"])],
)
def test_what_needs_no_training_can_be_trained(mechanism: str, options: list[str], tmp_path: Path, few: None) -> None:
    """A step by the command, and the adapter it writes."""
    settings = ["-s", "steps=1", "-s", "batch_size=2", "-s", "warmup=0", "--no-evaluate"]
    named = ["--mechanism", mechanism, *(part for option in options for part in ("-o", option))]
    with pytest.raises(SystemExit) as end:
        main(["distill", "run", "--preset", "tiny", *named, *settings, "--output", str(tmp_path)])
    assert end.value.code == 0
    pipe = FluxPipeline.from_pretrained(tiny.path("flux"))
    before = pipe.transformer.transformer_blocks[0].attn.to_q.weight.clone()
    handle = diffattn.load(pipe, tmp_path / "adapter")
    assert handle.layers[0].mechanism.type == mechanism
    assert not torch.equal(pipe.transformer.transformer_blocks[0].attn.to_q.weight, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a --preset"),
        (["--preset", "tiny", "-o", "radius=2"], "-o is for an option of --mechanism"),
        (["--preset", "huge"], "unknown preset 'huge'"),
        (["--preset", "tiny", "-s", "stepz=1"], "unknown field 'stepz'"),
        (["--preset", "tiny", "--resume", "yes"], "--resume is auto or never"),
    ],
)
def test_wrong_input_ends_with_code_2(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["distill", "run", *arguments, "--output", str(tmp_path / "run")])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_pictures_and_cache_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue ring\n")
    folder = str(tmp_path / "pictures")
    for arguments in (
        ["generate", "tiny", str(prompts), "--output", folder],
        ["cache", "tiny", folder, "--size", "128x128", "--text-length", "32"],
    ):
        with pytest.raises(SystemExit) as end:
            main(["distill", *arguments])
        assert end.value.code == 0, capsys.readouterr().err
    assert len(list(Path(folder).glob("*_latent_code.safetensors"))) == 2


def test_export_and_plot_say_what_they_cannot(trained: Setting, tmp_path: Path) -> None:
    (tmp_path / LOG).write_text("step,total\n1,0.5\n")
    assert draw_losses(tmp_path) == tmp_path / "loss.png"
    assert size_of(tmp_path / "loss.png") > (300, 200)
    assert export(trained, tmp_path / "adapter").is_file()


def test_forwards_are_timed_and_layers_are_counted(trained: Setting, tmp_path: Path, few: None) -> None:
    evaluation, paths = evaluate_run(trained, tmp_path, prompts=[], samples=2, rounds=2)
    assert evaluation.speed is not None and evaluation.speed.size == [4, 32, 32]
    assert set(evaluation.speed.seconds) == set(MODELS)
    assert all(len(timing["rounds_s"]) == 2 and timing["median_s"] > 0 for timing in evaluation.speed.seconds.values())
    for layer, swapped in zip(evaluation.layers, trained.student.handle.layers, strict=True):
        assert layer.name == swapped.name and layer.grid == str(swapped.grid)
        assert 0 < layer.operations < layer.full and layer.error == evaluation.attention_error[layer.name] > 0
    assert evaluation.operations == {
        "teacher": sum(layer.full for layer in evaluation.layers),
        "student": sum(layer.operations for layer in evaluation.layers),
    }
    assert evaluation.attention_share == evaluation.operations["student"] / evaluation.operations["teacher"]
    text = paths[1].read_text()
    assert f"| {evaluation.layers[0].name} | {evaluation.layers[0].grid} |" in text
    assert "| teacher |" in text and "latents 4 x 32 x 32, 2 rounds" in text


@pytest.mark.slow
def test_the_figures_have_the_documented_names(trained: Setting, tmp_path: Path, few: None) -> None:
    evaluate_run(trained, tmp_path, prompts=["a red circle"], samples=1, rounds=1)
    saved = json.loads((tmp_path / "evaluation.json").read_text())
    document = (ROOT / "docs/distillation.md").read_text()
    named = [*saved, *saved["velocity"][0], *saved["layers"][0], *saved["speed"], *saved["pictures"]]
    assert [name for name in named if f"`{name}`" not in document] == []


def test_metrics_are_of_all_pictures(trained: Setting, tmp_path: Path, few: None) -> None:
    def brightness(pictures: Any, teacher: Any, prompts: Any) -> float:
        assert len(pictures) == len(teacher) == len(prompts) == 1
        return float(pictures[0].mean())

    metrics = {"brightness": brightness}
    evaluation, paths = evaluate_run(trained, tmp_path, prompts=["a red circle"], samples=1, metrics=metrics)
    assert evaluation.pictures is not None
    assert set(evaluation.pictures.metrics["brightness"]) == set(MODELS)
    assert "| brightness |" in paths[1].read_text()
    with pytest.raises(ValueError, match="expected prompts to draw for brightness"):
        evaluate_run(trained, tmp_path, prompts=[], metrics=metrics)


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(["distill", *arguments])
    assert isinstance(end.value.code, int)
    return end.value.code


@pytest.mark.slow
def test_trained_weights_are_evaluated_under_other_options(
    trained: Setting, folder: Path, few: None, capsys: pytest.CaptureFixture[str]
) -> None:
    before = json.loads((folder / "config.json").read_text())
    options = ["--prompt", "a red circle", "--samples", "2", "--rounds", "0"]
    assert command("evaluate", str(folder), *options, "--output", str(folder / "other")) == 0
    own = json.loads((folder / "other/evaluation.json").read_text())
    assert command("evaluate", str(folder), *options, "--set", "mechanism.radius=3") == 0
    saved = json.loads((folder / "evaluations/mechanism.radius=3/evaluation.json").read_text())
    assert saved["mechanism"]["radius"] == 3 and saved["prompts"] == 1
    assert own["mechanism"]["radius"] == 2 and own["operations"]["student"] < saved["operations"]["student"]
    assert own["velocity_error"]["student"] != saved["velocity_error"]["student"]
    assert json.loads((folder / "config.json").read_text()) == before
    capsys.readouterr()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "steps=4"], "can change mechanism, data, frames, guidance, text_length of its run, got steps"),
        (["--set", "mechanism.radios=3"], "radios"),
        (["--set", "mechanism.down_factor=2"], "the run's weights don't fit"),
        (["--clip-model", "/no/such"], "expected a folder with a CLIP model"),
        (["--lpips-weights", "/no/such.pth"], "the weights of torchvision's AlexNet"),
    ],
)
def test_what_an_evaluation_cannot_take(
    options: list[str], message: str, trained: Setting, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("evaluate", str(folder), *options) == 2
    assert message in " ".join(capsys.readouterr().err.split())
