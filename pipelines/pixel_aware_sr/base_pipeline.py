"""What `PASDPipeline` and `PASDXLPipeline` share: everything but the text."""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.loaders import TextualInversionLoaderMixin
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput, StableDiffusionMixin
from PIL import Image
from torch import Tensor

from diffattn.media.windows import gaussian_weights, official_tiles, tiles

from . import prompts
from .networks.controlnet import PASDControlNetModel
from .networks.unet import PASDUNet2DConditionModel
from .sampling.denoiser import Denoiser, TextCondition, TilePlan
from .sampling.output import as_output, finish
from .sampling.preprocess import prepare
from .sampling.starting import Generators, add_noise_twice, draw
from .sampling.vae_tiles import padded_tiles, run_in_tiles
from .settings import CELL, Defaults, check_choices, check_level, check_tiles

Pictures = Image.Image | Tensor | Any
"""One image or several of one size: of Pillow, or arrays and tensors as diffusers' image processor takes them."""

Callback = Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any]]

OFFICIAL_VAE_TILES = (1024, 224)
"""Pixels of a tile for the encoder, latent cells for the decoder."""


class PixelAwarePipeline(DiffusionPipeline, StableDiffusionMixin, TextualInversionLoaderMixin):  # type: ignore[misc]
    """A base class: subclasses take the parts and encode the text."""

    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]
    model_cpu_offload_seq = "text_encoder->text_encoder_2->controlnet->unet->vae"
    defaults: ClassVar[Defaults]
    quality: ClassVar[str]
    """Words that are added to every prompt by default."""
    negative: ClassVar[str]
    """The default negative prompt."""
    replaced: ClassVar[dict[str, str]] = prompts.REPLACED
    """Words of captions, and what takes their places."""

    @torch.no_grad()
    def __call__(
        self,
        image: Pictures,
        prompt: str | Sequence[str] = "",
        *,
        negative_prompt: str | Sequence[str] | None = None,
        added_prompt: str | None = None,
        captioner: prompts.Captioner | None = None,
        upscale: float = 1,
        process_size: int | None = None,
        task: str = "realisr",
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        conditioning_scale: float | None = None,
        guess_mode: bool = False,
        start: str | None = None,
        added_noise_level: int = 900,
        tile_size: int = 1024,
        tile_overlap: int = 128,
        tile_batch: int = 1,
        color_fix: str | None = "wavelet",
        official: bool = False,
        generator: Generators = None,
        latents: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Restore one image, or several of one size.

        Args:
            image: images of any size; gray ones, or colour ones taken for gray, where `task` is "grayscale".
            prompt: what they show; one for all, or one each.
            negative_prompt: None: the authors'.
            added_prompt: quality prompt after every prompt. None: the authors'.
            captioner: says what an image shows, before the prompt. None: no caption.
            upscale: factor of both sides.
            process_size: least length in pixels of the shorter side while restoring: smaller images are enlarged to
                it and made smaller again. None: 768, or 1280 for SDXL.
            task: "realisr", or "grayscale" to colorize: the result keeps the luma of the input.
            num_inference_steps: None: 20, or 25 for SDXL.
            guidance_scale: weight of the prompt over the negative prompt; at most 1 leaves the negative one out, and
                halves the cost. None: 9, or 7 for SDXL.
            conditioning_scale: weight of the image: factor of the ControlNet's residuals. None: 1, or 0.8 for SDXL.
            guess_mode: the ControlNet sees the positive half alone, its residuals growing from 0.1 to 1 with depth.
            start: from the "lr" picture's latents under noise, or from "noise" alone. None: "lr", or "noise" for SDXL.
            added_noise_level: timestep, from 0, of the second noise on the latents of the "lr" start.
            tile_size: longest side in pixels that is restored at once; longer images are restored in tiles.
            tile_overlap: least overlap of tiles in pixels.
            tile_batch: tiles in one call of the networks: faster where they are small, for more memory.
            color_fix: give the result the colours of the input by "wavelet" or "adain"; None: leave them.
            official: what the released code does where it is wrong: see `add_noise_twice`, `official_tiles`,
                `gaussian_weights`, and VAE tiles without blending.
            generator: one for all images, or one each: then an image does not depend on the others in its batch.
            latents: start from these instead, (batch, 4, rows, columns), as they go into the first step.
            cross_attention_kwargs: for the U-Net's attention processors.
            output_type: "pil", "np", "pt", or "latent" for latents before decoding.
            return_dict: an `ImagePipelineOutput` instead of a tuple of one.
            callback_on_step_end: called as `f(pipe, step, timestep, tensors)`, and may return other tensors.
            callback_on_step_end_tensor_inputs: what it gets; "latents" is all there is.

        Raises `ValueError` for settings out of range and images of unlike sizes, before anything is computed.
        """
        defaults = self.defaults
        guidance_scale = defaults.guidance_scale if guidance_scale is None else guidance_scale
        start = start or defaults.start
        check_choices(start=start, color_fix=color_fix, output_type=output_type)
        check_tiles(tile_size, tile_overlap, tile_batch)
        check_level(added_noise_level, self.scheduler)

        inputs = self.as_pictures(image)
        process_size = process_size or defaults.process_size
        prepared = [prepare(picture, upscale=upscale, process_size=process_size, task=task) for picture in inputs]
        pictures = self.as_tensor(prepared)
        texts = self.compose_prompts(inputs, prompt, added_prompt, captioner, task)
        negatives = self.compose_negatives(len(inputs), negative_prompt, task)
        text = self.encode_texts(texts, negatives, pictures.shape[-2:], guided=guidance_scale > 1)

        self.scheduler.set_timesteps(num_inference_steps or defaults.num_inference_steps, device=pictures.device)
        if latents is None:
            latents = self.start_latents(pictures, start, added_noise_level, generator, official)
        denoiser = Denoiser(
            self.unet,
            self.controlnet,
            pictures,
            text,
            plan_tiles(latents, tile_size // CELL, tile_overlap // CELL, tile_batch, official),
            guidance_scale=guidance_scale,
            conditioning_scale=defaults.conditioning_scale if conditioning_scale is None else conditioning_scale,
            guess_mode=guess_mode,
            cross_attention_kwargs=cross_attention_kwargs,
        )
        latents = self.denoise(denoiser, latents, generator, callback_on_step_end, callback_on_step_end_tensor_inputs)
        result: Any = latents
        if output_type != "latent":
            decoded = self.decode(latents, official)
            finished = [
                finish(decoded[i], pictures[i], inputs[i], upscale, task, color_fix) for i in range(len(inputs))
            ]
            result = as_output(finished, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=result) if return_dict else (result,)

    def as_pictures(self, image: Pictures) -> list[Image.Image]:
        """Pillow images of what the caller gave; raises `ValueError` for none, and for what is no image."""
        if isinstance(image, list | tuple) and image and all(isinstance(one, Image.Image) for one in image):
            return list(image)
        if isinstance(image, Image.Image):
            return [image]
        if isinstance(image, Tensor):
            image = image.float().cpu()
        try:
            given = self.image_processor.preprocess(image) if image is not None and len(image) else None
        except (ValueError, TypeError) as error:
            raise ValueError(f"expected images; got {type(image).__name__}: {error}") from error
        if given is None:
            raise ValueError("expected at least one image; got none")
        pictures: list[Image.Image] = self.image_processor.postprocess(given, output_type="pil")
        return pictures

    def as_tensor(self, prepared: Sequence[Image.Image]) -> Tensor:
        """Images (batch, 3, rows, columns) in 0..1, on the device; raises `ValueError` for unlike sizes."""
        sizes = {picture.size for picture in prepared}
        if len(sizes) > 1:
            raise ValueError(
                f"expected images of one size in a batch; got {sorted(sizes)} after preparation; call once for each"
            )
        arrays = self.image_processor.pil_to_numpy(list(prepared))
        tensor: Tensor = self.image_processor.numpy_to_pt(arrays)
        return tensor.to(self._execution_device, torch.float32)

    def compose_prompts(
        self,
        inputs: Sequence[Image.Image],
        prompt: str | Sequence[str],
        added: str | None,
        captioner: prompts.Captioner | None,
        task: str,
    ) -> list[str]:
        """The whole prompt of each image; captions are of the images as they were given."""
        added = self.quality if added is None else added
        replaced = self.replaced | (prompts.COLOR_REPLACED if task == "grayscale" else {})
        captions = [captioner(picture) if captioner else "" for picture in inputs]
        return [
            prompts.compose(user, caption, added, replaced)
            for user, caption in zip(spread(prompt, len(inputs), "prompt"), captions, strict=True)
        ]

    def compose_negatives(self, count: int, negative: str | Sequence[str] | None, task: str) -> list[str]:
        """The negative prompt of each image."""
        if negative is None:
            negative = prompts.COLOR_NEGATIVE if task == "grayscale" else self.negative
        return spread(negative, count, "negative_prompt")

    def encode_texts(
        self, texts: list[str], negatives: list[str], size: Sequence[int], *, guided: bool
    ) -> TextCondition:
        """What the networks are told of images of `size`, rows and columns."""
        raise NotImplementedError

    def start_latents(self, pictures: Tensor, start: str, level: int, generator: Generators, official: bool) -> Tensor:
        """Latents for the first step; each image draws its VAE sample, then its noise."""
        rows, columns = (side // CELL for side in pictures.shape[-2:])
        shape = (len(pictures), self.vae.config.latent_channels, rows, columns)
        empty = torch.empty(shape, dtype=self.unet.dtype, device=pictures.device)
        if start == "noise":
            return draw(empty, generator) * self.scheduler.init_noise_sigma
        latents = self.encode(pictures, generator, official).to(self.unet.dtype)
        return self.add_start_noise(latents, level, generator, official) * self.scheduler.init_noise_sigma

    def add_start_noise(self, latents: Tensor, level: int, generator: Generators, official: bool) -> Tensor:
        """The "lr" start of latents of images."""
        noises = draw(latents, generator), draw(latents, generator)
        return add_noise_twice(latents, noises, self.scheduler, level, official=official)

    def encode(self, pictures: Tensor, generator: Generators, official: bool) -> Tensor:
        """Scaled latents of images in 0..1, drawn from the VAE's distribution."""
        with self.in_vae_dtype() as dtype:
            pixels = (2.0 * pictures - 1.0).to(dtype)
            if official:
                parts = padded_tiles(pixels.shape[-2], pixels.shape[-1], OFFICIAL_VAE_TILES[0], decoder=False)
                moments = run_in_tiles(
                    lambda tile: self.vae.encode(tile).latent_dist.parameters, pixels, parts, 1 / CELL
                )
                distribution = DiagonalGaussianDistribution(moments)
            else:
                distribution = self.vae.encode(pixels).latent_dist
        noise = draw(distribution.mean, generator)
        return (distribution.mean + distribution.std * noise) * self.vae.config.scaling_factor

    def decode(self, latents: Tensor, official: bool) -> Tensor:
        """Images around 0..1, float32 (batch, 3, rows, columns), one after the other for the sake of memory."""
        with self.in_vae_dtype() as dtype:
            latents = (latents / self.vae.config.scaling_factor).to(dtype)
            decoded = [self._decode(one[None], official) for one in latents]
        return torch.cat([0.5 * picture.float() + 0.5 for picture in decoded])

    def _decode(self, latents: Tensor, official: bool) -> Tensor:
        def decode(tile: Tensor) -> Tensor:
            decoded: Tensor = self.vae.decode(tile, return_dict=False)[0]
            return decoded

        if not official:
            return decode(latents)
        parts = padded_tiles(latents.shape[-2], latents.shape[-1], OFFICIAL_VAE_TILES[1], decoder=True)
        return run_in_tiles(decode, latents, parts, CELL)

    @contextlib.contextmanager
    def in_vae_dtype(self) -> Iterator[torch.dtype]:
        """The VAE in float32 where its float16 overflows, as SDXL's does."""
        if self.vae.dtype != torch.float16 or not self.vae.config.force_upcast:
            yield self.vae.dtype
            return
        self.vae.to(torch.float32)
        try:
            yield torch.float32
        finally:
            self.vae.to(torch.float16)

    def denoise(
        self,
        denoiser: Denoiser,
        latents: Tensor,
        generator: Generators,
        callback: Callback | None,
        wanted: Sequence[str],
    ) -> Tensor:
        """All steps of the scheduler."""
        if set(wanted) - set(self._callback_tensor_inputs):
            raise ValueError(f"expected callback tensors among {self._callback_tensor_inputs}; got {list(wanted)}")
        takes = inspect.signature(self.scheduler.step).parameters
        options = {"generator": generator} if "generator" in takes else {}
        for step, timestep in enumerate(self.progress_bar(self.scheduler.timesteps)):
            noise = denoiser(self.scheduler.scale_model_input(latents, timestep), timestep)
            latents = self.scheduler.step(noise, timestep, latents, **options, return_dict=False)[0]
            if callback is not None:
                tensors = {name: latents for name in wanted}
                latents = (callback(self, step, timestep, tensors) or {}).get("latents", latents)
        return latents


def plan_tiles(latents: Tensor, size: int, overlap: int, batch: int, official: bool) -> TilePlan:
    """Tiles of `size` latent cells a side; one for latents that are no larger."""
    rows, columns = latents.shape[-2:]
    places = official_tiles(rows, columns, size, overlap) if official else tiles(rows, columns, size, overlap)
    weights = gaussian_weights(places[0].height, places[0].width, official=official)
    return TilePlan(rows, columns, places, weights, batch)


def spread(value: str | Sequence[str], count: int, name: str) -> list[str]:
    """One text for each image."""
    texts = [value] * count if isinstance(value, str) else list(value)
    if len(texts) != count:
        raise ValueError(f"expected one {name}, or one for each of {count} images; got {len(texts)}")
    return texts


def check_parts(
    unet: PASDUNet2DConditionModel, controlnet: PASDControlNetModel, vae: AutoencoderKL, text_width: int
) -> None:
    """Raise `ValueError` for parts of unlike models; None, for a part that comes later, fits everything."""
    if unet is not None and unet.config.cross_attention_dim != text_width:
        raise ValueError(
            f"expected a U-Net for text of width {text_width}, that of the base model's encoder; this one takes "
            f"{unet.config.cross_attention_dim}; is one of them SDXL's and the other Stable Diffusion 1.5's?"
        )
    if unet is not None and controlnet is not None:
        for setting in ("cross_attention_dim", "block_out_channels"):
            own, other = unet.config[setting], controlnet.config[setting]
            if own != other:
                raise ValueError(f"expected U-Net and ControlNet of one checkpoint; their {setting}: {own} and {other}")
    if vae is not None and 2 ** (len(vae.config.block_out_channels) - 1) != CELL:
        raise ValueError(f"expected a VAE that makes sides {CELL} times shorter; got {vae.config.block_out_channels}")
