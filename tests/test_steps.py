"""Steps counted from outside, on whole pipelines with tiny random models."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxPipeline,
    HeunDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
    WanPipeline,
    WanVideoToVideoPipeline,
)
from models import flux, sd15, wan
from torch import Tensor
from torch.nn import functional as F

import diffattn
from diffattn.mechanisms.base import Mechanism
from diffattn.steps import StepCounter


@dataclass(frozen=True, kw_only=True)
class Probe(Mechanism):
    """Exact attention that notes the progress at which it is called."""

    type = "probe"
    seen = []  # noqa: RUF012

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"progress"})

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
        self.seen.append(context.progress)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=context.mask, scale=scale)


@pytest.fixture
def seen() -> Iterator[list[float]]:
    Probe.seen.clear()
    yield Probe.seen
    Probe.seen.clear()


def tiny_vae(**options: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        **options,
    )


class StableDiffusion:
    """One model call a step: both halves of the guidance in one batch."""

    calls_per_step, layer = 1, "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    scheduler: Any = staticmethod(lambda: DDIMScheduler(steps_offset=1, clip_sample=False))

    def pipe(self) -> Any:
        unet = sd15().model
        unet.register_to_config(sample_size=64)
        return StableDiffusionPipeline(
            vae=tiny_vae(), text_encoder=None, tokenizer=None, unet=unet, scheduler=self.scheduler(),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip

    def arguments(self, pipe: Any) -> dict[str, Any]:
        width = pipe.unet.config.cross_attention_dim
        return {
            "prompt_embeds": torch.ones(1, 5, width),
            "negative_prompt_embeds": torch.zeros(1, 5, width),
            "output_type": "latent",
        }

    def run(self, pipe: Any, steps: int) -> None:
        pipe(**self.arguments(pipe), height=16, width=24, num_inference_steps=steps)

    def run_from_picture(self, pipe: Any, steps: int) -> None:
        again = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
        pipe.scheduler = again.scheduler
        with diffattn.apply(again, Probe(), layers=self.layer, steps=slice(1, None)):
            again(**self.arguments(pipe), image=torch.rand(1, 3, 16, 24), strength=0.5, num_inference_steps=steps)


class StableDiffusionHeun(StableDiffusion):
    """A second-order scheduler: two calls a step but for the last, at two timesteps."""

    scheduler = staticmethod(lambda: HeunDiscreteScheduler(steps_offset=1))


class Flux:
    """Two model calls a step: guidance one after the other."""

    calls_per_step, layer = 2, "transformer_blocks.0.attn"

    def pipe(self) -> Any:
        vae = tiny_vae(latent_channels=1, shift_factor=0.0)
        return FluxPipeline(FlowMatchEulerDiscreteScheduler(), vae, None, None, None, None, flux().model)

    def arguments(self, pipe: Any) -> dict[str, Any]:
        config = pipe.transformer.config
        return {
            "prompt_embeds": torch.ones(1, 5, config.joint_attention_dim),
            "pooled_prompt_embeds": torch.ones(1, config.pooled_projection_dim),
            "negative_prompt_embeds": torch.zeros(1, 5, config.joint_attention_dim),
            "negative_pooled_prompt_embeds": torch.zeros(1, config.pooled_projection_dim),
            "true_cfg_scale": 2.0,
            "output_type": "latent",
        }

    def run(self, pipe: Any, steps: int) -> None:
        pipe(**self.arguments(pipe), height=16, width=24, num_inference_steps=steps)

    def run_from_picture(self, pipe: Any, steps: int) -> None:
        again = FluxImg2ImgPipeline(
            FlowMatchEulerDiscreteScheduler(), pipe.vae, None, None, None, None, pipe.transformer
        )
        with diffattn.apply(again, Probe(), layers=self.layer, steps=slice(1, None)):
            again(
                **self.arguments(pipe),
                image=torch.rand(1, 3, 16, 24),
                height=16,
                width=24,
                strength=0.5,
                num_inference_steps=steps,
            )


class Wan:
    calls_per_step, layer = 2, "blocks.0.attn1"

    def pipe(self) -> Any:
        vae = AutoencoderKLWan(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        )
        scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
        return WanPipeline(None, None, vae, scheduler, transformer=wan().model)

    def arguments(self, pipe: Any) -> dict[str, Any]:
        width = pipe.transformer.config.text_dim
        return {
            "prompt_embeds": torch.ones(1, 5, width),
            "negative_prompt_embeds": torch.zeros(1, 5, width),
            "output_type": "latent",
        }

    def run(self, pipe: Any, steps: int) -> None:
        pipe(**self.arguments(pipe), height=32, width=48, num_frames=5, num_inference_steps=steps)

    def run_from_picture(self, pipe: Any, steps: int) -> None:
        again = WanVideoToVideoPipeline(None, None, pipe.transformer, pipe.vae, pipe.scheduler)
        video = [torch.rand(3, 32, 48) for _ in range(5)]
        with diffattn.apply(again, Probe(), layers=self.layer, steps=slice(1, None)):
            again(video, **self.arguments(pipe), height=32, width=48, strength=0.5, num_inference_steps=steps)


CASES = [StableDiffusion(), Flux(), Wan()]
IDS = ["SD1.5", "Flux", "Wan"]


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_chosen_steps_and_two_runs_in_a_row(case: Any, seen: list[float]) -> None:
    pipe = case.pipe()
    pipe.set_progress_bar_config(disable=True)
    with diffattn.apply(pipe, Probe(), layers=case.layer, steps=slice(1, 3)):
        for _ in range(2):
            seen.clear()
            case.run(pipe, 4)
            assert seen == [1 / 4] * case.calls_per_step + [2 / 4] * case.calls_per_step
        seen.clear()
        case.run(pipe, 2)  # another number of steps
        assert seen == [1 / 2] * case.calls_per_step


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_negative_slice_and_predicate(case: Any, seen: list[float]) -> None:
    pipe = case.pipe()
    pipe.set_progress_bar_config(disable=True)
    diffattn.apply(pipe, Probe(), layers=case.layer, steps=slice(-1, None))
    case.run(pipe, 5)
    assert seen == [4 / 5] * case.calls_per_step
    seen.clear()
    diffattn.apply(pipe, Probe(), layers=case.layer, steps=lambda step: step % 2 == 0)
    case.run(pipe, 3)
    assert seen == [0.0] * case.calls_per_step + [2 / 3] * case.calls_per_step


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_image_to_image_counts_the_steps_it_makes(case: Any, seen: list[float]) -> None:
    pipe = case.pipe()
    pipe.set_progress_bar_config(disable=True)
    case.run_from_picture(pipe, 6)  # strength 0.5: 3 steps
    assert seen == [1 / 3] * case.calls_per_step + [2 / 3] * case.calls_per_step


def test_an_interrupted_run_does_not_count_on(seen: list[float]) -> None:
    case = Flux()
    pipe = case.pipe()
    pipe.set_progress_bar_config(disable=True)
    diffattn.apply(pipe, Probe(), layers=case.layer, steps=slice(0, 1))

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe(**case.arguments(pipe), height=16, width=24, num_inference_steps=4, callback_on_step_end=stop)
    seen.clear()
    case.run(pipe, 4)
    assert seen == [0.0, 0.0]


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # HeunDiscreteScheduler's own, under NumPy 2
def test_a_second_order_scheduler(seen: list[float]) -> None:
    case = StableDiffusionHeun()
    pipe = case.pipe()
    pipe.set_progress_bar_config(disable=True)
    diffattn.apply(pipe, Probe(), layers=case.layer)
    case.run(pipe, 3)
    assert seen == sorted(seen) and len(set(seen)) == 3 and seen[0] == 0.0 and max(seen) < 1


def test_a_scheduler_without_timesteps_is_refused() -> None:
    class Pipeline:
        scheduler = None

    pipeline = Pipeline()
    with pytest.raises(ValueError, match="apply without steps="):
        StepCounter(pipeline).update(1.0)


def test_steps_need_a_pipeline() -> None:
    model = flux().model
    with pytest.raises(ValueError, match="pass the pipeline"):
        diffattn.apply(model, "clear", radius=2, steps=slice(2, None))
    with pytest.raises(TypeError, match="steps must be a slice or a predicate"):
        diffattn.apply(Flux().pipe(), "clear", radius=2, steps=3)  # type: ignore[arg-type]
