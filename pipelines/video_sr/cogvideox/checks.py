"""Which parts of the CogVideoX pipeline fit and what a run may be set to, checked before anything is computed."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
COLOR_FIXES = ("adain", "wavelet", None)


def check_parts(vae: Any, text_encoder: Any, transformer: Any) -> None:
    """Raise `ValueError` for networks of other sizes than each other's."""
    config, channels = transformer.config, vae.config.latent_channels
    if config.in_channels != 2 * channels or config.out_channels != channels:
        raise ValueError(
            f"expected a transformer from {2 * channels} to {channels} channels, as the VAE has {channels}; got "
            f"{config.in_channels} to {config.out_channels}; a stock CogVideoX has no place for the low-quality clip"
        )
    if text_encoder.config.d_model != config.text_embed_dim:
        raise ValueError(
            f"expected a text encoder of width {config.text_embed_dim}, as the transformer; got "
            f"{text_encoder.config.d_model}; take CogVideoX-5B's"
        )


def check_call(
    upscale: float, guidance_scale: float, output_type: str, color_fix: str | None, callback_tensors: Sequence[str]
) -> None:
    """Raise `ValueError` for numbers out of range and names that there are not."""
    for name, value, known in (
        ("output_type", output_type, OUTPUT_TYPES),
        ("color_fix", color_fix, COLOR_FIXES),
        *(("callback_on_step_end_tensor_inputs", value, ("latents",)) for value in callback_tensors),
    ):
        if value not in known:
            raise ValueError(f"expected {name} among {', '.join(map(repr, known))}; got {value!r}")
    for name, number, least in (("upscale", upscale, 1), ("guidance_scale", guidance_scale, 0)):
        if not least <= number < float("inf"):
            raise ValueError(f"expected {name} of at least {least}; got {number}; 4 and 6 are the official ones")


def check_chunks(size: int | None, overlap: int) -> None:
    """Raise `ValueError` for chunks of latent frames that the VAE does not decode as part of a clip."""
    if size is not None and not (size % 2 == overlap % 2 == 1 and 1 <= overlap < size):
        raise ValueError(
            f"expected an odd decode_chunk_size and a smaller odd decode_overlap of at least 1; got {size} and "
            f"{overlap}; 13 and 3 are usual"
        )


def check_latents(latents: Tensor | None, shape: tuple[int, ...]) -> None:
    """Raise `ValueError` for first latents of another shape than the clip's."""
    if latents is not None and tuple(latents.shape) != shape:
        raise ValueError(f"expected latents of shape {shape} for this clip; got {tuple(latents.shape)}")
