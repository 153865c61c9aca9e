"""A window with states is trained, resumed, saved and loaded like any other mechanism, with weights of its own."""

from pathlib import Path

import pytest
import torch
from diffattn.distill.config import DistillConfig
from diffattn.distill.student import Trainable, make_student
from diffattn.distill.training.losses import LossWeights
from diffattn.distill.training.trainer import Trainer
from toys import Noise, config, flux_model, scheduler

import diffattn
from diffattn import WindowStateAttention

STATES = WindowStateAttention(radius=1, features=4)


def trainer(folder: Path, chosen: DistillConfig) -> Trainer:
    student = make_student(flux_model(), chosen.mechanism, trainable=chosen.trainable, layers=chosen.layers)
    return Trainer(chosen, student, scheduler(), Noise(), folder)


def chosen(trainable: Trainable, steps: int = 6) -> DistillConfig:
    losses = LossWeights(target=0, prediction=1, attention=0.5)
    return config(mechanism=STATES, trainable=trainable, steps=steps, rate=5e-3, loss=losses)


def test_states_alone_lower_the_teachers_losses(tmp_path: Path) -> None:
    run = trainer(tmp_path, chosen("mechanism", 60))
    names = {name.rpartition(".")[2] for name in run.student.parameters}
    assert names == {"q_map", "k_map", "gate_weight", "gate_bias", "mix"}
    before = {name: weight.detach().clone() for name, weight in run.student.parameters.items()}
    totals = run.run().totals
    assert sum(totals[-10:]) < 0.9 * sum(totals[:10])
    assert not any(torch.equal(weight, before[name]) for name, weight in run.student.parameters.items())


@pytest.mark.parametrize("trainable", ["mechanism", "projections"])
def test_a_resumed_run_ends_alike_and_its_adapter_gives_the_student(tmp_path: Path, trainable: Trainable) -> None:
    own = chosen(trainable)
    whole = trainer(tmp_path / "whole", own)
    whole.run()
    trainer(tmp_path / "cut", own).run(until=3)
    again = trainer(tmp_path / "cut", own)
    again.run(resume=True)
    for name, weight in whole.student.parameters.items():
        assert torch.equal(again.student.parameters[name], weight)

    diffattn.save(whole.student.model, tmp_path / "adapter", include=whole.student.projections)
    other = flux_model()
    handle = diffattn.load(other, tmp_path / "adapter")
    assert handle.layers[0].mechanism == STATES
    trained, loaded = whole.student.model.state_dict(), other.state_dict()
    assert trained.keys() == loaded.keys() and all(torch.equal(loaded[name], trained[name]) for name in trained)
    for one, two in zip(whole.student.handle.parameters(), handle.parameters(), strict=True):
        assert torch.equal(one, two)
