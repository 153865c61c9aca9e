"""LoRA through peft: its layers lie inside the projections, the swap lies behind them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compositions import Composition, prove
from models import BUILDERS, Tiny
from peft import LoraConfig
from torch import Tensor

in_both_orders = pytest.mark.parametrize("order", ["before", "after"])
families = pytest.mark.parametrize("family", ["Flux", "SD1.5", "Wan", "LTX-2", "HunyuanVideo-1.5", "Wan-VACE"])
# peft says so at every second adapter
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")

FILE = "lora.safetensors"


def add_adapter(tiny: Tiny, name: str) -> None:
    """A random adapter on the projections of all attention layers."""
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    tiny.model.add_adapter(config, name)
    generator = torch.Generator().manual_seed(len(name) + ord(name[0]))
    with torch.no_grad():
        for key, parameter in tiny.model.named_parameters():
            if f".{name}." in key:
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))


def output_of(tiny: Tiny) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.no_grad():
            return tiny.run()

    return run


@pytest.mark.cell("LoRA, one adapter", outcome="works")
@families
@in_both_orders
def test_one_adapter(family: str, order: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Loaded from a file, and deleted."""
    source = BUILDERS[family]()
    add_adapter(source, "one")
    source.model.save_lora_adapter(tmp_path, adapter_name="one", weight_name=FILE)

    def build() -> Composition:
        tiny = BUILDERS[family]()

        def load() -> None:
            tiny.model.load_lora_adapter(tmp_path, weight_name=FILE, prefix=None, adapter_name="one")

        return Composition(
            target=tiny.model,
            run=output_of(tiny),
            layouts=((tiny.model, tiny.spatial),),
            on=load,
            off=lambda: tiny.model.delete_adapters("one"),
        )

    prove(build, order, caplog)


@pytest.mark.cell("LoRA, two adapters", outcome="works")
@families
@in_both_orders
def test_two_adapters(family: str, order: str, caplog: pytest.LogCaptureFixture) -> None:
    """A second one beside the first, both weighted, and the first alone again."""

    def build() -> Composition:
        tiny = BUILDERS[family]()
        for name in ("one", "two"):
            add_adapter(tiny, name)
        tiny.model.set_adapters("one")
        return Composition(
            target=tiny.model,
            run=output_of(tiny),
            layouts=((tiny.model, tiny.spatial),),
            on=lambda: tiny.model.set_adapters(["one", "two"], [0.8, -1.3]),
            off=lambda: tiny.model.set_adapters("one"),
        )

    prove(build, order, caplog)


@pytest.mark.cell("LoRA, fused", outcome="works")
@families
@in_both_orders
def test_fused_adapters(family: str, order: str, caplog: pytest.LogCaptureFixture) -> None:
    """Added to the weights, and subtracted again."""

    def build() -> Composition:
        tiny = BUILDERS[family]()

        def fuse() -> None:
            add_adapter(tiny, "one")
            tiny.model.fuse_lora(lora_scale=0.7)

        def unfuse() -> None:
            tiny.model.unfuse_lora()
            tiny.model.delete_adapters("one")

        return Composition(
            target=tiny.model,
            run=output_of(tiny),
            layouts=((tiny.model, tiny.spatial),),
            on=fuse,
            off=unfuse,
            exact=False,
        )

    prove(build, order, caplog)
