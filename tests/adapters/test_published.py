"""Published weights of SLA and VSA for Wan: told by their keys, strict, and the authors' function."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from hand_masks import HandMask, error, under_masks
from models import BUILDERS, Tiny, wan
from safetensors.torch import save_file
from sparse_formulas import sla_by_hand, vsa_by_hand
from torch import Tensor, nn

import diffattn
from diffattn import SparseLinearAttention, VideoSparseAttention
from diffattn.adapters import Adapter
from diffattn.adapters.published import recognise
from diffattn.adapters.published.layout import PREFIXES
from diffattn.swap.plan import plan_all

TURBO, CONVERTED, FASTVIDEO = (
    "self_attn.attn_op.local_attn.",
    "attn1.attn_op.local_attn.",
    "attn1.attn_impl.",
)
"""Where files of SLA have the projection."""
SLA = {"top_share": 0.5, "tile": 8, "query_tile": 30}
VSA = {"top_share": 0.5, "tile": (2, 2, 3)}
ORIGINAL = [
    (r"condition_embedder\.time_embedder\.linear_1", "time_embedding.0"),
    (r"condition_embedder\.time_embedder\.linear_2", "time_embedding.2"),
    (r"condition_embedder\.text_embedder\.linear_1", "text_embedding.0"),
    (r"condition_embedder\.text_embedder\.linear_2", "text_embedding.2"),
    (r"condition_embedder\.time_proj", "time_projection.1"),
    (r"^scale_shift_table", "head.modulation"),
    (r"proj_out", "head.head"),
    (r"(blocks\.\d+)\.scale_shift_table", r"\1.modulation"),
    (r"attn1\.", "self_attn."),
    (r"attn2\.", "cross_attn."),
    (r"_attn\.to_([qkv])\.", r"_attn.\1."),
    (r"_attn\.to_out\.0", "_attn.o"),
    (r"ffn\.net\.0\.proj", "ffn.0"),
    (r"ffn\.net\.2", "ffn.2"),
    (r"(blocks\.\d+)\.norm2", r"\1.norm3"),
]
"""diffusers' names into Wan's."""


def original(name: str) -> str:
    for pattern, other in ORIGINAL:
        name = re.sub(pattern, other, name)
    return name


def projections(layers: int, size: int, place: str) -> dict[str, tuple[int, ...]]:
    return {
        f"blocks.{n}.{place}proj_l.{kind}": shape
        for n in range(layers)
        for kind, shape in (("weight", (size, size)), ("bias", (size,)))
    }


def gates(layers: int, size: int, place: str) -> dict[str, tuple[int, ...]]:
    return {
        name.replace("proj_l", "to_gate_compress"): shape for name, shape in projections(layers, size, place).items()
    }


def drawn(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {name: 0.3 * torch.randn(shape) for name, shape in shapes.items()}


def changed(model: nn.Module) -> dict[str, Tensor]:
    """Other weights for all of a model."""
    return {name: value + 0.1 * torch.randn_like(value) for name, value in model.state_dict().items()}


def of_kind(kind: str, model: nn.Module, place: str = "") -> dict[str, Tensor]:
    """What a file has of the mechanism's own for a tiny Wan of heads of 8 or more channels."""
    attention: Any = model.get_submodule("blocks.0.attn1")
    layers, width = len(model.blocks), attention.inner_dim  # type: ignore[arg-type]
    if kind == "sla":
        return drawn(projections(layers, width // attention.heads, place or CONVERTED))
    return drawn(gates(layers, width, place))


class ByHand(HandMask):
    """The formula in place of the attention of an unmodified Wan."""

    def __init__(self, model: nn.Module, layouts: Any, kind: str, own: dict[str, Tensor]) -> None:
        super().__init__(model, layouts)
        self._kind, self._own, self._hidden = kind, own, torch.zeros(())
        for name in self._layouts:
            module = model.get_submodule(name)
            self._hooks.append(module.register_forward_pre_hook(self._note, with_kwargs=True))

    def _note(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._hidden = (args[0] if args else kwargs["hidden_states"]).double()

    def _attend(
        self, layout: Any, query: Tensor, key: Tensor, value: Tensor, own: Tensor | None, *rest: Any, **kwargs: Any
    ) -> Tensor:
        number = re.findall(r"\d+", str(self._layer))[0]
        weight, bias = (
            next(v.double() for k, v in self._own.items() if f"blocks.{number}." in k and k.endswith(kind))
            for kind in ("weight", "bias")
        )
        q, k, v = query.double(), key.double(), value.double()
        if self._kind == "sla":
            return sla_by_hand(q, k, v, weight, bias, share=0.5, asking=30, tile=8).to(query.dtype)
        gate = (self._hidden @ weight.mT + bias).unflatten(-1, (q.shape[1], -1)).transpose(1, 2)
        return vsa_by_hand(q, k, v, gate, (3, 4, 5), share=0.5, sides=(2, 2, 3)).to(query.dtype)


@torch.no_grad()
def wanted(kind: str, own: dict[str, Tensor], whole: dict[str, Tensor] | None) -> Tensor:
    """A Wan's output by the formula, with other weights where the file has them."""
    tiny = wan()
    if whole is not None:
        tiny.model.load_state_dict(whole)
    return under_masks(tiny.run, (tiny.model, tiny.spatial), mode=ByHand, kind=kind, own=own)


CASES = {
    "TurboDiffusion": ("sla", TURBO, "", True),
    "TurboDiffusion, from training": ("sla", TURBO, "net.", True),
    "TurboDiffusion, converted": ("sla", CONVERTED, "", False),
    "FastVideo's SLA": ("sla", FASTVIDEO, "", False),
    "FastWan": ("vsa", "", "", False),
    "FastWan, gate in the attention": ("vsa", "attn1.", "transformer.", False),
    "VSA under original names": ("vsa", "", "model.diffusion_model.", True),
}


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_a_whole_model_in_every_layout_is_the_formula(name: str, tmp_path: Path) -> None:
    kind, place, prefix, renamed = CASES[name]
    tiny = wan()
    own, whole = of_kind(kind, tiny.model, place), changed(tiny.model)
    tensors = {**own, **{original(key) if renamed else key: value for key, value in whole.items()}}
    if renamed and kind == "sla":  # a matrix there
        tensors["patch_embedding.weight"] = tensors["patch_embedding.weight"].flatten(1)
    save_file({prefix + key: value for key, value in tensors.items()}, tmp_path / "model.safetensors")
    before, plain = {key: value.clone() for key, value in tiny.model.state_dict().items()}, tiny.run()
    handle = diffattn.load(tiny.model, tmp_path / "model.safetensors", **(SLA if kind == "sla" else VSA))
    assert handle.layers[0].mechanism.type == kind and len(handle.layers) == len(tiny.model.blocks)
    assert all(torch.equal(value, whole[key]) for key, value in tiny.model.state_dict().items())
    got = tiny.run()
    assert error(got, wanted(kind, own, whole)) < 2e-5
    assert error(got, plain) > 1e-2

    diffattn.save(tiny.model, tmp_path / "ours")
    other = wan()
    again = diffattn.load(other.model, tmp_path / "ours")
    assert again.layers[0].mechanism == handle.layers[0].mechanism
    assert torch.equal(other.run(), got)

    handle.restore()
    assert all(torch.equal(value, before[key]) for key, value in tiny.model.state_dict().items())
    assert torch.equal(tiny.run(), plain)


@torch.no_grad()
@pytest.mark.parametrize(("kind", "options"), [("sla", SLA), ("vsa", VSA)])
def test_projections_or_gates_alone_leave_the_models_own_weights(
    kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    tiny = wan()
    own = of_kind(kind, tiny.model)
    save_file(own, tmp_path / "own.safetensors")
    before = {key: value.clone() for key, value in tiny.model.state_dict().items()}
    diffattn.load(tiny.model, tmp_path, **options)
    assert all(torch.equal(value, before[key]) for key, value in tiny.model.state_dict().items())
    assert error(tiny.run(), wanted(kind, own, None)) < 2e-5


def test_the_defaults_are_the_authors(tmp_path: Path) -> None:
    for kind, mechanism in (
        ("sla", SparseLinearAttention(top_share=0.1)),
        ("vsa", VideoSparseAttention(top_share=0.2)),
    ):
        tiny = wan()
        save_file(of_kind(kind, tiny.model), tmp_path / f"{kind}.safetensors")
        assert diffattn.load(tiny.model, tmp_path / f"{kind}.safetensors").layers[0].mechanism == mechanism
    assert SparseLinearAttention() == SparseLinearAttention(tile=64, query_tile=128, over="all", feature_map="softmax")
    assert VideoSparseAttention().part == VideoSparseAttention(tile=(4, 4, 4)).part


@torch.no_grad()
@pytest.mark.parametrize("whole", [True, False], ids=["of a folder", "of a file"])
def test_a_model_in_several_files(whole: bool, tmp_path: Path) -> None:
    tiny = wan()
    tensors = {**of_kind("vsa", tiny.model), **changed(tiny.model)}
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, own in parts.items():
        save_file({name: tensors[name] for name in own}, tmp_path / file)
    index = {"weight_map": {name: file for file, own in parts.items() for name in own}}
    file = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    file.write_text(json.dumps(index))
    diffattn.load(tiny.model, tmp_path if whole else file, **VSA)
    assert torch.equal(tiny.model.patch_embedding.weight, tensors["patch_embedding.weight"])
    one = wan()
    save_file(tensors, tmp_path / "one.safetensors")
    diffattn.load(one.model, tmp_path / "one.safetensors", **VSA)
    assert torch.equal(tiny.run(), one.run())


@torch.no_grad()
@pytest.mark.parametrize("form", ["lora_A", "lora_down, alpha", "original names", "alpha in the metadata"])
def test_a_lora_beside_the_projections(form: str, tmp_path: Path) -> None:
    tiny = wan()
    own = of_kind("sla", tiny.model, TURBO if form == "original names" else CONVERTED)
    modules = ["blocks.0.attn1.to_q", "blocks.1.ffn.net.2", "blocks.1.attn2.to_out.0"]
    factors, whole, metadata = {}, dict(tiny.model.state_dict()), {}
    for module in modules:
        weight = whole[f"{module}.weight"]
        a, b = 0.3 * torch.randn(4, weight.shape[1]), 0.3 * torch.randn(weight.shape[0], 4)
        scale = {"lora_down, alpha": 2.0, "alpha in the metadata": 0.5}.get(form, 1.0)
        whole[f"{module}.weight"] = weight + scale * b @ a
        named = original(f"{module}.weight").removesuffix(".weight") if form == "original names" else module
        first, second = ("lora_down", "lora_up") if form == "lora_down, alpha" else ("lora_A.default", "lora_B.default")
        factors |= {f"{named}.{first}.weight": a, f"{named}.{second}.weight": b}
        if form == "lora_down, alpha":
            factors[f"{named}.alpha"] = torch.tensor(8.0)
        if form == "alpha in the metadata":
            metadata = {"alpha": "2"}
    prefixed = {f"diffusion_model.{name}": value for name, value in {**own, **factors}.items()}
    save_file(prefixed, tmp_path / "lora.safetensors", metadata)
    plain = tiny.run()
    handle = diffattn.load(tiny.model, tmp_path / "lora.safetensors", **SLA)
    assert error(tiny.run(), wanted("sla", own, whole)) < 2e-5
    handle.restore()
    assert torch.equal(tiny.run(), plain)
    assert not any("lora" in name for name, _ in tiny.model.named_parameters())


# Real sizes


def model_of(width: int, heads: int, layers: int, inner: int, **more: Any) -> nn.Module:
    with torch.device("meta"):
        return WanTransformer3DModel(
            num_attention_heads=heads, attention_head_dim=width // heads, num_layers=layers, ffn_dim=inner, **more
        )


def wan_keys(width: int, layers: int, inner: int) -> dict[str, tuple[int, ...]]:
    """Wan2.1's text-to-video model under its original names."""
    square, line = (width, width), (width,)
    block: dict[str, tuple[int, ...]] = {"modulation": (1, 6, width), "norm3.weight": line, "norm3.bias": line}
    for attention in ("self_attn", "cross_attn"):
        for part in "qkvo":
            block |= {f"{attention}.{part}.weight": square, f"{attention}.{part}.bias": line}
        block |= {f"{attention}.norm_q.weight": line, f"{attention}.norm_k.weight": line}
    block |= {
        "ffn.0.weight": (inner, width),
        "ffn.0.bias": (inner,),
        "ffn.2.weight": (width, inner),
        "ffn.2.bias": line,
    }
    keys = {f"blocks.{n}.{name}": shape for n in range(layers) for name, shape in block.items()}
    sizes = {
        "text_embedding.0": (width, 4096), "text_embedding.2": square, "time_embedding.0": (width, 256),
        "time_embedding.2": square, "time_projection.1": (6 * width, width), "head.head": (64, width),
    }  # fmt: skip
    for name, shape in sizes.items():
        keys |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return keys | {
        "patch_embedding.weight": (width, 64),
        "patch_embedding.bias": line,
        "head.modulation": (1, 2, width),
    }


SIZES = {"1.3B": (1536, 12, 30, 8960), "14B": (5120, 40, 40, 13824)}


def expected(model: nn.Module, names: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """What a file of these names must have for a model."""
    found = recognise([Adapter(Path("model.safetensors"), names, {})])
    assert found is not None
    with torch.device("meta"):
        [swap] = plan_all(model, found.mechanism({}, model))
    return found.expected(swap)


@pytest.mark.parametrize("size", SIZES)
def test_turbodiffusions_keys_at_full_size(size: str) -> None:
    """885 tensors of the 1.3B model, by a listing of its file."""
    width, heads, layers, inner = SIZES[size]
    model = model_of(width, heads, layers, inner)
    keys = wan_keys(width, layers, inner) | projections(layers, 128, TURBO)
    assert len(keys) == 29 * layers + 15 and (size != "1.3B" or len(keys) == 885)
    assert expected(model, keys) == keys
    diffusers = dict.fromkeys(convert_wan_transformer_to_diffusers(dict.fromkeys(wan_keys(width, layers, inner))))
    assert diffusers.keys() == model.state_dict().keys()
    for place in (CONVERTED, FASTVIDEO):
        own = {name: tuple(value.shape) for name, value in model.state_dict().items()} | projections(layers, 128, place)
        assert expected(model, own) == own


@pytest.mark.parametrize(("size", "prefix"), [("14B", ""), *(("1.3B", prefix) for prefix in PREFIXES)])
def test_fastwans_keys_at_full_size(size: str, prefix: str) -> None:
    width, heads, layers, inner = SIZES[size]
    model = model_of(width, heads, layers, inner)
    for place in ("", "attn1."):
        keys = {name: tuple(value.shape) for name, value in model.state_dict().items()} | gates(layers, width, place)
        assert len(keys) == 29 * layers + 15
        keys = {prefix + name: shape for name, shape in keys.items()}
        assert expected(model, keys) == keys


def test_an_image_to_video_model_has_its_image_under_original_names_too() -> None:
    model = model_of(64, 4, 2, 96, image_dim=32, added_kv_proj_dim=64, in_channels=36)
    keys = {f"blocks.{n}.cross_attn.{part}" for n in range(2) for part in ("k_img.weight", "norm_k_img.weight")}
    keys |= {f"img_emb.proj.{n}.{kind}" for n in (0, 1, 3, 4) for kind in ("weight", "bias")}
    names = projections(2, 16, TURBO) | {"head.head.weight": (64, 64)}
    assert keys <= expected(model, names).keys()


# What is refused


def spoiled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """One missing, one too many, one of another shape, of the model's and of the mechanism's own."""
    tensors = dict(tensors)
    del tensors["blocks.1.self_attn.q.bias"], tensors[f"blocks.0.{TURBO}proj_l.bias"]
    for own, model, shape in (("blocks.7", "blocks.0.self_attn.extra", (2,)), ("blocks.1", "head.head", (3, 5))):
        tensors |= {f"{own}.{TURBO}proj_l.weight": torch.zeros(shape), f"{model}.weight": torch.zeros(shape)}
    return tensors


def test_every_wrong_key_is_named(tmp_path: Path) -> None:
    model = wan().model
    tensors = of_kind("sla", model, TURBO) | {original(key): value for key, value in changed(model).items()}
    save_file(spoiled(tensors), tmp_path / "model.safetensors")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError) as refusal:
        diffattn.load(model, tmp_path / "model.safetensors", **SLA)
    text = str(refusal.value)
    assert f"2 missing: blocks.0.{TURBO}proj_l.bias, blocks.1.self_attn.q.bias" in text
    assert "2 unexpected: " in text and "blocks.0.self_attn.extra.weight" in text
    assert f"blocks.7.{TURBO}proj_l.weight" in text
    assert "2 misshapen: " in text and "head.head.weight is [3, 5], expected [" in text
    assert f"blocks.1.{TURBO}proj_l.weight is [3, 5], expected [" in text
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not hasattr(model, "_diffattn")


def test_a_wrong_lora_beside_them_is_named(tmp_path: Path) -> None:
    model = wan().model
    own = of_kind("sla", model)
    own |= {"blocks.0.attn1.to_q.lora_A.weight": torch.zeros(4, 3), "blocks.0.attn1.to_q.diff": torch.zeros(2)}
    save_file(own, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError) as refusal:
        diffattn.load(model, tmp_path / "lora.safetensors", **SLA)
    text = str(refusal.value)
    assert "1 missing: transformer.blocks.0.attn1.to_q.lora_B.weight" in text
    assert "1 unexpected: transformer.blocks.0.attn1.to_q.diff" in text
    assert "transformer.blocks.0.attn1.to_q.lora_A.weight is [4, 3], expected" in text
    assert not hasattr(model, "_diffattn")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda model: {"transformer_blocks.0.attn.to_gate_compress.weight": torch.zeros(4, 4)},
            "MiniMax-H3 and LTX-2",
        ),
        (lambda model: {"ema.blocks.0.to_gate_compress.weight": torch.zeros(4, 4)}, "expected a name such as"),
        (lambda model: of_kind("sla", model) | {"x": torch.zeros(2, dtype=torch.int8)}, "before it was quantized"),
        (lambda model: {k: v * torch.nan for k, v in of_kind("sla", model).items()}, "NaN"),
    ],
)
def test_what_cannot_be_read_is_refused(
    build: Callable[[nn.Module], dict[str, Tensor]], message: str, tmp_path: Path
) -> None:
    model = wan().model
    save_file(build(model), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        diffattn.load(model, tmp_path / "model.safetensors")
    assert not hasattr(model, "_diffattn")


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "TurboWan2.1-T2V-1.3B-480P.pth")
    with pytest.raises(ValueError, match=r"is a pickle, which can run code.*weights_only=True"):
        diffattn.load(wan().model, tmp_path / "TurboWan2.1-T2V-1.3B-480P.pth")


def test_other_models_are_refused(tmp_path: Path) -> None:
    save_file(of_kind("sla", wan().model), tmp_path / "model.safetensors")
    tiny: Tiny = BUILDERS["Flux"]()
    with pytest.raises(ValueError, match="holds sla weights for Wan, and the target is FluxTransformer2DModel"):
        diffattn.load(tiny.model, tmp_path / "model.safetensors")


def test_our_own_adapters_are_not_taken_for_published_ones(tmp_path: Path) -> None:
    tiny = wan()
    diffattn.apply(tiny.model, "sla", **SLA)
    diffattn.save(tiny.model, tmp_path)
    file = Adapter.open(tmp_path / "adapter.safetensors")
    assert any("proj_l" in name for name in file.shapes) and recognise([file]) is None
    assert diffattn.load(wan().model, tmp_path).layers[0].mechanism == SparseLinearAttention(**SLA)
