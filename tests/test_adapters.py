"""Adapter files: ours and CLEAR's, strict, reversible, never half-loaded."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from models import flux, sd3
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import diffattn
from diffattn.adapters import Adapter, expected_parameters, mechanism_weights
from diffattn.plan import plan_all, resolve


def official_tensors(model: nn.Module, **options: Any) -> dict[str, Tensor]:
    """What the released files hold for a model, with random values."""
    [swap] = plan_all(model, resolve("clear", **options))
    tensors = {name: torch.randn_like(value) for name, value in expected_parameters(swap, None).items()}
    return tensors | {
        f"{layer}.processor.{key}": torch.rand_like(value) for layer, key, value in mechanism_weights(swap)
    }


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_state(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_official_layout_at_full_size() -> None:
    """380 tensors of FLUX.1-dev, 3072 wide; 57 pooling weights more with down_factor 4 (spec of the released files)."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True)
    [swap] = plan_all(model, resolve("clear", radius=8, down_factor=4))
    shapes = {name: tuple(value.shape) for name, value in expected_parameters(swap, None).items()}
    wanted = {}
    for block in range(19):
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            wanted[f"transformer_blocks.{block}.attn.{part}.weight"] = (3072, 3072)
            wanted[f"transformer_blocks.{block}.attn.{part}.bias"] = (3072,)
    for block in range(38):
        for part in ("to_q", "to_k", "to_v"):
            wanted[f"single_transformer_blocks.{block}.attn.{part}.weight"] = (3072, 3072)
            wanted[f"single_transformer_blocks.{block}.attn.{part}.bias"] = (3072,)
    assert shapes == wanted
    assert len(shapes) == 380
    pooling = {f"{layer}.processor.{key}": tuple(value.shape) for layer, key, value in mechanism_weights(swap)}
    assert pooling == {f"{name}.processor.spatial_weight": (1, 1, 1, 4, 1, 4, 1) for name in swap.layers}
    assert len(pooling) == 57


@pytest.mark.parametrize("name", ["clear_local_3.safetensors", "clear_local_3_down_3.safetensors"])
def test_official_file_of_19_and_38_layers(name: str, tmp_path: Path) -> None:
    tiny = flux(num_layers=19, num_single_layers=38)
    model = tiny.model
    options = {"radius": 3, "down_factor": 3} if "down" in name else {"radius": 3}
    tensors = official_tensors(model, **options)
    assert len(tensors) == (437 if "down" in name else 380)
    save_file(tensors, tmp_path / name)
    before, plain = state(model), tiny.run()

    handle = diffattn.load(model, tmp_path, weight_name=name)
    assert handle.layers[0].mechanism == diffattn.ClearAttention(**options)
    assert len(handle.layers) == 57
    after = state(model)
    for key, value in tensors.items():
        if ".processor." not in key:
            assert torch.equal(after[key], value)
    swapped = tiny.run()
    assert not torch.allclose(swapped, plain, atol=1e-3)

    handle.restore()
    assert_same_state(model, before)
    assert torch.equal(tiny.run(), plain)


def test_every_wrong_key_is_named(tmp_path: Path) -> None:
    model = flux().model
    tensors = official_tensors(model, radius=2)
    gone = "single_transformer_blocks.1.attn.to_k.bias"
    shape = "transformer_blocks.0.attn.to_out.0.weight"
    del tensors[gone]
    tensors[shape] = torch.zeros(3, 5)
    tensors["transformer_blocks.0.attn.to_extra.weight"] = torch.zeros(2)
    save_file(tensors, tmp_path / "clear_local_2.safetensors")
    before = state(model)
    with pytest.raises(ValueError) as error:
        diffattn.load(model, tmp_path / "clear_local_2.safetensors")
    text = str(error.value)
    assert f"1 missing: {gone}" in text
    assert "1 unexpected: transformer_blocks.0.attn.to_extra.weight" in text
    assert f"1 misshapen: {shape} is [3, 5], expected [" in text
    assert_same_state(model, before)
    assert not hasattr(model, "_diffattn")


def test_radius_given_or_in_the_name(tmp_path: Path) -> None:
    model = flux().model
    save_file(official_tensors(model, radius=2), tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"pass radius="):
        diffattn.load(model, tmp_path / "weights.safetensors")
    assert diffattn.load(model, tmp_path / "weights.safetensors", radius=5).layers[0].mechanism.radius == 5  # type: ignore[attr-defined]
    (tmp_path / "weights.safetensors").rename(tmp_path / "clear_local_16.safetensors")
    layer = diffattn.load(model, tmp_path, ntk_factor=10).layers[0]
    assert layer.mechanism == diffattn.ClearAttention(radius=16, ntk_factor=10)
    assert model.pos_embed.theta == 100_000
    diffattn.restore(model)
    assert model.pos_embed.theta == 10_000


def test_save_and_load_round_trip(tmp_path: Path) -> None:
    tiny = flux()
    model = tiny.model
    trained = ["transformer_blocks.0.attn.to_q.weight", "single_transformer_blocks.1.attn.to_v.bias"]
    handle = diffattn.apply(model, "clear", radius=2, down_factor=3, layers=["transformer_blocks.*", "*.1.attn"])
    plain = state(model)
    with torch.no_grad():
        for parameter in [*handle.parameters(), *(model.get_parameter(name) for name in trained)]:
            parameter.copy_(torch.randn_like(parameter))
        wanted = tiny.run()
    file = diffattn.save(model, tmp_path / "adapter", include=trained)
    assert sorted(load_file(file)) == sorted(
        [*trained, *(f"{layer.name}.processor.spatial_weight" for layer in handle.layers)]
    )
    assert [path.name for path in file.parent.iterdir()] == [file.name]

    other = flux().model
    other.load_state_dict(plain)
    loaded = diffattn.load(other, tmp_path / "adapter")
    assert [layer.name for layer in loaded.layers] == [layer.name for layer in handle.layers]
    assert torch.equal(tiny.run(other), wanted)
    again = diffattn.save(other, tmp_path / "again")
    assert Adapter.open(again).metadata == Adapter.open(file).metadata
    first, second = load_file(file), load_file(again)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    loaded.restore()
    assert_same_state(other, plain)


def test_metadata_says_what_it_is(tmp_path: Path) -> None:
    model = flux().model
    diffattn.apply(model, "clear", radius=2, down_factor=3)
    adapter = Adapter.open(diffattn.save(model, tmp_path))
    assert json.loads(adapter.metadata["mechanism"])["type"] == "clear"
    assert adapter.metadata["model"] == "FluxTransformer2DModel"
    other = sd3().model
    with pytest.raises(ValueError, match="adapter of FluxTransformer2DModel, but the target is SD3Transformer2DModel"):
        diffattn.load(other, tmp_path)
    assert isinstance(other, SD3Transformer2DModel) and not hasattr(other, "_diffattn")


@pytest.mark.parametrize("content", [b"", b"not a safetensors file at all", None])
def test_broken_file(content: bytes | None, tmp_path: Path) -> None:
    model = flux().model
    file = tmp_path / "clear_local_2.safetensors"
    save_file(official_tensors(model, radius=2), file)
    file.write_bytes(file.read_bytes()[:-100] if content is None else content)
    before = state(model)
    with pytest.raises(ValueError, match=r"clear_local_2\.safetensors is not a whole safetensors file"):
        diffattn.load(model, file)
    assert_same_state(model, before)


def test_missing_files(tmp_path: Path) -> None:
    model = flux().model
    with pytest.raises(ValueError, match="0 safetensors files"):
        diffattn.load(model, tmp_path)
    with pytest.raises(ValueError, match="no file other.safetensors"):
        diffattn.load(model, tmp_path, weight_name="other.safetensors")
    with pytest.raises(ValueError, match="neither a file, a folder nor a hub repository"):
        diffattn.load(model, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="save needs one swapped model"):
        diffattn.save(model, tmp_path)


def test_loading_again_goes_back_to_the_true_original(tmp_path: Path) -> None:
    tiny = flux()
    model = tiny.model
    before, plain = state(model), tiny.run()
    for radius in (2, 3):
        save_file(official_tensors(model, radius=radius), tmp_path / f"clear_local_{radius}.safetensors")
        diffattn.load(model, tmp_path / f"clear_local_{radius}.safetensors")
    diffattn.restore(model)
    assert_same_state(model, before)
    assert torch.equal(tiny.run(), plain)


def test_without_keeping_the_original(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = flux().model
    tensors = official_tensors(model, radius=2)
    save_file(tensors, tmp_path / "clear_local_2.safetensors")
    diffattn.load(model, tmp_path, keep_original=False)
    with caplog.at_level(logging.WARNING, logger="diffattn"):
        diffattn.restore(model)
    assert "keep the adapter's values" in caplog.text
    name = "transformer_blocks.0.attn.to_q.weight"
    assert torch.equal(model.get_parameter(name), tensors[name])


def test_save_pretrained_warns_of_adapter_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = flux().model
    save_file(official_tensors(model, radius=2), tmp_path / "clear_local_2.safetensors")
    diffattn.load(model, tmp_path)
    with caplog.at_level(logging.WARNING, logger="diffattn"):
        model.save_pretrained(tmp_path / "model")
    assert "diffattn.save" in caplog.text
    diffattn.restore(model)
    caplog.clear()
    model.save_pretrained(tmp_path / "model")
    assert not caplog.text


def test_peft_layers_are_written_to_their_base(tmp_path: Path) -> None:
    from peft import LoraConfig

    tiny = flux()
    model = tiny.model
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    plain, before = tiny.run(), state(model)
    bare = flux().model
    tensors = official_tensors(bare, radius=2)
    save_file(tensors, tmp_path / "clear_local_2.safetensors")
    diffattn.load(model, tmp_path)
    base = model.get_parameter("transformer_blocks.0.attn.to_q.base_layer.weight")
    assert torch.equal(base, tensors["transformer_blocks.0.attn.to_q.weight"])
    assert not torch.allclose(tiny.run(), plain, atol=1e-3)
    diffattn.restore(model)
    assert_same_state(model, before)
    assert torch.equal(tiny.run(), plain)


def test_fused_projections_are_refused(tmp_path: Path) -> None:
    model = flux().model
    save_file(official_tensors(model, radius=2), tmp_path / "clear_local_2.safetensors")
    model.fuse_qkv_projections()
    with pytest.raises(ValueError, match="unfuse_qkv_projections"):
        diffattn.load(model, tmp_path)
    assert not hasattr(model, "_diffattn")


def test_quantized_projections_are_refused(tmp_path: Path) -> None:
    class Int8Linear(nn.Linear):
        """Stands for a quantizer's own linear layer."""

    model = flux().model
    save_file(official_tensors(model, radius=2), tmp_path / "clear_local_2.safetensors")
    model.transformer_blocks[0].attn.to_k.__class__ = Int8Linear
    with pytest.raises(ValueError, match=r"to_k\.weight is quantized .* load the adapter before quantizing"):
        diffattn.load(model, tmp_path)
    assert not hasattr(model, "_diffattn")
