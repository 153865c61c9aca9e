"""One student for several settings: drawn anew at every step, the same however a run is cut."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from diffattn.distill.config import from_dict, override, preset, read_config
from diffattn.distill.data.samples import index_at
from diffattn.distill.student import make_student
from diffattn.distill.training.trainer import Trainer
from toys import Noise, config, flux_model, scheduler

from diffattn import ClearAttention, LinearAttention, RoutingAttention
from diffattn.options import Text

RADII = {"radius": (1.5, 2, 3)}


def trainer(folder: Path, **changes: Any) -> Trainer:
    chosen = config(**{"drawn": RADII, "steps": 9, **changes})
    student = make_student(flux_model(), chosen.mechanism, settings=chosen.settings)
    return Trainer(chosen, student, scheduler(), Noise(), folder)


def weights(run: Trainer) -> torch.Tensor:
    return torch.cat([weight.detach().flatten() for weight in run.student.parameters.values()])


def used(run: Trainer) -> list[float]:
    """The radius of every step, as the layers have it in their forward."""
    found: list[float] = []
    layer = run.student.handle.layers[0]
    layer.module.register_forward_pre_hook(
        lambda *_: found.append(layer.mechanism.radius) if torch.is_grad_enabled() else None
    )
    return found


def test_every_setting_has_its_turn_and_the_student_ends_as_its_own(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    found = used(run)
    run.run()
    assert Counter(found) == {1.5: 3, 2: 3, 3: 3} and found[:3] != found[3:6]
    assert {layer.mechanism for layer in run.student.handle.layers} == {ClearAttention(radius=2)}


@pytest.mark.parametrize("error", [FloatingPointError, KeyboardInterrupt])
def test_a_run_that_breaks_off_leaves_the_students_own_setting(tmp_path: Path, error: Any) -> None:
    run = trainer(tmp_path)

    def broken(part: int) -> dict[str, float]:
        assert run.student.handle.layers[0].mechanism != ClearAttention(radius=2)
        raise error("in the middle of a step")

    run.step = next(step for step in range(9) if run.settings[index_at(step, 3, run.config.seed)].radius != 2)
    run._learn = broken  # type: ignore[method-assign]
    with pytest.raises(error, match="in the middle"):
        run.run()
    assert {layer.mechanism for layer in run.student.handle.layers} == {ClearAttention(radius=2)}


def test_a_resumed_run_draws_what_it_would_have_drawn(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole")
    found = used(whole)
    whole.run()
    trainer(tmp_path / "cut").run(until=4)
    again = trainer(tmp_path / "cut")
    rest = used(again)
    again.run(resume=True)
    assert rest == found[4:]
    assert torch.equal(weights(again), weights(whole))


def test_one_setting_a_step_however_its_batch_is_split(tmp_path: Path) -> None:
    parted = trainer(tmp_path, accumulation=2)
    found = used(parted)
    parted.run()
    assert found[0::2] == found[1::2]


def test_the_gradients_are_those_of_the_drawn_setting(tmp_path: Path) -> None:
    """A step with a drawn radius is the step of a run that has that radius alone."""
    drawn = trainer(tmp_path / "drawn")
    found = used(drawn)
    total = drawn.train_step()["total"]
    alone = trainer(tmp_path / "alone", drawn={}, mechanism=ClearAttention(radius=found[0]))
    other = trainer(tmp_path / "other", drawn={}, mechanism=ClearAttention(radius=1.5 if found[0] != 1.5 else 3))
    assert alone.train_step()["total"] == pytest.approx(total, rel=1e-6)
    assert torch.equal(weights(alone), weights(drawn))
    assert other.train_step()["total"] != pytest.approx(total, rel=1e-4)


def test_configs_of_all_kinds(tmp_path: Path) -> None:
    chosen = override(preset("tiny"), ["drawn.radius=3,4,6"])
    assert chosen.drawn == {"radius": (3, 4, 6)}
    assert chosen.settings == tuple(ClearAttention(radius=radius) for radius in (3, 4, 6))
    assert from_dict(chosen.to_dict()) == chosen
    file = tmp_path / "run.toml"
    file.write_text("[drawn]\nradius = [3, 5.5]\nproportional = [true, false]\n")
    read = read_config(file, preset("tiny"))
    assert len(read.settings) == 4 and read.settings[1] == ClearAttention(radius=3, proportional=False)
    shapes = override(preset("tiny"), ["mechanism=routing", "mechanism.tile=4", "mechanism.pool=2", "drawn.tile=4,8"])
    assert shapes.settings[1] == RoutingAttention(tile=8, pool=2)
    assert preset("tiny").settings == (ClearAttention(radius=4),)


@pytest.mark.parametrize(
    ("drawn", "message"),
    [
        ({"radius": (3,)}, r"drawn.radius must be several values, such as 3,4,6, got \(3,\)"),
        ({"radius": 3}, "drawn.radius must be several values, such as 3,4,6, got 3"),
        ({"radius": (3, 3)}, "values that differ"),
        ({"radius": (3, -1)}, "clear: radius must be a positive number, got -1"),
        ({"radios": (3, 4)}, "clear has no option 'radios'"),
        ({"ntk_factor": (1, 2)}, "ntk_factor is the same in all steps"),
        (Text("radius"), "drawn must be a table"),
    ],
)
def test_wrong_tables_are_refused(drawn: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(drawn=drawn)


def test_settings_with_other_weights_are_refused_before_anything_is_swapped() -> None:
    model = flux_model()
    plain, learned = LinearAttention(), LinearAttention(feature_map="learned")
    with pytest.raises(ValueError, match="has other weights than linear"):
        make_student(model, learned, settings=(plain, learned))
    assert not any(hasattr(module, "_diffattn") for module in model.modules())


def test_words_of_a_teacher_are_the_same_for_all_settings(tmp_path: Path) -> None:
    kept = trainer(tmp_path / "kept", noises=1, teacher_cache=1.0)
    plain = trainer(tmp_path / "plain", noises=1)
    assert kept.run().totals == pytest.approx(plain.run().totals, rel=1e-5)
