"""Students as folders to share: what lies in them, what their cards say, and that both work for whoever gets them."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from diffattn.distill.config import override, preset
from diffattn.distill.evaluation.evaluate import evaluate
from diffattn.distill.export import CARD, applied, export
from diffattn.distill.run import Setting, evaluate_run, export_run, open_setting, train
from diffattn.distill.student import make_student
from diffusers import FluxPipeline
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects
from models import BUILDERS
from PIL import Image
from safetensors.torch import load_file
from toys import Noise, flux_model, scheduler

import diffattn
from diffattn import ClearAttention, config, tiny
from diffattn.adapters.files import CONFIG_NAME, FILE_NAME, LORA_NAME
from diffattn.cli import main

ROOT = Path(__file__).resolve().parents[2]


def shake(student: Any) -> None:
    with torch.no_grad():
        for weight in student.parameters.values():
            weight.add_(torch.randn_like(weight) * 0.05)


def setting_of(*options: str) -> Setting:
    """The bundled pipeline with a student whose weights are as if trained."""
    setting = open_setting(override(preset("tiny"), ["mechanism.radius=2", *options]))
    shake(setting.student)
    return setting


@pytest.fixture(scope="module")
def lora() -> Setting:
    return setting_of("trainable=lora", "lora_rank=4", "layers=single_transformer_blocks.*")


def blocks(folder: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (folder / CARD).read_text(), flags=re.DOTALL | re.MULTILINE)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def pixels(picture: Any) -> np.ndarray:
    return np.asarray(picture)


def test_the_card_of_a_lora_runs_both_ways(lora: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = export(lora, tmp_path / "windows")
    assert file.name == LORA_NAME and names(file.parent) == [CARD, CONFIG_NAME, LORA_NAME]
    monkeypatch.chdir(tmp_path)
    first, second = blocks(tmp_path / "windows")
    space: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(first, space)
    pipe = space["pipe"]

    def draw() -> np.ndarray:
        torch.manual_seed(0)
        return pixels(pipe("a red circle", **tiny.defaults("flux")).images[0])

    by_load = draw()
    assert np.array_equal(pixels(space["image"]), by_load)
    diffattn.restore(pipe)
    plain = draw()
    assert not np.array_equal(plain, by_load)
    exec(second, space)
    assert np.array_equal(draw(), by_load)
    assert {layer.name for layer in lora.student.handle.layers} == {
        name for name in pipe.transformer.attn_processors for name in [name.removesuffix(".processor")]
        if name.startswith("single")
    }  # fmt: skip


def test_a_lora_student_is_the_same_in_a_stock_pipeline(lora: Setting, tmp_path: Path) -> None:
    export(lora, tmp_path)
    pipe = FluxPipeline.from_pretrained(tiny.path("flux"))
    original = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    diffattn.load(pipe, tmp_path)
    own, loaded = lora.student.model.state_dict(), pipe.transformer.state_dict()
    assert {name.replace(".default.", ".diffattn.") for name in own} == set(loaded)
    assert all(torch.equal(own[name], loaded[name.replace(".default.", ".diffattn.")]) for name in own)
    diffattn.restore(pipe)
    restored = pipe.transformer.state_dict()
    assert list(restored) == list(original) and all(torch.equal(restored[name], original[name]) for name in original)


def test_a_lora_with_weights_of_the_mechanism_goes_in_two_files(tmp_path: Path) -> None:
    setting = setting_of("trainable=lora", "mechanism.down_factor=2")
    file = export(setting, tmp_path)
    assert names(tmp_path) == [CARD, FILE_NAME, CONFIG_NAME, LORA_NAME]
    assert file.name == FILE_NAME and all(".processor." in name for name in load_file(file))
    assert len(blocks(tmp_path)) == 1, "apply alone has not the mechanism's weights"
    pipe = FluxPipeline.from_pretrained(tiny.path("flux"))
    handle = diffattn.load(pipe, tmp_path)
    own = [weight for name, weight in setting.student.parameters.items() if ".processor." in name]
    assert len(own) and all(torch.equal(a, b) for a, b in zip(handle.parameters(), own, strict=True))
    assert "a LoRA on the projections" in (tmp_path / CARD).read_text()


def test_the_card_of_a_hybrid_says_what_it_is_and_what_was_trained(tmp_path: Path) -> None:
    base = "mechanism.base=clear(radius=3, pool=2)"
    setting = open_setting(override(preset("tiny"), ["mechanism=hybrid", base, "trainable=projections"]))
    shake(setting.student)
    export(setting, tmp_path / "one")
    text = (tmp_path / "one" / CARD).read_text()
    assert "`hybrid`: A mechanism, and a trained linear branch for what it leaves out." in text
    assert "values and outputs of these layers, and the mechanism's own weights." in text
    pipe = FluxPipeline.from_pretrained(tiny.path("flux"))
    handle = diffattn.load(pipe, tmp_path / "one")
    assert handle.layers[0].mechanism == setting.config.mechanism


@pytest.mark.parametrize(
    "text", ["hybrid(base=clear(radius=3, pool=2))", "per_head(mechanisms=clear(radius=2),linear)"]
)
def test_a_line_that_applies_mechanisms_within_one_runs(text: str) -> None:
    mechanism = config.from_text(text)
    pipe = FluxPipeline.from_pretrained(tiny.path("flux"))
    scope: dict[str, Any] = {"diffattn": diffattn, "pipe": pipe}
    exec(f"handle = {applied(mechanism, None)}", scope)
    assert scope["handle"].layers[0].mechanism == mechanism


@pytest.mark.parametrize("trainable", ["projections", "lora"])
def test_a_student_of_several_settings_says_which(
    trainable: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    setting = setting_of("drawn.radius=2,3,5", f"trainable={trainable}", "layers=single_transformer_blocks.*")
    export(setting, tmp_path / "one")
    assert (
        'One training for radius 2, 3, 5: choose by `diffattn.load(pipe, "one", radius=5)`'
        in (tmp_path / "one" / CARD).read_text()
    )
    pipe = FluxPipeline.from_pretrained(tiny.path("flux"))
    for radius, told in ((5, False), (2.5, False), (6, True), (1.5, True)):
        caplog.clear()
        handle = diffattn.load(pipe, tmp_path / "one", radius=radius)
        assert handle.layers[0].mechanism == ClearAttention(radius=radius)
        assert (f"was trained for radius from 2, 3, 5, and is used with {radius}" in caplog.text) is told
    diffattn.save(pipe, tmp_path / "again")
    saved = json.loads((tmp_path / "again" / CONFIG_NAME).read_text())
    assert saved["drawn"] == {"radius": [2, 3, 5]} and saved["mechanism"]["radius"] == 1.5
    diffattn.restore(pipe)


@pytest.mark.parametrize("trainable", ["projections", "mechanism"])
def test_other_students(trainable: str, tmp_path: Path) -> None:
    setting = setting_of(f"trainable={trainable}", "mechanism.down_factor=2")
    assert export(setting, tmp_path).name == FILE_NAME
    assert names(tmp_path) == [CARD, FILE_NAME, CONFIG_NAME]
    pipe = FluxPipeline.from_pretrained(tiny.path("flux"))
    handle = diffattn.load(pipe, tmp_path)
    own, loaded = setting.student.model.state_dict(), pipe.transformer.state_dict()
    assert all(torch.equal(own[name], loaded[name]) for name in own)
    weights = [weight for layer in setting.student.handle.layers for weight in layer.weights.parameters()]  # type: ignore[union-attr]
    assert all(torch.equal(a, b) for a, b in zip(handle.parameters(), weights, strict=True))


def test_what_a_card_says_of_its_base(lora: Setting, tmp_path: Path) -> None:
    folder = tmp_path / "models" / "flux"
    folder.mkdir(parents=True)
    wanted = {
        "tiny": ("tiny", None, "apache-2.0"),
        "black-forest-labs/FLUX.1-dev": ("black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-dev", None),
        str(folder): ("", None, None),
    }
    for number, (model, (base, named, license_)) in enumerate(wanted.items()):
        setting = Setting(override(lora.config, [f"model={model}"]), lora.pipe, lora.student)
        target = tmp_path / str(number)
        export(setting, target)
        data = ModelCard.load(target / CARD).data
        assert (data.base_model, data.license) == (named, license_)
        assert data.library_name == "diffattn" and {"clear", "lora", "diffusers"} <= set(data.tags)
        assert json.loads((target / CONFIG_NAME).read_text())["base_model"] == base
        compile(blocks(target)[0], "card", "exec")
        for file in target.iterdir():
            content = file.read_bytes()
            assert str(tmp_path).encode() not in content and str(ROOT).encode() not in content, file


def test_the_line_that_draws_fits_the_pipeline(lora: Setting, tmp_path: Path) -> None:
    config = override(lora.config, ["model=Wan-AI/Wan2.1-T2V-1.3B-Diffusers"])
    video: Any = SimpleNamespace(config={}, video_processor=object())
    export(Setting(config, video, lora.student), tmp_path / "video")
    assert 'video = pipe("a lighthouse at dawn").frames[0]' in blocks(tmp_path / "video")[0]
    export(Setting(config, lora.pipe, lora.student), tmp_path / "picture")
    assert 'image = pipe("a lighthouse at dawn").images[0]' in blocks(tmp_path / "picture")[0]


@pytest.mark.parametrize("family", ["SD3", "SD1.5"])
def test_a_student_without_a_pipeline(family: str, tmp_path: Path) -> None:
    built, fresh = (BUILDERS[family]() for _ in range(2))
    student = make_student(built.model, ClearAttention(radius=2), trainable="lora", lora_rank=3)
    shake(student)
    export(student, tmp_path)
    assert ModelCard.load(tmp_path / CARD).data.base_model is None
    diffattn.load(fresh.model, tmp_path)
    with torch.no_grad():
        assert torch.equal(fresh.run(), built.run())


def test_figures_of_another_mechanism_are_refused(tmp_path: Path) -> None:
    student = make_student(flux_model(), ClearAttention(radius=2))
    shake(student)
    evaluation, _ = evaluate(student, scheduler(), Noise(), samples=2)
    other = make_student(flux_model(), ClearAttention(radius=3))
    with pytest.raises(ValueError, match="the evaluation is of .* evaluate the student again"):
        export(other, tmp_path / "other", evaluation)
    assert not (tmp_path / "other").exists()
    export(student, tmp_path / "own", evaluation)
    text = (tmp_path / "own" / CARD).read_text()
    row = evaluation.velocity[2]
    assert f"| velocity error, noise {row.level:.2f} | {row.student:.4g} | {row.swap_alone:.4g} |" in text
    error = evaluation.velocity_error
    assert f"| velocity error, all | {error['student']:.4g} | {error['swap alone']:.4g} |" in text
    assert f"{evaluation.attention_share:.1%} of full attention" in text and "Over 2 held-out samples" in text


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a short run with a LoRA, evaluated."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffattn.distill.setting.TRAINING_PICTURES", 8)
        patch.setattr("diffattn.distill.setting.HELD_OUT_PICTURES", 2)
        options = ["steps=2", "batch_size=2", "warmup=0", "mechanism.radius=2", "trainable=lora", "lora_rank=2"]
        setting, outcome = train(override(preset("tiny"), [*options, "ema=0.5"]), folder)
        assert outcome.finished
        evaluate_run(setting, folder, prompts=["a red circle"], samples=1)
    yield folder


@pytest.mark.slow
def test_a_run_exports_its_student(run: Path) -> None:
    assert set(names(run / "adapter")) == {CARD, CONFIG_NAME, LORA_NAME, "loss.png"}
    assert "## Evaluation" not in (run / "adapter" / CARD).read_text()
    assert "![Losses of the training](loss.png)" in (run / "adapter" / CARD).read_text()


def test_the_command_exports_a_run_with_its_figures(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["distill", "export", str(run), "--output", str(tmp_path / "windows")])
    assert end.value.code == 0, capsys.readouterr().err
    assert f"diffattn.load(pipe, '{tmp_path / 'windows'}') takes it" in capsys.readouterr().out
    folder = tmp_path / "windows"
    assert set(names(folder)) == {CARD, CONFIG_NAME, LORA_NAME, "loss.png", "sheet.png"}
    text = (folder / CARD).read_text()
    figures = json.loads((run / "evaluation.json").read_text())
    assert f"| {figures['velocity_error']['student']:.4g} |" in text and "| PSNR, dB |" in text
    for name in ("loss.png", "sheet.png"):
        assert f"]({name})" in text
        with Image.open(folder / name) as own, Image.open(run / name) as theirs:
            assert np.array_equal(pixels(own), pixels(theirs))
    first, second = load_file(run / "adapter" / LORA_NAME), load_file(folder / LORA_NAME)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert any(value.abs().max() > 0 for name, value in first.items() if "lora_B" in name)


def test_a_run_is_exported_without_its_data(run: Path, tmp_path: Path) -> None:
    values = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**values, "data": "/no/such/cache"}))
    try:
        assert export_run(run, tmp_path / "windows").name == LORA_NAME
    finally:
        (run / "config.json").write_text(json.dumps(values))


def test_the_command_uploads_what_it_wrote(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    uploaded: dict[str, list[str]] = {}

    class Uploads:
        """Stands for `HfApi`: notes what would have gone to the hub."""

        def create_repo(self, repo_id: str, exist_ok: bool) -> Any:
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, *, repo_id: str, folder_path: Path, allow_patterns: list[str]) -> None:
            uploaded[repo_id] = sorted(filter_repo_objects(names(folder_path), allow_patterns=allow_patterns))

    monkeypatch.setattr(huggingface_hub, "HfApi", Uploads)
    (tmp_path / "notes.txt").write_text("private")
    with pytest.raises(SystemExit) as end:
        main(["distill", "export", str(run), "--output", str(tmp_path), "--push-to-hub", "--repo-id", "me/windows"])
    assert end.value.code == 0
    assert "uploaded to me/windows" in capsys.readouterr().out
    assert set(uploaded["me/windows"]) == {CARD, CONFIG_NAME, LORA_NAME, "loss.png", "sheet.png"}
    assert 'diffattn.load(pipe, "me/windows")' in blocks(tmp_path)[0]
    assert 'pipe.load_lora_weights("me/windows")' in blocks(tmp_path)[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--repo-id", "me/windows"], "--repo-id me/windows goes with --push-to-hub"),
        (["--push-to-hub"], "expected repo_id=owner/name"),
        (["--push-to-hub", "--repo-id", "windows"], "expected repo_id=owner/name"),
    ],
)
def test_what_the_command_refuses(
    options: list[str], message: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["distill", "export", str(run), "--output", str(tmp_path / "windows"), *options])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "windows").exists()


def test_a_folder_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["distill", "export", str(tmp_path)])
    assert end.value.code == 2
    assert "holds no checkpoint" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
