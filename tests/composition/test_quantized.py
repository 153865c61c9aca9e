"""Quantized models: the projections are quantized, what they give to attention is not."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from compositions import VISIBLE, Count
from hand_masks import RADIUS, TOLERANCE, error, under_masks
from models import BUILDERS, Tiny
from safetensors.torch import save_file
from torch import nn

import diffattn
from diffattn.adapters import expected_parameters
from diffattn.swap.plan import plan_all, resolve


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"needs the package {package}")


needs_accelerator = pytest.mark.skipif(
    not torch.accelerator.is_available(), reason="diffusers quantizes by bitsandbytes on an accelerator only"
)


def projections(model: nn.Module) -> list[nn.Module]:
    """Queries, keys, values and outputs of all attention layers."""
    ends = (".to_q", ".to_k", ".to_v", ".to_out.0")
    return [module for name, module in model.named_modules() if name.endswith(ends)]


def loaded(tiny: Tiny, folder: Path, **options: Any) -> Tiny:
    """The same model from its files, quantized on the way."""
    tiny.model.save_pretrained(folder)
    model = type(tiny.model).from_pretrained(folder, torch_dtype=torch.float32, **options)
    device = model.device
    inputs = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in tiny.inputs.items()}
    return Tiny(model, inputs, tiny.spatial)


@torch.no_grad()
def check(family: str, tiny: Tiny, is_quantized: Callable[[nn.Module], bool]) -> None:
    """A quantized model, swapped: right twice, and undone to the last bit."""
    assert projections(tiny.model) and all(is_quantized(module) for module in projections(tiny.model))
    used = Count()
    used.watch(*projections(tiny.model))
    exact, own = BUILDERS[family]().run(), tiny.run()
    assert error(own.cpu(), exact) > VISIBLE, "quantization changes nothing"
    want = under_masks(tiny.run, (tiny.model, tiny.spatial))
    assert error(want, own) > VISIBLE
    with diffattn.apply(tiny.model, "clear", radius=RADIUS):
        for _ in range(2):
            before = used()
            assert error(tiny.run(), want) < TOLERANCE
            assert used() > before
    assert torch.equal(tiny.run(), own)


def is_int8(module: nn.Module) -> bool:
    return type(module.weight).__name__ == "Int8Tensor"


torchao_families = pytest.mark.parametrize(
    "family", ["Flux", "SD3", "Wan", "SD1.5", "LTX-2", "HunyuanVideo-1.5", "Wan-VACE"]
)


@pytest.mark.cell("Quantized: torchao int8", outcome="works")
@needs("torchao")
@torchao_families
def test_torchao_model_swapped(family: str, tmp_path: Path) -> None:
    from torchao.quantization import Int8WeightOnlyConfig

    config = diffusers.TorchAoConfig(Int8WeightOnlyConfig())
    check(family, loaded(BUILDERS[family](), tmp_path, quantization_config=config), is_int8)


@torch.no_grad()
@pytest.mark.cell("Quantized: torchao int8", outcome="works")
@needs("torchao")
@torchao_families
def test_swapped_model_quantized_by_torchao(family: str) -> None:
    """torchao quantizes a model where it stands."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    tiny = BUILDERS[family]()
    handle = diffattn.apply(tiny.model, "clear", radius=RADIUS)
    exact = tiny.run()
    quantize_(tiny.model, Int8WeightOnlyConfig())
    got = [tiny.run() for _ in range(2)]
    assert all(is_int8(module) for module in projections(tiny.model))
    assert error(got[0], exact) > VISIBLE, "quantization changes nothing"
    handle.restore()
    own, want = tiny.run(), under_masks(tiny.run, (tiny.model, tiny.spatial))
    assert error(want, own) > VISIBLE
    assert all(error(output, want) < TOLERANCE for output in got)
    other = BUILDERS[family]()
    quantize_(other.model, Int8WeightOnlyConfig())
    assert torch.equal(own, other.run())


@torch.no_grad()
@pytest.mark.cell("Trained weights on a quantized model", outcome="refused", note="load them before quantizing")
@needs("torchao")
@pytest.mark.parametrize("family", ["Flux"])
def test_weights_that_replace_quantized_ones_are_refused(family: str, tmp_path: Path) -> None:
    """Each of the two is possible alone: the file fits the model, and the model can be swapped."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    tiny = BUILDERS[family]()
    [swap] = plan_all(tiny.model, resolve("clear", radius=RADIUS))
    save_file(expected_parameters(swap, None), tmp_path / f"clear_local_{RADIUS}.safetensors")
    diffattn.load(tiny.model, tmp_path).restore()
    quantize_(tiny.model, Int8WeightOnlyConfig())
    own = tiny.run()
    with pytest.raises(ValueError, match="is quantized .* load the adapter before quantizing"):
        diffattn.load(tiny.model, tmp_path)
    assert torch.equal(tiny.run(), own)
    diffattn.apply(tiny.model, "clear", radius=RADIUS)


def write_gguf(model: nn.Module, file: Path) -> None:
    """All parameters under their own names; matrices as Q8_0, whose blocks are 32 numbers of a row."""
    import gguf

    kind = gguf.GGMLQuantizationType.Q8_0
    writer = gguf.GGUFWriter(file, "flux")
    for name, value in model.state_dict().items():
        if value.ndim == 2 and value.shape[1] % 32 == 0:
            writer.add_tensor(name, gguf.quants.quantize(value.numpy(), kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.cell(
    "Quantized: GGUF", outcome="works", note="Q8_0; diffusers quantizes while it loads, so the swap comes after"
)
@needs("gguf")
@pytest.mark.parametrize("family", ["Flux"])
def test_gguf(family: str, tmp_path: Path) -> None:
    tiny = BUILDERS[family]()
    tiny.model.save_config(tmp_path)
    write_gguf(tiny.model, tmp_path / "model.gguf")
    tiny.model = type(tiny.model).from_single_file(
        tmp_path / "model.gguf",
        config=str(tmp_path),
        quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32),
        torch_dtype=torch.float32,
    )
    check(family, tiny, lambda module: type(module).__name__ == "GGUFLinear")


@pytest.mark.cell("Quantized: bitsandbytes", outcome="works")
@needs("bitsandbytes")
@needs_accelerator
@pytest.mark.parametrize("family", ["Flux", "Wan"])
def test_bitsandbytes(family: str, tmp_path: Path) -> None:
    config = diffusers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    tiny = loaded(BUILDERS[family](), tmp_path, quantization_config=config)
    check(family, tiny, lambda module: type(module).__name__ == "Linear4bit")
