"""X-Portrait on diffusers: an image of a person, animated after a video of another.

    pipe = XPortraitPipeline.from_pretrained("x-portrait", dtype=torch.float16).to("cuda")
    frames = pipe(Image.open("person.jpg"), driving, eyes_and_mouth).frames[0]

`x-portrait` is a folder from `convert`.

Source: Xie et al., X-Portrait: Expressive Portrait Animation with Hierarchical Motion Attention,
https://arxiv.org/abs/2403.15931.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, LCMScheduler, MultiControlNetModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.animatediff.pipeline_output import AnimateDiffPipelineOutput
from diffusers.pipelines.pipeline_utils import StableDiffusionMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .checks import check_choices, check_frames, check_numbers, check_offsets, check_parts, check_windows
from .networks.null_text import NullText
from .networks.reference_unet import XPortraitReferenceUNet
from .networks.unet import XPortraitUNet
from .sampling.denoiser import Condition, Denoiser, Networks
from .sampling.features import CELL, encode_once
from .sampling.inputs import Pictures, as_tensor
from .sampling.start import noisy_start, set_timesteps
from .sampling.windows import Windows, circular_windows, plain_windows

Callback = Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any]]


class XPortraitPipeline(DiffusionPipeline, StableDiffusionMixin):  # type: ignore[misc]
    """Animates an image of a person.

    Args:
        unet: with motion modules.
        reference_unet: the appearance network.
        controlnet: two: of the whole driving frames, and of their eyes and mouth.
        vae: of Stable Diffusion 1.5.
        null_text: embedding of the empty prompt.
        scheduler: DDIM, which is given the official timesteps, or LCM.
    """

    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]
    # The networks of a step stay on the device together: moving them at every step would take longer than they do.
    model_cpu_offload_seq = "null_text->unet->vae"

    def __init__(
        self,
        unet: XPortraitUNet,
        reference_unet: XPortraitReferenceUNet,
        controlnet: MultiControlNetModel,
        vae: AutoencoderKL,
        null_text: NullText,
        scheduler: DDIMScheduler | LCMScheduler,
    ) -> None:
        """Raises `ValueError` for parts that do not belong together."""
        super().__init__()
        check_parts(unet, reference_unet, controlnet, vae, null_text)
        self.register_modules(
            unet=unet,
            reference_unet=reference_unet,
            controlnet=controlnet,
            vae=vae,
            null_text=null_text,
            scheduler=scheduler,
        )
        self.image_processor = VaeImageProcessor(vae_scale_factor=CELL)

    @torch.no_grad()
    def __call__(
        self,
        image: Pictures,
        driving: Pictures,
        local: Pictures,
        *,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 30,
        guidance_scale: float = 5.0,
        control_mode: str = "controlnet_important",
        window_size: int = 16,
        window_overlap: int = 4,
        window_batch: int = 1,
        official: bool = False,
        offsets: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        decode_chunk_size: int = 16,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> AnimateDiffPipelineOutput | tuple[Any]:
        """Animate one person; a video of as many frames as there are driving frames.

        All images are stretched to `height` x `width`.

        Args:
            image: the person; or several images of the same person, the first of which the noise starts from.
            driving: frames of the movement, with the driving face where the person's is.
            local: the same frames with nothing but eyes and mouth, on black.
            height: of the video in pixels, a multiple of 8. None: what the networks were trained on, 512.
            width: likewise.
            num_inference_steps: DDIM takes the official timesteps, which may be a few more.
            guidance_scale: at most 1 leaves out the half without control, as models distilled for LCM want.
            control_mode: what the other guidance branch sees: "controlnet_important" neither reference nor control
                images, "balance" the reference and grey control images.
            window_size: frames that the U-Net sees together, at most `motion_max_seq_length` of its configuration.
            window_overlap: least number of frames that neighbouring windows share.
            window_batch: windows in one call of the U-Net: faster, for more memory.
            official: windows that go round the end of the video, as in the released code; see `circular_windows`.
            offsets: where the first of these begins, at each step. None: drawn from `generator`.
            generator: of the reference's VAE sample, the noise and the offsets.
            latents: start from these instead, (frames, 4, rows, columns), as they go into the first step.
            decode_chunk_size: frames that are decoded together; `enable_vae_slicing` decodes them one by one.
            output_type: "pil", "np", "pt", or "latent" for latents before decoding.
            return_dict: an output whose `frames` hold one video, instead of a tuple of it.
            callback_on_step_end: called as `f(pipe, step, timestep, tensors)`, and may return other tensors.
            callback_on_step_end_tensor_inputs: what it gets; "latents" is all there is.

        Raises `ValueError` for settings out of range and numbers of images that differ, before any work.
        """
        trained = CELL * self.unet.config.sample_size
        height, width = (trained if side is None else side for side in (height, width))
        check_choices(control_mode, output_type, callback_on_step_end_tensor_inputs)
        check_numbers(height, width, {"window_batch": window_batch, "decode_chunk_size": decode_chunk_size})
        check_windows(window_size, window_overlap, self.unet.config.motion_max_seq_length)
        pictures, pose, eyes_and_mouth = (
            as_tensor(self.image_processor, given, name, height, width)
            for name, given in (("image", image), ("driving", driving), ("local", local))
        )
        check_frames(pose, eyes_and_mouth, latents)
        device = self._execution_device
        set_timesteps(self.scheduler, num_inference_steps, device)
        windows = self.plan_windows(len(pose), window_size, window_overlap, official, offsets, generator)

        references = self.encode(pictures.to(device), generator)
        if latents is None:
            latents = self.start_latents(references[:1], len(pose), generator)
        text = self.null_text().to(device)
        denoiser = Denoiser(
            Networks(self.unet, self.reference_unet, self.controlnet),
            Condition(references[:, None], self.encode_controls(pose, eyes_and_mouth, window_size), text, text),
            guidance_scale=guidance_scale,
            mode=control_mode,
            window_batch=window_batch,
        )
        latents = self.denoise(
            denoiser,
            latents.to(device, self.unet.dtype),
            windows,
            generator,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )
        video: Any = latents
        if output_type != "latent":
            video = self.image_processor.postprocess(self.decode(latents, decode_chunk_size), output_type)
        self.maybe_free_model_hooks()
        return AnimateDiffPipelineOutput(frames=[video]) if return_dict else ([video],)

    def plan_windows(
        self,
        frames: int,
        size: int,
        overlap: int,
        official: bool,
        offsets: Sequence[int] | None,
        generator: torch.Generator | None,
    ) -> list[Windows]:
        """The windows of each of the scheduler's steps."""
        steps = len(self.scheduler.timesteps)
        if not official:
            return [plain_windows(frames, size, overlap)] * steps
        if offsets is None:
            device = "cpu" if generator is None else generator.device
            offsets = torch.randint(frames, (steps,), generator=generator, device=device).tolist()
        check_offsets(offsets, steps)
        return [circular_windows(frames, size, overlap, offset) for offset in offsets]

    def encode(self, pictures: Tensor, generator: torch.Generator | None) -> Tensor:
        """Scaled latents of images (n, 3, rows, columns) in -1..1, drawn from the VAE's distribution."""
        distribution = self.vae.encode(pictures.to(self.vae.dtype)).latent_dist
        latents: Tensor = distribution.sample(generator) * self.vae.config.scaling_factor
        return latents.to(self.unet.dtype)

    def encode_controls(self, driving: Tensor, local: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
        """Features of both kinds of control images, `chunk` at a time; on the CPU, as the images are."""
        pose, eyes_and_mouth = (
            encode_once(net.controlnet_cond_embedding, pictures, self._execution_device, self.unet.dtype, chunk)
            for net, pictures in zip(self.controlnet.nets, (driving, local), strict=True)
        )
        return pose, eyes_and_mouth

    def start_latents(self, reference: Tensor, frames: int, generator: torch.Generator | None) -> Tensor:
        """Latents for the first step, (frames, 4, rows, columns)."""
        shape = frames, *reference.shape[1:]
        noise = randn_tensor(shape, generator=generator, device=reference.device, dtype=reference.dtype)
        return noisy_start(reference, noise, self.scheduler) * self.scheduler.init_noise_sigma

    def decode(self, latents: Tensor, chunk: int) -> Tensor:
        """Frames around -1..1, float32 (frames, 3, rows, columns) on the CPU, `chunk` at a time."""
        latents = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
        return torch.cat([self.vae.decode(part, return_dict=False)[0].float().cpu() for part in latents.split(chunk)])

    def denoise(
        self,
        denoiser: Denoiser,
        latents: Tensor,
        windows: Sequence[Windows],
        generator: torch.Generator | None,
        callback: Callback | None,
        wanted: Sequence[str],
    ) -> Tensor:
        """All steps of the scheduler."""
        takes = inspect.signature(self.scheduler.step).parameters
        options = {"generator": generator} if "generator" in takes else {}
        for step, timestep in enumerate(self.progress_bar(self.scheduler.timesteps)):
            noise = denoiser(self.scheduler.scale_model_input(latents, timestep), timestep, windows[step])
            latents = self.scheduler.step(noise, timestep, latents, **options, return_dict=False)[0]
            if callback is not None:
                tensors = {name: latents for name in wanted}
                latents = (callback(self, step, timestep, tensors) or {}).get("latents", latents)
        return latents
