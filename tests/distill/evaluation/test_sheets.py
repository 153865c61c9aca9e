"""Sheets and trackers: what a run shows while it goes on, without a change to what it trains."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffattn.distill.config import DistillConfig, override, preset
from diffattn.distill.evaluation.sheets import Sheets
from diffattn.distill.run import Setting, open_setting, train
from diffattn.distill.training.trainer import make_accelerator
from PIL import Image
from toys import config as toy_config


def config(*options: str) -> DistillConfig:
    short = ["steps=2", "batch_size=2", "warmup=0", "save_every=4", "mechanism.radius=2"]
    return override(preset("tiny"), [*short, *options])


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffattn.distill.setting.TRAINING_PICTURES", 8)
    monkeypatch.setattr("diffattn.distill.evaluation.sheets.COUNT", 1)
    monkeypatch.setattr("diffattn.tiny.NATIVE", {"flux": {"height": 64, "width": 64, "num_inference_steps": 2,
                                                          "max_sequence_length": 32}})  # fmt: skip


def weights(setting: Setting | None) -> torch.Tensor:
    assert setting is not None
    return torch.cat([weight.detach().flatten() for weight in setting.student.parameters.values()])


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def test_a_run_with_sheets_and_tensorboard_trains_as_one_without(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    plain, _ = train(config(), tmp_path / "plain")
    shown, outcome = train(config("sheet_every=1", "trackers=tensorboard"), tmp_path / "shown")
    assert torch.equal(weights(shown), weights(plain))
    sheets = sorted((tmp_path / "shown" / "sheets").iterdir())
    assert [path.name for path in sheets] == ["step-000001.png", "step-000002.png"]
    [events] = (tmp_path / "shown" / "diffattn").glob("events.*")
    said = EventAccumulator(str(events.parent)).Reload()
    assert [round(event.value, 4) for event in said.Scalars("total")] == [round(t, 4) for t in outcome.totals]
    [name] = said.Tags()["images"]
    assert [(image.step, image.height) for image in said.Images(name)] == [
        (step, pixels(path).shape[0]) for step, path in enumerate(sheets, 1)
    ]


def test_a_sheet_shows_the_student_as_it_is(tmp_path: Path) -> None:
    setting = open_setting(config("sheet_every=1", "sheet_prompts=a red circle"))
    sheets = Sheets(setting, tmp_path)
    first = pixels(sheets(1))
    with torch.no_grad():
        for weight in setting.student.parameters.values():
            weight.add_(torch.randn_like(weight) * 0.1)
    second = pixels(sheets(2))
    changed = np.abs(first - second).max(axis=(0, 2)) > 8
    assert first.shape == second.shape and changed.any()
    columns = np.flatnonzero(changed)
    third = first.shape[1] / 3
    assert third * 0.9 < columns.min() and columns.max() < 2 * third * 1.1


def test_other_processes_write_no_sheet(tmp_path: Path) -> None:
    path = Sheets(open_setting(config("sheet_every=1")), tmp_path, write=False)(1)
    assert not path.exists() and not path.parent.exists()


def test_sheets_of_other_data_need_prompts(tmp_path: Path) -> None:
    setting = open_setting(config("sheet_every=1"))
    setting.config = override(setting.config, ["data=somewhere"])
    with pytest.raises(ValueError, match="sheet_every=1 needs prompts to draw: give sheet_prompts"):
        Sheets(setting, tmp_path)


def test_trackers_are_checked_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="the tracker trackio is not installed: pip install trackio"):
        make_accelerator(toy_config(trackers=("trackio",)), tmp_path)
    with pytest.raises(ValueError, match="trackers must be among tensorboard, wandb, trackio, got .*mlflow"):
        toy_config(trackers=("mlflow",))


def test_a_backend_without_gradients_is_refused_before_training() -> None:
    with pytest.raises(ValueError, match="backend='flex' has no backward pass on cpu, .*: use auto, or one of dense"):
        open_setting(config("backend=flex"))
    assert open_setting(config("backend=dense")).student.handle.layers[0].backend == "dense"
