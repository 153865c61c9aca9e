"""STAR on diffusers: a low-resolution clip in, a sharper and larger one out.

    pipe = STARPipeline.from_pretrained("star", torch_dtype=torch.float16).to("cuda")
    frames = pipe(video, "a street at night", upscale=4).frames[0]

`star` is a folder from `diffattn.pipelines.video_sr.convert`.

The clip is enlarged bilinearly and encoded. From its noised latents the networks predict x0 window by window at every
step, and the windows cross-fade; solver and noise are of the whole clip, frame by frame. `__call__` keeps the clip's
latents in memory and calls `plan`, `embed`, `encode_clip`, `denoise_step` and `decode_clip`; with a `FolderStore` these
need memory for a window only, however long the clip is, and can be gone on with after any step.

Source: Xie et al., STAR: Spatial-Temporal Augmentation with Text-to-Video Models for Real-World Video
Super-Resolution, 2025, https://arxiv.org/abs/2501.02976.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLTemporalDecoder, DiffusionPipeline
from diffusers.pipelines.animatediff.pipeline_output import AnimateDiffPipelineOutput
from diffusers.video_processor import VideoProcessor
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from diffattn.options import changed
from diffattn.parallel.operations.noise import FrameNoise

from ..clips.chunks import Window
from ..clips.frames import Video, read_video
from ..clips.store import ClipStore, MemoryStore
from ..clips.streaming import finished, finished_sizes, regroup
from .checks import check_call, check_frames, check_latents, check_parts
from .decoding import decode, fix_colors
from .denoiser import Denoiser
from .encoding import encode, prepare, widened
from .networks.controlnet import STARControlNetModel
from .networks.unet import STARUNet3DConditionModel
from .scheduler import STARScheduler
from .settings import CELL, UpscaleSettings
from .sizes import Plan, plan_upscaling
from .text import NEGATIVE, PROMPT, embed_text, with_quality

Callback = Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any]]
POSTERIOR = 2**32 - 1
"""Number of the noise of the VAE's samples, among those of the steps."""


class STARPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Restores and enlarges a clip of any length.

    Args:
        vae: of Stable Video Diffusion.
        text_encoder: of Stable Diffusion 2.1: OpenCLIP's without the last layer.
        tokenizer: its tokenizer.
        unet: the denoising network.
        controlnet: its control branch.
        scheduler: the sampler of STAR.
    """

    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]
    # The networks of a step stay on the device together: moving them at every step would take longer than they do.
    model_cpu_offload_seq = "text_encoder->unet->vae"

    def __init__(
        self,
        vae: AutoencoderKLTemporalDecoder,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: STARUNet3DConditionModel,
        controlnet: STARControlNetModel,
        scheduler: STARScheduler,
    ) -> None:
        """Raises `ValueError` for parts that do not belong together."""
        super().__init__()
        check_parts(vae, text_encoder, unet, controlnet, scheduler)
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            controlnet=controlnet,
            scheduler=scheduler,
        )
        self.video_processor = VideoProcessor(vae_scale_factor=CELL, do_resize=False, do_normalize=False)

    @torch.no_grad()
    def __call__(
        self,
        video: Video,
        prompt: str = PROMPT,
        negative_prompt: str | None = None,
        *,
        upscale: float = 4.0,
        settings: UpscaleSettings | None = None,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **changes: Any,
    ) -> AnimateDiffPipelineOutput | tuple[Any]:
        """Restore one clip; as many frames come out as go in.

        Args:
            video: frames of any number and size: tensor (frames, 3, rows, columns) or array (frames, rows, columns, 3)
                in 0..1, uint8 array, or list of images.
            prompt: what the clip shows; a quality prompt is added.
            negative_prompt: what it is not to look like. None: a list of faults.
            upscale: factor of both sides, at least 1; sides are rounded.
            settings: how it is restored. None: the defaults of `UpscaleSettings`.
            generator: the seed of all noise is drawn from it. None: from torch's own.
            latents: start from these instead, (1, 4, frames, rows, columns), as they go into the first step.
            prompt_embeds: of the whole prompt (1, tokens, width), instead of `prompt`.
            negative_prompt_embeds: likewise.
            output_type: "pil", "np", "pt", or "latent" for scaled latents (1, 4, frames, rows, columns), padded.
            return_dict: an output whose `frames` hold one clip, instead of a tuple of it.
            callback_on_step_end: called as `f(pipe, step, timestep, tensors)`, and may return other tensors.
            callback_on_step_end_tensor_inputs: what it gets; "latents" is all there is.
            changes: fields of `UpscaleSettings` by name, such as `num_inference_steps=15` or `window=16`; they go over
                `settings`. The seed is drawn from `generator`, where there is one or no settings are given.

        Raises `ValueError` for settings out of range and for what is no clip, before any work.
        """
        check_call(output_type, callback_on_step_end_tensor_inputs)
        if generator is not None or (settings is None and "seed" not in changes):
            changes["seed"] = _seed(generator)
        settings = changed(settings or UpscaleSettings(), changes)
        source = read_video(video, self.video_processor)
        frames, _, height, width = source.shape
        plan = self.plan(frames, height, width, upscale, settings)
        check_latents(latents, plan, self.unet.config.in_channels)
        text = self._texts(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
        store = MemoryStore()
        self.encode_clip([source], plan, settings, store)
        if latents is not None:
            store.write("x.0", 0, latents[0].transpose(0, 1))
        for step in self.progress_bar(range(plan.steps)):
            self.denoise_step(step, plan, settings, text, store)
            if callback_on_step_end is not None:
                self._call_back(callback_on_step_end, step, plan, store)
        if output_type == "latent":
            result: Any = self._latents(plan.steps, plan, store)
        else:
            decoded = torch.cat(list(self.decode_clip([source], plan, settings, store)))
            result = self.video_processor.postprocess_video(decoded.transpose(0, 1)[None], output_type)
        self.maybe_free_model_hooks()
        return AnimateDiffPipelineOutput(frames=result) if return_dict else (result,)

    def plan(self, frames: int, height: int, width: int, upscale: float, settings: UpscaleSettings) -> Plan:
        """All sizes for a clip of so many frames and pixels; raises `ValueError` for what cannot be."""
        self.scheduler.set_timesteps(settings.num_inference_steps)
        steps = len(self.scheduler.timesteps)
        return plan_upscaling(
            frames, height, width, upscale, settings, steps=steps, downsamplings=self.unet.downsamplings
        )

    @torch.no_grad()
    def embed(self, prompt: str = PROMPT, negative_prompt: str | None = None) -> tuple[Tensor, Tensor]:
        """Embeddings (1, tokens, width) of the prompt with the quality prompt, and of the negative prompt."""
        texts = with_quality(prompt), NEGATIVE if negative_prompt is None else negative_prompt
        device = self._execution_device
        positive, negative = (embed_text(self.text_encoder, self.tokenizer, text, device) for text in texts)
        return positive, negative

    @torch.no_grad()
    def encode_clip(self, frames: Iterable[Tensor], plan: Plan, settings: UpscaleSettings, store: ClipStore) -> None:
        """Write the clip's latents as "hint" and the noised start as "x.0", a few frames at a time.

        Args:
            frames: the clip in pieces of any lengths, (n, 3, rows, columns) in 0..1.
            plan: from `plan`.
            settings: the same as for the plan.
            store: where to.

        Raises `ValueError` for frames of another size or number than planned.
        """
        noise, shape, begin = FrameNoise(settings.seed), (self.vae.config.latent_channels, *plan.latent), 0
        chunk = min(settings.encode_chunk, plan.frames)
        sizes = [min(chunk, plan.frames - first) for first in range(0, plan.frames, chunk)]
        with widened(self.vae):
            for block in regroup((check_frames(piece, plan) for piece in frames), sizes):
                numbers = range(begin, begin + len(block))
                sampled = noise.draw(numbers, shape, step=POSTERIOR) if settings.official else None
                pictures = prepare(block, plan, official=settings.official).to(self._execution_device)
                hint = encode(self.vae, pictures, sampled)
                start = self.scheduler.start(self.scheduler.noised(hint, noise.draw(numbers, shape)))
                store.write("hint", begin, hint)
                store.write("x.0", begin, start)
                begin += len(block)

    @torch.no_grad()
    def denoise_step(
        self, step: int, plan: Plan, settings: UpscaleSettings, text: tuple[Tensor, Tensor], store: ClipStore
    ) -> None:
        """Write "x.{step + 1}" and "x0.{step + 1}", from "hint", "x.{step}" and, after step 0, "x0.{step}".

        What the step reads stays until the next one begins: a step that was cut off, or whose end nobody noted, can be
        made again, with the same numbers.

        Args:
            step: from 0 to below `plan.steps`.
            plan: from `plan`.
            settings: the same as for the plan.
            text: from `embed`.
            store: what `encode_clip` and the steps before wrote to.
        """
        self.scheduler.set_timesteps(settings.num_inference_steps)
        for name in (f"x.{step - 1}", f"x0.{step - 1}"):
            store.drop(name)
        denoiser = Denoiser(
            self.unet,
            self.controlnet,
            text,
            plan.tiles,
            guidance_scale=settings.guidance_scale,
            guidance_rescale=settings.guidance_rescale,
            batch=settings.guidance_batch,
        )
        noise = FrameNoise(settings.seed)
        parts = (self._predict(denoiser, step, window, store) for window in plan.windows)
        for begin, x0 in finished(plan.windows, parts):
            end = begin + len(x0)
            x = store.read(f"x.{step}", begin, end)
            before = store.read(f"x0.{step}", begin, end) if step > 0 else None
            drawn = noise.draw(range(begin, end), x.shape[1:], step=step + 1) if step + 1 < plan.steps else None
            store.write(f"x.{step + 1}", begin, self.scheduler.update(x, x0, before, step, drawn))
            store.write(f"x0.{step + 1}", begin, x0)

    def _predict(self, denoiser: Denoiser, step: int, window: Window, store: ClipStore) -> Tensor:
        """x0 of a window, (frames, 4, rows, columns)."""
        x, hint = (
            store.read(name, window.begin, window.end).transpose(0, 1)[None].to(self._execution_device)
            for name in (f"x.{step}", "hint")
        )
        timestep = self.scheduler.timesteps[step].to(x.device)
        velocity = denoiser(self.scheduler.model_input(x, step), hint, timestep)
        x0: Tensor = self.scheduler.predict_x0(x, velocity, step)[0].transpose(0, 1).cpu()
        return x0

    @torch.no_grad()
    def decode_clip(
        self, source: Iterable[Tensor], plan: Plan, settings: UpscaleSettings, store: ClipStore
    ) -> Iterator[Tensor]:
        """The result in pieces (n, 3, rows, columns), float32 in 0..1 on the CPU, from "x.{plan.steps}".

        Args:
            source: the clip again, as for `encode_clip`; its colours are taken.
            plan: from `plan`.
            settings: the same as for the plan.
            store: what the last step wrote to.

        Raises `ValueError` for frames of another size or number than planned.
        """
        parts = (
            decode(
                self.vae,
                store.read(f"x.{plan.steps}", window.begin, window.end),
                plan.decode_tiles,
                self._execution_device,
            )
            for window in plan.decode_windows
        )
        blocks = finished(plan.decode_windows, parts)
        given = regroup((check_frames(piece, plan) for piece in source), finished_sizes(plan.decode_windows))
        for (_, frames), colours in zip(blocks, given, strict=True):
            yield fix_colors(plan.padding.crop(frames), colours, settings.color_fix)

    def _texts(
        self, prompt: str, negative_prompt: str | None, positive: Tensor | None, negative: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The given embeddings, and those of the texts in place of what is not given."""
        if positive is not None and negative is not None:
            return positive, negative
        own = self.embed(prompt, negative_prompt)
        return own[0] if positive is None else positive, own[1] if negative is None else negative

    def _latents(self, step: int, plan: Plan, store: ClipStore) -> Tensor:
        return store.read(f"x.{step}", 0, plan.frames).transpose(0, 1)[None]

    def _call_back(self, callback: Callback, step: int, plan: Plan, store: ClipStore) -> None:
        own = self._latents(step + 1, plan, store)
        latents = (callback(self, step, self.scheduler.timesteps[step], {"latents": own}) or {}).get("latents", own)
        check_latents(latents, plan, self.unet.config.in_channels)
        store.write(f"x.{step + 1}", 0, latents[0].transpose(0, 1))


def _seed(generator: torch.Generator | None) -> int:
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**62, (1,), generator=generator, device=device))
