"""Adapter files: ours and CLEAR's, strict, reversible, never half-loaded."""

import json
import logging
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
import pytest
import tiny_pipelines
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from models import BUILDERS, Tiny, flux, pixart, sd3
from peft import LoraConfig
from releases import needs
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import diffattn
from diffattn import ClearAttention
from diffattn.adapters import Adapter, expected_parameters, mechanism_weights
from diffattn.adapters.files import CONFIG_NAME, FILE_NAME, LORA_NAME
from diffattn.adapters.saving import base_model_of
from diffattn.cli.swapping import Swap
from diffattn.options import Text
from diffattn.swap.plan import plan_all, resolve


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
    assert sorted(path.name for path in file.parent.iterdir()) == [file.name, CONFIG_NAME]

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


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn]
)
def test_tensors_that_are_no_weights_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    model = flux().model
    tensors = official_tensors(model, radius=2)
    first = min(tensors)
    save_file({**tensors, first: tensors[first].to(dtype)}, tmp_path / "clear_local_2.safetensors")
    refused(model, tmp_path, rf"float16, .* in .*clear_local_2\.safetensors; got \S+ in {first}; take the file before")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_that_are_not_finite_are_refused(value: float, dtype: torch.dtype, tmp_path: Path) -> None:
    model = flux().model
    tensors = {name: tensor.to(dtype) for name, tensor in official_tensors(model, radius=2).items()}
    save_file(tensors, tmp_path / "clear_local_2.safetensors")
    diffattn.load(model, tmp_path).restore()  # each of these precisions is fine
    first, last = min(tensors), max(tensors)
    tensors[first].view(-1)[1] = tensors[last].view(-1)[0] = value
    save_file(tensors, tmp_path / "clear_local_2.safetensors")
    refused(
        model, tmp_path, rf"finite weights in .*clear_local_2\.safetensors; got NaN or infinity in {first} and 1 more"
    )


@pytest.mark.parametrize("name", ["mechanism", "layers", "projections"])
@pytest.mark.parametrize("text", ["{", "", "3", '"x"', "null", "[[1]]", "[" * 100_000])
def test_broken_metadata_is_refused_with_the_name_of_the_file(name: str, text: str, tmp_path: Path) -> None:
    model = flux().model
    diffattn.apply(model, "clear", radius=2)
    file = diffattn.save(model, tmp_path)
    diffattn.restore(model)
    metadata = {**Adapter.open(file).metadata, name: text}
    save_file(load_file(file), file, metadata)
    refused(model, tmp_path, rf"{name} in the metadata of .*{FILE_NAME} (is not valid JSON|must be)")


def test_options_of_an_adapter_are_read_by_type(tmp_path: Path) -> None:
    """As `-o proportional=no` on the command line."""
    model = flux().model
    diffattn.apply(model, "clear", radius=2, proportional=True)
    diffattn.save(model, tmp_path)
    diffattn.restore(model)
    texts = {name: Text(text) for name, text in {"proportional": "no", "radius": "2.5", "radius_t": "none"}.items()}
    handle = diffattn.load(model, tmp_path, **texts)  # type: ignore[arg-type]
    assert handle.layers[0].mechanism == ClearAttention(radius=2.5)
    handle.restore()
    put = Swap(None, ["proportional=off"], adapter=str(tmp_path)).put(model)
    assert put is not None and put.layers[0].mechanism == ClearAttention(radius=2)
    put.restore()
    with pytest.raises(ValueError, match="clear: proportional must be true or false, got 'maybe'"):
        diffattn.load(model, tmp_path, proportional=Text("maybe"))
    for name in ("min_tokens", "keep_original", "backend"):
        with pytest.raises(ValueError, match=f"-o is for options of the adapter's mechanism, and {name} is none"):
            Swap(None, [f"{name}=0"], adapter=str(tmp_path)).put(model)
    with pytest.raises(ValueError, match="keep_original must be true or false, got 'no'"):
        diffattn.load(model, tmp_path, keep_original="no")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="source must be a file, a folder or a hub repository, got 3"):
        diffattn.load(model, 3)  # type: ignore[arg-type]


def refused(model: nn.Module, folder: Path, message: str) -> None:
    """Loading a folder ends with one line, and nothing is changed."""
    before = state(model)
    with pytest.raises(ValueError, match=message) as error:
        diffattn.load(model, folder)
    assert "\n" not in str(error.value)
    assert_same_state(model, before)
    assert not hasattr(model, "_diffattn")


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


def add_lora(
    model: Any, name: str = "default", targets: Any = ("to_q", "to_k", "to_v", "to_out.0"), rank: int = 2
) -> None:
    """A LoRA with random factors; alpha is not the rank, so that a file without it would be another."""
    targets = targets if isinstance(targets, str) else list(targets)
    model.add_adapter(LoraConfig(r=rank, lora_alpha=5, target_modules=targets), name)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f".{name}." in key:
                parameter.copy_(torch.randn_like(parameter) * 0.3)


@torch.no_grad()
def output(tiny: Tiny) -> Tensor:
    return tiny.run()


def write_lora(family: str, folder: Path, **options: Any) -> Tensor:
    """A folder with a LoRA of windows for the tiny model of a family; returns what the model computed with it."""
    tiny = BUILDERS[family]()
    plain = output(tiny)
    diffattn.apply(tiny.model, "clear", radius=2, **options)
    swapped = output(tiny)
    add_lora(tiny.model)
    result = output(tiny)
    assert not torch.allclose(swapped, plain, atol=1e-3) and not torch.allclose(result, swapped, atol=1e-3)
    diffattn.save(tiny.model, folder)
    return result


def pipeline_around(tiny: Tiny) -> Any:
    """The pipeline of a tiny model's family; the rest of its parts are left out."""
    model, none = tiny.model, dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    two = none | dict.fromkeys(("text_encoder_2", "tokenizer_2"))
    checker = dict.fromkeys(("safety_checker", "feature_extractor")) | {"requires_safety_checker": False}
    flow, ddim = diffusers.FlowMatchEulerDiscreteScheduler(), diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
    parts: dict[str, tuple[str, dict[str, Any]]] = {
        "FluxTransformer2DModel": ("FluxPipeline", {**two, "scheduler": flow, "transformer": model}),
        "SD3Transformer2DModel": (
            "StableDiffusion3Pipeline",
            {**two, "text_encoder_3": None, "tokenizer_3": None, "scheduler": flow, "transformer": model},
        ),
        "WanTransformer3DModel": ("WanPipeline", {**none, "scheduler": flow, "transformer": model}),
        "CogVideoXTransformer3DModel": ("CogVideoXPipeline", {**none, "scheduler": ddim, "transformer": model}),
    }
    name = type(model).__name__
    if "UNet" in name and tiny.inputs.get("added_cond_kwargs"):
        return diffusers.StableDiffusionXLPipeline(**two, scheduler=ddim, unet=model)
    if "UNet" in name:
        return diffusers.StableDiffusionPipeline(**none, **checker, scheduler=ddim, unet=model)
    pipeline, values = parts[name]
    return getattr(diffusers, pipeline)(**values)


@pytest.mark.parametrize("family", ["Flux", "SD3", "SD1.5", "SDXL", "Wan", "CogVideoX"])
def test_a_lora_is_the_same_by_diffusers_and_by_load(family: str, tmp_path: Path) -> None:
    wanted = write_lora(family, tmp_path)
    by_hand, by_load, bare = (BUILDERS[family]() for _ in range(3))
    pipe = pipeline_around(by_hand)
    pipe.load_lora_weights(tmp_path, weight_name=LORA_NAME)
    diffattn.apply(pipe, "clear", radius=2)
    handle = diffattn.load(pipeline_around(by_load), tmp_path)
    diffattn.load(bare.model, tmp_path)
    assert handle.layers[0].mechanism == diffattn.ClearAttention(radius=2)
    assert torch.equal(output(by_load), output(by_hand))
    assert torch.equal(output(by_load), wanted)
    assert torch.equal(output(bare), wanted)


@needs("diffusers", "0.40.0", "without the hub, load_lora_weights finds the file in a folder")
def test_a_whole_pipeline_draws_the_same_by_diffusers_and_by_load(tmp_path: Path) -> None:
    write_lora("Flux", tmp_path)
    by_hand, by_load = tiny_pipelines.flux(), tiny_pipelines.flux()
    by_hand.pipe.load_lora_weights(tmp_path)
    diffattn.apply(by_hand.pipe, "clear", radius=2)
    plain = by_load.run()
    diffattn.load(by_load.pipe, tmp_path)
    assert by_load.pipe.get_active_adapters() == ["diffattn"]
    drawn = by_load.run()
    assert torch.equal(drawn, by_hand.run()) and not torch.allclose(drawn, plain, atol=1e-3)
    diffattn.restore(by_load.pipe)
    assert by_load.pipe.get_list_adapters() == {}
    assert torch.equal(by_load.run(), plain)


def test_half_precision_keeps_the_precision_that_diffusers_gives(tmp_path: Path) -> None:
    write_lora("Flux", tmp_path)
    by_hand, by_load = (BUILDERS["Flux"]() for _ in range(2))
    pipe = pipeline_around(by_hand).to(torch.bfloat16)
    pipe.load_lora_weights(tmp_path, weight_name=LORA_NAME, adapter_name="diffattn")
    diffattn.load(by_load.model.to(torch.bfloat16), tmp_path)
    wanted, found = by_hand.model.state_dict(), by_load.model.state_dict()
    assert wanted.keys() == found.keys()
    assert all(wanted[name].dtype == found[name].dtype and torch.equal(wanted[name], found[name]) for name in wanted)


# peft says at each layer of torchao that it cannot be merged
@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated:UserWarning")
@pytest.mark.parametrize("family", ["Flux", "SD3", "SD1.5"])
def test_a_lora_on_a_quantized_base(family: str, tmp_path: Path) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    exact = write_lora(family, tmp_path)
    by_hand, by_load = (BUILDERS[family]() for _ in range(2))
    for tiny in (by_hand, by_load):
        torchao.quantize_(tiny.model, torchao.Int8WeightOnlyConfig())
    plain, names = output(by_load), list(by_load.model.state_dict())
    pipe = pipeline_around(by_hand)
    pipe.load_lora_weights(tmp_path, weight_name=LORA_NAME)
    diffattn.apply(pipe, "clear", radius=2)
    handle = diffattn.load(pipeline_around(by_load), tmp_path)
    found = output(by_load)
    assert torch.equal(found, output(by_hand))
    assert not torch.equal(found, exact), "quantization changes nothing"
    assert (found - exact).norm() < 0.2 * (exact - plain).norm()
    handle.restore()
    assert torch.equal(output(by_load), plain)
    assert list(by_load.model.state_dict()) == names


@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated:UserWarning")
def test_a_lora_trained_on_a_quantized_base_is_saved(tmp_path: Path) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    tinies = [BUILDERS["Flux"]() for _ in range(2)]
    for tiny in tinies:
        torchao.quantize_(tiny.model, torchao.Int8WeightOnlyConfig())
    diffattn.apply(tinies[0].model, "clear", radius=2)
    add_lora(tinies[0].model)
    assert diffattn.save(tinies[0].model, tmp_path).name == LORA_NAME
    diffattn.load(tinies[1].model, tmp_path)
    assert torch.equal(output(tinies[1]), output(tinies[0]))


def test_restore_takes_the_lora_away(tmp_path: Path) -> None:
    write_lora("SD3", tmp_path)
    tiny = sd3()
    tiny.model.pos_embed.requires_grad_(False)
    plain, before = output(tiny), state(tiny.model)
    modules = {name: type(module) for name, module in tiny.model.named_modules()}
    trained = {name: parameter.requires_grad for name, parameter in tiny.model.named_parameters()}
    handle = diffattn.load(tiny.model, tmp_path)
    assert not any(p.requires_grad for n, p in tiny.model.named_parameters() if "lora_" not in n)
    handle.restore()
    assert_same_state(tiny.model, before)
    assert torch.equal(output(tiny), plain)
    assert {name: type(module) for name, module in tiny.model.named_modules()} == modules
    assert {name: parameter.requires_grad for name, parameter in tiny.model.named_parameters()} == trained
    assert not getattr(tiny.model, "peft_config", None)


# peft says so at every second adapter
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
def test_another_lora_stays_as_it_was(tmp_path: Path) -> None:
    write_lora("Flux", tmp_path)
    tiny = flux()
    add_lora(tiny.model, "style", "transformer_blocks.0.attn.to_q|.*ff.*proj")
    styled, names = output(tiny), list(tiny.model.state_dict())
    with diffattn.load(tiny.model, tmp_path):
        alone = output(tiny)
        tiny.model.set_adapters(["diffattn", "style"])
        both = output(tiny)
        assert not torch.allclose(alone, both, atol=1e-3)
    assert torch.equal(output(tiny), styled)
    assert list(tiny.model.state_dict()) == names
    diffattn.load(tiny.model, tmp_path).restore()
    assert tiny.model.active_adapters() == ["style"]
    assert torch.equal(output(tiny), styled)


def test_loading_a_lora_again_and_after_it_was_taken_away(tmp_path: Path) -> None:
    wanted = write_lora("Flux", tmp_path)
    tiny = flux()
    plain, before = output(tiny), state(tiny.model)
    for _ in range(2):
        diffattn.load(tiny.model, tmp_path)
        assert torch.equal(output(tiny), wanted)
        assert list(tiny.model.peft_config) == ["diffattn"]
    tiny.model.unload_lora()
    diffattn.restore(tiny.model)
    assert_same_state(tiny.model, before)
    assert torch.equal(output(tiny), plain)


def test_a_fused_lora_is_taken_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_lora("Flux", tmp_path)
    tiny = flux()
    plain, names = output(tiny), list(tiny.model.state_dict())
    diffattn.load(tiny.model, tmp_path)
    tiny.model.fuse_lora()
    diffattn.restore(tiny.model)
    assert "was fused" in caplog.text
    assert list(tiny.model.state_dict()) == names
    torch.testing.assert_close(output(tiny), plain)


def test_a_lora_beside_weights_of_the_mechanism_and_of_the_model(tmp_path: Path) -> None:
    tiny, other = flux(), flux()
    handle = diffattn.apply(tiny.model, "clear", radius=2, down_factor=3)
    trained = "transformer_blocks.0.attn.to_q.bias"
    with torch.no_grad():
        for parameter in [*handle.parameters(), tiny.model.get_parameter(trained)]:
            parameter.copy_(torch.randn_like(parameter))
    add_lora(tiny.model)
    loras = [name for name, parameter in tiny.model.named_parameters() if ".lora_" in name]
    file = diffattn.save(tiny.model, tmp_path, include=[trained, *loras])
    assert sorted(path.name for path in tmp_path.iterdir()) == [FILE_NAME, CONFIG_NAME, LORA_NAME]
    assert sorted(load_file(file)) == sorted(
        [trained, *(f"{layer.name}.processor.spatial_weight" for layer in handle.layers)]
    )
    assert all(name.startswith("transformer.") and ".lora_" in name for name in load_file(tmp_path / LORA_NAME))
    plain, before = output(other), state(other.model)
    diffattn.load(other.model, tmp_path)
    assert torch.equal(output(other), output(tiny))
    again = diffattn.save(other.model, tmp_path / "again").parent
    for name in (FILE_NAME, LORA_NAME):
        first, second = load_file(tmp_path / name), load_file(again / name)
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
        assert Adapter.open(tmp_path / name).metadata == Adapter.open(again / name).metadata
    diffattn.restore(other.model)
    assert_same_state(other.model, before)
    assert torch.equal(output(other), plain)

    (tmp_path / CONFIG_NAME).unlink()
    diffattn.load(other.model, tmp_path)
    assert torch.equal(output(other), output(tiny))


def test_the_config_says_what_the_folder_is(tmp_path: Path) -> None:
    write_lora("Flux", tmp_path / "one", layers="transformer_blocks.*")
    said = json.loads((tmp_path / "one" / CONFIG_NAME).read_text())
    assert said == {
        "mechanism": diffattn.ClearAttention(radius=2).to_dict(),
        "layers": ["transformer_blocks.0.attn", "transformer_blocks.1.attn"],
        "model": "FluxTransformer2DModel",
        "base_model": "",
        "diffattn_version": said["diffattn_version"],
        "files": [LORA_NAME],
    }
    assert said["diffattn_version"]
    handle = diffattn.load(flux().model, tmp_path / "one", radius=3)
    assert [layer.name for layer in handle.layers] == said["layers"]
    assert handle.layers[0].mechanism == diffattn.ClearAttention(radius=3)


def test_a_loras_metadata_are_those_that_differ_from_pefts_defaults(tmp_path: Path) -> None:
    tiny = flux()
    diffattn.apply(tiny.model, "clear", radius=2)
    config = LoraConfig(r=8, lora_alpha=4, target_modules=["to_q"], use_rslora=True, init_lora_weights="gaussian")
    tiny.model.add_adapter(config)
    diffattn.save(tiny.model, tmp_path)
    [text] = [
        value for key, value in Adapter.open(tmp_path / LORA_NAME).metadata.items() if key == "lora_adapter_metadata"
    ]
    wanted = {"r": 8, "lora_alpha": 4, "target_modules": ["to_q"], "rank_pattern": {}, "use_rslora": True}
    assert json.loads(text) == {f"transformer.{key}": value for key, value in wanted.items()}


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-dev"),
        ("/home/me/hub/models--black-forest-labs--FLUX.1-dev/snapshots/3d/transformer", "black-forest-labs/FLUX.1-dev"),
        ("/home/me/models/flux", ""),
        ("models/flux/transformer", ""),
        ("", ""),
    ],
)  # fmt: skip
def test_the_base_model_is_a_hub_id_or_nothing(path: str, wanted: str) -> None:
    model = flux().model
    model.register_to_config(_name_or_path=path)
    assert base_model_of(model) == wanted


def test_a_folder_on_the_disk_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "flux").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    model = flux().model
    model.register_to_config(_name_or_path="models/flux")
    assert base_model_of(model) == ""


def damage(folder: Path, name: str) -> None:
    """Break a LoRA's folder in one way."""
    file, config = folder / LORA_NAME, folder / CONFIG_NAME
    tensors, said = load_file(file), json.loads(config.read_text())
    first = next(iter(tensors))
    changes: dict[str, Any] = {
        "cut": lambda: file.write_bytes(file.read_bytes()[:-100]),
        "gone": file.unlink,
        "half a pair": lambda: save_file({k: v for k, v in tensors.items() if k != first}, file),
        "shape": lambda: save_file({**tensors, first: torch.zeros(2, 7)}, file),
        "layer": lambda: save_file({**tensors, "transformer.nowhere.lora_A.weight": torch.zeros(2, 7)}, file),
        "empty": lambda: save_file({}, file),
        "no config": config.unlink,
        "no json": lambda: config.write_text(config.read_text()[:-5]),
        "no mechanism": lambda: config.write_text(json.dumps({**said, "mechanism": None})),
        "leads away": lambda: config.write_text(json.dumps({**said, "files": [f"../{LORA_NAME}"]})),
        "metadata": lambda: save_file(tensors, file, {"lora_adapter_metadata": "{"}),
        "metadata of another rank": lambda: save_file(
            tensors, file, {"lora_adapter_metadata": '{"transformer.r": "two", "transformer.lora_alpha": 1}'}
        ),
        "metadata of another kind": lambda: save_file(tensors, file, {"lora_adapter_metadata": "[3]"}),
        "int8": lambda: save_file({**tensors, first: tensors[first].to(torch.int8)}, file),
        "NaN": lambda: save_file({**tensors, first: tensors[first] * float("nan")}, file),
        "layers": lambda: config.write_text(json.dumps({**said, "layers": [3]})),
        "option": lambda: config.write_text(json.dumps({**said, "mechanism": {"type": "clear", "radius": "2"}})),
        "unknown mechanism": lambda: config.write_text(json.dumps({**said, "mechanism": {"type": "nothing"}})),
        "weights of the mechanism": lambda: config.write_text(
            json.dumps({**said, "mechanism": {"type": "clear", "radius": 2, "down_factor": 3}})
        ),
    }
    changes[name]()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cut", rf"{LORA_NAME} is not a whole safetensors file"),
        ("gone", rf"has no file of its {CONFIG_NAME}, {LORA_NAME}; it has no safetensors file"),
        ("half a pair", r"1 missing: transformer\.\S+\.lora_"),
        ("shape", r"1 misshapen: transformer\.\S+ is \[2, 7\], expected \["),
        ("layer", r"1 unexpected: transformer\.nowhere\.lora_A\.weight"),
        ("empty", "holds no tensors"),
        ("no config", rf"is a LoRA, and no {CONFIG_NAME} beside it says its mechanism"),
        ("no json", rf"{CONFIG_NAME} is not valid JSON"),
        ("no mechanism", rf"{CONFIG_NAME} has no mechanism"),
        ("leads away", "must be names of files beside it"),
        ("unknown mechanism", "unknown mechanism 'nothing'"),
        ("metadata", rf"lora_adapter_metadata in the metadata of .*{LORA_NAME} is not valid JSON"),
        ("metadata of another rank", rf"{LORA_NAME} cannot be put on FluxTransformer2DModel"),
        ("metadata of another kind", rf"lora_adapter_metadata in the metadata of .*{LORA_NAME} must be an object"),
        ("int8", rf"expected weights of float16, .* in .*{LORA_NAME}; got I8 in transformer"),
        ("NaN", rf"expected finite weights in .*{LORA_NAME}; got NaN or infinity in transformer"),
        ("layers", rf"layers in .*{CONFIG_NAME} must be names, got \[3\]"),
        ("option", rf"the mechanism of {LORA_NAME}: clear: radius must be a positive number, got '2'"),
        ("weights of the mechanism", rf"{FILE_NAME} is missing beside it"),
    ],
)
def test_a_broken_lora_folder_changes_nothing(name: str, message: str, tmp_path: Path) -> None:
    write_lora("Flux", tmp_path)
    damage(tmp_path, name)
    model = flux().model
    before = state(model)
    with pytest.raises(ValueError, match=message):
        diffattn.load(model, tmp_path)
    assert_same_state(model, before)
    assert not hasattr(model, "_diffattn") and not hasattr(model, "peft_config")


def test_a_lora_of_another_model_is_refused(tmp_path: Path) -> None:
    write_lora("Flux", tmp_path)
    with pytest.raises(ValueError, match="adapter of FluxTransformer2DModel, but the target is SD3Transformer2DModel"):
        diffattn.load(sd3().model, tmp_path)
    small = flux(num_attention_heads=4, joint_attention_dim=12).model
    with pytest.raises(ValueError, match=rf"{LORA_NAME} does not fit this model\. \d+ misshapen"):
        diffattn.load(small, tmp_path)
    said = json.loads((tmp_path / CONFIG_NAME).read_text())
    kept = {"model": "PixArtTransformer2DModel", "layers": ["transformer_blocks.0.attn1"]}
    (tmp_path / CONFIG_NAME).write_text(json.dumps({**said, **kept}))
    with pytest.raises(ValueError, match="diffusers loads no LoRA into a PixArtTransformer2DModel"):
        diffattn.load(pixart().model, tmp_path)
    fused = flux().model
    fused.fuse_qkv_projections()
    (tmp_path / CONFIG_NAME).write_text(json.dumps(said))
    with pytest.raises(ValueError, match="unfuse_qkv_projections"):
        diffattn.load(fused, tmp_path)
    assert not hasattr(fused, "peft_config")


def test_a_lora_that_diffusers_cannot_put_on_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lora("Flux", tmp_path)
    model = flux().model
    before = state(model)
    plain = model.load_lora_adapter

    def fails(*args: Any, **kwargs: Any) -> None:
        plain(*args, **kwargs)
        raise RuntimeError("no memory")

    monkeypatch.setattr(model, "load_lora_adapter", fails)
    with pytest.raises(RuntimeError, match="no memory"):
        diffattn.load(model, tmp_path)
    assert_same_state(model, before)
    assert not hasattr(model, "_diffattn") and not getattr(model, "peft_config", None)


def test_what_save_refuses(tmp_path: Path) -> None:
    model = flux().model
    diffattn.apply(model, "clear", radius=2)
    diffattn.save(model, tmp_path / "plain")
    add_lora(model, "one")
    with pytest.raises(ValueError, match=rf"{FILE_NAME} belongs to another adapter"):
        diffattn.save(model, tmp_path / "plain")
    assert not (tmp_path / "plain" / LORA_NAME).exists()
    with pytest.warns(UserWarning, match="Already found a `peft_config`"):
        add_lora(model, "two")
    with pytest.raises(ValueError, match="carries 2 LoRAs"):
        diffattn.save(model, tmp_path / "two")
    assert not (tmp_path / "two").exists()


def test_save_pretrained_warns_of_a_lora(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_lora("Flux", tmp_path)
    model = flux().model
    diffattn.load(model, tmp_path)
    model.save_pretrained(tmp_path / "model")
    assert "diffattn.save writes the adapter alone" in caplog.text
    diffattn.restore(model)
    assert "save_pretrained" not in vars(model)


class Uploads:
    """Stands for `HfApi`: notes what would have gone to the hub."""

    def __init__(self) -> None:
        self.repos: list[str] = []
        self.files: dict[str, list[str]] = {}

    def __call__(self) -> "Uploads":
        return self

    def create_repo(self, repo_id: str, exist_ok: bool = False) -> Any:
        assert exist_ok
        self.repos.append(repo_id)
        return huggingface_hub.RepoUrl(f"https://huggingface.co/me/{repo_id.rpartition('/')[2]}")

    def upload_folder(self, *, repo_id: str, folder_path: Path, allow_patterns: list[str]) -> None:
        names = [path.relative_to(folder_path).as_posix() for path in Path(folder_path).rglob("*") if path.is_file()]
        self.files[repo_id] = sorted(filter_repo_objects(names, allow_patterns=allow_patterns))


def test_what_goes_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploads = Uploads()
    monkeypatch.setattr(huggingface_hub, "HfApi", uploads)
    model = flux().model
    diffattn.apply(model, "clear", radius=2)
    add_lora(model)
    folder = tmp_path / "windows"
    diffattn.save(model, folder)
    assert not uploads.files
    (folder / "private.txt").write_text("notes")
    (folder / "README.md").write_text("a card")
    diffattn.save(model, folder, push_to_hub=True)
    diffattn.save(model, folder, push_to_hub=True, repo_id="me/other")
    assert uploads.repos == ["windows", "me/other"]
    assert uploads.files == {repo: ["README.md", CONFIG_NAME, LORA_NAME] for repo in ("me/windows", "me/other")}


@pytest.mark.parametrize("config", [True, False])
def test_a_repository_is_loaded_by_its_config(config: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def download(repo: str, name: str, **hub: Any) -> str:
        assert repo == "me/windows" and hub["revision"] == "v1"
        asked.append(name)
        if not (tmp_path / name).is_file():
            raise EntryNotFoundError(f"no {name}")
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    tiny = flux()
    if config:
        wanted = write_lora("Flux", tmp_path)
    else:
        other = flux()
        diffattn.apply(other.model, "clear", radius=2)
        wanted = output(other)
        diffattn.save(other.model, tmp_path)
        (tmp_path / CONFIG_NAME).unlink()
    diffattn.load(tiny.model, "me/windows", revision="v1")
    assert torch.equal(output(tiny), wanted)
    assert asked == [CONFIG_NAME, LORA_NAME if config else FILE_NAME]
