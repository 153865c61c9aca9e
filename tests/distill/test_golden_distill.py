"""CLEAR's distillation losses, captured attention and gradients against those of the released code."""

import math

import pytest
import torch
from diffattn.distill.inputs import pack, predict
from diffattn.distill.objective import Noised
from diffattn.distill.student import make_student
from diffattn.distill.training.capture import Capture
from diffattn.distill.training.losses import LossWeights, losses
from diffusers import FluxTransformer2DModel
from golden_clear import grid_of, ids_of, mechanism_of
from golden_record import Record
from golden_vectors import GoldenCase, assert_golden, golden_cases
from torch import Tensor

CASES = [case for case in golden_cases("clear") if case.values[0] is None or case.values[0].kind == "distill_loss"]


def model_of(config: Record, weights: dict[str, Tensor]) -> FluxTransformer2DModel:
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
    model.load_state_dict(weights)
    return model


def check_inputs(config: Record, tensors: Record) -> None:
    """The packed image, its ids and the text lie as the library makes them of the latents."""
    height, width, text = config["height"], config["width"], config["text_length"]
    assert tensors["latents"].shape[1:] == (config["latent_channels"], 2 * height, 2 * width)
    assert tensors["encoder_hidden_states"].shape[1] == text
    assert torch.equal(torch.cat([tensors["txt_ids"], tensors["img_ids"]]), ids_of(grid_of(config)))


@pytest.mark.golden
@pytest.mark.parametrize("case", CASES)
def test_losses_captures_and_gradients(case: GoldenCase) -> None:
    config, tensors = case.config, case.tensors()
    weights = tensors.under("model.")
    pooling = {name: weights.pop(name) for name in list(weights) if name.endswith("spatial_weight")}
    check_inputs(config, tensors)
    model = model_of(config, weights)
    student = make_student(model, mechanism_of(config))
    for layer in student.handle.layers:
        if layer.weights is not None:
            layer.weights.load_state_dict({"spatial_weight": pooling.pop(f"{layer.name}.processor.spatial_weight")})
    assert not pooling
    assert set(student.parameters) == set(config["trainable"])
    names = [name.removesuffix(".processor") for name in config["distilled_attention_layers"]]
    sigma = tensors["sigmas"]
    noised = Noised(
        (1 - sigma) * tensors["latents"] + sigma * tensors["noise"],
        tensors["timestep"] * 1000,
        sigma.flatten(),
        tensors["noise"] - tensors["latents"],
    )
    assert_golden("packed latents", pack(noised.latents), tensors["hidden_states"], case.tolerance)
    conditioning = {name: tensors[name] for name in ("encoder_hidden_states", "pooled_projections")}
    guidance = None
    if config["guidance_embeds"]:
        (guidance,) = set(tensors["guidance"].tolist())
    capture = Capture(model, names)
    with student.teacher(), capture:
        teacher = predict(model, noised, conditioning, guidance)
    teachers = capture.outputs
    with capture:
        prediction = predict(model, noised, conditioning, guidance)
    told = config["loss_weights"]
    factors = LossWeights(target=told["flow"], prediction=told["prediction"], attention=told["attention"])
    found = losses(factors, prediction, noised.target, teacher, capture.outputs, teachers)
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
        assert math.isclose(values[name], config["values"][key], rel_tol=case.tolerance["rtol"], abs_tol=1e-9)
        assert math.isclose(values[name], float(tensors[key]), rel_tol=case.tolerance["rtol"], abs_tol=1e-9)
    gradients = tensors.under("grad.")
    assert gradients
    for name, want in gradients.items():
        gradient = student.parameters[name].grad
        assert gradient is not None
        assert_golden(f"gradient of {name}", gradient, want, case.tolerance)
