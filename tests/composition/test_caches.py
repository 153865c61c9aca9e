"""Caches of diffusers: what they keep is what the swapped attention computed, and they skip what they would skip."""

import re
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from compositions import VISIBLE, Composition, Count, prove
from diffusers import FasterCacheConfig, FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from diffusers.hooks import MagCacheConfig, SeaCacheConfig, TaylorSeerCacheConfig
from hand_masks import RADIUS, TOLERANCE, HandMask, error
from tiny_pipelines import PIPELINES, TinyPipeline
from torch import Tensor

import diffattn

STEPS = 5
ANY_STEP = -1, 1001
AFTER_THE_FIRST = -1, 990
"""Timesteps at which attention may be skipped; a run starts at 999 or 1000."""

in_both_orders = pytest.mark.parametrize("order", ["before", "after"])
families = pytest.mark.parametrize("family", ["Flux", "Wan", "CogVideoX"])


def cached(family: str, config: Callable[[TinyPipeline], Any]) -> Callable[[], Composition]:
    """The cache's work is counted by what it skips: blocks that were called and whose attention was not computed."""

    def build() -> Composition:
        case = PIPELINES[family](steps=STEPS)
        (model,) = case.models
        called, computed = Count(), Count()
        for name in layers_of(case):
            called.watch(model.get_submodule(name.rpartition(".")[0]))
            computed.watch(model.get_submodule(f"{name}.to_q"))

        def skipped() -> int:
            assert computed() > 0 or called() == 0
            return called() - computed()

        return case.composition(on=lambda: model.enable_cache(config(case)), off=model.disable_cache, used=skipped)

    return build


def layers_of(case: TinyPipeline) -> list[str]:
    """Names of the layers that are to be swapped, by the layouts made by hand."""
    (model,), (layouts,) = case.models, case.layouts.values()
    return [name for name, _ in model.named_modules() if any(re.fullmatch(pattern, name) for pattern in layouts)]


@pytest.mark.cell("FirstBlockCache", outcome="works")
@families
@in_both_orders
def test_first_block_cache(family: str, order: str, caplog: pytest.LogCaptureFixture) -> None:
    """At this threshold some steps are computed after the first, and some are not."""
    prove(cached(family, lambda case: FirstBlockCacheConfig(threshold=0.9)), order, caplog)


@pytest.mark.cell("Pyramid Attention Broadcast", outcome="works")
@families
@in_both_orders
def test_pyramid_attention_broadcast(family: str, order: str, caplog: pytest.LogCaptureFixture) -> None:
    """Keeps the output of the attention modules themselves."""
    prove(cached(family, every_second_attention), order, caplog)


def every_second_attention(case: TinyPipeline) -> PyramidAttentionBroadcastConfig:
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=ANY_STEP,
        current_timestep_callback=lambda: case.pipe.current_timestep,
    )


@pytest.mark.parametrize(
    ("config", "last_step_before"),
    [
        pytest.param(
            every_second_attention, 2, marks=pytest.mark.cell("Pyramid Attention Broadcast", outcome="works"), id="PAB"
        ),
        pytest.param(
            lambda case: FirstBlockCacheConfig(threshold=0.9),
            1,
            marks=pytest.mark.cell("FirstBlockCache", outcome="works"),
            id="FirstBlockCache",
        ),
    ],
)
@pytest.mark.parametrize("family", ["Flux"])
def test_a_swap_in_the_middle_of_a_run_when_the_next_step_is_skipped(
    family: str, config: Callable[[TinyPipeline], Any], last_step_before: int, caplog: pytest.LogCaptureFixture
) -> None:
    """A forward in which no layer, or not every layer, comes to its attention says nothing about the swap."""

    def run(start: Callable[[TinyPipeline], object]) -> Tensor:
        case = PIPELINES[family](steps=STEPS)
        case.models[0].enable_cache(config(case))

        def after_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if step == last_step_before:
                start(case)
            return tensors

        case.call["callback_on_step_end"] = after_step
        return case.run()

    with ExitStack() as stack:
        want = run(
            lambda case: stack.enter_context(HandMask(case.models[0], case.layouts["transformer"], radius=RADIUS))
        )
    got = run(lambda case: diffattn.apply(case.pipe, "clear", radius=RADIUS))
    dense = run(lambda case: None)
    assert error(got, want) < TOLERANCE
    assert error(got, dense) > VISIBLE
    assert not [record for record in caplog.records if "not used" in record.getMessage()]


@pytest.mark.cell("FasterCache", outcome="works")
@pytest.mark.parametrize("family", ["Flux", "CogVideoX"])
@in_both_orders
# its own, for the low and high frequencies
@pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning")
def test_faster_cache(family: str, order: str, caplog: pytest.LogCaptureFixture) -> None:
    """Of CogVideoX it also skips the unguided half of the batch; Wan, which has two calls a step, it cannot do."""

    def config(case: TinyPipeline) -> FasterCacheConfig:
        return FasterCacheConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=AFTER_THE_FIRST,
            spatial_attention_block_identifiers=(r"transformer_blocks\.\d+\.attn",),
            unconditional_batch_skip_range=2,
            unconditional_batch_timestep_skip_range=ANY_STEP,
            attention_weight_callback=lambda _: 0.5,
            tensor_format="BFCHW",
            is_guidance_distilled=family == "Flux",
            current_timestep_callback=lambda: case.pipe.current_timestep,
        )

    prove(cached(family, config), order, caplog)


@pytest.mark.cell("MagCache", outcome="works")
@families
@in_both_orders
def test_mag_cache(family: str, order: str, caplog: pytest.LogCaptureFixture) -> None:
    def config(case: TinyPipeline) -> MagCacheConfig:
        ratios = torch.full((STEPS,), 0.9)
        return MagCacheConfig(threshold=1.0, max_skip_steps=1, num_inference_steps=STEPS, mag_ratios=ratios)

    prove(cached(family, config), order, caplog)


@pytest.mark.cell("TaylorSeer", outcome="works")
@families
@in_both_orders
def test_taylor_seer(family: str, order: str, caplog: pytest.LogCaptureFixture) -> None:
    """Extrapolates the output of the attention modules themselves."""

    def config(case: TinyPipeline) -> TaylorSeerCacheConfig:
        (layouts,) = case.layouts.values()
        return TaylorSeerCacheConfig(
            cache_interval=2,
            disable_cache_before_step=2,
            taylor_factors_dtype=torch.float32,
            cache_identifiers=list(layouts),
        )

    prove(cached(family, config), order, caplog)


@pytest.mark.cell("SeaCache", outcome="works")
@pytest.mark.parametrize("family", ["Wan"])
@in_both_orders
def test_sea_cache(family: str, order: str, caplog: pytest.LogCaptureFixture) -> None:
    prove(cached(family, lambda case: SeaCacheConfig(threshold=1.0, max_consecutive_cached=1)), order, caplog)
