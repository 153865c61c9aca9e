"""Mechanisms with trained branches learn from the teacher, alone and with the projections, and their adapters load."""

from pathlib import Path

import pytest
import torch
from diffattn.distill.config import DistillConfig
from diffattn.distill.student import Trainable, make_student
from diffattn.distill.training.losses import LossWeights
from diffattn.distill.training.trainer import Trainer
from toys import Noise, config, flux_model, scheduler

import diffattn
from diffattn import HybridAttention, Mechanism, RoutingAttention, SparseLinearAttention, VideoSparseAttention

MECHANISMS: dict[str, Mechanism] = {
    "rest": HybridAttention(base="routing(top_k=1,tile=2,pool=2)"),
    "learned means": RoutingAttention(top_k=1, tile=2, pool=2, means="learned"),
    "sla": SparseLinearAttention(top_share=0.3, tile=4, query_tile=4),
    "vsa": VideoSparseAttention(top_share=0.3, tile=2),
}


def trainer(folder: Path, chosen: DistillConfig) -> Trainer:
    student = make_student(flux_model(), chosen.mechanism, trainable=chosen.trainable, layers=chosen.layers)
    return Trainer(chosen, student, scheduler(), Noise(), folder)


def chosen(name: str, trainable: Trainable, steps: int, rate: float) -> DistillConfig:
    losses = LossWeights(target=0, prediction=1, attention=0.5)
    return config(mechanism=MECHANISMS[name], trainable=trainable, steps=steps, rate=rate, loss=losses)


@pytest.mark.parametrize("name", MECHANISMS)
def test_a_mechanism_alone_lowers_the_teachers_losses(name: str, tmp_path: Path) -> None:
    """Beside a run of the same samples in which nothing is learned."""
    run = trainer(tmp_path / "learns", chosen(name, "mechanism", 24, rate=8e-3))
    before = {own: weight.detach().clone() for own, weight in run.student.parameters.items()}
    assert all(".processor." in own for own in before)
    totals = run.run().totals
    still = trainer(tmp_path / "stays", chosen(name, "mechanism", 24, rate=1e-12)).run().totals
    assert sum(totals[-6:]) < 0.98 * sum(still[-6:])
    assert sum(torch.equal(weight, before[own]) for own, weight in run.student.parameters.items()) == 0


@pytest.mark.parametrize("name", ["rest", "vsa"])
def test_a_resumed_run_ends_alike_and_its_adapter_gives_the_student(name: str, tmp_path: Path) -> None:
    own = chosen(name, "projections", 4, rate=1e-2)
    whole = trainer(tmp_path / "whole", own)
    whole.run()
    trainer(tmp_path / "cut", own).run(until=2)
    again = trainer(tmp_path / "cut", own)
    again.run(resume=True)
    for key, weight in whole.student.parameters.items():
        assert torch.equal(again.student.parameters[key], weight)
    diffattn.save(whole.student.model, tmp_path / "adapter", include=whole.student.projections)
    other = flux_model()
    handle = diffattn.load(other, tmp_path / "adapter")
    assert handle.layers[0].mechanism == MECHANISMS[name]
    for one, two in zip(whole.student.handle.parameters(), handle.parameters(), strict=True):
        assert torch.equal(one, two)
