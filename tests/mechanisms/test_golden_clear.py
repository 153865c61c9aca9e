"""CLEAR against numbers recorded from the released code: masks, rotary tables, attention layers, whole models."""

from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxPosEmbed
from golden_clear import grid_of, ids_of, mechanism_of
from golden_record import Record
from golden_vectors import GoldenCase, assert_golden, golden_cases
from torch import Tensor

import diffattn
from diffattn import TokenGrid
from diffattn.intercept import processor_class
from diffattn.mechanisms.base import Context, Mechanism

ATTENTION, MASKS, MODELS = {"local", "full", "down"}, {"mask"}, {"model_local", "model_full", "model_down"}
CASES = [case for case in golden_cases("clear") if case.values[0] is None or case.values[0].kind != "distill_loss"]
"""`tests/distill/test_golden_distill.py` takes the others."""


@pytest.mark.golden
@pytest.mark.parametrize("case", CASES)
def test_recorded_numbers(case: GoldenCase) -> None:
    if case.kind in MASKS:
        check_mask(case)
    elif case.kind == "rope":
        check_rope(case)
    elif case.kind in ATTENTION:
        check_attention(case)
    elif case.kind in MODELS:
        check_model(case)
    else:
        pytest.fail(f"{case.path.name} is of a kind this test does not understand: {case.kind!r}")


def check_kind(kind: str, config: Record) -> None:
    """A kind says again what window and pooled keys do."""
    window = "full" if config["window_size"] is None else "local" if config.get("down_factor") is None else "down"
    assert kind.removeprefix("model_") == window, f"{kind!r} with a window of another kind, {window!r}"


def check_mask(case: GoldenCase) -> None:
    mask = mechanism_of(case.config).mask(grid_of(case.config))
    assert torch.equal(mask, case.tensors()["mask"].bool())
    assert int(mask.sum()) == case.config["allowed"]
    assert mechanism_of(case.config).flops(grid_of(case.config), 1, 1) == 4 * case.config["allowed"]


def check_rope(case: GoldenCase) -> None:
    config, tensors = case.config, case.tensors()
    model = tiny_flux(config["axes"], heads=1, layers=(0, 1))
    assert model.pos_embed.theta == config["theta"]
    assert torch.equal(tensors["ids"], ids_of(grid_of(config)))
    with diffattn.apply(model, "clear", radius=2, ntk_factor=config["ntk_factor"]):
        cos, sin = model.pos_embed(tensors["ids"])
    assert_golden("cos", cos, tensors["rope_cos"], case.tolerance)
    assert_golden("sin", sin, tensors["rope_sin"], case.tolerance)
    assert model.pos_embed.theta == config["theta"]


def check_attention(case: GoldenCase) -> None:
    config, tensors = case.config, case.tensors()
    mechanism, double = mechanism_of(config), {"double": True, "single": False}[config["stream"]]
    check_kind(str(case.kind), config)
    assert tensors["hidden_states"].shape[0] == config["batch"]
    rope = FluxPosEmbed(10_000 * config["ntk_factor"], config["rope_axes"])(ids_of(grid_of(config)))
    for name, got in zip(("rope_cos", "rope_sin"), rope, strict=True):
        assert_golden(name, got, tensors[name], case.tolerance)
    attention = FluxAttention(
        query_dim=config["dim"],
        heads=config["heads"],
        dim_head=config["head_dim"],
        out_dim=config["dim"],
        bias=True,
        added_kv_proj_dim=config["dim"] if double else None,
        context_pre_only=False if double else None,
        pre_only=not double,
        eps=config["qk_norm_eps"],
    )
    attention.load_state_dict(tensors.under("attn."))
    processor = processor_class(type(attention.processor), "Golden", {})()
    processor.layer = FixedLayer(mechanism, grid_of(config), tensors.get("processor.spatial_weight"))
    attention.set_processor(processor)
    with torch.no_grad():
        out = attention(
            tensors["hidden_states"],
            encoder_hidden_states=tensors.get("encoder_hidden_states"),
            image_rotary_emb=(tensors["rope_cos"], tensors["rope_sin"]),
        )
    image, text = out if double else (out, None)
    assert_golden("output", image, tensors["output"], case.tolerance)
    if double:
        assert_golden("encoder_output", text, tensors["encoder_output"], case.tolerance)
    if "mask" in tensors:
        assert torch.equal(mechanism.mask(grid_of(config)), tensors["mask"].bool())


class FixedLayer:
    """One layer with a grid given beforehand; checks fast form and reference against each other on the way."""

    def __init__(self, mechanism: Mechanism, grid: TokenGrid, spatial_weight: Tensor | None) -> None:
        self.mechanism, self.grid = mechanism, grid
        weights = mechanism.weights(1, 1)
        if weights is not None:
            weights.load_state_dict({"spatial_weight": spatial_weight})
        self.context = Context(weights=weights)

    def wants(self, query: Tensor, key: Tensor, parallel_config: Any = None) -> bool:
        return True

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float | None,
        parallel_config: Any = None,
    ) -> Tensor:
        out = self.mechanism.attend(query, key, value, self.grid, scale=scale, context=self.context)
        reference = self.mechanism.reference(query, key, value, self.grid, scale=scale, context=self.context)
        torch.testing.assert_close(out, reference, atol=2e-5, rtol=0)
        return out


def check_model(case: GoldenCase) -> None:
    config, tensors = case.config, case.tensors()
    check_kind(str(case.kind), config)
    grid = grid_of(config)
    assert sum(config["axes_dims_rope"]) == config["head_dim"]
    assert torch.equal(torch.cat([tensors["txt_ids"], tensors["img_ids"]]), ids_of(grid))
    model = tiny_flux(
        config["axes_dims_rope"],
        heads=config["heads"],
        layers=(config["num_layers"], config["num_single_layers"]),
        in_channels=config["in_channels"],
        joint_attention_dim=config["joint_attention_dim"],
        pooled_projection_dim=config["pooled_projection_dim"],
        guidance_embeds=config["guidance_embeds"],
    )
    weights = tensors.under("model.")
    pooling = {key: weights.pop(key) for key in list(weights) if key.endswith(".processor.spatial_weight")}
    model.load_state_dict(weights)
    names = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "img_ids", "txt_ids")
    inputs = {name: tensors[name] for name in (*names, *(["guidance"] if config["guidance_embeds"] else []))}
    with torch.no_grad():
        teacher = model(**inputs, return_dict=False)[0]
        handle = diffattn.apply(model, mechanism_of(config))
        for layer in handle.layers:
            if layer.weights is not None:
                layer.weights.load_state_dict({"spatial_weight": pooling.pop(f"{layer.name}.processor.spatial_weight")})
        student = model(**inputs, return_dict=False)[0]
    assert not pooling
    assert [f"{layer.name}.processor" for layer in handle.layers] == config["processor_order"]
    assert_golden("teacher_output", teacher, tensors["teacher_output"], case.tolerance)
    assert_golden("output", student, tensors["output"], case.tolerance)


def tiny_flux(axes: list[int], heads: int, layers: tuple[int, int], **options: Any) -> FluxTransformer2DModel:
    sizes = {"in_channels": 16, "joint_attention_dim": 24, "pooled_projection_dim": 20, **options}
    return FluxTransformer2DModel(
        patch_size=1,
        num_layers=layers[0],
        num_single_layers=layers[1],
        attention_head_dim=sum(axes),
        num_attention_heads=heads,
        axes_dims_rope=tuple(axes),
        **sizes,
    ).eval()
