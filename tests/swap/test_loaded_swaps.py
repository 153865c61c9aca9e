"""A swap with loaded weights among other swaps, new processors, copies, and in memory."""

import copy
import gc
import logging
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from models import Tiny, flux
from peft import LoraConfig
from torch import nn

import diffattn


def official(folder: Path) -> None:
    """Weights in place of the model's own."""
    tiny = flux()
    diffattn.apply(tiny.model, "clear", radius=2)
    trained = {name: parameter for name, parameter in tiny.model.named_parameters() if ".attn.to_" in name}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) / 10)
    diffattn.save(tiny.model, folder, include=trained)


def lora(folder: Path) -> None:
    """Weights beside the model's own."""
    tiny = flux()
    diffattn.apply(tiny.model, "clear", radius=2)
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    tiny.model.add_adapter(config, "default")
    diffattn.save(tiny.model, folder)


KINDS = [official, lora]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    write: Callable[[Path], None] = request.param
    write(tmp_path)
    return tmp_path


@pytest.fixture
def tiny() -> Tiny:
    return flux()


@torch.no_grad()
def test_new_processors_keep_what_was_loaded(folder: Path, tiny: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    own = tiny.run()
    diffattn.load(tiny.model, folder)
    want = tiny.run()
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="diffattn"):
        tiny.model.set_attn_processor(FluxAttnProcessor())
        assert torch.equal(tiny.run(), want)
    assert "apply again" not in caplog.text and "it is swapped too" in caplog.text
    diffattn.restore(tiny.model)
    assert torch.equal(tiny.run(), own)


@torch.no_grad()
def test_another_apply_says_that_weights_go(folder: Path, tiny: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    own = tiny.run()
    diffattn.load(tiny.model, folder)
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="diffattn"):
        diffattn.apply(tiny.model, "softmax")
    assert (
        caplog.text.count("the weights that were loaded for clear(radius=2) on FluxTransformer2DModel are taken") == 1
    )
    assert torch.equal(tiny.run(), own)


@torch.no_grad()
def test_a_block_inside_brings_loaded_weights_back(folder: Path, tiny: Tiny) -> None:
    own = tiny.run()
    with diffattn.load(tiny.model, folder):
        want = tiny.run()
        for _ in range(2):
            with diffattn.apply(tiny.model, "softmax"):
                assert torch.equal(tiny.run(), own)
            assert torch.equal(tiny.run(), want)
    assert torch.equal(tiny.run(), own)
    assert not torch.equal(want, own)


@torch.no_grad()
def test_a_copy_has_weights_of_its_own(folder: Path, tiny: Tiny) -> None:
    own = tiny.run()
    diffattn.load(tiny.model, folder)
    want = tiny.run()
    other = copy.deepcopy(tiny.model)
    assert torch.equal(tiny.run(other), want)
    diffattn.restore(other)
    assert torch.equal(tiny.run(other), own) and torch.equal(tiny.run(), want)
    diffattn.restore(tiny.model)
    assert torch.equal(tiny.run(), own)


def test_a_model_with_loaded_weights_is_freed_with_its_last_reference(tmp_path: Path, tiny: Tiny) -> None:
    """A LoRA's layers of peft are in cycles of their own."""
    official(tmp_path)
    gc.collect()
    gc.disable()
    try:
        diffattn.load(tiny.model, tmp_path)
        tiny.run()
        gone = weakref.ref(tiny.model)
        tiny.model = nn.Identity()
        assert gone() is None
    finally:
        gc.enable()
