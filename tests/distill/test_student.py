"""One model as teacher and student."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffattn.distill.data.samples import collate
from diffattn.distill.inputs import predict
from diffattn.distill.objective import add_noise
from diffattn.distill.student import Student, make_student
from torch import Tensor
from toys import Noise, flux_model, scheduler

import diffattn
from diffattn import ClearAttention


def forward(model: Any) -> Tensor:
    batch = collate(Noise(), range(2), 0)
    return predict(model, add_noise(scheduler(), batch), batch.conditioning, None)


def shake(student: Student) -> None:
    with torch.no_grad():
        for weight in student.parameters.values():
            weight.add_(torch.randn_like(weight) * 0.1)


@pytest.mark.parametrize("trainable", ["projections", "lora"])
def test_the_teacher_is_the_original_model_whatever_the_student_learnt(trainable: Any) -> None:
    model = flux_model()
    with torch.no_grad():
        original = forward(model)
        with diffattn.apply(model, "clear", radius=2, ntk_factor=10):
            swapped = forward(model)
    student = make_student(model, ClearAttention(radius=2, ntk_factor=10), trainable=trainable)
    assert torch.equal(forward(model).detach(), swapped)
    shake(student)
    learnt = forward(model)
    assert not torch.allclose(learnt.detach(), swapped, atol=1e-3)
    with student.teacher():
        assert torch.equal(forward(model), original)
    with student.untrained():
        assert torch.equal(forward(model), swapped)
    assert torch.equal(forward(model), learnt)
    learnt.sum().backward()
    assert all(weight.grad is not None for weight in student.parameters.values())
    assert all(weight.grad is None for weight in model.parameters() if not weight.requires_grad)


def test_an_error_in_the_teachers_pass_leaves_the_student_in_place() -> None:
    model = flux_model()
    student = make_student(model, ClearAttention(radius=2))
    shake(student)
    learnt = forward(model)
    hook = model.single_transformer_blocks[1].attn.to_q.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), student.teacher():
        forward(model)
    hook.remove()
    assert torch.equal(forward(model), learnt)


@pytest.mark.parametrize("trainable", ["projections", "lora"])
def test_restore_brings_the_original_back(trainable: Any) -> None:
    model = flux_model()
    original, names = forward(model).detach(), set(model.state_dict())
    student = make_student(model, ClearAttention(radius=2), trainable=trainable)
    shake(student)
    student.restore()
    assert torch.equal(forward(model).detach(), original)
    assert set(model.state_dict()) == names
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_weights_are_held_once_but_for_the_projections() -> None:
    model = flux_model()
    student = make_student(model, ClearAttention(radius=2))
    trained = sum(weight.nbytes for weight in student.parameters.values())
    assert student.originals.bytes == trained
    whole = sum(weight.nbytes for weight in model.parameters())
    assert whole + student.originals.bytes < 2 * whole


def test_an_exported_student_loads_into_a_fresh_model(tmp_path: Path) -> None:
    model = flux_model()
    student = make_student(model, ClearAttention(radius=2))
    shake(student)
    learnt = forward(model).detach()
    diffattn.save(model, tmp_path, include=student.projections)
    fresh = flux_model()
    original = forward(fresh).detach()
    handle = diffattn.load(fresh, tmp_path)
    assert torch.equal(forward(fresh).detach(), learnt)
    handle.restore()
    assert torch.equal(forward(fresh).detach(), original)


def test_a_model_without_lora_in_diffusers_is_refused_as_it_was() -> None:
    from models import BUILDERS

    model = BUILDERS["PixArt"]().model
    before = [type(module.processor) for module in model.modules() if hasattr(module, "processor")]
    with pytest.raises(ValueError, match="diffusers has no LoRA for PixArtTransformer2DModel: train its projections"):
        make_student(model, ClearAttention(radius=2), trainable="lora")
    assert before == [type(module.processor) for module in model.modules() if hasattr(module, "processor")]
