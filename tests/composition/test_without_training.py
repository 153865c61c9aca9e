"""`routing` and windows with `pool` beside the other features, against their references in the model's own layers."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compiling import Graphs, compile_blocks
from compositions import VISIBLE, Composition, prove
from diffusers import FirstBlockCacheConfig, TaylorSeerCacheConfig
from hand_masks import TOLERANCE, HandReference, error, under_masks
from models import BUILDERS
from peft import LoraConfig
from tiny_pipelines import PIPELINES, TinyPipeline

import diffattn
from diffattn import (
    ClearAttention,
    MultiAxisAttention,
    PerHeadAttention,
    RoutingAttention,
    ShiftedWindowAttention,
)
from diffattn.mechanisms.base import Mechanism

ROUTING = RoutingAttention(top_k=1, tile=(1, 2, 2), pool=(1, 2, 2))
POOL = ClearAttention(radius=1, pool=(1, 2, 2))
KINDS = ShiftedWindowAttention(window=(1, 2, 2))
MEANS = MultiAxisAttention(window=(1, 2, 2), pool=(1, 2, 2))
SEVERAL = PerHeadAttention(mechanisms=(ClearAttention(radius=2), ROUTING))
STEPS = 5

in_both_orders = pytest.mark.parametrize("order", ["before", "after"])
families = pytest.mark.parametrize("family", ["Flux", "Wan"])
models = pytest.mark.parametrize("family", ["Flux", "Wan", "LTX-2", "HunyuanVideo-1.5", "Wan-VACE"])
mechanisms = pytest.mark.parametrize(
    "mechanism",
    [
        pytest.param(replace(ROUTING, order="content"), id="routing"),
        pytest.param(POOL, id="pool"),
    ],
)


def cell(feature: str, note: str = "") -> Any:
    return pytest.mark.cell(f"`routing` and `pool=`: {feature}", outcome="works", note=note)


@cell("LoRA")
@mechanisms
@models
@in_both_orders
# peft says so at every second adapter
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
def test_lora(family: str, mechanism: Mechanism, order: str, caplog: pytest.LogCaptureFixture) -> None:
    def build() -> Composition:
        tiny = BUILDERS[family]()

        @torch.no_grad()
        def add() -> None:
            tiny.model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"]), "one")
            generator = torch.Generator().manual_seed(1)
            for key, parameter in tiny.model.named_parameters():
                if ".one." in key:
                    parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))

        return Composition(
            target=tiny.model,
            run=torch.no_grad()(tiny.run),
            layouts=((tiny.model, tiny.spatial),),
            on=add,
            off=lambda: tiny.model.delete_adapters("one"),
            mechanism=mechanism,
        )

    prove(build, order, caplog)


def first_block(case: TinyPipeline) -> Any:
    return FirstBlockCacheConfig(threshold=0.9)


def taylor(case: TinyPipeline) -> Any:
    (layouts,) = case.layouts.values()
    return TaylorSeerCacheConfig(
        cache_interval=2,
        disable_cache_before_step=2,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=list(layouts),
    )


@mechanisms
@families
@in_both_orders
@pytest.mark.parametrize(
    "config",
    [
        pytest.param(first_block, marks=cell("FirstBlockCache"), id="FirstBlockCache"),
        pytest.param(taylor, marks=cell("TaylorSeer"), id="TaylorSeer"),
    ],
)
def test_caches(
    family: str,
    mechanism: Mechanism,
    order: str,
    config: Callable[[TinyPipeline], Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    def build() -> Composition:
        case = PIPELINES[family](steps=STEPS)
        (model,) = case.models
        return case.composition(lambda: model.enable_cache(config(case)), model.disable_cache, mechanism=mechanism)

    prove(build, order, caplog)


@cell("model CPU offload")
@mechanisms
@families
@in_both_orders
def test_offload(family: str, mechanism: Mechanism, order: str, caplog: pytest.LogCaptureFixture) -> None:
    def build() -> Composition:
        case = PIPELINES[family](steps=2)
        return case.composition(
            on=lambda: case.pipe.enable_model_cpu_offload(device="cpu"),
            off=case.pipe.remove_all_hooks,
            used=lambda: sum(hasattr(model, "_hf_hook") for model in case.models) and next(runs),
            mechanism=mechanism,
        )

    runs = iter(range(10**6))
    prove(build, order, caplog)


@cell("torch.compile of blocks", note="`fullgraph=True`")
@pytest.mark.compile
@torch.no_grad()
@mechanisms
@models
def test_compiled_blocks(family: str, mechanism: Mechanism) -> None:
    torch._dynamo.reset()
    tiny, graphs = BUILDERS[family](), Graphs()
    own = tiny.run()
    want = under_masks(tiny.run, (tiny.model, tiny.spatial), mode=HandReference, mechanism=mechanism)
    assert error(want, own) > VISIBLE
    with diffattn.apply(tiny.model, mechanism):
        compile_blocks(tiny.model, graphs)
        for _ in range(2):
            assert error(tiny.run(), want) < TOLERANCE
        assert graphs.count > 0
    assert torch.equal(tiny.run(), own)
    torch._dynamo.reset()


@pytest.mark.cell("heads of several kinds: torch.compile of blocks", outcome="works", note="`fullgraph=True`")
@pytest.mark.compile
@torch.no_grad()
@pytest.mark.parametrize("mechanism", [KINDS, MEANS, SEVERAL], ids=["shifted", "means", "per head"])
@families
def test_heads_of_several_kinds_compile(family: str, mechanism: Mechanism) -> None:
    test_compiled_blocks(family, mechanism)


@cell("adapter files")
@models
@mechanisms
def test_adapter_files(family: str, mechanism: Mechanism, tmp_path: Path) -> None:
    """Changed layers under a mechanism go into a file, and come with it into a fresh model."""
    tiny, fresh = BUILDERS[family](), BUILDERS[family]()
    with torch.no_grad():
        diffattn.apply(tiny.model, mechanism)
        projections = {n: p for n, p in tiny.model.named_parameters() if re.search(r"\.attn1?\.to_[qkv]\.weight", n)}
        for parameter in projections.values():
            parameter.mul_(1.1)
        want = tiny.run()
        diffattn.adapters.save(tiny.model, tmp_path, include=projections)
        assert diffattn.load(fresh.model, tmp_path).layers[0].mechanism == mechanism
        assert error(fresh.run(), want) < TOLERANCE
