"""CLEAR's distillation losses, captured attention and gradients against those of the released code."""

import math
from typing import Any

import pytest
import torch
from diffattn.distill.capture import Capture
from diffattn.distill.inputs import pack, predict
from diffattn.distill.losses import LossWeights, losses
from diffattn.distill.objective import Noised
from diffattn.distill.student import make_student
from diffusers import FluxTransformer2DModel
from golden_vectors import GoldenCase, assert_golden, golden_cases

from diffattn import ClearAttention, SoftmaxAttention
from diffattn.mechanisms import Mechanism

KNOWN = {
    "kind", "num_layers", "num_single_layers", "heads", "head_dim", "in_channels", "joint_attention_dim",
    "pooled_projection_dim", "guidance_embeds", "axes_dims_rope", "height", "width", "text_length", "window_size",
    "down_factor", "latent_channels", "distilled_attention_layers", "trainable", "loss_weights", "values",
    "proportional_attention", "ntk_factor",
}  # fmt: skip

CASES = [case for case in golden_cases("clear") if case.values[0] is None or case.values[0].kind == "distill_loss"]


def model_of(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> FluxTransformer2DModel:
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=config["in_channels"],
        num_layers=config["num_layers"],
        num_single_layers=config["num_single_layers"],
        attention_head_dim=config["head_dim"],
        num_attention_heads=config["heads"],
        joint_attention_dim=config["joint_attention_dim"],
        pooled_projection_dim=config["pooled_projection_dim"],
        guidance_embeds=config["guidance_embeds"],
        axes_dims_rope=tuple(config["axes_dims_rope"]),
    )
    weights = {name[6:]: value for name, value in tensors.items() if name.startswith("model.")}
    model.load_state_dict({name: value for name, value in weights.items() if "spatial_weight" not in name})
    return model


@pytest.mark.golden
@pytest.mark.parametrize("case", CASES)
def test_losses_captures_and_gradients(case: GoldenCase) -> None:
    config, tensors = case.config, case.tensors()
    unknown = set(config) - KNOWN
    assert not unknown, f"{case.path.name} has config keys this test does not understand: {sorted(unknown)}"
    mechanism: Mechanism = SoftmaxAttention()
    if config["window_size"] is not None:
        mechanism = ClearAttention(
            radius=config["window_size"],
            down_factor=config["down_factor"],
            proportional=config.get("proportional_attention", False),
            ntk_factor=config.get("ntk_factor", 1.0),
            official=True,
        )
    model = model_of(config, tensors)
    student = make_student(model, mechanism)
    for layer in student.handle.layers:
        if layer.weights is not None:
            layer.weights.load_state_dict({"spatial_weight": tensors[f"model.{layer.name}.processor.spatial_weight"]})
    assert set(student.parameters) == set(config["trainable"])
    names = [name.removesuffix(".processor") for name in config["distilled_attention_layers"]]
    sigma = tensors["sigmas"]
    noised = Noised(
        (1 - sigma) * tensors["latents"] + sigma * tensors["noise"],
        tensors["timestep"] * 1000,
        sigma.flatten(),
        tensors["noise"] - tensors["latents"],
    )
    conditioning = {name: tensors[name] for name in ("encoder_hidden_states", "pooled_projections")}
    guidance = float(tensors["guidance"][0]) if "guidance" in tensors else None
    capture = Capture(model, names)
    with student.teacher(), capture:
        teacher = predict(model, noised, conditioning, guidance)
    teachers = capture.outputs
    with capture:
        prediction = predict(model, noised, conditioning, guidance)
    weights = LossWeights(
        target=config["loss_weights"]["flow"],
        prediction=config["loss_weights"]["prediction"],
        attention=config["loss_weights"]["attention"],
    )
    found = losses(weights, prediction, noised.target, teacher, capture.outputs, teachers)
    found.total.backward()

    assert_golden("output", pack(prediction).detach(), tensors["output"], case.tolerance)
    assert_golden("teacher_output", pack(teacher), tensors["teacher_output"], case.tolerance)
    for number, (own, wanted) in enumerate(zip(capture.outputs, teachers, strict=True)):
        assert_golden(f"student {number}", own.detach(), tensors[f"attn_student.{number}"], case.tolerance)
        assert_golden(f"teacher {number}", wanted, tensors[f"attn_teacher.{number}"], case.tolerance)
    values = found.values()
    for name, key in (
        ("target", "loss_fm"),
        ("prediction", "loss_distill"),
        ("attention", "loss_attn"),
        ("total", "loss"),
    ):
        assert math.isclose(values[name], config["values"][key], rel_tol=case.tolerance["rtol"])
        assert math.isclose(values[name], float(tensors[key]), rel_tol=case.tolerance["rtol"])
    gradients = {name[5:] for name in tensors if name.startswith("grad.")}
    assert gradients
    for name in sorted(gradients):
        gradient = student.parameters[name].grad
        assert gradient is not None
        assert_golden(f"gradient of {name}", gradient, tensors[f"grad.{name}"], case.tolerance)
