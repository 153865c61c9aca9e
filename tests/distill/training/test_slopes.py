"""Projections that lean with the option that is drawn: gradients, teacher, resume, and the adapter that comes of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffattn.distill.config import override, preset
from diffattn.distill.export import export
from diffattn.distill.setting import open_setting
from diffattn.distill.student import Student, make_student
from diffattn.distill.training.trainer import Trainer
from diffusers import FluxPipeline
from toys import POOLED, TEXT, WIDTH, Noise, config, flux_model, scheduler

import diffattn
from diffattn import ClearAttention, tiny
from diffattn.adapters.slopes import SUFFIX, check_leaning, place

RADII = {"radius": (1.5, 2, 3)}


def student(**changes: Any) -> Student:
    settings = [ClearAttention(radius=radius) for radius in RADII["radius"]]
    return make_student(flux_model(), ClearAttention(radius=2), settings=settings, leaning=RADII, **changes)


def trainer(folder: Path, **changes: Any) -> Trainer:
    chosen = config(**{"drawn": RADII, "slopes": True, "steps": 9, **changes})
    own = make_student(flux_model(), chosen.mechanism, settings=chosen.settings, leaning=chosen.drawn)
    return Trainer(chosen, own, scheduler(), Noise(), folder)


def weights(run: Trainer) -> torch.Tensor:
    return torch.cat([weight.detach().flatten() for weight in run.student.parameters.values()])


@torch.no_grad()
def shake(own: Student) -> None:
    for weight in own.parameters.values():
        weight.add_(torch.randn_like(weight) * 0.05)


@torch.no_grad()
def said(model: Any) -> torch.Tensor:
    """What a model makes of 6 x 4 tokens, the same at every call."""
    generator = torch.Generator().manual_seed(5)
    rows, columns = torch.meshgrid(torch.arange(6), torch.arange(4), indexing="ij")
    arguments = {
        "hidden_states": torch.randn(2, 24, 16, generator=generator),
        "encoder_hidden_states": torch.randn(2, TEXT, WIDTH, generator=generator),
        "pooled_projections": torch.randn(2, POOLED, generator=generator),
        "timestep": torch.tensor([0.3, 0.8]),
        "img_ids": torch.stack([torch.zeros(6, 4), rows, columns], -1).view(24, 3),
        "txt_ids": torch.zeros(TEXT, 3),
    }
    return torch.as_tensor(model(**arguments, return_dict=False)[0])


def test_what_is_said_is_what_the_leaning_weights_say() -> None:
    own, places = student(), {1.5: -1.0, 3: 1.0, 2: 2 * torch.tensor(2 / 1.5).log() / torch.tensor(2.0).log() - 1}
    shake(own)
    for radius, t in places.items():
        own.use(ClearAttention(radius=radius))
        plain = make_student(flux_model(), ClearAttention(radius=radius))
        with torch.no_grad():
            for name, weight in plain.parameters.items():
                weight.copy_(own.parameters[name] + t * own.parameters[name + SUFFIX])
        torch.testing.assert_close(said(own.model), said(plain.model), atol=2e-5, rtol=1e-4)


def test_teacher_and_swap_alone_do_not_lean_and_restore_ends_it() -> None:
    own, model = student(), flux_model()
    want = said(model)
    handle = diffattn.apply(model, ClearAttention(radius=2))
    alone = said(model)
    handle.restore()
    shake(own)
    with own.teacher():
        assert torch.equal(said(own.model), want)
    with own.untrained():
        assert torch.equal(said(own.model), alone)
    assert not torch.equal(said(own.model), alone)
    own.restore()
    assert torch.equal(said(own.model), want)


def test_slopes_learn_and_a_resumed_run_ends_bit_for_bit(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole")
    whole.run()
    slopes = [weight for name, weight in whole.student.parameters.items() if name.endswith(SUFFIX)]
    assert slopes and all(float(slope.detach().abs().max()) > 0 for slope in slopes)
    trainer(tmp_path / "cut").run(until=4)
    again = trainer(tmp_path / "cut")
    again.run(resume=True)
    assert torch.equal(weights(again), weights(whole))


def test_a_run_with_slopes_is_none_without(tmp_path: Path) -> None:
    trainer(tmp_path).run(until=1)
    chosen = config(drawn=RADII, steps=9)
    plain = make_student(flux_model(), chosen.mechanism, settings=chosen.settings)
    with pytest.raises(ValueError, match="slopes=True, and this one has False"):
        Trainer(chosen, plain, scheduler(), Noise(), tmp_path).resume()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "slopes need one option with several positive numbers"),
        (("drawn.radius=2,3", "drawn.pool=2,4"), "slopes need one option"),
        (("mechanism=routing", "drawn.order=space,content"), "slopes need one option with several positive numbers"),
        (("drawn.radius=2,3", "trainable=lora"), "slopes are those of projections, got trainable=lora"),
    ],
)
def test_what_does_not_lean_is_refused(options: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        override(preset("tiny"), ["slopes=true", *options])


def test_an_adapter_leans_with_what_load_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    setting = open_setting(override(preset("tiny"), ["drawn.radius=2,3,5", "slopes=true"]))
    shake(setting.student)
    export(setting, tmp_path / "one")
    card = (tmp_path / "one" / "README.md").read_text()
    assert "One training for radius 2, 3, 5, with which they lean: choose by" in card
    pipe = FluxPipeline.from_pretrained(tiny.path("flux"))
    original = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    for radius, nearest in ((2, 2), (5, 5), (3, 3), (9, 5)):
        diffattn.load(pipe, tmp_path / "one", radius=radius)
        setting.student.use(ClearAttention(radius=nearest))
        place = setting.student.slopes._place  # type: ignore[union-attr]
        for name, slope in setting.student.slopes.by_name.items():  # type: ignore[union-attr]
            want = setting.student.parameters[name] + place * slope
            assert torch.equal(pipe.transformer.get_parameter(name), want)
        diffattn.restore(pipe)
    assert "was trained for radius from 2, 3, 5, and is used with 9" in caplog.text
    assert all(torch.equal(value, original[name]) for name, value in pipe.transformer.state_dict().items())


def test_what_was_loaded_at_one_setting_is_saved_for_that(tmp_path: Path) -> None:
    setting = open_setting(override(preset("tiny"), ["drawn.radius=2,3", "slopes=true"]))
    shake(setting.student)
    export(setting, tmp_path / "one")
    pipe, again = (FluxPipeline.from_pretrained(tiny.path("flux")) for _ in range(2))
    diffattn.load(pipe, tmp_path / "one", radius=3)
    diffattn.save(pipe, tmp_path / "two")
    assert "drawn" not in (tmp_path / "two" / "diffattn_config.json").read_text()
    diffattn.load(again, tmp_path / "two")
    for one, other in zip(pipe.transformer.parameters(), again.transformer.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("values", [{"radius": 3}, {"radius": [1, float("nan")]}, {"radius": [1, float("inf")]}, {}])
def test_strange_values_of_a_file_are_refused(values: Any) -> None:
    with pytest.raises(ValueError, match="slopes need one option with several positive numbers"):
        check_leaning(values)


def test_a_mechanism_without_the_option_is_refused() -> None:
    with pytest.raises(ValueError, match="slopes lean with girth, a positive number; clear.* has None"):
        place(ClearAttention(radius=2), {"girth": [1, 2]})


def test_a_missing_slope_is_named(tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    setting = open_setting(override(preset("tiny"), ["drawn.radius=2,3", "slopes=true"]))
    file = export(setting, tmp_path)
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    name = next(own for own in tensors if own.endswith(SUFFIX))
    save_file({key: value for key, value in tensors.items() if key != name}, file, metadata)
    pipe = FluxPipeline.from_pretrained(tiny.path("flux"))
    with pytest.raises(ValueError, match=f"1 missing: {name}"):
        diffattn.load(pipe, tmp_path)
    save_file(tensors, file, {key: value for key, value in metadata.items() if key != "drawn"})
    (tmp_path / "diffattn_config.json").unlink()
    with pytest.raises(ValueError, match="slopes need one option"):
        diffattn.load(pipe, file)
