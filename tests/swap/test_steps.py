"""Steps counted from outside, on whole pipelines with tiny random models."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    EulerDiscreteScheduler,
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
from models import animatediff, flux, sd15, wan
from releases import needs
from torch import Tensor
from torch.nn import functional as F

import diffattn
from diffattn.mechanisms.base import Mechanism
from diffattn.swap.calls.steps import Caller, Runs, noise_share


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


def when(start: float | None) -> dict[str, Any]:
    """All steps but the first, or those from a share of the schedule on."""
    return {"steps": slice(1, None)} if start is None else {"start": start}


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

    def run_from_picture(self, pipe: Any, steps: int, start: float | None = None) -> None:
        again = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
        pipe.scheduler = again.scheduler
        with diffattn.apply(again, Probe(), layers=self.layer, **when(start)):
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

    def run_from_picture(self, pipe: Any, steps: int, start: float | None = None) -> None:
        again = FluxImg2ImgPipeline(
            FlowMatchEulerDiscreteScheduler(), pipe.vae, None, None, None, None, pipe.transformer
        )
        with diffattn.apply(again, Probe(), layers=self.layer, **when(start)):
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

    def run_from_picture(self, pipe: Any, steps: int, start: float | None = None) -> None:
        again = WanVideoToVideoPipeline(None, None, pipe.transformer, pipe.vae, pipe.scheduler)
        video = [torch.rand(3, 32, 48) for _ in range(5)]
        with diffattn.apply(again, Probe(), layers=self.layer, **when(start)):
            again(video, **self.arguments(pipe), height=32, width=48, strength=0.5, num_inference_steps=steps)


CASES = [StableDiffusion(), Flux(), Wan()]
IDS = ["SD1.5", "Flux", "Wan"]
needs_guidance = needs("diffusers", "0.39.0", "FluxImg2ImgPipeline guides by negative embeddings too")
FROM_PICTURE = [StableDiffusion(), pytest.param(Flux(), marks=needs_guidance), Wan()]


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


@pytest.mark.parametrize("case", FROM_PICTURE, ids=IDS)
def test_image_to_image_counts_the_steps_it_makes(case: Any, seen: list[float]) -> None:
    pipe = case.pipe()
    pipe.set_progress_bar_config(disable=True)
    case.run_from_picture(pipe, 6)  # strength 0.5: the last 3 of 6 steps, the first of them dense by steps=
    assert seen == [4 / 6] * case.calls_per_step + [5 / 6] * case.calls_per_step


@pytest.mark.parametrize("case", FROM_PICTURE, ids=IDS)
@pytest.mark.parametrize(("start", "swapped"), [(0.2, [3, 4, 5]), (0.6, [4, 5]), (0.7, [5])])
def test_shares_count_from_pure_noise(case: Any, start: float, swapped: list[int], seen: list[float]) -> None:
    pipe = case.pipe()
    pipe.set_progress_bar_config(disable=True)
    case.run_from_picture(pipe, 6, start=start)
    assert seen == [step / 6 for step in swapped for _ in range(case.calls_per_step)]


def test_a_loop_by_hand_after_a_shorter_run_of_the_pipeline(seen: list[float]) -> None:
    case = Flux()
    pipe = case.pipe()
    pipe.set_progress_bar_config(disable=True)
    case.run(pipe, 2)  # leaves its number of timesteps behind
    model, inputs = pipe.transformer, flux().inputs
    diffattn.apply(pipe, Probe(), layers=case.layer, steps=slice(2, 5))
    pipe.scheduler.set_timesteps(6)
    sample = torch.zeros(1, 2)
    for timestep in pipe.scheduler.timesteps:
        model(**{**inputs, "timestep": timestep.expand(2) / 1000})
        sample = pipe.scheduler.step(sample, timestep, sample).prev_sample
    assert seen == [2 / 6, 3 / 6, 4 / 6]


class Shorter(FluxPipeline):
    """Somebody's pipeline, with a loop of its own that says nothing of its timesteps."""

    def __call__(self, **call: Any) -> Any:
        self.scheduler.set_timesteps(6)
        sample = torch.zeros(1, 2)
        for t in self.scheduler.timesteps:
            self.transformer(**{**call, "timestep": t.expand(2) / 1000})
            sample = self.scheduler.step(sample, t, sample).prev_sample


def test_a_pipeline_of_ones_own_after_a_stock_run(seen: list[float]) -> None:
    case = Flux()
    stock = case.pipe()
    stock.set_progress_bar_config(disable=True)
    pipe = Shorter(stock.scheduler, stock.vae, None, None, None, None, stock.transformer)
    case.run(stock, 2)
    diffattn.apply(pipe, Probe(), layers=case.layer, steps=slice(2, 5))
    for _ in range(2):
        seen.clear()
        pipe(**flux().inputs)
        assert seen == [2 / 6, 3 / 6, 4 / 6]


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
        Runs(pipeline).moment(Caller(pipeline), lambda: 1.0)


def test_steps_need_a_pipeline() -> None:
    model = flux().model
    with pytest.raises(ValueError, match="pass the pipeline"):
        diffattn.apply(model, "clear", radius=2, steps=slice(2, None))
    with pytest.raises(TypeError, match="steps must be a slice or a predicate"):
        diffattn.apply(Flux().pipe(), "clear", radius=2, steps=3)  # type: ignore[arg-type]


def scheduled(scheduler: Any, steps: int = 4, **options: Any) -> Any:
    scheduler.set_timesteps(steps, **options)
    return scheduler


SCHEDULERS = [
    DDIMScheduler(beta_schedule="scaled_linear"),
    CogVideoXDDIMScheduler(snr_shift_scale=3.0),
    EulerDiscreteScheduler(beta_schedule="scaled_linear"),
    EulerDiscreteScheduler(use_karras_sigmas=True),
    EulerDiscreteScheduler(  # Stable Video Diffusion's, whose timesteps are log(sigma)/4
        timestep_type="continuous",
        prediction_type="v_prediction",
        use_karras_sigmas=True,
        sigma_max=700.0,
        sigma_min=0.002,
    ),
    UniPCMultistepScheduler(),
    UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    FlowMatchEulerDiscreteScheduler(shift=3.0),
    FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
]


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda scheduler: type(scheduler).__name__)
def test_the_share_of_noise_is_what_the_scheduler_adds(scheduler: Any) -> None:
    """Noise of 1 added to latents of 0, and of 0 to latents of 1: the two weights, without a word of sigma."""
    scheduler = scheduled(scheduler, 6)
    for index, timestep in enumerate(scheduler.timesteps):
        if hasattr(scheduler, "add_noise"):
            clean, noise = torch.ones(1, 1), torch.zeros(1, 1)
            signal = float(scheduler.add_noise(clean, noise, timestep[None].to(scheduler.timesteps.dtype)))
            added = float(scheduler.add_noise(noise, clean, timestep[None].to(scheduler.timesteps.dtype)))
        else:
            signal = float(scheduler.scale_noise(torch.ones(1), timestep[None], torch.zeros(1)))
            added = float(scheduler.scale_noise(torch.zeros(1), timestep[None], torch.ones(1)))
        if scheduler.config.get("invert_sigmas"):
            signal, added = added, signal
        assert noise_share(scheduler, index) == pytest.approx(added / (added + signal), abs=1e-4)


def test_a_scheduler_without_noise_levels_is_refused() -> None:
    class Scheduler:
        timesteps = torch.arange(3)

    with pytest.raises(ValueError, match="phase_by='timestep'"):
        noise_share(Scheduler(), 0)


@dataclass(frozen=True, kw_only=True)
class NoiseProbe(Probe):
    """Exact attention that notes timestep and share of noise."""

    type = "noise_probe"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"timestep", "sigma"})

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
        self.seen.append((context.timestep, context.sigma))
        assert context.progress is None
        return F.scaled_dot_product_attention(q, k, v, attn_mask=context.mask, scale=scale)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_timestep_and_noise_reach_the_mechanism(case: Any, seen: list[Any]) -> None:
    pipe = case.pipe()
    pipe.set_progress_bar_config(disable=True)
    with diffattn.apply(pipe, NoiseProbe(), layers=case.layer):
        for _ in range(2):
            seen.clear()
            case.run(pipe, 4)
            scheduler, per_step = pipe.scheduler, case.calls_per_step
            shares = [noise_share(scheduler, index) for index in range(4)]
            assert [share for _, share in seen] == [share for share in shares for _ in range(per_step)]
            assert shares == sorted(shares, reverse=True) and shares[0] > 0.9 > shares[-1]
            unit = 1000 if isinstance(case, Flux) else 1  # Flux gets its timestep between 0 and 1
            want = scheduler.timesteps.repeat_interleave(per_step) / unit
            torch.testing.assert_close(torch.tensor([time for time, _ in seen]), want.float())


@pytest.mark.parametrize("case", FROM_PICTURE, ids=IDS)
def test_noise_in_image_to_image(case: Any, seen: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = case.pipe()
    pipe.set_progress_bar_config(disable=True)
    monkeypatch.setitem(globals(), "Probe", NoiseProbe)
    case.run_from_picture(pipe, 6)  # strength 0.5: the last 3 steps, the first of them dense
    per_step = case.calls_per_step
    assert len(seen) == 2 * per_step and seen[0][1] > seen[-1][1]
    unit = 1000 if isinstance(case, Flux) else 1
    if isinstance(case, Flux | Wan):  # flow matching: the timestep is 1000 times the share
        for time, share in seen:
            assert share == pytest.approx(time * unit / 1000, abs=2e-3)
    else:
        signal = pipe.scheduler.alphas_cumprod[[int(time) for time, _ in seen]]
        want = (1 - signal).sqrt() / ((1 - signal).sqrt() + signal.sqrt())
        torch.testing.assert_close(torch.tensor([share for _, share in seen]), want)


def test_the_timestep_is_read_only_where_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(timestep: Any) -> float:
        raise AssertionError("the timestep was read")

    monkeypatch.setattr(diffattn.swap.model_swap, "largest", refuse)
    pipe = Flux().pipe()
    pipe.set_progress_bar_config(disable=True)
    diffattn.apply(pipe, "clear", radius=2)
    Flux().run(pipe, 2)
    diffattn.apply(pipe, "clear", radius=2, steps=slice(1, None))
    Flux().run(pipe, 2)  # its scheduler counts
    old = StableDiffusion().pipe()
    old.set_progress_bar_config(disable=True)
    diffattn.apply(old, "clear", radius=2, steps=slice(1, None))
    with pytest.raises(AssertionError, match="the timestep was read"):
        StableDiffusion().run(old, 2)


def test_dual_scope_in_the_animatediff_pipeline() -> None:
    """Its phases switch within a run, and its layers are those along the frames."""
    model = animatediff().model
    model.register_to_config(sample_size=8)
    pipe = AnimateDiffPipeline(tiny_vae(), None, None, model, None, DDIMScheduler(steps_offset=1, clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    width = model.config.cross_attention_dim

    text = {"prompt_embeds": torch.ones(1, 5, width), "negative_prompt_embeds": torch.zeros(1, 5, width)}
    call = {**text, "num_frames": 6, "height": 16, "width": 24, "num_inference_steps": 2, "output_type": "latent"}

    def run() -> Tensor:
        return pipe(**call, generator=torch.Generator().manual_seed(0)).frames

    own = run()
    options: dict[str, Any] = {"padding": 0, "top_k": 2}
    outs = []
    for threshold in (0, 300, 2000):  # timesteps 501 and 1: all early, one of each, all late
        phases = {"local_phase": (threshold, 20, 0), "global_phase": (threshold, 0, 20)}
        with diffattn.apply(pipe, "dual_scope", **options, **phases) as handle:
            assert all("motion_modules" in layer.name for layer in handle.layers)
            outs.append(run())
    assert torch.equal(run(), own)
    for i, out in enumerate(outs):
        assert all(not torch.allclose(out, other, atol=1e-4) for other in [own, *outs[:i]])


def test_dual_scope_by_noise_in_a_video_transformer() -> None:
    case = Wan()
    pipe = case.pipe()
    pipe.set_progress_bar_config(disable=True)

    def run(mechanism: Any) -> Tensor:
        with diffattn.apply(pipe, mechanism):
            call = {**case.arguments(pipe), "height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 4}
            return pipe(**call, generator=torch.Generator().manual_seed(0)).frames

    options: dict[str, Any] = {"padding": 0, "top_k": 1}
    by_noise = diffattn.DualScopeAttention(
        phase_by="sigma", local_phase=(0.6, 5, 0), global_phase=(0.6, 0, 5), **options
    )
    by_time = diffattn.DualScopeAttention(local_phase=(600, 5, 0), global_phase=(600, 0, 5), **options)
    late = diffattn.DualScopeAttention(local_phase=(None, 5, 0), global_phase=None, **options)
    assert torch.equal(run(by_noise), run(by_time))
    assert not torch.allclose(run(by_noise), run(late), atol=1e-4)
