"""Modular pipelines: `apply` takes one as it takes any other; and the guiders that come with them."""

from collections.abc import Callable
from typing import Any

import diffusers
import models
import pytest
import torch
from compositions import VISIBLE, Composition, prove
from diffusers.guiders import PerturbedAttentionGuidance, SkipLayerGuidance, SmoothedEnergyGuidance
from diffusers.hooks import LayerSkipConfig, apply_layer_skip
from diffusers.hooks.smoothed_energy_guidance_utils import SmoothedEnergyGuidanceConfig
from diffusers.modular_pipelines.flux.modular_blocks_flux import FluxCoreDenoiseStep
from diffusers.modular_pipelines.qwenimage.modular_blocks_qwenimage import QwenImageCoreDenoiseStep
from diffusers.modular_pipelines.stable_diffusion_xl.modular_blocks_stable_diffusion_xl import (
    StableDiffusionXLCoreDenoiseStep,
)
from diffusers.modular_pipelines.wan.modular_blocks_wan import WanCoreDenoiseStep
from diffusers.modular_pipelines.wan.modular_blocks_wan22 import Wan22CoreDenoiseStep
from hand_masks import RADIUS, error
from models import TEXT, Tokens
from tiny_pipelines import TinyPipeline, flux, flux_call, wan
from torch import Tensor

import diffattn
from diffattn.swap.calls.frames import find

in_both_orders = pytest.mark.parametrize("order", ["before", "after"])


class ModularTiny(TinyPipeline):
    """The blocks from embeddings to latents."""

    @torch.no_grad()
    def run(self) -> Tensor:
        output = self.pipe(**self.call, generator=torch.Generator().manual_seed(0), output="latents")
        return output.float().cpu().flatten()


def modular(blocks: Any, call: dict[str, Any], layouts: dict[str, Any], **parts: Any) -> ModularTiny:
    pipe = blocks.init_pipeline()
    pipe.update_components(**parts)
    return ModularTiny(pipe, call, layouts)


def modular_flux() -> ModularTiny:
    """4 x 6 tokens: without a VAE the blocks take its factor for 8."""
    case = flux()
    call = {**flux_call(), "height": 64, "width": 96}
    return modular(
        FluxCoreDenoiseStep(), call, case.layouts, transformer=case.pipe.transformer, scheduler=case.pipe.scheduler
    )


def wan_parts(case: TinyPipeline) -> dict[str, Any]:
    return {"transformer": case.pipe.transformer, "scheduler": case.pipe.scheduler}


def modular_wan(steps: int = 3) -> ModularTiny:
    case = wan(steps)
    call = {**case.call, "latents": models.draw(1, 4, 3, 8, 10)}
    return modular(WanCoreDenoiseStep(), call, case.layouts, **wan_parts(case))


def modular_wan22() -> ModularTiny:
    case = wan(4)
    call = {**case.call, "latents": models.draw(1, 4, 3, 8, 10)}
    layouts = {**case.layouts, "transformer_2": case.layouts["transformer"]}
    other = wan().pipe.transformer
    pipe = modular(Wan22CoreDenoiseStep(), call, layouts, transformer_2=other, **wan_parts(case))
    pipe.pipe.update_components(boundary_ratio=0.5)
    return pipe


def modular_qwen_image() -> ModularTiny:
    call = {
        "prompt_embeds": models.draw(1, TEXT, 12),
        "prompt_embeds_mask": torch.ones(1, TEXT, dtype=torch.long),
        "negative_prompt_embeds": -models.draw(1, TEXT, 12),
        "negative_prompt_embeds_mask": models.text_mask(TEXT, 3)[1:].long(),
        "height": 96,
        "width": 144,
        "num_inference_steps": 3,
    }
    return modular(
        QwenImageCoreDenoiseStep(),
        call,
        {"transformer": {r"transformer_blocks\.\d+\.attn": (Tokens(TEXT, 1, 6, 9),)}},
        transformer=models.qwen_image(out_channels=1).model,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )


def modular_sdxl() -> ModularTiny:
    tiny = models.sdxl()
    call = {
        "prompt_embeds": models.draw(1, TEXT, 12),
        "negative_prompt_embeds": -models.draw(1, TEXT, 12),
        "pooled_prompt_embeds": models.draw(1, 8),
        "negative_pooled_prompt_embeds": -models.draw(1, 8),
        "height": 64,
        "width": 96,
        "num_inference_steps": 3,
    }
    scheduler = diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
    return modular(
        StableDiffusionXLCoreDenoiseStep(), call, {"unet": tiny.spatial}, unet=tiny.model, scheduler=scheduler
    )


PIPELINES: dict[str, Callable[[], ModularTiny]] = {
    "Flux": modular_flux,
    "Wan": modular_wan,
    "Qwen-Image": modular_qwen_image,
    "SDXL": modular_sdxl,
}


@pytest.mark.cell("Modular pipeline", outcome="works")
@pytest.mark.parametrize("family", PIPELINES)
def test_a_modular_pipeline(family: str) -> None:
    PIPELINES[family]().check_swap()


@pytest.mark.cell("Modular pipeline", family="Wan", outcome="works")
def test_one_with_two_transformers() -> None:
    modular_wan22().check_swap()


@pytest.mark.cell("Modular pipeline", family="Wan", outcome="works")
def test_its_steps_are_counted() -> None:
    """Those that are not chosen are dense; guidance calls the model twice a step."""
    case = modular_wan(4)
    dense, calls = case.run(), []
    with diffattn.apply(case.pipe, "clear", radius=RADIUS):
        everywhere = case.run()
    with diffattn.apply(case.pipe, "clear", radius=RADIUS, steps=slice(1, 3)) as handle:
        layer = handle.layers[0]
        layer.module.register_forward_hook(lambda *_: calls.append(find(layer.scope).call.dense))
        got = [case.run() for _ in range(2)]
    assert torch.equal(*got)
    assert calls == [True, True, False, False, False, False, True, True] * 2
    assert min(error(got[0], dense), error(got[0], everywhere)) > VISIBLE


def skipped(family: str, **options: bool) -> LayerSkipConfig:
    """The first block of Qwen-Image; the block in the middle of SDXL, which has to be named."""
    fqn = "mid_block.attentions.0.transformer_blocks" if family == "SDXL" else "auto"
    return LayerSkipConfig(indices=[0], fqn=fqn, **options)


def perturbed_attention(family: str) -> PerturbedAttentionGuidance:
    config = skipped(family, skip_attention=False, skip_attention_scores=True, skip_ff=False)
    return PerturbedAttentionGuidance(
        perturbed_guidance_config=config, perturbed_guidance_start=0.0, perturbed_guidance_stop=1.0
    )


def guided(family: str, guider: Any, backend: str = "auto") -> Callable[[], Composition]:
    def build() -> Composition:
        case = PIPELINES[family]()
        own = case.pipe.guider
        return case.composition(
            on=lambda: case.pipe.update_components(guider=guider),
            off=lambda: case.pipe.update_components(guider=own),
            backend=backend,
        )

    return build


@pytest.mark.cell("Guider: perturbed attention", outcome="works")
@pytest.mark.parametrize("family", ["Qwen-Image", "SDXL"])
@pytest.mark.parametrize("backend", ["dense", "tiled"])
@in_both_orders
def test_perturbed_attention_guidance(family: str, order: str, backend: str, caplog: pytest.LogCaptureFixture) -> None:
    """Its perturbed forward has no attention, whatever kernel computes it otherwise."""
    prove(guided(family, perturbed_attention(family), backend), order, caplog)


@torch.no_grad()
@pytest.mark.cell("Guider: perturbed attention", outcome="works")
@pytest.mark.parametrize("family", ["Qwen-Image"])
@pytest.mark.parametrize(
    ("mechanism", "options"), [("clear", {"radius": RADIUS, "backend": "tiled"}), ("agent", {})], ids=["clear", "agent"]
)
def test_the_perturbed_forward_is_that_of_the_model_alone(family: str, mechanism: str, options: dict[str, Any]) -> None:
    """With all layers perturbed it makes no difference what the mechanism would have computed."""
    tiny = models.qwen_image()
    own = tiny.run()
    config = LayerSkipConfig(indices=[0, 1], skip_attention=False, skip_attention_scores=True, skip_ff=False)
    apply_layer_skip(tiny.model, config)
    perturbed = tiny.run()
    assert error(perturbed, own) > VISIBLE
    with diffattn.apply(tiny.model, mechanism, **options):
        assert torch.equal(tiny.run(), perturbed)


@pytest.mark.cell("Guider: skipped layers", outcome="works")
@pytest.mark.parametrize("family", ["SDXL"])
@pytest.mark.parametrize("whole_block", [True, False])
@in_both_orders
def test_skip_layer_guidance(family: str, order: str, whole_block: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Skipping the attention alone asks diffusers what a processor of this class would have returned."""
    guider = SkipLayerGuidance(
        skip_layer_config=skipped(family, skip_ff=whole_block),
        skip_layer_guidance_start=0.0,
        skip_layer_guidance_stop=1.0,
    )
    prove(guided(family, guider), order, caplog)


@pytest.mark.cell("Guider: smoothed energy", outcome="works")
@pytest.mark.parametrize("family", ["Qwen-Image"])
@in_both_orders
def test_smoothed_energy_guidance(family: str, order: str, caplog: pytest.LogCaptureFixture) -> None:
    """Blurs the queries before attention."""
    guider = SmoothedEnergyGuidance(seg_guidance_config=SmoothedEnergyGuidanceConfig(indices=[0]))
    prove(guided(family, guider), order, caplog)
