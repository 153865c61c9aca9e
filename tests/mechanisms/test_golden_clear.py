"""CLEAR against numbers recorded from the released code: masks, rotary tables, attention layers, whole models."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxPosEmbed
from golden_clear import grid_of, ids_of, mechanism_of
from golden_record import Record
from golden_vectors import (
    GoldenCase,
    assert_golden,
    golden_cases,
    run_golden,
    with_a_key_more,
    write_case,
)
from torch import Tensor
from torch.nn import functional

import diffattn
from diffattn import TokenGrid
from diffattn.mechanisms.base import Context, Mechanism
from diffattn.swap.intercept import processor_class

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
    processor = processor_class(type(attention.processor), "Golden")()
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

    def wants(self, query: Tensor, key: Tensor, parallel_config: Any = None, is_causal: bool = False) -> bool:
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


# ---- cases of our own


def test_a_key_that_is_not_used_fails(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"full_single_5x8_t20_prop.json says .*\['config.surprise'\]"):
        run_golden(test_recorded_numbers, with_a_key_more("clear", "full_single_5x8_t20_prop", tmp_path))


@pytest.mark.parametrize("window", [None, 2.5])
@pytest.mark.parametrize("proportional", [False, True])
def test_other_sizes(tmp_path: Path, window: float | None, proportional: bool) -> None:
    """A layer worked out in float64 by its formula: another grid, L0, base of positions, batch and widths."""
    config = {
        "kind": "full" if window is None else "local", "stream": "single", "height": 7, "width": 3, "text_length": 5,
        "window_size": window, "down_factor": None, "proportional_attention": proportional, "ntk_factor": 4.0,
        "heads": 3, "head_dim": 8, "dim": 24, "batch": 2, "qk_norm_eps": 1e-5, "rope_axes": [2, 2, 4],
        "train_seq_len": 99,
    }  # fmt: skip
    x, angles = torch.randn(2, 26, 24), rotary_angles(config)
    weights = {f"to_{name}.{part}": torch.randn(*([24, 24] if part == "weight" else [24])) * 0.3
               for name in "qkv" for part in ("weight", "bias")}  # fmt: skip
    weights |= {f"norm_{name}.weight": torch.rand(8) + 0.5 for name in "qk"}
    double = {name: weight.double() for name, weight in weights.items()}
    q, k, v = (
        functional.linear(x.double(), double[f"to_{name}.weight"], double[f"to_{name}.bias"])
        .unflatten(-1, (3, 8))
        .transpose(1, 2)
        for name in "qkv"
    )
    q, k = (rotated(t / (t.square().mean(-1, keepdim=True) + 1e-5).sqrt() * double[f"norm_{name}.weight"], angles)
            for t, name in ((q, "q"), (k, "k")))  # fmt: skip
    scale = math.sqrt((math.log(26) / math.log(99) if proportional else 1) / 8)
    logits = scale * q @ k.transpose(-1, -2)
    if window is not None:
        logits = logits.masked_fill(~near(config), -torch.inf)
    tensors = {f"attn.{name}": weight for name, weight in weights.items()}
    tensors |= {"hidden_states": x, "output": (logits.softmax(-1) @ v).transpose(1, 2).flatten(2).float()}
    tensors |= {f"rope_{name}": getattr(angles, name)().repeat_interleave(2, -1).float() for name in ("cos", "sin")}
    run_golden(test_recorded_numbers, write_case(tmp_path / "clear", "own", {"config": config}, tensors))


def rotary_angles(config: dict[str, Any]) -> Tensor:
    """(tokens, head_dim / 2): 1 / base^(2 i / n) a place, for the i-th pair of an axis of n channels."""
    places = [(0, 0, 0)] * 5 + [(0, row, column) for row in range(7) for column in range(3)]
    frequencies = [(axis, 40_000 ** (-2 * i / n)) for axis, n in enumerate(config["rope_axes"]) for i in range(n // 2)]
    return torch.tensor([[place[axis] * of for axis, of in frequencies] for place in places], dtype=torch.float64)


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(turned).flatten(-2)


def near(config: dict[str, Any]) -> Tensor:
    """May a query (row) see a key? Text always; cells within the circle."""
    cells = [(i // 3, i % 3) for i in range(21)]
    seen = torch.ones(26, 26, dtype=torch.bool)
    for i, (y, x) in enumerate(cells):
        for j, (v, u) in enumerate(cells):
            seen[5 + i, 5 + j] = (y - v) ** 2 + (x - u) ** 2 < config["window_size"] ** 2
    return seen
