"""STAR on CogVideoX-5B as a diffusers pipeline: a clip in, a sharper and larger one out.

    pipe = CogVideoXSTARPipeline.from_pretrained("star-cogvideox", torch_dtype=torch.bfloat16).to("cuda")
    frames = pipe(video, "a street at night").frames[0]

`star-cogvideox` is a folder from `diffattn.pipelines.video_sr.cogvideox_convert`.

The clip is enlarged by bicubic interpolation and encoded; noise is denoised beside these latents. Latents longer than
a window are denoised in windows, whose velocities are joined in every step by weights that fade over the overlap, as
in MultiDiffusion. The transformer was trained on clips of 25 frames, 7 latent ones, of 480 x 720 pixels; the released
script takes nothing else. It also takes the colours of the ground truth, which is not repeated here.

Source: Xie et al., STAR: Spatial-Temporal Augmentation with Text-to-Video Models for Real-World Video
Super-Resolution, 2025, https://arxiv.org/abs/2501.02976.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLCogVideoX, DiffusionPipeline
from diffusers.pipelines.cogvideo.pipeline_output import CogVideoXPipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from torch import Tensor
from transformers import PreTrainedTokenizerBase, T5EncoderModel

from diffattn.media.color import adain_fix, wavelet_fix

from ..clips.frames import Video, enlarge, pad, read_video
from .checks import check_call, check_chunks, check_latents, check_parts
from .decoding import decode, encode
from .denoiser import Denoiser
from .scheduler import STARCogVideoXScheduler
from .transformer import STARCogVideoXTransformer3DModel

Callback = Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any]]


class CogVideoXSTARPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Restores and enlarges a clip.

    Memory: the VAE works on chunks of the clip and the transformer on windows, so the device holds nothing of the whole
    clip but latents. `vae.enable_tiling` cuts the images, which need most of it; `enable_model_cpu_offload` takes the
    networks to the device when their turn comes.

    Args:
        vae: of CogVideoX-5B.
        text_encoder: T5-XXL.
        tokenizer: T5's.
        transformer: with twice as many channels in as out.
        scheduler: the official sampler.
    """

    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]
    model_cpu_offload_seq = "text_encoder->transformer->vae"

    def __init__(
        self,
        vae: AutoencoderKLCogVideoX,
        text_encoder: T5EncoderModel,
        tokenizer: PreTrainedTokenizerBase,
        transformer: STARCogVideoXTransformer3DModel,
        scheduler: STARCogVideoXScheduler,
    ) -> None:
        """Raises `ValueError` for parts that do not belong together."""
        super().__init__()
        check_parts(vae, text_encoder, transformer)
        self.register_modules(
            vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, transformer=transformer, scheduler=scheduler
        )
        self.cell = 2 ** (len(vae.config.block_out_channels) - 1)
        self.period = int(vae.config.temporal_compression_ratio)
        self.video_processor = VideoProcessor(vae_scale_factor=self.cell, do_resize=False, do_normalize=False)

    @torch.no_grad()
    def __call__(
        self,
        video: Video,
        prompt: str = "",
        *,
        negative_prompt: str | None = None,
        upscale: float = 4,
        num_inference_steps: int = 50,
        guidance_scale: float = 6.0,
        window: int | None = 25,
        overlap: int = 12,
        sequential_guidance: bool = False,
        decode_chunk_size: int | None = 13,
        decode_overlap: int = 3,
        official: bool = False,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        color_fix: str | None = "adain",
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> CogVideoXPipelineOutput | tuple[Any]:
        """Restore one clip; as many frames come out as go in.

        Args:
            video: frames of any number and size: tensor (frames, 3, rows, columns) or array (frames, rows, columns, 3)
                in 0..1, uint8 array, or list of images.
            prompt: what the clip shows.
            negative_prompt: what guidance leads away from. None: an embedding of zeros, as in training.
            upscale: factor of both sides, at least 1; sides are rounded.
            num_inference_steps: of the sampler, all of which are taken.
            guidance_scale: s of dynamic guidance, whose weight grows to 1 + s; 0 leaves it out, which halves the time.
            window: frames that the transformer sees together, a multiple of 4 and one more. None: all.
            overlap: least number of frames that neighbouring windows share, a multiple of 4.
            sequential_guidance: two calls with one clip each instead of one with two: less memory.
            decode_chunk_size: latent frames that the VAE encodes and decodes together, an odd number of at least 3; 13
                are 49 frames. None: all.
            decode_overlap: least number of latent frames that neighbouring chunks share, odd; the later one drops the
                first of them, and they cross-fade in the others.
            official: weights of guidance and order of noise as released, see `STARCogVideoXScheduler.guidance`.
            generator: of the VAE's sample and the noise.
            latents: start from this unit noise instead, (1, latent frames, channels, rows, columns).
            color_fix: take the colours of the low-quality clip: "adain" its mean and deviation, "wavelet" its low
                frequencies. None: the model's own.
            output_type: "pil", "np", "pt", or "latent" for latents (1, latent frames, channels, rows, columns), padded.
            return_dict: an output whose `frames` hold one clip, instead of a tuple of it.
            callback_on_step_end: called as `f(pipe, step, timestep, tensors)`, and may return other tensors.
            callback_on_step_end_tensor_inputs: what it gets; "latents" is all there is.

        Raises `ValueError` for settings out of range and for what is no clip, before any work.
        """
        check_call(upscale, guidance_scale, output_type, color_fix, callback_on_step_end_tensor_inputs)
        check_chunks(decode_chunk_size, decode_overlap)
        windows, chunks = self.latent_windows(window, overlap), (decode_chunk_size, decode_overlap)
        self.scheduler.set_timesteps(num_inference_steps, device=self._execution_device)
        source = read_video(video, self.video_processor)
        large = enlarge(source, upscale)
        padded = pad(large, self.cell * self.transformer.config.patch_size, 2 * self.period)
        shape = self.latent_shape(padded)
        check_latents(latents, shape)

        device, dtype = self._execution_device, self.transformer.dtype
        texts = [self.embed(text).to(device, dtype) for text in (negative_prompt, prompt)]
        condition = self.encode(padded, generator, *chunks)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        denoiser = Denoiser(self.transformer, condition.to(dtype), texts[1], texts[0], *windows, sequential_guidance)
        weights = [
            self.scheduler.guidance(guidance_scale, step, official=official)
            for step in range(len(self.scheduler.timesteps))
        ]
        result: Any = self.denoise(
            denoiser, latents.to(device, torch.float32), weights, generator, official, callback_on_step_end
        )
        if output_type != "latent":
            frames = self.decode(result, *chunks)[: len(large), :, : large.shape[2], : large.shape[3]]
            frames = fix_colors(frames, large if color_fix == "wavelet" else source, color_fix).clamp_(0, 1)
            result = self.video_processor.postprocess_video(frames.transpose(0, 1)[None], output_type)
        self.maybe_free_model_hooks()
        return CogVideoXPipelineOutput(frames=result) if return_dict else (result,)

    def latent_windows(self, window: int | None, overlap: int) -> tuple[int | None, int]:
        """Length and overlap of windows in latent frames, from those in frames."""
        if window is None:
            return None, 0
        if window < 1 or window % self.period != 1 or overlap % self.period or not 0 <= overlap < window:
            raise ValueError(
                f"expected a window of {self.period} k + 1 frames and an overlap of fewer, a multiple of "
                f"{self.period}; got {window} and {overlap}; 25 and 12 are usual"
            )
        return (window - 1) // self.period + 1, overlap // self.period

    def latent_shape(self, frames: Tensor) -> tuple[int, ...]:
        """Of the latents of padded frames."""
        count, _, rows, columns = frames.shape
        channels = self.transformer.config.out_channels
        return 1, (count - 1) // self.period + 1, channels, rows // self.cell, columns // self.cell

    def embed(self, text: str | None) -> Tensor:
        """T5's last hidden states (1, tokens, width); zeros for None."""
        config = self.transformer.config
        if text is None:
            return torch.zeros(1, config.max_text_seq_length, config.text_embed_dim)
        tokens = self.tokenizer(
            [text], padding="max_length", max_length=config.max_text_seq_length, truncation=True, return_tensors="pt"
        )
        hidden: Tensor = self.text_encoder(tokens.input_ids.to(self._execution_device))[0]
        return hidden

    def encode(self, frames: Tensor, generator: torch.Generator | None, chunk_size: int | None, overlap: int) -> Tensor:
        """Scaled latents (1, latent frames, channels, rows, columns) of frames in 0..1, drawn from the VAE's."""
        return encode(self.vae, frames, chunk_size, overlap, generator, self._execution_device)

    def decode(self, latents: Tensor, chunk_size: int | None, overlap: int) -> Tensor:
        """Frames (n, 3, rows, columns) around 0..1, float32 on the CPU."""
        _, count, _, rows, columns = latents.shape
        frames = torch.empty((count - 1) * self.period + 1, 3, rows * self.cell, columns * self.cell)
        for begin, part in decode(self.vae, latents, chunk_size, overlap, self._execution_device):
            frames[begin : begin + len(part)] = part
        return frames

    def denoise(
        self,
        denoiser: Denoiser,
        latents: Tensor,
        weights: Sequence[float],
        generator: torch.Generator | None,
        official: bool,
        callback: Callback | None,
    ) -> Tensor:
        """All steps of the sampler; the official one draws noise twice from the second step on and uses the second."""
        before: Tensor | None = None
        steps = len(weights)
        for step, timestep in enumerate(self.progress_bar(self.scheduler.timesteps)):
            x0 = self.scheduler.predict_x0(latents, denoiser(latents, timestep, weights[step]), step)
            draws = 0 if step == steps - 1 else 2 if official and step else 1
            noise = None
            for _ in range(draws):
                noise = randn_tensor(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
            latents, before = self.scheduler.update(latents, x0, before, step, noise), x0
            if callback is not None:
                latents = callback(self, step, timestep, {"latents": latents}).pop("latents", latents)
        return latents


def fix_colors(frames: Tensor, style: Tensor, how: str | None) -> Tensor:
    """Frames with the colours of the low-quality clip, which "wavelet" needs at their size."""
    if how is None:
        return frames
    return wavelet_fix(frames, style) if how == "wavelet" else adain_fix(frames, style)
