"""State of a call lives in the call: threads, copies, shared models, nested swaps, errors in the middle."""

import asyncio
import copy
import gc
import logging
import pickle
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import models
import pytest
import tiny_pipelines
import torch
from hand_masks import RADIUS, TOLERANCE, error
from models import BUILDERS, Tiny, flux, picture_ids, sd15
from releases import built
from shared_model import SHAPES, flux_pipelines, picture, spread
from torch import Tensor, nn
from torch.nn import functional as F

import diffattn
from diffattn.mechanisms.base import Mechanism
from diffattn.swap import compiled
from diffattn.swap.calls import frames


def turned(tiny: Tiny) -> dict[str, Any]:
    """The image of 6 x 9 tokens as one of 9 x 6: as many tokens."""
    return {"img_ids": picture_ids(9, 6), "hidden_states": tiny.inputs["hidden_states"]}


def test_tasks_of_one_thread_take_turns_inside_a_forward() -> None:
    tiny = flux()
    diffattn.apply(tiny.model, "clear", radius=2)
    want = [tiny.run(), tiny.run(**turned(tiny))]

    async def run(call: dict[str, Any]) -> Tensor:
        return tiny.run(**call)

    async def both() -> list[Tensor]:
        return await asyncio.gather(run({}), run(turned(tiny)))

    assert all(torch.equal(got, one) for got, one in zip(asyncio.run(both()), want, strict=True))


def test_a_forward_that_fails_leaves_nothing_behind() -> None:
    tiny = flux()
    diffattn.apply(tiny.model, "clear", radius=2)
    want = tiny.run()
    hook = tiny.model.transformer_blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tiny.run(**turned(tiny))
    hook.remove()
    assert frames._frames.get() == ()
    attention = tiny.model.single_transformer_blocks[0].attn
    with pytest.raises(RuntimeError, match="called outside its model"):
        attention(torch.randn(1, 59, attention.query_dim))
    assert torch.equal(tiny.run(), want)


def test_a_forward_that_is_interrupted_does_not_reach_the_next() -> None:
    tiny = flux()
    diffattn.apply(tiny.model, "clear", radius=2)
    want = tiny.run()

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = tiny.model.transformer_blocks[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        tiny.run(**turned(tiny))
    hook.remove()
    assert torch.equal(tiny.run(), want)
    assert frames._frames.get() == ()


def test_a_model_inside_another_forward() -> None:
    """A second swapped model is called in the middle of the first one's forward."""
    outer, inner = flux(), sd15()
    diffattn.apply(outer.model, "clear", radius=2)
    diffattn.apply(inner.model, "clear", radius=2)
    want, seen = (outer.run(), inner.run()), []
    outer.model.transformer_blocks[1].register_forward_pre_hook(lambda *_: seen.append(inner.run()))
    assert torch.equal(outer.run(), want[0]) and torch.equal(seen[0], want[1])


def test_a_level_of_a_unet_called_by_itself() -> None:
    tiny = sd15()
    diffattn.apply(tiny.model, "clear", radius=2)
    level = tiny.model.down_blocks[0].attentions[0]
    features = torch.randn(2, level.config.in_channels, 5, 7)
    text = tiny.inputs["encoder_hidden_states"]
    call = {"encoder_hidden_states": text, "return_dict": False}
    (got,) = level(features, **call)
    diffattn.restore(tiny.model)
    assert not torch.allclose(got, level(features, **call)[0], atol=1e-3)
    assert frames._frames.get() == ()


# --- steps of the pipeline that runs


def test_steps_of_image_to_image_from_the_same_pipe() -> None:
    case = tiny_pipelines.flux(steps=4)
    diffattn.apply(case.pipe, "clear", radius=RADIUS, steps=slice(1, None))
    again = diffusers.FluxImg2ImgPipeline.from_pipe(case.pipe)
    fresh = diffusers.FluxImg2ImgPipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(), case.pipe.vae, None, None, None, None, case.pipe.transformer
    )
    call = {**case.call, "image": torch.rand(1, 3, 16, 24), "strength": 0.5, "num_inference_steps": 6}
    outputs = []
    for pipe in (again, fresh):
        pipe.set_progress_bar_config(disable=True)
        outputs += [pipe(**call, generator=torch.manual_seed(0), output_type="latent").images for _ in range(2)]
        summary = diffattn.summary(pipe)
        assert summary.calls == {"swapped": 8, "dense in steps that steps= leaves out": 4}
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_a_pipeline_that_is_gone() -> None:
    case = tiny_pipelines.flux()
    model = case.pipe.transformer
    diffattn.apply(case.pipe, "clear", radius=RADIUS, steps=slice(1, None))
    del case
    gc.collect()
    with pytest.raises(ValueError, match="no pipeline runs, and the one given to apply is gone"):
        model(**flux().inputs)


SCHEDULERS: dict[str, Callable[[], Any]] = {
    name: getattr(diffusers, name)
    for name in (
        "DDIMScheduler", "DDPMScheduler", "DDIMParallelScheduler", "DDPMParallelScheduler", "DEISMultistepScheduler",
        "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler",
        "EulerDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler",
        "LCMScheduler", "TCDScheduler", "UniPCMultistepScheduler", "IPNDMScheduler", "SASolverScheduler",
        "PNDMScheduler", "EDMEulerScheduler", "EDMDPMSolverMultistepScheduler",
    )
}  # fmt: skip
SCHEDULERS["PNDM without Runge-Kutta"] = lambda: diffusers.PNDMScheduler(skip_prk_steps=True)
SCHEDULERS["DPM++ 2M Karras"] = lambda: diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True)
CALLS_OF_A_STEP = {
    "HeunDiscreteScheduler": [2, 2, 2, 1],
    "KDPM2DiscreteScheduler": [2, 2, 2, 1],
    "KDPM2AncestralDiscreteScheduler": [2, 2, 2, 1],
    "PNDMScheduler": [4, 4, 4, 1],
    "PNDM without Runge-Kutta": [2, 1, 1, 1],
}
"""Model calls in each of four steps; elsewhere one."""


@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_step_is_a_step_of_the_scheduler(name: str) -> None:
    """Stable Diffusion with each of them: four steps, of which the third is swapped."""
    case = tiny_pipelines.sd15(steps=4)
    case.pipe.scheduler = SCHEDULERS[name]()
    seen: list[tuple[int, int]] = []

    def third(step: int) -> bool:
        return step == 2

    with diffattn.apply(case.pipe, "clear", radius=RADIUS, layers="down_blocks.0.*", steps=third) as handle:
        layer = handle.layers[0]

        def note(*_: Any) -> None:
            frame = frames.find(layer.scope)
            assert frame is not None and frame.call.moment is not None
            assert frame.call.dense == (frame.call.moment.step != 2)
            seen.append((frame.call.moment.step, frame.call.moment.total))

        layer.module.register_forward_pre_hook(note)
        for _ in range(2):
            seen.clear()
            case.run()
            counts = CALLS_OF_A_STEP.get(name, [1, 1, 1, 1])
            assert seen == [(step, 4) for step, count in enumerate(counts) for _ in range(count)]


FLOWS = ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler"]


@pytest.mark.parametrize("name", FLOWS)
def test_a_step_of_flow_matching(name: str) -> None:
    case = tiny_pipelines.flux(steps=4)
    scheduler = getattr(diffusers, name)()
    scheduler.set_timesteps(4)
    case.pipe.scheduler = scheduler
    tiny = flux()
    case.pipe.transformer = tiny.model
    handle = diffattn.apply(case.pipe, "clear", radius=2, steps=slice(1, 3))
    layer, seen = handle.layers[0], []
    layer.module.register_forward_pre_hook(lambda *_: seen.append(frames.find(layer.scope).call.moment.step))  # type: ignore[union-attr]
    sample = torch.zeros(1, 2, 2)
    for timestep in scheduler.timesteps:
        tiny.run(timestep=timestep.expand(2) / 1000)
        sample = scheduler.step(torch.ones_like(sample), timestep, sample).prev_sample
    assert seen == ([0, 0, 1, 1, 2, 2, 3] if "Heun" in name else [0, 1, 2, 3])


# --- nothing silent


def test_steps_that_pick_nothing_are_told_before_the_work(caplog: pytest.LogCaptureFixture) -> None:
    case = tiny_pipelines.flux(steps=4)
    own = case.run()
    with caplog.at_level(logging.WARNING, logger="diffattn"):
        diffattn.apply(case.pipe, "clear", radius=RADIUS, steps=slice(4, None))
        caplog.clear()
        assert torch.equal(case.run(), own)
    assert caplog.text.count("steps= picks none of the 4 steps of this run") == 1
    summary = diffattn.summary(case.pipe)
    assert summary.calls == {"dense in steps that steps= leaves out": 4 * 4} and summary.computed == 1.0
    assert "16 dense in steps that steps= leaves out; 100.0% of the attention computed" in str(summary)


def test_summary_says_what_ran() -> None:
    case = tiny_pipelines.flux(steps=4)
    mechanism = diffattn.ClearAttention(radius=1)
    diffattn.apply(case.pipe, mechanism, steps=slice(3, None))
    for _ in range(2):  # of the last run alone
        case.run()
        summary = diffattn.summary(case.pipe)
        assert summary.calls == {"swapped": 4, "dense in steps that steps= leaves out": 12}
        grid = diffattn.TokenGrid(4, 6, before=models.TEXT)
        share = mechanism.mask(grid).float().mean()
        assert summary.computed == pytest.approx((3 + float(share)) / 4)
    assert summary.rows[0].calls == {"swapped": 1, "dense in steps that steps= leaves out": 3}


def test_a_call_below_min_tokens_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    tiny = flux()
    diffattn.apply(tiny.model, "clear", radius=2, min_tokens=60)
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="diffattn"):
        tiny.run()
        tiny.run()
    assert caplog.text.count("no attention of FluxTransformer2DModel was swapped in this call") == 1
    assert diffattn.summary(tiny.model).calls == {"dense with fewer tokens than min_tokens": 4}


def test_the_probe_looks_at_every_forward() -> None:
    """A model may compute attention elsewhere in some of its calls."""
    tiny = flux()
    diffattn.apply(tiny.model, "clear", radius=2)
    want = tiny.run()
    for block in [*tiny.model.transformer_blocks, *tiny.model.single_transformer_blocks]:
        block.attn.processor.layer.wants = lambda *_: False
    with pytest.raises(RuntimeError, match="none of its 4 swapped layers came to an attention call"):
        tiny.run()
    for block in [*tiny.model.transformer_blocks, *tiny.model.single_transformer_blocks]:
        del block.attn.processor.layer.wants
    assert torch.equal(tiny.run(), want)


# --- nested swaps


@torch.no_grad()
def test_nested_blocks_bring_the_outer_swap_back() -> None:
    tiny = flux()
    own = tiny.run()
    with diffattn.apply(tiny.model, "clear", radius=2, ntk_factor=3):
        outer = tiny.run()
        with diffattn.apply(tiny.model, "clear", radius=4):
            inner = tiny.run()
            with diffattn.apply(tiny.model, "agent", num_agents=4):
                spread([own, outer, inner, tiny.run()])
            assert torch.equal(tiny.run(), inner)
        assert torch.equal(tiny.run(), outer)
        with pytest.raises(ZeroDivisionError), diffattn.apply(tiny.model, "clear", radius=4):
            raise ZeroDivisionError
        assert torch.equal(tiny.run(), outer)
    assert torch.equal(tiny.run(), own)


def test_a_block_inside_a_swap_that_stays() -> None:
    case = tiny_pipelines.flux(steps=4)
    diffattn.apply(case.pipe, "clear", radius=RADIUS, steps=slice(2, None))
    want = case.run()
    with diffattn.apply(case.pipe, "clear", radius=1):
        assert error(case.run(), want) > 1e-3
    assert torch.equal(case.run(), want)


def test_an_inner_block_that_was_restored_leaves_the_models_own() -> None:
    tiny = flux()
    own = tiny.run()
    with diffattn.apply(tiny.model, "clear", radius=2):
        handle = diffattn.apply(tiny.model, "clear", radius=4)
        handle.restore()
        assert torch.equal(tiny.run(), own)
    assert torch.equal(tiny.run(), own)


# --- shared models


def test_one_model_under_two_names() -> None:
    case = tiny_pipelines.wan()
    own = case.run()
    twice = diffusers.WanPipeline(
        None, None, case.pipe.vae, case.pipe.scheduler, case.pipe.transformer, case.pipe.transformer, boundary_ratio=0.5
    )
    handle = diffattn.apply(twice, "clear", radius=2)
    assert len(handle.layers) == len({id(layer.module) for layer in handle.layers})
    handle.restore()
    assert torch.equal(case.run(), own)


# --- copies, pickles, memory


@pytest.mark.parametrize("family", ["Flux", "SD1.5"])
@pytest.mark.parametrize("write", ["pickle", "torch.save"])
def test_pickles_are_refused_in_one_line(family: str, write: str, tmp_path: Path) -> None:
    tiny = BUILDERS[family]()
    diffattn.apply(tiny.model, "clear", radius=2)
    with pytest.raises(pickle.PicklingError, match="cannot be pickled: call diffattn.restore first") as caught:
        pickle.dumps(tiny.model) if write == "pickle" else torch.save(tiny.model, tmp_path / "model.pt")
    assert "\n" not in str(caught.value)
    diffattn.restore(tiny.model)
    again = pickle.loads(pickle.dumps(tiny.model))
    assert torch.equal(tiny.run(again), tiny.run())


@torch.no_grad()
@pytest.mark.slow
def test_the_original_goes_on_after_its_copy_was_restored() -> None:
    """Also where torch.compile looks names up by module."""
    tiny = flux()
    diffattn.apply(tiny.model, "clear", radius=2)
    want = tiny.run()
    other = copy.deepcopy(tiny.model)
    diffattn.restore(other)
    del other
    gc.collect()
    assert torch.equal(tiny.run(), want)
    compiled = torch.compile(tiny.model, backend="eager")
    assert error(tiny.run(compiled), want) < TOLERANCE
    torch._dynamo.reset()


@pytest.mark.parametrize("family", ["Flux", "SD1.5", "Wan"])
@pytest.mark.parametrize("mechanism", ["clear", "token_merge", "agent"])
def test_a_swapped_model_is_freed_with_its_last_reference(family: str, mechanism: str) -> None:
    tiny = BUILDERS[family]()
    options = {"clear": {"radius": 2}, "token_merge": {}, "agent": {"num_agents": 4}}[mechanism]
    gc.collect()
    gc.disable()
    try:
        handle = diffattn.apply(tiny.model, mechanism, **options)
        tiny.run()
        diffattn.summary(tiny.model)
        gone = weakref.ref(tiny.model)
        tiny.model = nn.Identity()
        assert gone() is None
        with pytest.raises(ValueError, match="no longer in place"):
            handle.restore()
    finally:
        gc.enable()


def test_a_swapped_pipeline_is_freed_with_its_last_reference() -> None:
    """Of one whose model diffusers itself does not hang a cycle of hooks on."""
    case = tiny_pipelines.sd15()
    gc.collect()
    gc.disable()
    try:
        diffattn.apply(case.pipe, "clear", radius=2, steps=slice(1, None))
        case.run()
        gone = weakref.ref(case.pipe.unet)
        case.pipe = None
        assert gone() is None
    finally:
        gc.enable()


def test_swapped_models_leave_nothing_in_the_process() -> None:
    def swapped() -> None:
        tiny = flux()
        diffattn.apply(tiny.model, "clear", radius=2)

    swapped()
    modules, layers = len(sys.modules), len(compiled._layers)
    for _ in range(5):
        swapped()
    assert len(sys.modules) == modules and len(compiled._layers) == layers


# --- what processors are set to


WITH_DEFAULTS = ["SD1.5", "AnimateDiff", "SD-ControlNet-Union", "SparseCtrl-ControlNet", "ControlNet-XS"]


@pytest.mark.parametrize("name", built(WITH_DEFAULTS))
def test_the_default_processors_of_a_swapped_unet(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """They make no call that can be swapped: as after set_attn_processor, and said."""
    tiny = BUILDERS[name]()
    tiny.model.set_default_attn_processor()
    own = tiny.run()
    tiny = BUILDERS[name]()
    diffattn.apply(tiny.model, "clear", radius=2)
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="diffattn"):
        tiny.model.set_default_attn_processor()
        assert torch.equal(tiny.run(), own)
    assert caplog.text.count("swapped layers were replaced by AttnProcessor and compute the model's own attention") == 1
    diffattn.restore(tiny.model)
    assert torch.equal(tiny.run(), own)


# --- what lives for a run


@dataclass(frozen=True, kw_only=True)
class Remembering(Mechanism):
    """Exact attention that notes whether it was here before in this run, and with which prompt."""

    type = "remembering"
    seen = []  # noqa: RUF012

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"memory"})

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: Any,
        *,
        scale: Any = None,
        backend: str = "auto",
        context: Any = None,
    ) -> Tensor:
        memory = context.memory
        if memory is None:
            self.seen.append(None)
        else:
            memory["calls"] = memory.get("calls", 0) + 1
            self.seen.append(memory["calls"])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=context.mask, scale=scale)

    def flops(self, grid: Any, heads: int, head_dim: int, *, context: Any = None) -> int:
        return 4 * grid.tokens**2 * heads * head_dim


@pytest.fixture
def seen() -> list[int | None]:
    Remembering.seen.clear()
    return Remembering.seen


LAYER = "transformer_blocks.0.attn"


def test_what_is_kept_is_kept_for_a_run_a_layer_and_a_prompt(seen: list[int | None]) -> None:
    case = tiny_pipelines.flux(steps=3)
    diffattn.apply(case.pipe, Remembering())
    for _ in range(2):
        seen.clear()
        case.run()
        assert seen == [1] * 4 + [2] * 4 + [3] * 4
    seen.clear()
    case.call |= {"negative_prompt_embeds": torch.zeros(1, models.TEXT, 12), "true_cfg_scale": 2.0}
    case.call |= {"negative_pooled_prompt_embeds": torch.zeros(1, 8)}
    case.run()  # two calls a step, of two prompts
    assert seen == [1] * 8 + [2] * 8 + [3] * 8


def test_equal_prompts_of_one_step_are_told_apart(seen: list[int | None]) -> None:
    case = tiny_pipelines.flux(steps=2)
    diffattn.apply(case.pipe, Remembering(), layers=LAYER)
    text = {"negative_prompt_embeds": case.call["prompt_embeds"], "true_cfg_scale": 2.0}
    case.call |= {**text, "negative_pooled_prompt_embeds": case.call["pooled_prompt_embeds"]}
    case.run()
    assert seen == [1, 1, 2, 2]


def test_what_is_kept_goes_with_shape_scheduler_and_run(seen: list[int | None]) -> None:
    tiny, case = flux(), tiny_pipelines.flux()
    case.pipe.transformer = tiny.model
    handle = diffattn.apply(case.pipe, Remembering(), layers=LAYER)
    case.pipe.scheduler.set_timesteps(4)
    with torch.no_grad():
        tiny.run()
        tiny.run(timestep=torch.full((2,), 0.5))
        tiny.run(**turned(tiny), timestep=torch.full((2,), 0.5))
        tiny.run(encoder_hidden_states=tiny.inputs["encoder_hidden_states"] + 1)
        case.pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        case.pipe.scheduler.set_timesteps(4)
        tiny.run()
        case.pipe.scheduler.set_timesteps(4)
        tiny.run()
    assert seen == [1, 2, 1, 1, 1, 1]
    seen.clear()
    tiny.run()  # with gradients
    handle.restore()
    diffattn.apply(tiny.model, Remembering(), layers=LAYER)
    with torch.no_grad():
        tiny.run()  # outside a pipeline
    assert seen == [None, None]


def test_what_is_kept_is_kept_in_each_thread(seen: list[int | None]) -> None:
    pipes = flux_pipelines(4)
    diffattn.apply(pipes[0], Remembering(), layers=LAYER)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda pipe: picture(pipe, SHAPES[0], 0, steps=3), pipes))
    assert sorted(seen) == [1] * 4 + [2] * 4 + [3] * 4  # type: ignore[type-var]


def test_a_deep_copy_begins_with_nothing_kept(seen: list[int | None]) -> None:
    case = tiny_pipelines.flux(steps=2)
    diffattn.apply(case.pipe, Remembering(), layers=LAYER)
    case.run()
    case.pipe = copy.deepcopy(case.pipe)
    seen.clear()
    case.run()
    assert seen == [1, 2]
