"""Wan 2.2's two models: each is trained at the noise levels of its calls, and its adapter is loaded into it alone."""

import json
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import text_pipelines
import torch
from diffattn.distill.config import DistillConfig
from diffattn.distill.data.cache import write_cache
from diffattn.distill.data.clips import Cut
from diffattn.distill.data.samples import Batch
from diffattn.distill.inputs import predict
from diffattn.distill.objective import Span, add_noise
from diffattn.distill.run import divided, evaluate_run, export_run, open_run, open_setting, train
from diffattn.distill.training import checkpoints
from diffusers import WanPipeline
from video_files import encode, picture

import diffattn
from diffattn import ClearAttention
from diffattn.cli import main

BOTH = ("transformer", "transformer_2")
BOUNDARY = 750.0
SIZE = text_pipelines.SIZE


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A saved pipeline and a cache of two clips."""
    model, data = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("data")
    for name in ("a", "b"):
        encode(data / f"{name}.mp4", [picture(number + ord(name) % 2) for number in range(5)])
        (data / f"{name}.txt").write_text("a red circle")
    pipe = text_pipelines._made(text_pipelines.wan22)()
    pipe.save_pretrained(model)
    write_cache(pipe, data, size=SIZE, cut=Cut(frames=5), max_sequence_length=12)
    return model, data


def config(places: tuple[Path, Path], **changes: Any) -> DistillConfig:
    model, data = places
    values = {"mechanism": ClearAttention(radius=1.5), "steps": 2, "batch_size": 2, "save_every": 1, **changes}
    return DistillConfig(model=str(model), data=str(data), **values)


@pytest.fixture(scope="module")
def runs(places: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run of each model."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    for place, own in divided(config(places), folder).items():
        _, outcome = train(own, place)
        assert outcome.finished
    return {part: folder / part for part in BOTH}


def levels_of_the_pipeline(places: tuple[Path, Path]) -> dict[str, list[float]]:
    """The timesteps of each model's calls in one of the pipeline."""
    pipe, found = WanPipeline.from_pretrained(places[0]), {part: [] for part in BOTH}
    pipe.set_progress_bar_config(disable=True)
    for part in BOTH:
        model = getattr(pipe, part)
        model.register_forward_pre_hook(
            lambda module, args, kwargs, part=part: found[part].append(float(kwargs["timestep"][0])), with_kwargs=True
        )
    pipe("a", height=32, width=48, num_frames=1, num_inference_steps=40, guidance_scale=1.0, output_type="latent")
    return found


@pytest.mark.parametrize("part", BOTH)
def test_a_model_is_trained_at_its_own_levels_alone(part: str, places: tuple[Path, Path], tmp_path: Path) -> None:
    setting = open_setting(config(places, part=part, steps=1, batch_size=8))
    others = [name for name in BOTH if name != part]
    assert [getattr(setting.pipe, name) for name in others] == [None], "the other one takes no memory"
    seen: list[float] = []
    model = setting.student.model
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.extend(kwargs["timestep"].tolist()), with_kwargs=True
    )
    setting.trainer(setting.source(), tmp_path).run()
    called = levels_of_the_pipeline(places)
    assert len(seen) == 16 and all((level >= BOUNDARY) == (part == "transformer") for level in seen)
    assert len(called[part]) > 10 and all((level >= BOUNDARY) == (part == "transformer") for level in called[part])


@pytest.mark.parametrize("part", BOTH)
def test_teacher_and_student_are_of_the_part(part: str, places: tuple[Path, Path]) -> None:
    setting = open_setting(config(places, part=part))
    own = getattr(WanPipeline.from_pretrained(places[0]), part)
    batch = torch.randn(1, 4, 2, 4, 6), {"encoder_hidden_states": torch.randn(1, 12, 8)}
    noised = add_noise(setting.scheduler, _batch(*batch))
    with torch.no_grad(), setting.student.teacher():
        teacher = predict(setting.student.model, noised, batch[1], None)
    with torch.no_grad():
        assert torch.equal(teacher, predict(own, noised, batch[1], None))
        assert not torch.equal(teacher, predict(setting.student.model, noised, batch[1], None))


def _batch(latents: torch.Tensor, conditioning: dict[str, torch.Tensor]) -> Any:
    return Batch(latents, conditioning, torch.randn_like(latents), torch.full((1,), 0.5))


def test_each_adapter_finds_its_model(runs: dict[str, Path], places: tuple[Path, Path]) -> None:
    """Loaded in any order, both together or alone."""
    pipe = WanPipeline.from_pretrained(places[0])
    before = {part: {key: value.clone() for key, value in getattr(pipe, part).state_dict().items()} for part in BOTH}
    second = diffattn.load(pipe, runs["transformer_2"] / "adapter")
    assert {layer.mechanism for layer in second.layers} == {ClearAttention(radius=1.5)}
    assert _same(pipe.transformer, before["transformer"])
    first = diffattn.load(pipe, runs["transformer"] / "adapter")
    for part in BOTH:
        trained = checkpoints.read(list(checkpoints.find(runs[part]).values())[-1], config(places, part=part))
        own = getattr(pipe, part).state_dict()
        assert all(torch.equal(own[name], weight) for name, weight in trained["weights"].items())
        changed = {name for name in own if not torch.equal(own[name], before[part][name])}
        assert changed == set(trained["weights"])
        assert json.loads((runs[part] / "adapter/diffattn_config.json").read_text())["component"] == part
    pipe.set_progress_bar_config(disable=True)
    call = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 4, "output_type": "latent"}
    assert pipe("a red circle", **call).frames.isfinite().all()
    first.restore()
    second.restore()
    assert all(_same(getattr(pipe, part), before[part]) for part in BOTH)


def _same(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_an_adapter_is_not_put_on_the_other_model(runs: dict[str, Path], places: tuple[Path, Path]) -> None:
    low = runs["transformer_2"] / "adapter"
    pipe = WanPipeline.from_pretrained(places[0])
    with pytest.raises(ValueError, match=r"trained for transformer_2, .* got components=\['transformer'\]"):
        diffattn.load(pipe, low, components=["transformer"])
    diffattn.load(pipe, low, components="transformer_2").restore()
    single = WanPipeline.from_pretrained(places[0], transformer_2=None)
    with pytest.raises(ValueError, match="trained for transformer_2, .* got a WanPipeline without it"):
        diffattn.load(single, low)
    diffattn.load(pipe.transformer_2, low).restore()
    diffattn.load(single, runs["transformer"] / "adapter").restore()


def test_save_says_which_model_it_was(places: tuple[Path, Path], tmp_path: Path) -> None:
    pipe = WanPipeline.from_pretrained(places[0])
    diffattn.apply(pipe, "clear", radius=1.5, components=["transformer_2"])
    diffattn.save(pipe, tmp_path)
    diffattn.restore(pipe)
    handle = diffattn.load(pipe, tmp_path)
    assert {id(layer.module) for layer in handle.layers} <= {id(module) for module in pipe.transformer_2.modules()}


def test_a_run_is_opened_resumed_exported_and_judged(
    runs: dict[str, Path], places: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "low"
    short = config(places, part="transformer_2", steps=4)
    setting, _ = train(short, folder)
    assert setting is not None
    whole = {name: weight.clone() for name, weight in setting.student.parameters.items()}
    again = tmp_path / "again"
    train(config(places, part="transformer_2", steps=2), again)
    resumed, outcome = train(short, again, resume=True)
    assert resumed is not None and outcome.step == 4
    assert all(torch.equal(whole[name], weight) for name, weight in resumed.student.parameters.items())
    with pytest.raises(ValueError, match="is of a run with part=transformer_2, and this one has transformer"):
        train(config(places, part="transformer", steps=5), again, resume=True)
    opened = open_run(folder)
    assert opened.part == "transformer_2" and isinstance(opened.scheduler, Span)
    evaluation, _ = evaluate_run(opened, folder, samples=2)
    assert all(row.level < BOUNDARY / 1000 for row in evaluation.velocity)
    assert evaluation.velocity_error["student"] != evaluation.velocity_error["swap alone"]
    file = export_run(folder, tmp_path / "shared")
    card = (file.parent / "README.md").read_text()
    assert "attention layers of `transformer_2` of" in card
    with pytest.raises(ValueError, match="holds no checkpoint: name one of the runs in it, again, low"):
        open_run(tmp_path)


def test_drawing_loads_the_other_model(runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    setting = open_run(runs["transformer"])
    assert setting.pipe.transformer_2 is None
    monkeypatch.setattr(WanPipeline, "__call__", _few_steps(WanPipeline.__call__), raising=True)
    drawn = setting.draw("a red circle", 0, SIZE)
    assert drawn.shape == (5, *SIZE, 3)
    assert setting.pipe.transformer is setting.student.model and setting.pipe.transformer_2 is not None


def _few_steps(call: Any) -> Any:
    @wraps(call)
    def quick(self: Any, *args: Any, **options: Any) -> Any:
        return call(self, *args, **{**options, "num_inference_steps": 4})

    return quick


@pytest.mark.parametrize(
    ("part", "said"),
    [
        (None, "expected part=transformer or part=transformer_2 for .*, got None: each model is trained by itself"),
        ("unet", "expected part=transformer or part=transformer_2 for .*, got unet"),
    ],
)
def test_a_run_names_its_model(part: str | None, said: str, places: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        train(config(places, part=part), tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_second_model_that_is_never_called_is_not_trained(places: tuple[Path, Path], tmp_path: Path) -> None:
    pipe = text_pipelines._made(text_pipelines.wan22)()
    pipe.register_to_config(boundary_ratio=None)
    pipe.save_pretrained(tmp_path / "model")
    setting = open_setting(config((tmp_path / "model", places[1])))
    assert setting.part is None and setting.pipe.transformer_2 is None and not isinstance(setting.scheduler, Span)
    with pytest.raises(ValueError, match="expected part=transformer for .*, got transformer_2"):
        open_setting(config((tmp_path / "model", places[1]), part="transformer_2"))


def test_models_of_other_samples_share_no_cache(places: tuple[Path, Path], tmp_path: Path) -> None:
    pipe = text_pipelines._made(text_pipelines.wan22)()
    pipe.transformer_2.register_to_config(text_dim=9)
    with pytest.raises(ValueError, match="expected models that take the same samples, got 2 that do not"):
        write_cache(pipe, places[1], size=SIZE, cut=Cut(frames=5), max_sequence_length=12)


@pytest.mark.slow
def test_the_command_trains_both(places: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps(config(places, steps=1).to_dict()))
    command = ["distill", "run", "--config", str(file), "--output", str(tmp_path / "run"), "--resume", "auto"]
    for _ in range(2):
        with pytest.raises(SystemExit) as end:
            main(command)
        said = capsys.readouterr().out
        assert end.value.code == 0
        for part in BOTH:
            assert f"wrote {tmp_path / 'run' / part / 'adapter'}" in said
            figures = json.loads((tmp_path / "run" / part / "evaluation.json").read_text())
            assert all((row["level"] >= 0.75) == (part == "transformer") for row in figures["velocity"])
